"""Files and folders that are there as a whole or not at all, and the run folder that they are in.

A killed process leaves at most a file or folder whose name begins with a dot; nobody reads it, the next run removes it.

Not covered: power that fails (nothing is flushed to the disk), and file systems without locks, where two runs of one
folder are not kept apart and what is half made is not removed.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of each artifact, in `store/<kind>/<key>/`
LOCK = ".lock"
# Names of what `temporary_folder` has not finished, and where these may be.
HALF_MADE = re.compile(r"\.making-[0-9a-f]{32}(-damaged)?")
PLACES = (".", "notebooks", "figures", "checkpoints", "store/*")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FULL = 2**20  # bytes free of a disk that counts as full when a unit fails


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file on the same disk, then move it to `path`: all of it, or nothing."""
    with temporary_folder(path.parent) as folder, name_disk_errors(path):
        write(folder / path.name)
        os.replace(folder / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys as given, one value a line."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(path: Path, names: list[str]) -> None:
    """Write hashes of files of the same folder, as `sha256sum --check` reads them."""
    write_text(path, "".join(f"{file_sha256(path.with_name(name))}  {name}\n" for name in names))


def changed_files(path: Path) -> list[str]:
    """Names in a file of `write_checksums` whose files are missing or not as they were then."""
    lines = (line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines())
    files = [(name, path.with_name(Path(name).name), sha256) for sha256, _, name in lines]
    return [name for name, file, sha256 in files if not file.is_file() or file_sha256(file) != sha256]


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in another until the block or this process ends, with a lock that tells `reserve` that it is in use."""
    scratch = parent / f".making-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
    finally:
        os.close(descriptor)
        shutil.rmtree(scratch, ignore_errors=True)


def move_unless_there(scratch: Path, folder: Path) -> None:
    """Move a folder into place, unless another is there already."""
    try:
        os.rename(scratch, folder)
    except OSError:
        if not folder.exists():
            raise


@contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """Let an error of the disk name what was to be written: not all libraries do, and some do not say "full" either."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            error.filename = error.filename or str(path)
        elif "No space left" in str(error) or shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a study, or artifacts of one."""
    return (folder / "study.yaml").is_file() or any(folder.glob(f"store/*/*/{MANIFEST}"))


def check_run_folder(folder: Path) -> None:
    """Raise FileExistsError for a folder of other things, among which a run would strew its files, or for a file."""
    if not folder.exists() or is_run_folder(folder):
        return
    # What a run writes before it has a study file is its lock and that file half-made.
    if folder.is_file() or any(path.name != LOCK and not HALF_MADE.fullmatch(path.name) for path in folder.iterdir()):
        why = "neither empty nor the folder of a run (no study.yaml, no artifacts in store/)"
        raise FileExistsError(f"{folder}: {why}; give a new or an empty folder with --out.")


@contextmanager
def reserve(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process, and remove what killed ones left half-made in it.

    Raises BlockingIOError, which says who, if another process has it, and OSError if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            at_work = f"{file.read().strip() or 'another process'} works on it"
            remedy = "wait until that ends, stop it, or give another folder with --out"
            raise BlockingIOError(f"{folder}: {at_work}; {remedy}.") from None
        except OSError as error:
            log.warning("%s: its file system has no locks (%s); see to it that nothing else runs in it.", folder, error)
        file.truncate(0)
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {begun},")
        file.flush()
        _remove_half_made(folder)
        try:
            yield
        finally:
            _remove_half_made(folder)  # of workers that died and whose jobs others did


def _remove_half_made(folder: Path) -> None:
    """Remove folders that killed processes left half-made in a run folder, and none that are in use."""
    for path in (path for place in PLACES for path in folder.glob(f"{place}/.*") if HALF_MADE.fullmatch(path.name)):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)

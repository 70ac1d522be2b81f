"""Artifacts on disk: made once, found again by the key of what they were made from, checked when read.

Nothing is ever changed in place. A killed process leaves at most a folder or file whose name begins with a dot, which
is never read, and which the next run removes.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from datawall.engine import paths
from datawall.engine.shared import Shared

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Those that compute what is stored.
RECORDED_PACKAGES = (
    *("datawall", "anndata", "igraph", "numba", "numpy", "pandas", "pynndescent", "scanpy", "scikit-learn", "scipy"),
    *("torch", "umap-learn"),
)

# Modules that no notebook uses: around a run, not in it.
ASIDE = (
    *("engine/kernels", "reading/report", "reading/notebooks", "engine/provenance"),
    *("planning/plan", "planning/calibration"),
    *("planning/starter", "planning/preflight", "planning/inspection", "reading/verify"),
)

# Modules that decide no artifact, though code that does imports them: last parts of their names.
APART = {
    **dict.fromkeys(("params", "units", "hyperparameters"), "values that matter are in the records"),
    "external": "a user's own file is in the record by its hash",
    **dict.fromkeys(("store", "shared", "paths"), "where what is made is kept"),
    **dict.fromkeys(("cluster", "processes", "forkserver", "costs"), "where and when units are made"),
    **dict.fromkeys(("study", "curated", "evaluation"), "makers are named function by function"),
    "families": "which family has which name",
}

# Names of what `temporary_folder` and `write_atomically` have not finished, and where in a run folder these are used.
HALF_MADE = re.compile(r"\.making-[0-9a-f]{32}(-damaged)?|\..+\.[0-9a-f]{32}")
PLACES = (".", "notebooks", "figures", "checkpoints", "store/*")
LOCK = ".lock"

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FULL = 2**20  # bytes free of a disk that counts as full when a unit fails

type Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A unit of work: what is to be made, fully described before it is."""

    kind: str  # `subset`, `model`, …: one folder of the store each
    record: Record  # all that it depends on, as JSON values: parameters, and the keys of other units
    makers: tuple[str, ...]  # library modules, or functions of them (see `code_version`), that make it

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that change with the record, and with the code of the makers' `closure`."""
        return key_of(self.kind, self.record, self.code)

    @property
    def code(self) -> dict[str, str]:
        """Versions of all code that decides the content."""
        return {name: code_version(name) for name in closure(self.makers)}


def key_of(kind: str, record: Record, code: dict[str, str]) -> str:
    """Key of a unit, from its kind, its record and the versions of the code that makes it."""
    return _sha256([kind, record, code])[:16]


def _sha256(value: Any) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: a folder of files, and what it was made from."""

    key: str
    folder: Path
    made: Record  # provenance: versions, seconds, peak memory, device


class Store:
    """The artifacts of one study, `<folder>/<kind>/<key>/`.

    Parameters
    ----------
    folder
        Made when the first artifact is written.
    url
        Of an object store (see `shared`), if artifacts are taken from one and put there.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.shared = Shared(url) if url else None
        self._checked: dict[str, Artifact] = {}  # found and verified by this process already

    def find(self, unit: Unit) -> Artifact | None:
        """The artifact of a unit, or None if it was never made or is damaged.

        A damaged artifact (a file missing, truncated or changed) is named in a warning and never used.
        """
        if unit.key in self._checked:
            return self._checked[unit.key]
        folder = self._folder(unit)
        made_here = folder.is_dir()
        if not made_here and not self._taken(unit, folder):
            return None
        if wrong := damage(folder):
            log.warning("%s %s is damaged (%s) and will be made again.", unit.kind, unit.key, "; ".join(wrong))
            return None
        if self.shared and made_here:
            self.shared.put_if_missing(f"{unit.kind}/{unit.key}", folder)
        self._checked[unit.key] = Artifact(unit.key, folder, read_manifest(folder)["made"])
        return self._checked[unit.key]

    def find_or_make(self, unit: Unit, make: Callable[[Path], Record | None]) -> Artifact:
        """Find a unit's artifact, or make it: `make` writes files into an empty folder that is then moved into place.

        The move is atomic, so a killed process leaves nothing that could be taken for an artifact. Of two processes
        that make the same one the earlier stores it, and others may read it already; the later drops its own.

        Parameters
        ----------
        unit
            What to find or make.
        make
            Writes the files; may return more provenance to record.
        """
        if found := self.find(unit):
            return found
        folder = self._folder(unit)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as scratch, naming(folder):
            begin = time.perf_counter()
            more = make(scratch) or {}
            made = {"seconds": round(time.perf_counter() - begin, 3), "device": "cpu", **_circumstances(), **more}
            manifest = {"kind": unit.kind, "key": unit.key, "record": unit.record, "code": unit.code}
            manifest |= {"files": {name: file_sha256(scratch / name) for name in _files(scratch)}, "made": made}
            write_json(scratch / MANIFEST, {**manifest, "sha256": _sha256(manifest)})
            if folder.exists():
                _remove_damaged(folder, scratch.with_name(f"{scratch.name}-damaged"))
            with suppress(FileExistsError):
                _move(scratch, folder)
        if self.shared:
            self.shared.put(f"{unit.kind}/{unit.key}", folder)
        self._checked[unit.key] = Artifact(unit.key, folder, read_manifest(folder)["made"])
        return self._checked[unit.key]

    def _taken(self, unit: Unit, folder: Path) -> bool:
        """Whether the object store has a unit's artifact, which is then in its place here."""
        if not self.shared:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as scratch, naming(folder):
            if not self.shared.take(f"{unit.kind}/{unit.key}", scratch):
                return False
            wrong = damage(scratch)
            if not wrong and read_manifest(scratch)["key"] != unit.key:
                wrong = ["it is another"]
            if wrong:
                at = f"{self.shared.url}: {unit.kind} {unit.key}"
                log.warning("%s is damaged (%s) and will be made again.", at, "; ".join(wrong))
                return False
            with suppress(FileExistsError):
                _move(scratch, folder)
        return True

    def _folder(self, unit: Unit) -> Path:
        return self.folder / unit.kind / unit.key


def read_manifest(folder: Path) -> Record:
    """What an artifact was made from, and its files.

    Raises
    ------
    OSError, ValueError
        If it is missing, or not as it was written.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _sha256(manifest):
        raise ValueError(f"{MANIFEST} is not as it was written")
    return manifest


def damage(folder: Path) -> list[str]:
    """What is wrong with an artifact: files that are missing, changed or of no one; nothing if it is sound."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    there = _files(folder)
    wrong = [name for name in there if name in files and file_sha256(folder / name) != files[name]]
    missing = [f"{name} is missing" for name in files if name not in there]
    return wrong + missing + [f"{name} does not belong there" for name in there if name not in files]


def _files(folder: Path) -> list[str]:
    """Names of the files of an artifact, but for its manifest, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in paths if name != MANIFEST)


def _move(scratch: Path, folder: Path) -> None:
    """Move a folder into place.

    Raises
    ------
    FileExistsError
        If something is there already.
    """
    try:
        os.rename(scratch, folder)
    except OSError as error:
        if folder.exists():
            raise FileExistsError(folder) from error
        raise


def _remove_damaged(folder: Path, aside: Path) -> None:
    """Remove an artifact if it is damaged: one process at a time, lest it be what another has just put in its place."""
    with (folder.parent / LOCK).open("a", encoding="utf-8") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and damage(folder):
            os.replace(folder, aside)
            shutil.rmtree(aside)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the artifacts (same file system, so that it can be moved into place); removed if it stays."""
    scratch = parent / f".making-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        with held(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk name what was to be written: not all libraries do, and some do not say "full" either."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            error.filename = error.filename or str(path)
        elif "No space left" in str(error) or shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark a file or folder as in use, until this process ends, however it ends; not on a file system without locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a study, or artifacts of one."""
    return (folder / "study.yaml").is_file() or any(folder.glob(f"store/*/*/{MANIFEST}"))


def check_run_folder(folder: Path) -> None:
    """Refuse a folder of other things: a run would strew its files among them.

    What a run writes before it has a study file is its lock and that file half-made.

    Raises
    ------
    FileExistsError
        If there is something in it, or it is no folder at all.
    """
    if not folder.exists() or is_run_folder(folder):
        return
    ours = folder.is_dir() and all(path.name == LOCK or HALF_MADE.fullmatch(path.name) for path in folder.iterdir())
    if not ours:
        raise FileExistsError(
            f"{folder}: neither empty nor the folder of a run (no study.yaml, no artifacts in store/); give a new or "
            "an empty folder with --out."
        )


def half_made(folder: Path) -> list[Path]:
    """Files and folders that killed processes left in a run folder, or living ones have not finished: none but ours."""
    every = (path for place in PLACES for path in folder.glob(f"{place}/.*"))
    return [path for path in every if HALF_MADE.fullmatch(path.name)]


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process, and remove what killed ones left half-made in it.

    Raises
    ------
    BlockingIOError
        If another process has it; the message says which.
    OSError
        If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(
                f"{folder}: {file.read().strip() or 'another process'} works on it; wait until that ends, stop it, or "
                "give another folder with --out."
            ) from None
        except OSError as error:
            log.warning("%s: its file system has no locks (%s); see to it that nothing else runs in it.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {_now()},")
        file.flush()
        _remove_half_made(folder)
        try:
            yield
        finally:
            _remove_half_made(folder)  # of workers that died and whose units others did


def _remove_half_made(folder: Path) -> None:
    for left in half_made(folder):
        _remove_unless_held(left)


def _remove_unless_held(path: Path) -> None:
    """Remove a file or folder that no process has in use."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(descriptor)


def read_sources(library: Path) -> dict[str, str]:
    """Text of every module of a library, by file name without `.py`."""
    return {
        path.relative_to(library).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in library.rglob("*.py")
    }


# As they are when a process, or the one that it is a fork of, imports the library: the code that it has. Read when a
# key is asked for, they would be those of a file edited meanwhile, and what old code made would be stored under the
# key of the new. Modules that are first needed later could still be newer than this, so a run's fork server imports
# all of them at once; without one, do not edit the library while a study runs.
SOURCES = read_sources(paths.LIBRARY)
MODULES = sorted(f"datawall.{name}".replace("/", ".").removesuffix(".__init__") for name in SOURCES)


def module_name(module: str) -> str:
    """How keys name a module of the library, from its `__name__`: `models/pca`."""
    return module.removeprefix("datawall.").replace(".", "/")


@cache
def closure(makers: tuple[str, ...]) -> list[str]:
    """All code that decides what these make: they, the library modules that they import, and so on; sorted names."""
    found, waiting = set(), list(makers)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _imported(name)
    return sorted(found)


@cache
def _imported(name: str) -> set[str]:
    """Library modules that a module imports, or that one function of it uses, but for those of `APART`."""
    module, _, function = name.partition(":")
    tree, found = ast.parse(SOURCES[module]), set()
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    used = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module.partition(".")[0] == "datawall"
            and id(node) not in left_out
        ):
            for alias in node.names if not function else [a for a in node.names if (a.asname or a.name) in used]:
                inner, outer = (
                    f"{node.module}.{alias.name}",
                    node.module,
                )  # a module of a package, or a name of a module
                found |= {module_name(inner)} & SOURCES.keys() or {module_name(outer)} & SOURCES.keys()
    return {each for each in found if each.rpartition("/")[2] not in APART}


@cache
def code_version(name: str) -> str:
    """Hash of the code of a library module, as this process has it; blind to comments, docstrings and layout.

    Of a module whose functions make things of several kinds, one of them can be named: `curated:_make_subset`.
    """
    module, _, function = name.partition(":")
    tree = ast.parse(SOURCES[module])
    if function:
        tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(path: Path, names: list[str]) -> None:
    """Write hashes of files of the same folder, as `sha256sum --check` reads them."""
    lines = [f"{file_sha256(path.with_name(name))}  {name}\n" for name in names]
    write_atomically(path, lambda scratch: scratch.write_text("".join(lines), encoding="utf-8"))


def changed(path: Path) -> list[str]:
    """Names in a file of `write_checksums` whose files are missing or not as they were then."""
    wrong = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sha256, _, name = line.partition("  ")
        file = path.with_name(Path(name).name)
        if not file.is_file() or file_sha256(file) != sha256:
            wrong.append(name)
    return wrong


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then move it to `path`: all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.touch()
        with naming(path), held(scratch):
            write(scratch)
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys as given, one value a line."""
    write_atomically(
        path, lambda scratch: scratch.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    )


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in RECORDED_PACKAGES}


def differing(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Which packages differ in version, in words; builds of a version (`+cu126`), and Pythons, count as the same."""
    both = {name: [of[name].partition("+")[0] for of in (theirs, ours)] for name in ours if name in theirs}
    return ", ".join(f"{name} {b} in place of {a}" for name, (a, b) in both.items() if a != b and name != "python")


def code_key() -> str:
    """Key of all the code that a notebook can run: the library's, but for `ASIDE`, blind as `code_version` is."""
    return _sha256({name: code_version(name) for name in SOURCES if name not in ASIDE})[:16]


def session() -> dict[str, str]:
    """A notebook's session information: by what code and which versions its outputs were made."""
    return {"code": code_key()} | versions()


def _circumstances() -> Record:
    """Versions, peak memory and when and where, for the provenance of an artifact."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"peak_memory_mib": peak, "host": socket.gethostname(), "ended": _now(), "versions": versions()}


def _now() -> str:
    """By the clock, for people alone: nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

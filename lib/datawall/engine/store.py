"""Artifacts on disk: made once, found again by the key of what they were made from, checked when read.

Nothing is ever changed in place, and nothing unfinished is ever found (`disk`). A process trusts what it has checked
once. Not covered: who wrote an artifact. Hashes show damage, not intent: whoever may write the folder can replace both.
"""

import fcntl
import json
import logging
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from datawall.engine import code, disk
from datawall.engine.disk import LOCK, MANIFEST
from datawall.engine.shared import Shared

log = logging.getLogger(__name__)

PEAK = 2**10 if sys.platform == "linux" else 2**20  # by which a process's peak memory, as it is told, is MiB

type Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A unit of work: what is to be made, fully described before it is."""

    kind: str  # `subset`, `model`, …: one folder of the store each
    record: Record  # all that it depends on, as JSON values: parameters, and the keys of other units
    makers: tuple[str, ...]  # library modules, or functions of them (see `code.code_version`), that make it

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that change with the record, and with the code of the makers."""
        return code.key_of(self.kind, self.record, self.code)

    @property
    def code(self) -> dict[str, str]:
        """Versions of all code that decides the content."""
        return {name: code.code_version(name) for name in code.closure(self.makers)}


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: a folder of files and, from its manifest, what they were made from."""

    folder: Path
    kind: str
    key: str
    record: Record  # of its unit
    code: dict[str, str]  # versions of the code that made it
    files: dict[str, str]  # sha256 by name
    made: Record  # and how: versions, seconds, device, and the most memory that its process had taken until then

    @cached_property
    def n_bytes(self) -> int:
        """Its size on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Store:
    """The artifacts of one study, `<folder>/<kind>/<key>/`; by `url`, of an object store too (see `shared`)."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.shared = Shared(url) if url else None
        self._checked: dict[str, Artifact] = {}  # found and verified by this process already

    def find(self, unit: Unit) -> Artifact | None:
        """The artifact of a unit; None if it was never made, or has a file missing or changed, as a warning says."""
        if unit.key in self._checked:
            return self._checked[unit.key]
        folder = self.folder / unit.kind / unit.key
        made_here = folder.is_dir()
        there = made_here or self._fetch(unit, folder)
        if not there or not (artifact := _sound(folder, folder)):
            return None
        if self.shared and made_here:
            self.shared.put_if_missing(f"{unit.kind}/{unit.key}", folder)
        self._checked[unit.key] = artifact
        return artifact

    def missing[Item](self, items: Iterable[tuple[Unit, Item]]) -> list[Item]:
        """Those whose unit has no artifact; of several with one unit, say two names for the same settings, one."""
        return list({unit.key: item for unit, item in items if not self.find(unit)}.values())

    def find_or_make(self, unit: Unit, make: Callable[[Path], Record | None]) -> Artifact:
        """Find a unit's artifact, or make it: `make` writes files into an empty folder that is then moved into place.

        The move is atomic, so a killed process leaves nothing that could be taken for an artifact. Of two processes
        that make the same one the later drops its own: others may read the earlier's. What `make` returns is recorded.
        """
        if artifact := self.find(unit):
            return artifact
        folder = self.folder / unit.kind / unit.key
        with disk.temporary_folder(folder.parent) as scratch, disk.name_disk_errors(folder):
            begin = time.perf_counter()
            more = make(scratch)
            # A process makes one artifact after another: its peak of memory may be that of an earlier one.
            made = {
                "seconds": round(time.perf_counter() - begin, 3),
                "device": "cpu",
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // PEAK,
                "host": socket.gethostname(),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": code.versions(),
                **(more or {}),
            }
            manifest = {"kind": unit.kind, "key": unit.key, "record": unit.record, "code": unit.code}
            manifest |= {"files": {name: disk.file_sha256(scratch / name) for name in _files(scratch)}, "made": made}
            disk.write_json(scratch / MANIFEST, {**manifest, "sha256": code.json_sha256(manifest)})
            if folder.exists():
                _remove_damaged(folder, scratch.with_name(f"{scratch.name}-damaged"))
            disk.move_unless_there(scratch, folder)
        if self.shared:
            self.shared.put(f"{unit.kind}/{unit.key}", folder)
        self._checked[unit.key] = read(folder)
        return self._checked[unit.key]

    def _fetch(self, unit: Unit, folder: Path) -> bool:
        """Put a unit's artifact into its place, if the object store has it; says whether it has."""
        if not self.shared:
            return False
        with disk.temporary_folder(folder.parent) as scratch, disk.name_disk_errors(folder):
            taken = self.shared.take(f"{unit.kind}/{unit.key}", scratch)
            if not taken or not _sound(scratch, folder, f" of {self.shared.url}"):
                return False
            disk.move_unless_there(scratch, folder)
        return True


def read(folder: Path) -> Artifact:
    """An artifact as its manifest tells; raises OSError or ValueError if that is missing or was changed."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != code.json_sha256(manifest):
        raise ValueError(f"{MANIFEST} is not as it was written")
    return Artifact(folder, **manifest)


def read_all(folder: Path) -> dict[str, Artifact]:
    """The artifacts of a store, by key; those whose manifest is missing or damaged are left out."""
    artifacts = {}
    for path in sorted(folder.glob(f"*/[!.]*/{MANIFEST}")):
        with suppress(OSError, ValueError):
            artifacts[path.parent.name] = read(path.parent)
    return artifacts


def upstream(made: Iterable[Artifact], artifacts: dict[str, Artifact]) -> list[Artifact]:
    """All that artifacts were made from, nearest first."""
    sources, nearest = {}, made
    while nearest:
        keys = dict.fromkeys(key for artifact in nearest for key in texts(artifact.record))
        nearest = [artifacts[key] for key in keys if key in artifacts and key not in sources]
        sources |= {artifact.key: artifact for artifact in nearest}
    return list(sources.values())


def texts(value: Any) -> Iterator[str]:
    """Every text in nested JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def check(folder: Path, place: Path | None = None) -> tuple[Artifact | None, list[str]]:
    """An artifact, if its manifest can be read, and all that is wrong with it there or, if given, in another place."""
    try:
        artifact = read(folder)
    except (OSError, ValueError) as error:
        return None, [f"{type(error).__name__}: {error}"]
    files, there, (kind, key) = artifact.files, _files(folder), (place or folder).parts[-2:]
    wrong = [name for name in there if name in files and disk.file_sha256(folder / name) != files[name]]
    wrong += [f"{name} is missing" for name in files if name not in there]
    wrong += [f"{name} does not belong there" for name in there if name not in files]
    if (artifact.kind, artifact.key) != (kind, key):
        wrong.append(f"it is {artifact.kind} {artifact.key}, in the place of another")
    elif code.key_of(kind, artifact.record, artifact.code) != key:
        wrong.append("its key is not that of its record")
    return artifact, wrong


def _sound(folder: Path, place: Path, where: str = "") -> Artifact | None:
    """The artifact in a folder, unless it is damaged, as a warning then says."""
    artifact, wrong = check(folder, place)
    if wrong:
        log.warning("%s %s%s is damaged (%s) and will be made again.", *place.parts[-2:], where, "; ".join(wrong))
    return None if wrong else artifact


def _files(folder: Path) -> list[str]:
    """Names of the files of an artifact, but for its manifest, in order."""
    there = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    return sorted(name for path in there if (name := path.removeprefix(f"{folder}/")) != MANIFEST)


def _remove_damaged(folder: Path, aside: Path) -> None:
    """Remove an artifact if it is damaged: one process at a time, lest it be what another has just put in its place."""
    with (folder.parent / LOCK).open("a", encoding="utf-8") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and check(folder)[1]:
            os.replace(folder, aside)
            shutil.rmtree(aside)

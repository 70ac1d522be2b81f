"""Artifacts on disk: made once, found again by the key of what they were made from, checked when read."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import platform
import resource
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECORDED_PACKAGES = (
    "datawall",
    "anndata",
    "numpy",
    "pandas",
    "scanpy",
    "scib-metrics",
    "scikit-learn",
    "scipy",
    "torch",
)

type Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A unit of work: what is to be made, fully described before it is."""

    kind: str  # `subset`, `model`, …: one folder of the store each
    record: Record  # all that it depends on, as JSON values: parameters, and the keys of other units
    modules: tuple[str, ...]  # library modules (file names without `.py`) whose code decides the content

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that change when the record, or the code of one of the modules, changes."""
        code = {name: code_version(name) for name in self.modules}
        text = json.dumps([self.kind, self.record, code], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: dict[str, Artifact] = {}  # found and verified by this process already

    def find(self, unit: Unit) -> Artifact | None:
        """The artifact of a unit, or None if it was never made or is damaged.

        A damaged artifact (a file missing, truncated or changed) is named in a warning and never used.
        """
        if unit.key in self._checked:
            return self._checked[unit.key]
        folder = self._folder(unit)
        if not folder.is_dir():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            made, files = manifest["made"], manifest["files"]
            wrong = [name for name, sha256 in files.items() if file_sha256(folder / name) != sha256]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            log.warning("%s %s is damaged (%s) and will be made again.", unit.kind, unit.key, "; ".join(wrong))
            return None
        self._checked[unit.key] = Artifact(unit.key, folder, made)
        return self._checked[unit.key]

    def find_or_make(self, unit: Unit, make: Callable[[Path], Record | None]) -> Artifact:
        """Find a unit's artifact, or make it: `make` writes files into an empty folder that is then moved into place.

        The move is atomic, so a killed process leaves nothing that could be taken for an artifact, and of two
        processes that make the same one the later replaces the earlier.

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
        with temporary_folder(folder.parent) as scratch:
            begin = time.perf_counter()
            more = make(scratch) or {}
            made = {"seconds": round(time.perf_counter() - begin, 3), "device": "cpu", **_circumstances(), **more}
            files = {
                str(path.relative_to(scratch)): file_sha256(path)
                for path in sorted(scratch.rglob("*"))
                if path.is_file()
            }
            write_json(
                scratch / MANIFEST,
                {"kind": unit.kind, "key": unit.key, "record": unit.record, "files": files, "made": made},
            )
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
        self._checked[unit.key] = Artifact(unit.key, folder, made)
        return self._checked[unit.key]

    def _folder(self, unit: Unit) -> Path:
        return self.folder / unit.kind / unit.key


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the artifacts (same file system, so that it can be moved into place); removed if it stays."""
    scratch = parent / f".making-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@cache
def code_version(module: str) -> str:
    """Hash of a library module's code, blind to comments, docstrings and layout."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then move it to `path`: all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys as given, one value a line."""
    write_atomically(path, lambda scratch: scratch.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on: a notebook's session information."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in RECORDED_PACKAGES}


def _circumstances() -> Record:
    """Versions and peak memory, for the provenance of an artifact."""
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "versions": versions()}

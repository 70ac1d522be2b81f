"""What the artifacts of a run were made from, and what that cost, read from their manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from datawall.engine import disk, store


@dataclass(frozen=True, eq=False)
class Made:
    """An artifact, as its manifest tells."""

    key: str
    kind: str
    record: dict[str, Any]  # what it was made from
    code: dict[str, str]  # versions of the modules that made it
    made: dict[str, Any]  # and how: seconds, memory, device, versions
    files: dict[str, str]  # sha256 by name
    n_bytes: int

    @property
    def label(self) -> str:
        """What it is, among others of its kind: the family of a model, the task of an evaluation."""
        of = {"model": "model", "evaluation": "task"}.get(self.kind)
        return f"{self.kind}: {self.record[of]}" if of in self.record else self.kind


def read(folder: Path) -> dict[str, Made]:
    """The artifacts of a store, by key; those whose manifest is missing or damaged are left out."""
    found = {}
    for path in sorted(folder.glob(f"*/[!.]*/{disk.MANIFEST}")):
        try:
            given = store.read_manifest(path.parent)
            n_bytes = path.stat().st_size + sum((path.parent / name).stat().st_size for name in given["files"])
        except (OSError, ValueError):
            continue
        parts = {name: given[name] for name in ("key", "kind", "record", "code", "made", "files")}
        found[given["key"]] = Made(**parts, n_bytes=n_bytes)
    return found


def inputs(one: Made, artifacts: dict[str, Made]) -> list[Made]:
    """The artifacts that one's record names."""
    return [artifacts[text] for text in dict.fromkeys(texts(one.record)) if text in artifacts]


def upstream(one: Made, artifacts: dict[str, Made]) -> list[Made]:
    """All that an artifact was made from, nearest first."""
    found, following = {}, inputs(one, artifacts)
    while following:
        found |= {each.key: each for each in following if each.key not in found}
        following = [each for near in following for each in inputs(near, artifacts) if each.key not in found]
    return list(found.values())


def costs(made: Iterable[Made]) -> pd.DataFrame:
    """What artifacts took, a row per kind, model family and task, in the order given.

    Columns: what, n, seconds (of all, each in a process of its own), longest (of one), memory_mib (greatest of a
    process), n_bytes, device.
    """
    rows = [
        {
            "what": one.label,
            "n": 1,
            "seconds": one.made.get("seconds"),
            "longest": one.made.get("seconds"),
            "memory_mib": one.made.get("peak_memory_mib"),
            "n_bytes": one.n_bytes,
            "device": one.made.get("device", ""),
        }
        for one in made
    ]
    how = {"n": "sum", "seconds": "sum", "longest": "max", "memory_mib": "max", "n_bytes": "sum"}
    joined = {"device": lambda devices: ", ".join(sorted(set(devices)))}
    table = pd.DataFrame(rows, columns=["what", *how, *joined])
    return table.groupby("what", sort=False).agg(how | joined).reset_index()


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it; nothing if it is not known."""
    if seconds is None:
        return ""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{seconds < 10 * unit:d}f}\u00a0{name}"
    return f"{seconds / 86_400:,.0f}\u00a0days"


def versions(made: Iterable[Made]) -> dict[str, list[str]]:
    """Versions of Python and of packages that artifacts were made with."""
    found: dict[str, set[str]] = {}
    for one in made:
        for package, version in one.made.get("versions", {}).items():
            found.setdefault(package, set()).add(version)
    return {package: sorted(of) for package, of in found.items()}


def texts(value: Any) -> Iterator[str]:
    """Every text in nested JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)

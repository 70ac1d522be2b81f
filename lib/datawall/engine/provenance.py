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
        name = {"model": "model", "evaluation": "task"}.get(self.kind)
        return f"{self.kind}: {self.record[name]}" if name in self.record else self.kind


def read(folder: Path) -> dict[str, Made]:
    """The artifacts of a store, by key; those whose manifest is missing or damaged are left out."""
    artifacts = {}
    for path in sorted(folder.glob(f"*/[!.]*/{disk.MANIFEST}")):
        try:
            manifest = store.read_manifest(path.parent)
            n_bytes = sum((path.parent / name).stat().st_size for name in (path.name, *manifest["files"]))
        except (OSError, ValueError):
            continue
        artifacts[manifest["key"]] = Made(**manifest, n_bytes=n_bytes)
    return artifacts


def upstream(made: Made, artifacts: dict[str, Made]) -> list[Made]:
    """All that an artifact was made from, nearest first."""
    sources, nearest = {}, [made]
    while nearest:
        keys = dict.fromkeys(key for artifact in nearest for key in texts(artifact.record))
        nearest = [artifacts[key] for key in keys if key in artifacts and key not in sources]
        sources |= {artifact.key: artifact for artifact in nearest}
    return list(sources.values())


def costs(made: Iterable[Made]) -> pd.DataFrame:
    """What artifacts took, a row per kind, model family and task, in the order given.

    Columns: what, n, seconds (of all, each in a process of its own), longest (of one), memory_mib (greatest of a
    process), n_bytes, device.
    """
    columns = ["what", "n", "seconds", "longest", "memory_mib", "n_bytes", "device"]
    rows = []
    for artifact in made:
        how, seconds = artifact.made, artifact.made.get("seconds")
        memory, device = how.get("peak_memory_mib"), how.get("device", "")
        rows.append((artifact.label, 1, seconds, seconds, memory, artifact.n_bytes, device))
    table = pd.DataFrame(rows, columns=columns)
    totals = dict.fromkeys(("n", "seconds", "n_bytes"), "sum") | dict.fromkeys(("longest", "memory_mib"), "max")
    totals["device"] = lambda devices: ", ".join(sorted(set(devices)))
    return table.groupby("what", sort=False).agg(totals).reset_index()[columns]


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
    by_package: dict[str, set[str]] = {}
    for artifact in made:
        for package, version in artifact.made.get("versions", {}).items():
            by_package.setdefault(package, set()).add(version)
    return {package: sorted(among) for package, among in by_package.items()}


def texts(value: Any) -> Iterator[str]:
    """Every text in nested JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)

"""What the artifacts of a run were made from, and what that cost, read from their manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from datawall.engine import disk, store
from datawall.engine.store import Artifact


def read(folder: Path) -> dict[str, Artifact]:
    """The artifacts of a store, by key; those whose manifest is missing or damaged are left out."""
    artifacts = {}
    for path in sorted(folder.glob(f"*/[!.]*/{disk.MANIFEST}")):
        with suppress(OSError, ValueError):
            artifact = store.read(path.parent)
            artifacts[artifact.key] = artifact
    return artifacts


def upstream(made: Iterable[Artifact], artifacts: dict[str, Artifact]) -> list[Artifact]:
    """All that artifacts were made from, nearest first."""
    sources, nearest = {}, made
    while nearest:
        keys = dict.fromkeys(key for artifact in nearest for key in texts(artifact.record))
        nearest = [artifacts[key] for key in keys if key in artifacts and key not in sources]
        sources |= {artifact.key: artifact for artifact in nearest}
    return list(sources.values())


def label(artifact: Artifact) -> str:
    """What an artifact is, among others of its kind: the family of a model, the task of an evaluation."""
    name = {"model": "model", "evaluation": "task"}.get(artifact.kind)
    return f"{artifact.kind}: {artifact.record[name]}" if name in artifact.record else artifact.kind


def costs(artifacts: Iterable[Artifact]) -> pd.DataFrame:
    """What artifacts took, a row per kind, model family and task, in the order given.

    Columns: what, n, seconds (of all, each in a process of its own), longest (of one), memory_mib (greatest of a
    process), n_bytes, device.
    """
    rows = [{"what": label(artifact), "n_bytes": artifact.n_bytes, **artifact.made} for artifact in artifacts]
    table = pd.DataFrame(rows, columns=["what", "seconds", "peak_memory_mib", "n_bytes", "device"])
    aggregated = {
        "n": ("seconds", "size"),
        "seconds": ("seconds", "sum"),
        "longest": ("seconds", "max"),
        "memory_mib": ("peak_memory_mib", "max"),
        "n_bytes": ("n_bytes", "sum"),
        "device": ("device", lambda devices: ", ".join(sorted(set(devices)))),
    }
    return table.groupby("what", sort=False).agg(**aggregated).reset_index()


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{seconds < 10 * unit:d}f}\u00a0{name}"
    return f"{seconds / 86_400:,.0f}\u00a0days"


def texts(value: Any) -> Iterator[str]:
    """Every text in nested JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)

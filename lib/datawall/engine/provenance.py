"""What the artifacts of a run were made from, read from their manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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

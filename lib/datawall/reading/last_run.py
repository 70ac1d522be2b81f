"""What the last run of all stages was made with, left in its folder and said: whether another would end as it did."""

import json
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from datawall.engine import disk, paths
from datawall.reading import verify
from datawall.study.study import Study

FILE = "finished.json"  # of a run folder


def surroundings(study: Study, notebooks: Iterable[Path]) -> dict[str, Any]:
    """What decides, beside the cells, what a run leaves: its study, the notebooks, the library, the packages."""
    library = (path for path in paths.LIBRARY.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {
        "study": study.params.model_dump(mode="json"),
        "folder": str(study.folder),
        "files": {str(path): disk.file_sha256(path) for path in sorted([*notebooks, *library])},
        "packages": sorted(f"{package.name} {package.version}" for package in metadata.distributions()),
        "python": sys.version,
    }


def write(study: Study, begun_with: dict[str, Any], said: list[str]) -> None:
    """Note down a run of all stages that has succeeded, its `surroundings` when it began, and what it said."""
    disk.write_json(study.folder / FILE, {"with": begun_with, "left": _left(study.folder), "said": said})


def said(study: Study, notebooks: Iterable[Path]) -> list[str]:
    """What the last run of all stages said, if it was begun with the same and what it left is there; else nothing."""
    try:
        last = json.loads((study.folder / FILE).read_text(encoding="utf-8"))
        same = (last["with"], last["left"]) == (surroundings(study, notebooks), _left(study.folder))
        return last["said"] if same else []
    except (OSError, LookupError, TypeError, ValueError):
        return []


def _left(folder: Path) -> dict[str, Any]:
    """What is in a run folder: hashes of its files and, in the store, the keys of artifacts, which have their own."""
    files = [path for name in ("figures", "notebooks", "report") for path in (folder / name).rglob("*.*")]
    files += [path for path in folder.glob("*.*") if path.name not in (FILE, disk.LOCK)]
    hashes = {str(path.relative_to(folder)): disk.file_sha256(path) for path in sorted(files) if path.is_file()}
    return {"files": hashes, "store": sorted(verify.artifacts(folder))}

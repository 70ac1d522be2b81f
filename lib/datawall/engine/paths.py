"""The only place that knows where the repository, a run folder and the user's cache are."""

import difflib
import os
from pathlib import Path

import datawall

LIBRARY = Path(datawall.__file__).parent
PACKAGE_DATA = LIBRARY / "data"


def repository() -> Path:
    """Root of the compendium: the nearest folder that holds `params/` and `notebooks/`; or else FileNotFoundError."""
    # Notebooks start in their own folder under nbval, in the caller's under papermill; else it is this checkout.
    for start in (Path.cwd(), Path(__file__).resolve()):
        for folder in (start, *start.parents):
            if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
                return folder
    where = f"at or above {Path.cwd()}; change into your checkout of datawall."
    raise FileNotFoundError(f"no compendium (a folder with params/ and notebooks/) {where}")


def located(path: str | Path) -> Path:
    """A path from the working directory if it exists there, or else from the repository."""
    return Path(path) if Path(path).exists() else repository() / path


def not_found(path: str) -> str:
    """What to say of a file that is neither here nor in the repository: where it was sought, and what is like it."""
    places = [Path(path).parent] if Path(path).is_absolute() else dict.fromkeys([Path.cwd(), repository()])
    beside = [file.name for place in places for file in (place / path).parent.glob("*")]
    similar = "".join(f"; is it {name!r}?" for name in difflib.get_close_matches(Path(path).name, beside, n=1))
    return f"{path}: no such file in {' or '.join(map(str, places))}{similar}"


def study_file(study: str) -> Path:
    """Path of a study file, from its name (`quick`), its path, or a run folder that holds a `study.yaml`.

    Raises FileNotFoundError, which lists the studies that exist, if there is no such file.
    """
    given = Path(study)
    named = repository() / "params" / f"{study}.yaml"
    candidates = [given / "study.yaml", given, repository() / given / "study.yaml", repository() / given, named]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in (repository() / "params").glob("*.yaml")))
    raise FileNotFoundError(f"{study}: no such study file; give a path, or one of the studies in params/: {known}.")


def run_folder(study_file: Path, study: str) -> Path:
    """Folder of all that a study makes: where its `study.yaml` lies, or else, as for one in params, `runs/<study>`."""
    written = study_file.name == "study.yaml" and study_file.parent != (repository() / "params").resolve()
    return study_file.parent if written else repository() / "runs" / study


def cache_folder() -> Path:
    """Per-user folder of downloaded data sets: `$DATAWALL_CACHE`, or `datawall` in the user's cache folder."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "datawall")
    return Path(os.environ.get("DATAWALL_CACHE") or of_user)

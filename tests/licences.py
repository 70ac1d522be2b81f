"""The licence of every locked package, by its own metadata: `make lock` writes LICENSES.md, a test holds it to that."""

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Licences

Of all packages in `requirements.lock`, as each states its own; datawall itself is under the MIT licence (`LICENSE`).
Written by `make lock`.

| package | licence |
|---|---|
"""


def locked():
    """Names of the packages that are locked."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return sorted((line.partition("==")[0] for line in lines if line.strip()), key=str.lower)


def licence(package):
    """What a package says: an SPDX expression, a classifier or a line of text, the first that it has."""
    about = metadata.metadata(package)
    classifiers = [name for name in about.get_all("Classifier", ()) if name.startswith("License :: ")]
    of_classifiers = ", ".join(name.rpartition(" :: ")[2] for name in classifiers if not name.endswith("OSI Approved"))
    text = next(iter(about.get("License", "").strip().splitlines()), "")
    return about.get("License-Expression") or of_classifiers or text or "not stated"


if __name__ == "__main__":
    (ROOT / "LICENSES.md").write_text(HEAD + "".join(f"| {name} | {licence(name)} |\n" for name in locked()))

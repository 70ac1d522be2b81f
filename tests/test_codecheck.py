"""What is written for an independent check is what the repository holds."""

import re
from pathlib import Path

import manifest
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = (ROOT / "codecheck.yml").read_text()
WRITTEN = yaml.safe_load(CONFIGURATION)
AGAIN = "run `make notebooks`, or after an edit alone `python tests/manifest.py`"


def test_files_and_hashes_are_those_of_the_repository():
    assert manifest.configuration() == CONFIGURATION, AGAIN


def test_every_output_of_the_notebooks_is_listed():
    listed, stored = pd.read_csv(manifest.MANIFEST), manifest.outputs()
    pd.testing.assert_frame_equal(listed, stored, obj=AGAIN)
    assert set(stored["kind"]) == {"figure", "table", "text"}
    assert stored.groupby("notebook")["compared"].any().all()


def test_every_figure_file_has_a_cell_that_makes_it_and_every_such_cell_a_file():
    stems, patterns = {path.stem for path in (ROOT / "figures").glob("*.png")}, [of for of, _ in manifest.makers()]
    assert all(any(re.fullmatch(pattern, stem) for pattern in patterns) for stem in stems)
    assert all(any(re.fullmatch(pattern, stem) for stem in stems) for pattern in patterns)


def test_the_rules_that_authors_can_keep_are_kept():
    # https://github.com/codecheckers/register, rules-2.0.yml: CC-CFG 1 to 7, 14 to 19, 23, 27, 29, 30 and CC-BUN-001.
    assert CONFIGURATION.startswith("---\n")
    assert WRITTEN["version"] == "https://codecheck.org.uk/spec/config/2.0/"
    assert all(set(each) >= {"file", "comment"} for each in WRITTEN["manifest"])
    names = [each["file"] for each in WRITTEN["manifest"]]
    assert len(names) == len(set(names))
    assert all((ROOT / name).is_file() and not Path(name).is_absolute() for name in names)
    assert WRITTEN["paper"]["title"]
    assert all(each["name"] for each in WRITTEN["paper"]["authors"])
    assert all(each.startswith("https://doi.org/10.") for each in WRITTEN["paper"]["reference-other"])
    assert not re.search("FIXME|TODO|XXXX", CONFIGURATION)


@pytest.mark.parametrize("image", re.findall(r"\]\((figures/[^)]+)\)", (ROOT / "README.md").read_text()))
def test_the_readmes_figures_are_among_them(image):
    (listed,) = [each for each in WRITTEN["manifest"] if each["file"] == image]
    assert listed["comment"].endswith("; shown in README.md")

"""What stored notebooks claim is what their code prints and would print again, and what a check of them is told."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import manifest
import nbformat
import pandas as pd
import pytest
import yaml
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams
from test_notebooks import CHECKED, NOTEBOOKS, ROOT, cells_of, each_notebook, tags

from datawall.engine import code

CONCLUSION = "**In short:**"  # how the paragraph begins, in a notebook's first cell
NUMBER = r"(?<![\w.,-])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|,\d|\.\d)"  # no part of a name, a version or a date


def texts(output):
    """The texts of an output, by kind."""
    if output.output_type == "stream":
        return {"stream": output.text}
    return {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}


# The numbers of a conclusion are printed below it


def numbers(text):
    """Numbers of a text as written, links and thousands' commas left out."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1 ", text)
    plain = re.sub(r"`[^`]*`|doi \S+|<[^>]*>", " ", plain)
    return [number.replace(",", "") for number in re.findall(NUMBER, plain)]


def is_printed(number, printed):
    """Whether a number, or its share of 100, is among others when these are rounded as it is."""
    n_decimals = len(number.partition(".")[2])
    wanted = float(number)
    return any(wanted in (round(value, n_decimals), round(100 * value, n_decimals)) for value in printed)


def test_numbers_are_compared_as_they_are_written():
    assert is_printed("0.91", [0.908])
    assert not is_printed("0.91", [0.904])
    assert is_printed("91", [0.908])  # per cent
    assert is_printed("13999", [13999.0])
    assert not is_printed("3", [0.5, 2.0])


def test_numbers_of_prose_are_found_and_names_are_not():
    text = "Of 13,999 CD4 cells (PBMC 68k, [doi 10.1/2](https://x.y/3)) 91.5 % are at 0.92; `k=5`, -1.5 and scVI2."
    assert numbers(text) == ["13999", "91.5", "0.92", "-1.5"]


@each_notebook
def test_every_number_of_the_conclusion_is_printed_below(path):
    paragraphs = cells_of(path, "markdown")[0].source.split("\n\n")
    conclusion = [paragraph for paragraph in paragraphs if paragraph.startswith(CONCLUSION)]
    assert len(conclusion) == 1, f"the first cell has no paragraph that begins with {CONCLUSION}"
    outputs = [output for cell in cells_of(path, "code") for output in cell.outputs]
    printed = [float(n) for output in outputs for text in texts(output).values() for n in numbers(text)]
    assert [number for number in numbers(conclusion[0]) if not is_printed(number, printed)] == []


# Stored outputs are of this code


@each_notebook
def test_outputs_are_of_this_code(path):
    last = cells_of(path, "code")[-1]
    assert last.source.strip() == "dw.code.session()"
    stored = ast.literal_eval(last.outputs[0].data["text/plain"])
    assert stored["code"] == code.code_key(), "run `make notebooks`: the library has changed since"


def test_figures_are_of_this_code_and_of_the_stored_notebooks():
    """`make notebooks` writes both; a run writes its figures into its own folder."""
    figures = ROOT / "figures"
    assert (figures / "code.txt").read_text().strip() == code.code_key(), "run `make notebooks`"
    saved = re.findall(r'plots\.save\([^"]*"(\w+)"', "".join(cell.source for cell in cells_of(NOTEBOOKS[6], "code")))
    assert saved
    assert {f"{name}.csv" for name in saved} <= {path.name for path in figures.iterdir()}


# Whoever alters a checked number is found out


def retold(output):
    """Code that gives a stored output again."""
    if output.output_type == "stream":
        return f"print({output.text!r}, end='')"
    return f"display({json.loads(json.dumps(output.data))!r}, raw=True)"


def altered(output):
    """Copies of an output, in each of which one number has another last digit."""
    for kind, text in texts(output).items():
        shown = re.sub(r"<style.*?</style>", lambda match: " " * len(match[0]), text, flags=re.S)
        for match in re.finditer(r"\d+(?:\.\d+)?", shown):
            digit = str((int(text[match.end() - 1]) + 1) % 10)
            changed = text[: match.end() - 1] + digit + text[match.end() :]
            if kind == "stream":
                yield nbformat.from_dict({**output, "text": changed})
            else:
                yield nbformat.from_dict({**output, "data": {**output.data, kind: changed}})


def meets(cell, stored, printed):
    """Whether nbval takes what a cell has printed for what is stored of it, where it compares the cell at all."""
    return not cell.options["check"] or cell.compare_outputs(coalesce_streams([printed]), coalesce_streams([stored]))


@pytest.fixture
def nbval_cells(request, monkeypatch):
    """What makes nbval's items of a notebook's code cells."""
    monkeypatch.setattr(IPyNbCell, "format_output_compare", lambda *_: None)  # a report of what differs
    return lambda path: list(IPyNbFile.from_parent(request.session, path=path).collect())


@each_notebook
def test_every_altered_number_of_a_checked_cell_fails(path, nbval_cells):
    """By nbval's own comparison, if what was printed is what is stored, and with each number of it altered."""
    n_altered = 0
    for cell in nbval_cells(path):
        for output in cell.cell.outputs if CHECKED in tags(cell.cell) else []:
            assert meets(cell, output, output)
            for other in altered(output):
                n_altered += 1
                assert not meets(cell, other, output), other
    assert n_altered > 3


def test_nbval_compares_so_what_a_kernel_prints(tmp_path, nbval_cells):
    """Code that prints a text and a table again meets them as they are, and not with a number altered."""
    new, of_notebooks = nbformat.v4, [cell for path in NOTEBOOKS for cell in cells_of(path, "code")]
    checked = [
        output for cell in of_notebooks if CHECKED in tags(cell) for output in cell.outputs if any(altered(output))
    ]
    cells, printed, given = [], [], {"execution_count": 1, "metadata": {"tags": [CHECKED]}}
    for kind in ("stream", "execute_result"):
        output = next(output for output in checked if output.output_type == kind)
        for stored in (output, next(altered(output))):
            printed.append(output)
            cells.append(new.new_code_cell(retold(output), outputs=[stored], **given))
    notebook = tmp_path / "altered.ipynb"
    nbformat.write(new.new_notebook(cells=cells), notebook)
    shown = ["-rA", "--tb=no", "--color=no", "-p", "nbval.plugin", "--nbval-lax", "--nbval-current-env", notebook.name]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds to load
    command = [sys.executable, "-m", "pytest", *shown]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    outcome = {
        int(number): word == "PASSED" for word, number in re.findall(r"^(\w+) .*::Cell (\d+)", done.stdout, re.M)
    }
    told = [meets(item, *item.cell.outputs, of) for item, of in zip(nbval_cells(notebook), printed, strict=True)]
    assert told == [outcome.get(i) for i in range(4)] == [True, False, True, False], done.stdout


# What is written for an independent check is what the repository holds


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
    without = [pattern for pattern in patterns if not any(re.fullmatch(pattern, stem) for stem in stems)]
    assert without == [r"variants_\w+"]  # which the default study has none of


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

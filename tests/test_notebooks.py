"""Rules that every notebook keeps, so that it reads well, re-executes and can be validated."""

import ast
import re
import statistics
from pathlib import Path

import manifest
import nbformat
import papermill
import pytest

import run_all
from datawall.study import params

ROOT = Path(__file__).resolve().parents[1]
STAGES = [ROOT / "notebooks" / f"{name}.ipynb" for name in run_all.STAGES.values()]
NAMES = ("08_published_results", "09_which_wall")  # no stages: they need no study
NOTEBOOKS = [*STAGES, *(ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES)]
CHECKED = "nbval-check-output"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_stages_and_notebooks_are_the_same():
    assert sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")) == [path.name for path in NOTEBOOKS]


@each_notebook
def test_outputs_are_stored_and_were_run_top_to_bottom(path):
    code = cells_of(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@each_notebook
def test_checked_cells_print_facts_that_hold_elsewhere(path):
    checked = [cell for cell in cells_of(path, "code") if CHECKED in tags(cell)]
    assert checked
    for cell in checked:
        printed = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in cell.outputs)
        assert printed
        assert not re.search(r"/\w+/\w+|\.\./|\bseconds\b|it/s", printed.replace("https://", ""))
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
        # What makes units shows a progress bar the first time, which would be compared too.
        assert not re.search(r"\b(evaluate|pretrain|pretrain_adaptively|layouts)\(|= study\.corpus$", cell.source, re.M)


@each_notebook
def test_every_section_with_code_prints_a_fact_that_is_compared(path):
    checked = {}
    for section, cell in manifest.code_cells(path):
        checked[section] = checked.get(section, False) or CHECKED in tags(cell)
    del checked["Session"]  # versions; `test_trust` holds its key against the code
    assert [section for section, is_checked in checked.items() if not is_checked] == []


def declared(path):
    (cell,) = [cell for cell in cells_of(path, "code") if "parameters" in tags(cell)]
    return {target.id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body for target in line.targets}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_default_study(path):
    quick = params.read(ROOT / "params" / "quick.yaml").model_dump()
    assert declared(path) == {name: quick[name] for name in declared(path)}


@each_notebook
def test_papermill_knows_the_parameters(path):
    assert set(papermill.inspect_notebook(str(path))) == set(declared(path))


@each_notebook
def test_cells_are_short_and_define_nothing(path):
    sources = [cell.source for cell in cells_of(path, "code")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lengths = [len(source.splitlines()) for source in sources]
    assert max(lengths) <= 25
    assert statistics.median(lengths) <= 8


@each_notebook
def test_nearly_half_of_the_cells_are_prose(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 0.45 * len(notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    assert "../" not in "".join(cell.source for cell in notebook.cells)

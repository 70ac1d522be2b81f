"""Rules that every notebook keeps, and that each runs to the end and says what it leaves out, whatever a study has."""

import ast
import re
import statistics
from pathlib import Path

import manifest
import nbformat
import pandas as pd
import papermill
import pytest
from result_tables import curve, table

import run_all
from datawall.analysis import results, saturation
from datawall.reading import plots
from datawall.study import params
from datawall.study.study import Study

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


# Whatever strategies and tasks a study has


NO_RANDOM, NO_UNTRAINED = "left out: what random subsets tell", "left out: what untrained models tell"
NO_NEIGHBOURS = "left out: what zeroshot_classification tells"
STUDIES = {
    "random only": ({"strategies": ["random"]}, [NO_UNTRAINED]),
    "no random": ({"strategies": ["celltype_reweighted"]}, [NO_RANDOM, NO_UNTRAINED]),
    "fine-tuned only": ({"tasks": ["finetuned_classification"]}, [NO_NEIGHBOURS]),
}


@pytest.mark.parametrize(("overrides", "left_out"), STUDIES.values(), ids=STUDIES)
def test_notebooks_run_to_the_end(overrides, left_out, tmp_path, capsys, monkeypatch, few_steps):
    """With places of cells that need no compiling, and figures of few pixels."""
    monkeypatch.setattr("scanpy.pp.neighbors", lambda *_, **__: None)
    monkeypatch.setattr("scanpy.tl.umap", lambda cells, **_: cells.obsm.update(X_umap=cells.X[:, :2]))
    monkeypatch.setitem(plots.plt.rcParams, "savefig.dpi", 20)
    study = Study(params.read(ROOT / "params" / "tiny.yaml", {"models": ["PretrainedPCA"], **overrides}), tmp_path)
    study.write_params()
    stages = [n for n in range(3, 8) if run_all.TASKS.get(n, study.params.tasks[0]) in study.params.tasks]
    for number in stages:
        path = STAGES[number - 1]
        given = {name: getattr(study.params, name, None) for name in declared(path)} | {"study": str(tmp_path)}
        names = {}
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
            if "parameters" in tags(cell):
                names |= given
        plots.plt.close("all")
    printed = capsys.readouterr().out
    assert [line for line in left_out if line not in printed] == []
    everything = overrides.get("strategies", ["random", "untrained"])
    assert (NO_RANDOM in printed) == ("random" not in everything)
    assert (NO_UNTRAINED in printed) == ("untrained" not in everything)


def test_a_model_without_random_subsets_stands_beside_the_baselines():
    found = table(
        *curve({1: 0.6}, strategy="celltype_reweighted"),
        {"strategy": "baseline", "model": "PCA", "percentage": 0.0, "seed": -1, "value": 0.7},
    )
    assert results.headline(found, "micro_f1").loc["kang2018", "scVI"].to_dict() == {"PCA": 0.7}
    beside = results.beside_controls(found, "micro_f1", margin=0.02)
    assert beside.to_dict("records") == [{"untrained": "unknown", "PCA": "unknown"}]
    assert results.gains(found, "micro_f1").index.tolist() == [("kang2018", "scVI")]
    assert results.gains(found, "micro_f1").isna().all(axis=None)
    assert results.gains(found.replace("celltype_reweighted", "random"), "micro_f1").isna().all(axis=None)  # one size


def test_no_results_have_no_saturation_points():
    none = table({})[:0]
    for found in (saturation.points_by_task(none), saturation.points_by_rule(none, "micro_f1", 0.02)):
        assert found.empty
        assert {"model", "percentage", "low", "high"} <= set(found)


def test_points_by_task_are_those_of_each_headline_score():
    runs = table(
        *curve({1: [0.5, 0.52], 100: [0.8, 0.81]}, task="zeroshot_integration", metric="avg_bio"),
        *curve({1: [0.5, 0.52], 100: [0.8, 0.81]}),
        *curve({1: 3.0}, task="reconstruction", metric="loss"),
    )
    separately = [
        saturation.saturation_points(results.select(runs, metric=metric), metric, rule="mean")
        for metric in ("micro_f1", "avg_bio")
    ]
    joined = pd.concat(separately, ignore_index=True)
    pd.testing.assert_frame_equal(saturation.points_by_task(runs, rule="mean"), joined)

"""The command, end to end on the tiny study: complete, repeatable, resumable, and clear when it fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

import datawall as dw
import run_all
from datawall.engine import forkserver
from datawall.planning import plan as planning
from datawall.reading import last_run

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "params" / "tiny.yaml")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    assert run_all.main([TINY, "--out", str(folder)]) == 0
    return folder


def test_run_leaves_results_figures_and_executed_notebooks(tiny_run):
    study = dw.open_study(str(tiny_run))
    ((_, plan),) = planning.counts(study)
    results = dw.read_results(tiny_run)
    assert results["run_id"].nunique() == plan["experiments"] + plan["baselines"]
    assert set(results["task"]) == set(study.params.tasks)
    assert results["value"].notna().all()
    assert list(results) == dw.results.COLUMNS
    pd.testing.assert_frame_equal(pd.read_csv(tiny_run / "results.csv"), results, check_dtype=False)
    figures = {path.stem for path in (tiny_run / "figures").glob("*.svg")}
    pictures = (study.folder / "notebooks" / "07_figures.ipynb").read_text().count("image/png")
    assert pictures > 2  # an executed notebook has them as a reader's would
    others = {"saturation_points", "verdicts", "beside_published", "loss_and_score"}
    assert figures == others | {f"learning_curves_{task}" for task in study.params.tasks}
    for name in figures:
        assert (tiny_run / "figures" / f"{name}.png").stat().st_size > 10_000
        assert len(pd.read_csv(tiny_run / "figures" / f"{name}.csv"))
    for name in run_all.STAGES.values():
        executed = nbformat.read(tiny_run / "notebooks" / f"{name}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
        if name == "01_curation":
            outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
            said = "".join(output.get("text", "") for output in outputs)
            tables = "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "560 cells to pretrain on, 240 held out" in said
    assert "left out: the corpus is simulated itself" in said
    assert " columns]" not in tables  # they are whole, as in a kernel of a reader's


def test_from_scratch_gives_the_same_numbers(tiny_run, tmp_path):
    again = dw.Study(dw.open_study(str(tiny_run)).params, tmp_path)
    for task in again.params.tasks:
        dw.evaluation.evaluate(again, task)
    pd.testing.assert_frame_equal(dw.read_results(tmp_path), dw.read_results(tiny_run), check_exact=True)


@pytest.fixture
def copy(tiny_run, tmp_path):
    """The run, for a test that writes other results into it; with one notebook, so that its report is soon made."""
    return shutil.copytree(tiny_run, tmp_path / "copy", ignore=shutil.ignore_patterns("0[2-7]*.ipynb"))


def test_papermill_by_hand_gives_the_same_numbers(copy, tmp_path, monkeypatch):
    """In a kernel that starts from scratch, of the part that it names."""
    task = "zeroshot_classification"
    before = dw.results.select(dw.read_results(copy), task=task)
    shutil.rmtree(copy / "store" / "evaluation")
    monkeypatch.delenv(forkserver.ADDRESS)
    source, out = ROOT / "notebooks" / "03_zero_shot_classification.ipynb", tmp_path / "out.ipynb"
    overrides = {"models": ["Geneformer"], "percentages": [1], "seeds": [0], "strategies": ["random"]}
    parameters = [word for key, value in overrides.items() for word in ("-p", key, str(value))]
    words = ["papermill", source, out, "-p", "study", str(copy), *parameters, "--no-progress-bar"]
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=tmp_path, capture_output=True)
    counts = [cell.execution_count for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    assert None not in counts
    after = dw.results.select(dw.read_results(copy), task=task).reset_index(drop=True)
    named = before["strategy"].eq("baseline") | before["strategy"].eq("random") & before["model"].eq("Geneformer")
    expected = before[named & before["percentage"].lt(100)].reset_index(drop=True)
    pd.testing.assert_frame_equal(after, expected, check_exact=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "percentges=[1]"], ["tiny.yaml", "percentges", "percentages"]),
        (["--set", "percentages=[0, 1]"], ["percentages.0", "0", "greater than 0"]),
        (["--set", "seeds=[-1]"], ["seeds.0", "-1"]),
        (["--set", "models=[GPT]"], ["GPT", "PretrainedPCA"]),
        (["--set", "steps"], ["key=value"]),
        (["--stages", "3,9"], ["9", "1 to 7"]),
        (["--from", "four"], ["four", "1 to 7"]),
        (["--from", "3,5"], ["give one stage", "--stages 3,5"]),
        (["--verify"], ["run: no folder of a run"]),
        (["--why", "abc"], ["run: no folder of a run"]),
        (["--set", "corpus=broken.h5ad", "--set", "simulation=null"], ["broken.h5ad: not readable"]),
    ],
)
def test_wrong_request_is_refused_before_anything_is_done(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.h5ad").write_text("not a data set")
    assert run_all.main([TINY, *words, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert not (tmp_path / "run").exists()


def test_folder_of_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / ".zenodo.json").touch()
    assert run_all.main([TINY, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: neither empty nor the folder of a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".zenodo.json"]


def test_failing_stage_stops_the_run_and_says_where_to_look(tmp_path, capsys, monkeypatch):
    """Without a fork server: in a kernel that starts from scratch."""
    monkeypatch.setenv(forkserver.ADDRESS, "off")
    columns = {"cell_type": list("ab") * 20, "dataset_id": "one", "condition": "ctrl"}
    obs = pd.DataFrame(columns, index=map(str, range(40)))
    genes = pd.read_csv(ROOT / "lib" / "datawall" / "data" / "sctab_genes.csv").iloc[:200, 0]
    ad.AnnData(np.full((40, 200), 0.5, np.float32), obs, pd.DataFrame(index=genes)).write_h5ad(tmp_path / "shares.h5ad")
    words = ["--set", f"corpus={tmp_path / 'shares.h5ad'}", "--set", "simulation=null", "--out", str(tmp_path / "run")]
    assert run_all.main([TINY, *words]) == 1
    printed = capsys.readouterr()
    assert "shares.h5ad: no raw counts" in printed.err
    assert "01_curation.ipynb" in printed.err
    assert "02_pretraining" not in printed.out
    assert not list((tmp_path / "run" / "store").rglob("*.*"))


@pytest.fixture
def without_kernels(monkeypatch, forks):
    """The command with stages that do nothing, or fail; returns the numbers of those begun."""
    begun = []

    def of(ends):
        monkeypatch.setattr(run_all, "_run_stage", lambda number, *_: begun.append(number) or ends)
        return begun

    return of


def test_what_is_left_is_told_at_the_stage_that_makes_it(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    study, left = dw.open_study(str(tiny_run)), {"pretraining": 40.0, **dict.fromkeys(dw.tasks.TASKS, 20.0)}
    assert all(run_all._run_stage(number, study, left) for number in (2, 3, 5))
    told = capsys.readouterr().out.splitlines()[::2]
    assert [line.partition(" … ")[2] for line in told] == ["about 80\u00a0s", "", "about 20\u00a0s"]


def test_artifacts_of_other_versions_are_named(copy, capsys, monkeypatch, without_kernels):
    shutil.rmtree(copy / "store" / "evaluation")
    versions = {**dw.code.versions(), "numpy": "0.1"}
    monkeypatch.setattr(dw.code, "versions", lambda: versions)
    without_kernels(True)
    assert run_all.main([TINY, "--out", str(copy), "--stages", "3"]) == 0
    said = capsys.readouterr().out
    assert "numpy 0.1 in place of" in said  # models are used as they are
    assert "a new folder with --out" in said


def test_results_of_other_parameters_or_a_failed_run_are_not_told_as_its_own(copy, capsys, without_kernels):
    command = [TINY, "--out", str(copy), "--stages", "1"]
    without_kernels(True)
    assert run_all.main(command) == 0
    assert "curves, one for each model and data set" in capsys.readouterr().out
    assert run_all.main([*command, "--set", "steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "The results are not those of study.yaml as it is now: they are of other steps." in printed
    assert "curves" not in printed
    without_kernels(False)
    assert run_all.main(command) == 1
    printed = capsys.readouterr().out
    assert "failed: 01_curation" in printed
    assert "numbers:" not in printed


@pytest.mark.parametrize("succeeds", [True, False])
def test_damaged_results_end_a_run_in_one_line(succeeds, copy, capsys, without_kernels):
    (copy / "results.parquet").write_bytes(b"")
    without_kernels(succeeds)
    assert run_all.main([TINY, "--out", str(copy), "--stages", "1"]) == 1
    assert capsys.readouterr().err == (
        f"no report: {copy}: results.parquet is missing, or not as it was written; run the study again, which makes "
        "it from the store in no time.\n"
    )


def test_second_run_executes_no_notebook_unless_something_has_changed(copy, capsys, without_kernels):
    every, begun = list(run_all.STAGES), without_kernels(True)

    def run(*words):
        begun.clear()
        assert run_all.main([TINY, "--out", str(copy), *words]) == 0
        return [*begun], capsys.readouterr().out.partition("report: ")[2]

    executed, said = run()
    assert executed == every  # what is recorded is of the folder that this is a copy of
    assert run() == ([], said)
    assert run("--from", "1") == (every, said)
    subsets = [*copy.glob("store/subset/*/rows.npy")]
    assert subsets
    for changed in (copy / last_run.FILE, copy / "figures" / "verdicts.png", *subsets):
        changed.write_bytes(b"")
        assert run() == (every, said)


def test_interrupted_before_anything_is_done(tmp_path, capsys, monkeypatch, without_kernels):
    def interrupted(study):
        raise KeyboardInterrupt

    without_kernels(True)
    monkeypatch.setattr(planning, "seconds_left", interrupted)
    assert run_all.main([TINY, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.strip().startswith("Stopped.")
    assert not (tmp_path / "run").exists()


def test_verify_and_why_need_no_data(copy, capsys):
    """The corpus of this run, a file, has been moved since."""
    given = yaml.safe_load((copy / "study.yaml").read_text())
    given |= {"corpus": str(copy / "moved.h5ad"), "simulation": None}
    (copy / "study.yaml").write_text(yaml.safe_dump(given))
    assert run_all.main([str(copy), "--verify"]) == 0
    assert "artifacts, all as they were written" in capsys.readouterr().out
    key = dw.read_results(copy)["run_id"].iloc[0]
    assert run_all.main([str(copy), "--why", key]) == 0
    assert f"evaluation {key}" in capsys.readouterr().out
    assert run_all.main([str(copy), "--why", "nosuch"]) == 2
    assert "--why nosuch: no artifacts" in capsys.readouterr().err

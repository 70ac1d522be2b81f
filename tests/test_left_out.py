"""Notebooks 3 to 7 run to the end, and say what they leave out, whatever strategies and tasks a study has."""

import nbformat
import pandas as pd
import pytest
from result_tables import curve, table
from test_notebooks import ROOT, STAGES, declared, tags

import run_all
from datawall.analysis import results, saturation
from datawall.reading import plots
from datawall.study import params
from datawall.study.study import Study

NO_RANDOM, NO_UNTRAINED = "left out: what random subsets tell", "left out: what untrained models tell"
NO_NEIGHBOURS = "left out: what zeroshot_classification tells"
STUDIES = {
    "random only": ({"strategies": ["random"]}, [NO_UNTRAINED]),
    "no random": ({"strategies": ["celltype_reweighted"]}, [NO_RANDOM, NO_UNTRAINED]),
    "fine-tuned only": ({"tasks": ["finetuned_classification"]}, [NO_NEIGHBOURS]),
}


@pytest.mark.parametrize(("overrides", "left_out"), STUDIES.values(), ids=STUDIES)
def test_notebooks_run_to_the_end(overrides, left_out, tmp_path, capsys):
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

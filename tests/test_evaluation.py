"""How a study is judged: splits, tables, keys, and who wins against which baseline."""

import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from small import STUDY, atlas, small_study

import datawall as dw
from datawall import tasks
from datawall.analysis import results
from datawall.cells import simulate
from datawall.planning import plan as planning
from datawall.planning import preflight
from datawall.reading import plots
from datawall.study import dataset, evaluation, joining, params, questions
from datawall.study.records import Evaluation, EvaluationSet
from datawall.tasks import uncertainty

TASKS = tuple(tasks.TASKS)
ATLAS = atlas(300, n_datasets=2, donors_per_dataset=3, responsive=["myeloid leukocyte", "lymphocyte"])
VALUES = STUDY | {
    "batch_key": "dataset_id", "donor_key": "donor_id", "perturbation_key": "condition", "control": "ctrl",
    "held_out": 0.5, "strategies": ["random", "untrained"], "percentages": [10, 100], "steps": 2,
    "models": ["PretrainedPCA", "SSL"], "hyperparameters": {"SSL": {"n_hidden": [8], "n_latent": 4, "batch_size": 16}},
    "tasks": list(TASKS), "splits": 2, "finetuned_splits": 1, "more_k": [1],
    "held_out_contexts": ["naive B cell"], "perturbation_genes": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    simulate.load(ATLAS).write_h5ad(folder / "cells.h5ad")
    return folder


def study_of(folder, **values):
    return small_study(folder / "run", **VALUES | {"corpus": str(folder / "cells.h5ad"), **values})


@pytest.fixture(scope="module")
def study(folder, few_steps):
    """A study of six models and five tasks, evaluated."""
    study = study_of(folder)
    for task in TASKS:
        for one in evaluation.evaluations(study, task):
            evaluation.evaluation_artifact(study, one)  # in this process, which has all loaded
        evaluation.evaluate(study, task)
    return study


@pytest.fixture(scope="module")
def tables(study):
    return {name: dw.read_results(study.folder, name) for name in ("results", "intervals", "per_class")}


# Splits


def cells_of(labels, donors=None, *, splits=3):
    """Parameters and labels of cells, as `joining` divides them."""
    obs = pd.DataFrame({"cell_type": labels})
    if donors is not None:
        obs["donor_id"] = pd.Categorical(donors)
    return SimpleNamespace(splits=splits, finetuned_splits=None, k=5, more_k=[]), obs


LABELS = np.repeat(["T", "B"], [60, 40])
BY_CELL = ["cells 0", "cells 1", "cells 2"]


def test_no_donor_is_on_both_sides_of_a_split_by_donor():
    donors = np.arange(100) % 7
    halves = dict(joining.halves(*cells_of(LABELS, donors)))
    assert list(halves) == [*BY_CELL, "donors 0", "donors 1", "donors 2"]
    for split, half in halves.items():
        shared = set(donors[half == 1]) & set(donors[half == 0])
        assert (not shared) == split.startswith("donors")
        assert 40 <= half.sum() <= 60
    parts = dict(joining.three_parts(*cells_of(LABELS, donors)))
    assert {*BY_CELL, "donors 0"} <= set(parts) <= set(halves)
    for split, part in parts.items():
        folds = np.atleast_2d(part)
        assert all((LABELS[fold == 1] == name).any() for fold in folds for name in "TB")
        if split.startswith("donors"):
            assert all(not set(donors[fold == 2]) & set(donors[fold < 2]) for fold in folds)
        else:
            assert ((folds == 2).sum(axis=0) == 1).all()  # every cell is tested once
            assert all(np.bincount(fold).tolist() in ([60, 7, 33], [60, 6, 34], [59, 7, 34]) for fold in folds)


def test_two_donors_are_parted_in_the_ways_there_are():
    donors = np.arange(100) % 2
    halves = [half for split, half in joining.halves(*cells_of(LABELS, donors, splits=20)) if "donors" in split]
    assert len(halves) == 2
    assert np.array_equal(halves[0], 1 - halves[1])


@pytest.mark.parametrize("donors", [None, ["only"] * 100])
def test_without_two_donors_there_is_no_split_by_donor(donors):
    assert list(dict(joining.halves(*cells_of(LABELS, donors)))) == BY_CELL


def test_a_large_data_set_is_split_once():
    large = cells_of(np.tile(LABELS, 50), np.arange(5000) % 4)
    for split in (joining.halves, joining.three_parts):
        assert list(dict(split(*large))) == ["cells 0", "donors 0"]


# A study


def test_values_are_those_of_scikit_learn_on_the_same_split(study, tables):
    run = study.pretraining_runs()[0]
    X, labels = study.embedding(run, "cells_held_out"), study.dataset("cells_held_out").obs["cell_type"].astype(str)
    rows = results.select(tables["results"], task=TASKS[0], model=run.model, strategy="random", percentage=10.0)
    for split, half in joining.halves(study.params, study.dataset("cells_held_out").obs):
        for metric, k in (("micro_f1", 5), ("knn1_micro_f1", 1)):
            predicted = cross_val_predict(KNeighborsClassifier(k), X, labels, cv=PredefinedSplit(half))
            found = results.select(rows, metric=metric, split=split)["value"].tolist()
            assert found == [accuracy_score(labels, predicted)]


def test_every_number_has_one_row_and_most_an_interval(tables):
    keys = [*results.RUN, "split"]
    assert list(tables["results"]) == results.COLUMNS
    assert not tables["results"].duplicated(keys).any()
    both = tables["results"].merge(tables["intervals"], on=[*keys, "value"])
    assert len(both) == len(tables["results"]) == len(tables["intervals"])
    known = both.dropna(subset="low")
    assert (known["low"] <= known["high"]).all()
    assert set(both.loc[both["low"].isna(), "model"]) <= {results.CHANCE, results.ORACLE}
    inside = (known["low"] <= known["value"]) & (known["value"] <= known["high"])
    assert inside.mean() > 0.95
    headlines = tables["intervals"][tables["intervals"]["metric"].isin(["micro_f1", "avg_bio", "pearson_delta"])]
    told = headlines[~headlines["model"].isin([results.CHANCE, results.ORACLE])]
    assert not told[["low", "chance"]].isna().all(axis=1).any()


def test_chance_and_ceiling_are_rows_and_columns(tables):
    scores = tables["intervals"]
    chance = results.select(scores, model=results.CHANCE, metric="micro_f1", split="cells 0", task=TASKS[0])
    beside = results.select(scores, metric="micro_f1", split="cells 0", task=TASKS[0], strategy="random")
    assert set(beside["chance"]) == set(chance["value"])
    assert 0.25 < chance["value"].iloc[0] < 0.5
    by_split = results.select(scores, metric="micro_f1", task=TASKS[2]).groupby("split")["chance"]
    assert by_split.nunique().to_dict() == {"cells 0": 1, "donors 0": 1}  # a baseline's is that of heads
    response = results.select(scores, task="perturbation_response", metric="pearson_delta")
    oracle = response[response["model"] == results.ORACLE]["value"]
    assert set(response["ceiling"]) == set(oracle)
    assert results.CHANCE not in set(response["model"])
    assert {"NoChange", "MeanShift", "TreatedMean", "Oracle"} <= set(response["model"])


def test_each_class_has_its_score_and_support(study, tables):
    rows = tables["per_class"]
    assert list(rows) == results.PER_CLASS
    assert not tables["results"]["metric"].str.contains(r"\[").any()
    of_run = ["task", "model", "strategy", "percentage", "seed", "split"]
    n_test = rows[rows["task"] == TASKS[0]].groupby(of_run)["support"].sum()
    assert (n_test == study.dataset("cells_held_out").n_obs).all()  # each half is tested by the other
    macro = rows.groupby(of_run)["f1"].mean().rename("macro")
    scores = results.select(tables["results"], metric="macro_f1").set_index(of_run)["value"]
    assert np.allclose(macro, scores.reindex(macro.index), rtol=1e-12)


def test_what_is_evaluated(study):
    def of(task, **changes):
        return {one.dataset for one in evaluation.evaluations(study_of(study.folder.parent, **changes), task)}

    assert planning.counts_in_words(study) == ["2 subsets, 6 models, 30 experiments, 13 baselines"]
    assert {one.source.model for one in evaluation.evaluations(study, "reconstruction")} == {"PretrainedPCA", "SSL"}
    assert of(TASKS[1], tasks=[TASKS[0]]) == set()
    assert of("reconstruction") == {"cells_held_out"}
    assert of("reconstruction", held_out_tasks=list(TASKS[:-1]), evaluation=["pbmc68k"]) == set()


def keys(study):
    return {
        (task, one.source): evaluation.evaluation_unit(study, one).key
        for task in study.params.tasks
        for one in evaluation.evaluations(study, task)
    }


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"k": 3}, {TASKS[0]}),
        ({"more_k": []}, {TASKS[0]}),
        ({"splits": 3}, {TASKS[0]}),
        ({"finetuned_splits": None}, {TASKS[2]}),
        ({"finetune": "full"}, {TASKS[2]}),
        ({"class_weight": "balanced"}, {TASKS[2]}),
        ({"matching": "ot"}, {TASKS[3]}),
        ({"held_out_contexts": ["classical monocyte"]}, {TASKS[3]}),
        ({"perturbation_genes": 50}, {TASKS[3]}),
        ({"donor_key": None}, set(TASKS)),
        ({"workers": 2, "memory_gib": 1.0}, set()),
    ],
)
def test_a_changed_setting_redoes_the_tasks_it_is_for(study, changes, redone):
    before, after = keys(study), keys(study_of(study.folder.parent, **changes))
    assert {task for (task, source), key in after.items() if before[task, source] != key} == redone


def test_whole_networks_are_trained_where_they_can_be(study, few_steps):
    full = study_of(study.folder.parent, finetune="full", percentages=[100], strategies=["random"])
    scores = {}
    for run in full.pretraining_runs():
        [(split, metrics), _] = evaluation.score(full, Evaluation("finetuned_classification", "cells_held_out", run))
        assert split == "cells 0"
        scores[run.model] = {name for name in metrics if name.startswith("full_")}
    assert scores == {
        "PretrainedPCA": set(),
        "SSL": {"full_micro_f1", "full_macro_f1", "full_balanced_accuracy", "full_error_rate"},
    }


def test_equal_units_are_handed_out_once(folder, tmp_path, monkeypatch):
    handed, twice = [], {"models": ["SSL", "SSL@same"], "percentages": [100], "seeds": [0, 1], "init_seed": 0}
    run_units = lambda study, make, items, *_: handed.append([make(study, item).key for item in items])  # noqa: E731
    monkeypatch.setattr(evaluation.cluster, "run_units", run_units)
    study = small_study(tmp_path, **VALUES | {"corpus": str(folder / "cells.h5ad"), **twice})
    evaluation.evaluate(study, TASKS[0])
    assert [(len(keys), len(set(keys))) for keys in handed] == [(3, 3), (7, 7)]  # models, evaluations


def test_extremes_are_the_best_the_worst_and_the_bests_control(study, tables):
    chosen = questions.extremes(study, results.select(tables["results"], task=TASKS[0]), "micro_f1")
    means = results.mean_over_splits(results.select(tables["results"], task=TASKS[0], metric="micro_f1"))
    means = means[means["strategy"] == "random"].sort_values("value")
    for kind, row in (("best", means.iloc[-1]), ("worst", means.iloc[0])):
        [run] = [run for title, run in chosen.items() if title.startswith(kind)]
        assert (run.model, run.subset.percentage) == (row["model"], row["percentage"])
    [control] = [run for title, run in chosen.items() if title.startswith("untrained")]
    assert control.subset.strategy == "untrained"
    assert control.model == means.iloc[-1]["model"]


def test_curves_of_common_and_rare_types_show_the_table(tables):
    rows = results.select(tables["per_class"], task=TASKS[0])
    figure = plots.per_class_curves(rows, n_types=1)
    assert [axis.get_title() for axis in figure.axes] == ["PretrainedPCA", "SSL"]
    support = rows.groupby("cell_type")["support"].mean()
    shown = {line.get_label().rpartition(" (")[0]: line for line in figure.axes[0].lines}
    assert list(shown) == [support.idxmax(), support.idxmin()]
    by_cell = rows[~rows["split"].str.startswith("donors") & (rows["model"] == "PretrainedPCA")]
    expected = results.select(by_cell, cell_type=support.idxmin()).groupby("percentage")["f1"].mean()
    assert np.allclose(shown[support.idxmin()].get_ydata(), expected)


def test_treatments_that_are_not_two_are_named(study):
    wrong = study_of(study.folder.parent, control="nothing", tasks=["perturbation_response"])
    one = Evaluation("perturbation_response", "cells_held_out", "NoChange")
    with pytest.raises(dw.corpus.CorpusError, match=r"\['ctrl', 'treated'\].*'nothing'"):
        list(evaluation.score(wrong, one))


@pytest.mark.parametrize("dataset", ["cells", "cells_held_out"])
def test_a_misspelt_control_is_an_error_that_names_the_nearest_value(study, folder, dataset, tmp_path):
    beside = {"file": str(folder / "cells.h5ad"), "perturbation_key": "condition", "control": "ctlr"}
    wrong = {"evaluation": [beside]} if dataset == "cells" else {"control": "ctlr"}
    told = r"cells.h5ad: control 'ctlr' is no value of 'condition'; they are \['ctrl', 'treated'\]; is it 'ctrl'\?"
    values = VALUES | {"corpus": str(folder / "cells.h5ad"), **wrong}
    (tmp_path / "small.yaml").write_text(params.to_yaml(values))
    [error] = preflight.check(tmp_path / "small.yaml").errors
    assert re.search(told, error)
    with pytest.raises(dw.corpus.CorpusError, match=told):
        small_study(tmp_path / "new", **values).dataset_artifact(dataset)
    with pytest.raises(dw.corpus.CorpusError, match=told):  # where the corpus was made before
        evaluation.evaluate(small_study(study.folder, **values), "perturbation_response")


def test_why_a_task_is_left_out_ends_with_one_full_stop(folder, tmp_path):
    study = study_of(folder, treatments=["nothing"])
    with pytest.raises(dw.corpus.CorpusError, match=r"perturbation_response is left out: .*[^.]\.$"):
        evaluation.evaluate(study, "perturbation_response")


def labels(**columns):
    return pd.DataFrame({key: np.repeat(*zip(*of, strict=True)) for key, of in columns.items()})


def unfit(task, obs, **values):
    p = params.check({**VALUES, **values}, "mine")
    return joining.unfit(task, obs, EvaluationSet(file="x", control="ctrl", treatments=5), p)


@pytest.mark.parametrize(
    ("task", "columns", "why"),
    [
        ("zeroshot_classification", {"cell_type": [("B", 30)]}, "no two types with 5 cells or more: 'B' (30)"),
        ("finetuned_classification", {"cell_type": [("B", 26), ("T", 4)]}, "or more: 'B' (26), 'T' (4)"),
        ("zeroshot_classification", {"cell_type": [("B", 5), ("T", 5)]}, "it has 10 cells, and needs 20"),
        ("zeroshot_integration", {"cell_type": [("B", 9), ("T", 21)], "batch": [("x", 30)]}, "all of one batch"),
        ("zeroshot_integration", {"cell_type": [("B", 9), ("T", 21)], "batch": [("x", 9), ("y", 21)]}, "told apart"),
        ("zeroshot_integration", {"cell_type": [("B", 800), ("T", 800)], "batch": [("x", 2), ("y", 1598)]}, "batch"),
        ("perturbation_response", {"cell_type": [("B", 9), ("T", 21)], "perturbation": [("a", 30)]}, "the control"),
        ("reconstruction", {"cell_type": [("B", 3)]}, None),
        ("zeroshot_integration", {"cell_type": [("B", 9), ("T", 21)], "batch": [("x", 8), ("y", 22)]}, None),
        ("finetuned_classification", {"cell_type": [("B", 25), ("T", 5)]}, None),
    ],
)
def test_what_a_data_set_cannot_be_judged_on_is_known_from_its_labels(task, columns, why):
    found = unfit(task, labels(**columns), integration_cells=500)  # a sample, of the largest
    assert found is None if why is None else why in found


def test_neighbours_that_vote_take_twice_as_many_cells():
    obs = labels(cell_type=[("B", 10), ("T", 10)])
    assert unfit("finetuned_classification", obs, k=30) is None
    assert "needs 60, twice the neighbours that vote" in unfit("zeroshot_classification", obs, k=30)


def test_treatments_are_judged_one_by_one_by_name_or_those_with_the_most_cells():
    cells = [("B", t, n) for t, n in {"ctrl": 40, "a": 30, "b": 12, "c": 20}.items()]
    cells += [("T", t, n) for t, n in {"ctrl": 40, "a": 11, "b": 12, "c": 1}.items()]
    obs = pd.DataFrame([(kind, treatment) for kind, treatment, n in cells for _ in range(n)])
    obs.columns = ["cell_type", "perturbation"]

    def judged(chosen, named=None):
        one = EvaluationSet(file="x", control="ctrl", treatments=chosen, held_out_contexts=named)
        return joining.treatments(obs, one)

    assert judged(5) == {"a": ["B", "T"], "b": ["B", "T"], "c": ["B"]}
    assert judged(2) == {"a": ["B", "T"], "b": ["B", "T"]}
    assert judged(["c"]) == {"c": ["B"]}
    assert judged(5, ["T"]) == {"a": ["T"], "b": ["T"]}  # c has one cell there
    with pytest.raises(dw.corpus.CorpusError, match=r"c: held_out_contexts: \['T'\]"):
        judged(["c"], ["T"])
    with pytest.raises(dw.corpus.CorpusError, match=r"\['d'\] are none; they are \['a', 'b', 'c', 'ctrl'\]"):
        judged(["a", "d"])


def test_each_treatment_is_scored_as_if_it_were_the_only_one():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": np.tile(["B", "T"], 90), "perturbation": np.repeat(["ctrl", "a", "b"], 60)})
    obs.index = obs.index.astype(str)
    data = ad.AnnData(sp.csr_matrix(rng.poisson(2.0, (180, 80)).astype(np.float32)), obs=obs)
    drug = {"file": "drug.h5ad", "perturbation_key": "drug", "control": "ctrl"}
    p = params.check({**VALUES, "evaluation": [drug], "perturbation_genes": 50}, "mine")

    def splits(cells):
        study = Mock(params=p, dataset=lambda _: cells)
        found = evaluation.score(study, Evaluation("perturbation_response", "drug", "MeanShift"))
        return {split: dict(metrics) for split, metrics in found}

    both, alone = splits(data), splits(data[obs["perturbation"] != "b"].copy())
    assert list(both) == ["a, B held out", "a, T held out", "b, B held out", "b, T held out"]
    assert {f"a, {split}": metrics for split, metrics in alone.items()} == {s: both[s] for s in list(both)[:2]}


@pytest.mark.parametrize("by", ["dataset_id", "plate"])
def test_whole_groups_of_any_column_are_held_out(by):
    p = params.check({**VALUES, "split_by": by, "held_out": 0.25}, "mine")
    role = "dataset_id" if by == "dataset_id" else "split"
    assert (p.split_role, p.columns().get("split")) == (role, None if by == "dataset_id" else "plate")
    obs = pd.DataFrame({role: pd.Categorical(np.repeat(list("abcd"), 10))})
    held_out = dataset.hold_out(p, obs)
    assert held_out.sum() == 10
    assert len(set(obs.loc[held_out, role])) == 1
    with pytest.raises(dw.corpus.CorpusError, match=f"split_by: {by} has one value for all cells"):
        dataset.hold_out(p, obs[:10])


def test_rare_types_are_not_held_out_of_perturbation_response_unless_named():
    n_cells = pd.Series({"many": 50, "ten": 10, "few": 9, "one": 1, "none": 0})
    assert joining.contexts_held_out(n_cells, None) == ["many", "ten"]
    assert joining.contexts_held_out(n_cells, ["few"]) == ["few"]
    for named in (["one"], ["none"], ["unknown"]):
        with pytest.raises(dw.corpus.CorpusError, match=f"{named[0]}.*fewer than two"):
            joining.contexts_held_out(n_cells, named)
    with pytest.raises(dw.corpus.CorpusError, match="no cell type has 10"):
        joining.contexts_held_out(n_cells[2:4], None)
    with pytest.raises(dw.corpus.CorpusError, match=r"two cell types .* not \['one'\]"):
        joining.contexts_held_out(n_cells[3:], None)


def test_a_type_with_one_treated_cell_does_not_stop_the_oracle(study):
    obs = study.dataset("cells_held_out").obs
    rare = (obs["cell_type"] == "natural killer cell").to_numpy()
    lone = np.flatnonzero(rare & (obs["perturbation"] != "ctrl").to_numpy())[1:]
    data = study.dataset("cells_held_out")[np.setdiff1d(np.arange(len(obs)), lone)]
    one = study_of(study.folder.parent, held_out_contexts=None).params
    few = Mock(params=one, dataset=lambda name: data, response_genes=study.response_genes)
    found = evaluation.score(few, Evaluation("perturbation_response", "cells_held_out", "Oracle"))
    assert [split for split, _ in found] == ["classical monocyte held out", "naive B cell held out"]


# Tables


def table_of(rows):
    """A table of intervals from rows of model, strategy, percentage, seed, split, value, low, high."""
    columns = ["model", "strategy", "percentage", "seed", "split", "value", "low", "high"]
    same = {"study": "s", "n_cells": 0, "task": "zeroshot_classification", "dataset": "d", "metric": "micro_f1"}
    return pd.DataFrame(rows, columns=columns).assign(**same, chance=np.nan, ceiling=np.nan)


def test_splits_by_donor_are_not_averaged_with_those_by_cell():
    rows = [("A", "random", 1, 0, split, value, value - 0.1, value + 0.2) for split, value in SPLITS.items()]
    [mean] = results.mean_over_splits(table_of(rows)).to_dict("records")
    assert (mean["value"], mean["low"], mean["high"]) == pytest.approx((0.7, 0.6, 0.9))
    [donors] = results.mean_over_splits(results.select(table_of(rows), split="donors 0")).to_dict("records")
    assert donors["value"] == 0.2


SPLITS = {"cells 0": 0.6, "cells 1": 0.8, "donors 0": 0.2}


# Against baselines


def compared(model, baseline, *, intervals=(0.0, 0.0), metric="micro_f1", **options):
    """The one row of a comparison: (n_seeds, n_splits) values of a model, and (n_splits,) of its baseline."""
    model, baseline = np.atleast_2d(model), np.atleast_1d(baseline)
    rows = [
        ("A", "random", 1, seed, f"cells {split}", value, value - intervals[0], value + intervals[0])
        for (seed, split), value in np.ndenumerate(model)
    ]
    rows += [
        ("PCA", "baseline", 0, -1, f"cells {split}", value, value - intervals[1], value + intervals[1])
        for split, value in enumerate(baseline)
    ]
    others = {"Chance": 1.0, "Oracle": 2.0, "HVG": baseline.min() - 5}
    rows += [
        (name, "baseline", 0, -1, f"cells {split}", value, np.nan, np.nan)
        for name, value in others.items()
        for split in range(len(baseline))
    ]
    table = table_of(rows).assign(metric=metric)
    [row] = results.against_baselines(table, metric, **options).to_dict("records")
    return row


NAN = float("nan")


@pytest.mark.parametrize(
    ("model", "baseline", "options", "expected"),
    [
        # A constant gap has no width.
        ([[0.625, 0.875, 0.375]] * 2, [0.5, 0.75, 0.25], {}, ("PCA", 0.625, 0.5, 0.125, 0.125, 0.125, "win")),
        # Seeds are drawn too; one number without an interval tells nothing.
        ([[0.6, 0.6], [0.4, 0.4]], [0.5, 0.5], {}, ("PCA", 0.5, 0.5, 0, -0.1, 0.1, "tie")),
        ([0.9], [0.5], {}, ("PCA", 0.9, 0.5, 0.4, NAN, NAN, "unknown")),
        # Of errors the best baseline is the lowest, and a smaller one wins.
        ([[0.2, 0.2]] * 2, [0.5, 0.7], {"metric": "error_rate"}, ("HVG", 0.2, -4.5, 4.7, 4.7, 4.7, "loss")),
    ],
)
def test_a_comparison_by_hand(model, baseline, options, expected):
    row = compared(model, baseline, **options)
    columns = ("baseline", "value", "baseline_value", "difference", "low", "high", "verdict")
    assert [row[name] for name in columns] == pytest.approx(expected, nan_ok=True)


def test_what_is_better_when_lower():
    names = ("mse", "knn15_error_rate", "a metric of one's own")
    assert [results.lower_is_better(name) for name in names] == [True, True, False]


def test_width_from_cells_is_that_of_a_difference_of_normals():
    row = compared([[0.6], [0.6]], [0.5], intervals=(0.03, 0.04), n_resamples=200_000)
    assert (row["low"], row["high"]) == pytest.approx((0.1 - 0.05, 0.1 + 0.05), abs=5e-4)
    verdicts = {0.6: "win", 0.54: "tie", 0.44: "loss"}
    assert verdicts == {of: compared([[of], [of]], [0.5], intervals=(0.03, 0.04))["verdict"] for of in verdicts}
    assert compared([0.6], [0.5], intervals=(0.03, 0.04))["verdict"] == results.ONE_SEED


def test_width_from_splits_is_scipys_bootstrap_of_paired_differences():
    rng = np.random.default_rng(0)
    baseline, gap = rng.normal(0.5, 0.2, size=12), rng.normal(0.02, 0.03, size=12)
    row = compared(baseline + gap, baseline, n_resamples=100_000)
    reference = scipy.stats.bootstrap((gap,), np.mean, n_resamples=100_000, method="percentile", rng=1)
    assert (row["low"], row["high"]) == pytest.approx(tuple(reference.confidence_interval), abs=4e-4)


@pytest.mark.parametrize(("n_cells", "n_seeds", "spread"), [(300, 5, 0.1), (2000, 3, 0.02), (700, 1, 0.0)])
def test_differences_paired_by_cell_hold_the_truth_and_are_narrower(n_cells, n_seeds, spread):
    """What is hard is hard for both, and seeds differ; 1,000 draws have a Monte-Carlo error of 0.7 % at 95 %."""
    rng, held, widths = np.random.default_rng(0), [], []
    truth = scipy.stats.norm.cdf(0.3 / np.sqrt(1 + 0.5**2 + spread**2)) - 0.5
    names = ["task", "dataset", "model", "strategy", "percentage", "seed"]
    for draw in range(1000):
        easy = rng.standard_normal(n_cells)
        worth = 0.3 + spread * rng.standard_normal((n_seeds, 1))
        ours = worth + easy + 0.5 * rng.standard_normal((n_seeds, n_cells)) > 0
        theirs = easy + 0.5 * rng.standard_normal(n_cells) > 0
        difference, low, high = uncertainty.paired_interval(ours, theirs)
        held.append(low <= truth <= high)
        if draw < 10:  # what a table says
            where = "zeroshot_classification", "d"
            right = {(*where, "A", "random", 1, seed): of for seed, of in enumerate(ours)}
            right[(*where, "PCA", "baseline", 0, -1)] = theirs
            right = pd.Series(right, index=pd.MultiIndex.from_tuples(right, names=names), dtype=object)
            values = ours.mean(axis=1, keepdims=True), theirs.mean(keepdims=True)
            paired = compared(*values, right=right)
            assert (paired["difference"], paired["low"], paired["high"]) == pytest.approx((difference, low, high))
            half = [1.96 * np.sqrt(value.mean() * (1 - value.mean()) / n_cells) for value in values]
            apart = compared(*values, intervals=half, n_resamples=200)
            assert paired["difference"] == pytest.approx(apart["difference"])
            widths.append((high - low) / (apart["high"] - apart["low"]))
    assert (paired["verdict"] == results.ONE_SEED) == (n_seeds == 1)
    assert 0.93 < np.mean(held) < 0.97
    assert np.mean(widths) < 0.9


def test_cells_named_right_make_up_micro_f1(study, tables):
    right = questions.right_cells(study)
    scores = results.mean_over_splits(results.select(tables["results"], metric="micro_f1")).set_index(right.index.names)
    scores = scores["value"].drop(index="Chance", level="model")
    assert right.map(np.mean).to_dict() == pytest.approx(scores.to_dict())
    assert set(right.index.get_level_values("task")) == {"zeroshot_classification", "finetuned_classification"}
    found = results.against_baselines(tables["intervals"], "micro_f1", right=right)
    assert (found["low"] <= found["difference"]).all()
    assert set(found["verdict"]) == {results.ONE_SEED}


def test_a_second_opinion_is_of_the_splits_that_scores_are_of(monkeypatch, tmp_path):
    cells = pd.DataFrame({"cell_type": ["B", "T"]}, index=["a", "b"])
    study = Mock(**{"params.held_out_name": "x", "columns_of.return_value": {}, "dataset.return_value.obs": cells})
    study.store.find.return_value.folder = tmp_path
    np.savez(tmp_path / "predicted.npz", **{"cells 0": ["B", "T"], "donors 0": ["T", "B"]})
    monkeypatch.setattr(questions, "evaluations", lambda *_: [Evaluation("zeroshot_classification", "x", "PCA")])
    monkeypatch.setattr(questions, "evaluation_unit", Mock())
    monkeypatch.setattr(questions.curation, "authors_labels", lambda *_: pd.Series(["B", "B"], cells.index))
    assert questions.second_opinion(study).to_dict("records") == [{"ours": 1.0, "authors": 0.5, "judged": 2}]


@settings(max_examples=30, deadline=None)
@given(st.floats(-10, 10), st.integers(0, 2**32 - 1))
def test_what_is_added_to_all_values_changes_no_verdict(shift, seed):
    rng = np.random.default_rng(seed)
    model, baseline = rng.normal(size=(2, 3)), rng.normal(size=3)
    once, again = (compared(model + by, baseline + by, n_resamples=200) for by in (0, shift))
    assert again["difference"] == pytest.approx(once["difference"], abs=1e-9)
    assert (again["low"], again["high"]) == pytest.approx((once["low"], once["high"]), abs=1e-9)
    assert once["low"] - 1e-9 <= once["difference"] <= once["high"] + 1e-9
    rows = table_of([("A", "random", 1, 0, "cells 0", 1.0, 0.9, 1.1)])
    assert results.against_baselines(rows, "micro_f1").empty


# Threads


def test_numba_leaves_torch_its_one_thread():
    code = """
import torch
from datawall.engine import processes
processes.use_one_thread()
from numba.np.ufunc import parallel
parallel._launch_threads()
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The tasks on real cells: embeddings whose worth is known beforehand, and controls that a broken evaluation fails."""

import logging

import numpy as np
import pytest
import real

from datawall import tasks
from datawall.cells import datasets, expression, sampling, simulate
from datawall.models import training
from datawall.tasks import baselines, classification, integration, perturbation

SHORT = training.Recipe(steps=100, batch_size=64, learning_rate=3e-3, decay="none", validate_every=50, patience=3)


def one_hot(labels):
    """The labels as an embedding, with a trace of noise so that no two cells are the same."""
    types, codes = np.unique(labels, return_inverse=True)
    return np.eye(len(types))[codes] + 0.01 * np.random.default_rng(0).normal(size=(len(labels), len(types)))


@pytest.fixture(scope="module")
def cells():
    """PBMC with and without interferon: counts, principal components, types, batches, and each cell's part."""
    adata = real.kang()
    labels, batches = (adata.obs[column].to_numpy().astype(str) for column in ("cell_type", "condition"))
    part = sampling.stratified_split(labels, [0.4, 0.2, 0.4], seed=0)
    return adata.X, baselines.pca_embedding(adata.X), labels, batches, part


def classified(X, labels, part):
    train, test = part < 2, part == 2
    return tasks.zeroshot_classification(X[train], labels[train], X[test], labels[test])


def finetuned(X, labels, part):
    return tasks.finetuned_classification(X, labels, part, seed=0, recipe=SHORT)


# Classification


@pytest.fixture(scope="module", params=["kang", "pbmc68k"])
def typed(request, cells):
    """Principal components, types, and each cell's part."""
    if request.param == "kang":
        return cells[1], cells[2], cells[4]
    adata = datasets.load_pbmc68k()
    labels = adata.obs["cell_type"].to_numpy().astype(str)
    return baselines.pca_embedding(adata.X), labels, 2 * sampling.stratified_split(labels, [0.5, 0.5], seed=0)


def test_pca_is_far_above_chance(typed):
    X, labels, part = typed
    metrics = classified(X, labels, part)
    for name, chance in metrics.chance.items():
        if name.startswith("f1["):
            continue
        better = 1 if not name.endswith("error_rate") else -1
        assert better * (metrics[name] - chance) > 0.4, name
    majority = max(np.mean(labels[part == 2] == label) for label in np.unique(labels))
    assert metrics["micro_f1"] > majority + 0.4


def test_labels_as_embedding_are_classified_without_a_mistake(typed):
    _, labels, part = typed
    metrics = classified(one_hot(labels), labels, part)
    assert metrics["micro_f1"] == metrics["macro_f1"] == metrics["probe_micro_f1"] == 1
    low, high = metrics.intervals["micro_f1"]
    assert 0.98 < low < high == 1  # so many cells without a mistake do not rule one out


# Integration


@pytest.fixture(scope="module")
def of_pca(cells):
    return tasks.zeroshot_integration(*cells[1:4], unintegrated=cells[1])


def test_pca_integrates_types_far_above_chance(of_pca):
    for name in ("nmi", "ari", "avg_bio", "clisi", "graph_connectivity"):
        assert of_pca[name] > of_pca.chance[name] + 0.25, name
    assert of_pca["pcr_comparison"] == 0  # the same components before and after


def test_labels_as_embedding_have_the_best_bio_metrics(cells):
    _, X, labels, batches, _ = cells
    metrics = tasks.zeroshot_integration(one_hot(labels), labels, batches, unintegrated=X)
    for name in ("nmi", "ari", "asw_label", "isolated_labels", "clisi", "graph_connectivity"):
        assert metrics[name] > 0.98, name
    assert metrics["ilisi"] > metrics.ceiling["ilisi"] - 0.03
    assert metrics["kbet"] == pytest.approx(metrics.ceiling["kbet"], abs=0.04)


def test_batch_offset_lowers_the_batch_metrics_and_spares_the_others(cells):
    _, X, labels, batches, _ = cells
    noise = 0.1 * np.random.default_rng(1).normal(size=(len(labels), len(np.unique(labels)) + 1))
    good = np.column_stack([one_hot(labels), np.zeros(len(labels))]) + noise
    offset = good.copy()
    offset[:, -1] += 0.3 * (batches == np.unique(batches)[0])  # types are 1.4 apart
    before, after = (tasks.zeroshot_integration(each, labels, batches, unintegrated=X) for each in (good, offset))
    for name in ("asw_batch", "ilisi", "kbet", "pcr_comparison"):
        assert after[name] < before[name] - 0.03, name
        assert after.intervals[name][1] < before.intervals[name][0], name
    for name in ("nmi", "ari", "asw_label", "isolated_labels", "clisi"):
        assert after[name] > before[name] - 0.06, name


def test_removing_the_batch_means_raises_the_batch_metrics(cells, of_pca):
    _, X, labels, batches, _ = cells
    corrected = X.copy()
    for batch in np.unique(batches):
        corrected[batches == batch] -= X[batches == batch].mean(axis=0)
    after = tasks.zeroshot_integration(corrected, labels, batches, unintegrated=X)
    for name in ("ilisi", "kbet", "pcr_comparison", "total"):
        assert after[name] > of_pca[name], name
    assert after["pcr_comparison"] == pytest.approx(1, abs=1e-6)


# Perturbation response


@pytest.fixture(scope="module")
def stimulated():
    """Principal components, expression, whether treated, and type."""
    adata = real.kang()
    adata = adata[adata.obs["cell_type"] != "CD8 T cells"]  # 29 of which are untreated
    X = expression.lognormalise(adata.X)
    X = X[:, expression.variable_genes(X, 300)]
    treated = (adata.obs["condition"] == "stim").to_numpy()
    return expression.pca_scores(X, 20), X.toarray(), treated, adata.obs["cell_type"].to_numpy().astype(str)


def sides(X, treated, context, held_out):
    return X[treated & (context == held_out)], X[~treated & (context == held_out)]


def test_response_is_learnt_from_the_other_types(stimulated):
    embedding, X, treated, context = stimulated
    learnt, untreated, directions = [], [], []
    for held_out in np.unique(context):
        metrics = tasks.perturbation_response(embedding, X, treated, context, held_out, seed=0)
        learnt.append(metrics["pearson_delta"])
        directions.append(metrics["direction_accuracy"])
        # Other types differ from this one, drug or no drug: that alone must not explain the agreement.
        after, control = sides(X, treated, context, held_out)
        others = X[~treated & (context != held_out)].mean(axis=0)
        untreated.append(perturbation.Response(after, control).metrics(others)["pearson_delta"])
    assert min(learnt) > 0.1
    assert np.mean(learnt) > 0.4
    assert np.mean(learnt) > np.mean(untreated) + 0.1
    assert np.mean(directions) > 0.75


@pytest.mark.parametrize("matching", ["nearest", "ot"])
def test_matched_cells_learn_the_response_too(stimulated, matching):
    embedding, X, treated, context = stimulated
    metrics = tasks.perturbation_response(embedding, X, treated, context, "CD14+ Monocytes", seed=0, matching=matching)
    assert metrics["pearson_delta"] > 0.4
    assert metrics["pearson_delta_top50"] > 0.5


def test_mean_shift_beats_no_change_and_the_oracle_beats_all(stimulated):
    _, X, treated, context = stimulated
    for held_out in np.unique(context):
        after, control = sides(X, treated, context, held_out)
        other = treated & (context != held_out)
        changes = perturbation.changes(X, treated, context, sorted(set(context) - {held_out}))
        predicted = {
            "no change": control,
            "mean shift": control + changes.mean(axis=0),
            "treated mean": baselines.treated_mean(X[other], context[other]),
        }
        scores = {name: perturbation.Response(after, control).metrics(cells) for name, cells in predicted.items()}
        ceiling = perturbation.oracle(after, control)
        assert scores["mean shift"]["pearson_delta"] > 0.4
        assert scores["no change"]["pearson_delta"] == scores["no change"]["direction_accuracy"] == 0
        for name, score in scores.items():
            assert score["mse"] > 1.5 * ceiling["mse"], name
            assert score["pearson_delta"] < ceiling["pearson_delta"], name
            assert score["energy_distance"] > ceiling["energy_distance"] + 0.1, name


# Nothing to be learnt


@pytest.mark.parametrize("control", ["labels permuted", "random embedding"])
def test_no_signal_scores_at_chance(cells, control):
    _, X, labels, batches, part = cells
    rng = np.random.default_rng(3)
    if control == "labels permuted":
        labels = rng.permutation(labels)
    else:
        X = rng.normal(size=X.shape).astype(np.float32)
    majority = max(np.mean(labels == label) for label in np.unique(labels))
    for task in (classified, finetuned):
        metrics = task(X, labels, part)
        assert metrics["balanced_accuracy"] == pytest.approx(metrics.chance["balanced_accuracy"], abs=0.05), task
        assert metrics["macro_f1"] < metrics.chance["macro_f1"] + 0.05, task
        assert metrics["micro_f1"] < majority + 0.05, task
    metrics = tasks.zeroshot_integration(X, labels, batches)
    assert set(metrics.chance) == {*integration.BIO, "nmi_fixed", "ari_fixed", "graph_connectivity", "avg_bio"}
    for name in set(metrics.chance) - {"graph_connectivity"}:
        assert metrics[name] == pytest.approx(metrics.chance[name], abs=0.05), name
    assert metrics["asw_label"] < 0.51


def test_a_response_that_is_none_is_not_found():
    cells = simulate.load(simulate.Atlas(n_cells=2500, n_genes=300, composition={"mast cell": 1}, treated=0.0))
    X = expression.lognormalise(cells.X).toarray()
    donor = cells.obs["dataset_id"].to_numpy().astype(str)
    treated = np.random.default_rng(0).random(len(donor)) < 0.5
    embedding = expression.pca_scores(X, 10)
    after, before = X[treated & (donor == donor[0])], X[~treated & (donor == donor[0])]
    metrics = tasks.perturbation_response(embedding, X, treated, donor, donor[0], seed=0, recipe=SHORT)
    # No change is as good as it gets: nothing is closer than the control cells,
    # and they are as close as others of their kind.
    assert metrics["mse"] > metrics.chance["mse"]
    ceiling = perturbation.oracle(after, before)
    assert metrics.chance["energy_distance"] < 0.1
    assert abs(ceiling["energy_distance"]) < 0.1


# The same cells on both sides


def test_cells_of_both_sides_are_found_in_the_embedding(cells, caplog):
    _, X, labels, _, part = cells
    train, test = np.flatnonzero(part < 2), np.flatnonzero(part == 2)
    assert len(classification.shared_rows(X[train], X[test])) == 0
    leaked = np.concatenate([test, train[[5, 40, 7]]])
    shared = classification.shared_rows(X[train], X[leaked])
    np.testing.assert_array_equal(shared, len(test) + np.arange(3))
    with caplog.at_level(logging.WARNING):
        tasks.zeroshot_classification(X[train], labels[train], X[leaked], labels[leaked], probe=False)
    assert f"3 of {len(leaked)} test cells have the embedding of a training cell." in caplog.text
    caplog.clear()
    tasks.zeroshot_classification(X[train], labels[train], X[test], labels[test], probe=False)
    assert not caplog.text
    assert classification.shared_rows(np.array([[0.0, 1]]), np.array([[-0.0, 1], [1, 0]])).tolist() == [0]


# An embedding that says nothing, or is none


def test_constant_embedding_predicts_one_type(cells):
    _, X, labels, batches, part = cells
    constant = np.full_like(X, 0.5)
    for task, prefix in ((classified, ""), (classified, "probe_"), (finetuned, "")):
        metrics = task(constant, labels, part)
        assert metrics[prefix + "balanced_accuracy"] == pytest.approx(1 / len(np.unique(labels)))
        shares = [np.mean(labels[part == 2] == label) for label in np.unique(labels)]
        assert any(metrics[prefix + "micro_f1"] == pytest.approx(share) for share in shares)
    with pytest.raises(ValueError, match="all cells have the same embedding; there are no neighbours to judge"):
        tasks.zeroshot_integration(constant, labels, batches)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused_and_the_cell_is_named(cells, value):
    _, X, labels, batches, part = cells
    broken = X.copy()
    broken[17, 3] = value
    treated = batches == "stim"
    for task in (
        lambda: classified(broken, labels, part),
        lambda: classified(broken[::-1], labels[::-1], part[::-1]),
        lambda: finetuned(broken, labels, part),
        lambda: tasks.zeroshot_integration(broken, labels, batches),
        lambda: tasks.zeroshot_integration(X, labels, batches, unintegrated=broken),
        lambda: tasks.perturbation_response(broken, X, np.arange(len(X)) != 17, labels, "B cells", seed=0),
        lambda: tasks.perturbation_response(broken, X, treated, labels, "CD8 T cells", seed=0, matching="ot"),
    ):
        with pytest.raises(ValueError, match=r"the embedding of 1 cells \(first: cell \d+\) is NaN or infinite"):
            task()


# Labels and batches at their limits


def test_one_class_is_all_right_and_so_is_chance(cells):
    _, X, _, _, part = cells
    labels = np.repeat("T cell", len(X))
    for task in (classified, finetuned):
        metrics = task(X, labels, part)
        assert metrics["micro_f1"] == metrics["macro_f1"] == metrics.chance["micro_f1"] == 1
    assert classified(X, labels, part)["probe_micro_f1"] == 1


@pytest.mark.parametrize(
    ("label", "batch", "message"),
    [
        ("T cell", None, "all cells have the label 'T cell'; integration needs at least two"),
        (None, "only", "all cells have the batch 'only'; integration needs at least two"),
        (None, None, "no label has cells in two batches; mixing of batches cannot be told"),  # batches are types
    ],
)
def test_what_cannot_be_integrated_is_refused(label, batch, message, cells):
    _, X, labels, *_ = cells
    given = [np.repeat(name, len(X)) if name else labels for name in (label, batch)]
    with pytest.raises(ValueError, match=message):
        tasks.zeroshot_integration(X, *given)


def test_a_class_with_one_cell_is_scored(cells):
    _, X, labels, batches, part = cells
    for side in (0, 2):
        lone = labels.copy()
        lone[np.flatnonzero(part == side)[0]] = "lone"
        for task in (classified, finetuned):
            metrics = task(X, lone, part)
            assert all(np.isfinite(value) for value in metrics.values())
            assert ("f1[lone]" in metrics) == (side == 2)
            assert metrics.get("f1[lone]", 0) == 0  # no training cell, or no neighbour of its kind
            assert metrics.get("support[lone]", 1) == 1
        metrics = tasks.zeroshot_integration(X, lone, batches)
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["isolated_labels"] == pytest.approx(0.5)  # the silhouette of a lone cell is 0 by definition


def test_a_label_of_test_cells_only_counts_as_wrong(cells):
    _, X, labels, _, part = cells
    unseen = np.where((labels == "B cells") & (part < 2), "CD4 T cells", labels)
    for task in (classified, finetuned):
        metrics = task(X, unseen, part)
        assert metrics["f1[B cells]"] == metrics.chance["f1[B cells]"] == 0
        assert metrics["support[B cells]"] == np.sum((labels == "B cells") & (part == 2))
        known = task(X, labels, part)
        assert metrics["macro_f1"] < known["macro_f1"] - 0.05

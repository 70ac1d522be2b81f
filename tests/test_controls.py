"""Controls that a broken evaluation fails, on real cells: what each must come out as, or be refused with."""

import logging

import numpy as np
import pytest
import real

from datawall import tasks
from datawall.cells import expression, sampling, simulate
from datawall.models import training
from datawall.tasks import baselines, classification, perturbation

SHORT = training.Recipe(steps=100, batch_size=64, learning_rate=3e-3, decay="none", validate_every=50, patience=3)


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


def integrated(X, labels, batches):
    return tasks.zeroshot_integration(X, labels, batches)


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
    metrics = integrated(X, labels, batches)
    for name in ("nmi", "ari", "nmi_fixed", "ari_fixed", "avg_bio"):
        assert metrics[name] == pytest.approx(metrics.chance[name], abs=0.05), name
    assert metrics["asw_label"] < 0.51


def test_random_embedding_mixes_batches_as_well_as_can_be(cells):
    _, X, labels, batches, _ = cells
    metrics = integrated(np.random.default_rng(3).normal(size=X.shape), labels, batches)
    assert metrics["kbet"] == pytest.approx(metrics.ceiling["kbet"], abs=0.05)
    assert metrics["ilisi"] == pytest.approx(metrics.ceiling["ilisi"], abs=0.05)
    # So that a batch metric alone is no praise, and `total` ranks it below components that know types.
    assert metrics["total"] < integrated(X, labels, batches)["total"]


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


def test_duplicates_lift_a_random_embedding_above_chance(cells):
    # What the warning is for: with the test cells among the training cells, nearest neighbours know everything.
    _, X, labels, *_ = cells
    X = np.random.default_rng(0).normal(size=X.shape)
    assert tasks.zeroshot_classification(X, labels, X, labels, k=1, probe=False)["micro_f1"] == 1


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
        integrated(constant, labels, batches)


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
        lambda: integrated(broken, labels, batches),
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


def test_one_class_or_batch_cannot_be_integrated(cells):
    _, X, labels, batches, _ = cells
    with pytest.raises(ValueError, match="all cells have the label 'T cell'; integration needs at least two"):
        integrated(X, np.repeat("T cell", len(X)), batches)
    with pytest.raises(ValueError, match="all cells have the batch 'only'; integration needs at least two"):
        integrated(X, labels, np.repeat("only", len(X)))


def test_batches_that_are_types_cannot_be_integrated(cells):
    _, X, labels, *_ = cells
    with pytest.raises(ValueError, match="no label has cells in two batches; mixing of batches cannot be told"):
        integrated(X, labels, labels)


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
        metrics = integrated(X, lone, batches)
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


def test_a_label_of_training_cells_only_is_not_averaged(cells):
    _, X, labels, _, part = cells
    kept = (labels != "B cells") | (part < 2)
    metrics = classified(X[kept], labels[kept], part[kept])
    assert "f1[B cells]" not in metrics
    assert metrics["macro_f1"] == pytest.approx(np.mean([metrics[name] for name in metrics if name.startswith("f1[")]))

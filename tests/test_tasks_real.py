"""The tasks on real cells: what they say of embeddings whose worth is known beforehand."""

import numpy as np
import pytest
import real

from datawall import tasks
from datawall.cells import datasets, expression, sampling, simulate
from datawall.tasks import baselines, perturbation


def one_hot(labels):
    """The labels as an embedding, with a trace of noise so that no two cells are the same."""
    types, codes = np.unique(labels, return_inverse=True)
    return np.eye(len(types))[codes] + 0.01 * np.random.default_rng(0).normal(size=(len(labels), len(types)))


# Classification


@pytest.fixture(scope="module", params=[real.kang, datasets.load_pbmc68k])
def typed(request):
    """Principal components, types, and which cells test."""
    adata = request.param()
    labels = adata.obs["cell_type"].to_numpy().astype(str)
    return baselines.pca_embedding(adata.X), labels, sampling.stratified_split(labels, [0.5, 0.5], seed=0) == 1


def classified(X, labels, test, **options):
    return tasks.zeroshot_classification(X[~test], labels[~test], X[test], labels[test], **options)


def test_pca_is_far_above_chance(typed):
    X, labels, test = typed
    metrics = classified(X, labels, test, more_k=(1, 15))
    for name, chance in metrics.chance.items():
        if name.startswith("f1["):
            continue
        better = 1 if not name.endswith("error_rate") else -1
        assert better * (metrics[name] - chance) > 0.4, name
    majority = max(np.mean(labels[test] == label) for label in np.unique(labels))
    assert metrics["micro_f1"] > majority + 0.4


def test_labels_as_embedding_are_classified_without_a_mistake(typed):
    _, labels, test = typed
    metrics = classified(one_hot(labels), labels, test)
    assert metrics["micro_f1"] == metrics["macro_f1"] == metrics["probe_micro_f1"] == 1
    low, high = metrics.intervals["micro_f1"]
    assert 0.98 < low < high == 1  # so many cells without a mistake do not rule one out


# Integration


def simulated():
    """Four types in three data sets, whose effects are planted."""
    blood = {"CD4-positive, alpha-beta T cell": 5, "classical monocyte": 3, "B cell": 2, "natural killer cell": 2}
    return simulate.load(simulate.Atlas(n_cells=1200, n_genes=500, composition=blood, n_datasets=3, dataset_effect=1.0))


@pytest.fixture(scope="module", params=[(real.kang, "condition"), (simulated, "dataset_id")])
def batched(request):
    """Principal components, types and batches."""
    load, batch = request.param
    adata = load()
    labels, batches = (adata.obs[column].to_numpy().astype(str) for column in ("cell_type", batch))
    return baselines.pca_embedding(adata.X), labels, batches


def integrated(batched, embedding):
    X, labels, batches = batched
    return tasks.zeroshot_integration(embedding, labels, batches, unintegrated=X)


@pytest.fixture(scope="module")
def of_pca(batched):
    return integrated(batched, batched[0])


def test_pca_integrates_types_far_above_chance(of_pca):
    for name in ("nmi", "ari", "avg_bio", "clisi", "graph_connectivity"):
        assert of_pca[name] > of_pca.chance[name] + 0.25, name
    assert of_pca["pcr_comparison"] == 0  # the same components before and after


def test_labels_as_embedding_have_the_best_bio_metrics(batched):
    metrics = integrated(batched, one_hot(batched[1]))
    for name in ("nmi", "ari", "asw_label", "isolated_labels", "clisi", "graph_connectivity"):
        assert metrics[name] > 0.98, name
    assert metrics["ilisi"] > metrics.ceiling["ilisi"] - 0.03
    assert metrics["kbet"] == pytest.approx(metrics.ceiling["kbet"], abs=0.04)


def test_batch_offset_lowers_the_batch_metrics_and_spares_the_others(batched):
    _, labels, batches = batched
    noise = 0.1 * np.random.default_rng(1).normal(size=(len(labels), len(np.unique(labels)) + 1))
    good = np.column_stack([one_hot(labels), np.zeros(len(labels))]) + noise
    offset = good.copy()
    offset[:, -1] += 0.3 * (batches == np.unique(batches)[0])  # types are 1.4 apart
    before, after = (integrated(batched, embedding) for embedding in (good, offset))
    for name in ("asw_batch", "ilisi", "kbet", "pcr_comparison"):
        assert after[name] < before[name] - 0.03, name
        assert after.intervals[name][1] < before.intervals[name][0], name
    for name in ("nmi", "ari", "asw_label", "isolated_labels", "clisi"):
        assert after[name] > before[name] - 0.06, name


def test_removing_the_batch_means_raises_the_batch_metrics(batched, of_pca):
    X, _, batches = batched
    corrected = X.copy()
    for batch in np.unique(batches):
        corrected[batches == batch] -= X[batches == batch].mean(axis=0)
    after = integrated(batched, corrected)
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
        untreated.append(perturbation.response_metrics(others, after, control)["pearson_delta"])
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
        scores = {name: perturbation.response_metrics(cells, after, control) for name, cells in predicted.items()}
        ceiling = perturbation.oracle(after, control)
        assert scores["mean shift"]["pearson_delta"] > 0.4
        assert scores["no change"]["pearson_delta"] == scores["no change"]["direction_accuracy"] == 0
        for name, score in scores.items():
            assert score["mse"] > 1.5 * ceiling["mse"], name
            assert score["pearson_delta"] < ceiling["pearson_delta"], name
            assert score["energy_distance"] > ceiling["energy_distance"] + 0.1, name

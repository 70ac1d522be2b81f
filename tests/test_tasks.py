"""Tasks on cases with a known answer, against scikit-learn, and on real cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier, kneighbors_graph

from datawall import baselines, corpus, expression, tasks, training
from datawall.tasks import classification, perturbation

# umap, which scib-metrics imports, says so when first imported.
pytestmark = pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return ad.read_h5ad(path)


def blobs(n_types=3, n_each=60, *, noise=0.3, seed=0):
    """Cells around the corners of a simplex ten apart, types in turn; and their types."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n_types * n_each) % n_types
    X = 10 * np.eye(n_types, 8)[labels] + noise * rng.normal(size=(len(labels), 8))
    return X.astype(np.float32), np.array([f"type {label}" for label in labels])


# Metrics and zero-shot classification


def test_metrics_by_hand():
    # a: 3 of 4 right; b: 1 of 1 right but one a is called b; the type z is only predicted, of the second cell.
    metrics = classification.classification_metrics(list("aaaaab"), list("aaazbb"))
    f1_a, f1_b = 2 * 3 / (5 + 3), 2 * 1 / (1 + 2)
    assert metrics == pytest.approx(
        {"micro_f1": 4 / 6, "macro_f1": (f1_a + f1_b) / 2, "balanced_accuracy": (3 / 5 + 1) / 2}
    )


def test_separated_types_are_all_found():
    X, y = blobs()
    assert tasks.zeroshot_classification(X[::2], y[::2], X[1::2], y[1::2]) == {
        "micro_f1": 1.0,
        "macro_f1": 1.0,
        "balanced_accuracy": 1.0,
    }


def test_shuffled_labels_are_at_chance():
    X, y = blobs(n_each=400)
    y = np.random.default_rng(0).permutation(y)
    metrics = tasks.zeroshot_classification(X[::2], y[::2], X[1::2], y[1::2])
    assert abs(metrics["micro_f1"] - 1 / 3) < 0.08
    assert abs(metrics["balanced_accuracy"] - 1 / 3) < 0.08


@pytest.mark.parametrize("k", [1, 5])
def test_classifier_is_scikit_learns(k):
    X, y = blobs(noise=6)
    metrics = tasks.zeroshot_classification(X[::2], y[::2], X[1::2], y[1::2], k=k)
    expected = KNeighborsClassifier(k).fit(X[::2], y[::2]).score(X[1::2], y[1::2])
    assert metrics["micro_f1"] == pytest.approx(expected)
    assert expected < 1


def test_embedding_with_nan_names_the_cell():
    X, y = blobs()
    X[[7, 9], 2] = np.nan, np.inf
    part = np.arange(len(y)) % 3
    for call in (
        lambda: tasks.zeroshot_classification(X, y, X[:5], y[:5]),
        lambda: tasks.zeroshot_classification(X[20:], y[20:], X, y),
        lambda: tasks.zeroshot_integration(X, y, part),
        lambda: tasks.finetuned_classification(X, y, part, seed=0),
        lambda: tasks.perturbation_response(X, X, part == 0, y, "type 0", seed=0),
    ):
        with pytest.raises(ValueError, match=r"embedding of \d cells \(first: cell \d\) is NaN or infinite"):
            call()


def test_fewer_cells_than_neighbours_is_refused():
    X, y = blobs()
    with pytest.raises(ValueError, match="4 training cells are fewer than k=5 neighbours; lower k"):
        tasks.zeroshot_classification(X[:4], y[:4], X, y)
    assert tasks.zeroshot_classification(X[:4], y[:4], X, y, k=4)["micro_f1"] <= 1


def test_pca_of_real_cells_is_far_above_chance():
    adata = shared("pbmc3k.h5ad")[:1000]
    y = adata.obs["cell_type"].to_numpy().astype(str)
    X = baselines.pca_embedding(adata.X)
    test = corpus.stratified_split(y, [0.5, 0.5], seed=0) == 1
    metrics = tasks.zeroshot_classification(X[~test], y[~test], X[test], y[test])
    majority = max(np.mean(y[test] == label) for label in np.unique(y))
    assert metrics["micro_f1"] > majority + 0.4
    assert metrics["macro_f1"] > 0.6


# Zero-shot integration


@pytest.fixture(scope="module")
def integrated():
    """Separated types, batches mixed: the embedding, its types and batches, and their metrics."""
    X, y = blobs(noise=1.0)
    batch = np.random.default_rng(5).permutation(["one", "two"] * (len(y) // 2))
    return X, y, batch, tasks.zeroshot_integration(X, y, batch)


def test_labels_as_embedding_score_near_the_top():
    X, y = blobs(noise=1e-2)
    batch = np.random.default_rng(5).permutation(["one", "two"] * (len(y) // 2))
    metrics = tasks.zeroshot_integration(X, y, batch)
    assert set(metrics) == {"nmi", "ari", "asw_label", "avg_bio", "asw_batch", "graph_connectivity"}
    assert metrics["avg_bio"] > 0.99
    assert metrics["asw_batch"] > 0.95


def test_labels_that_say_nothing_score_low(integrated):
    X, y, batch, good = integrated
    metrics = tasks.zeroshot_integration(X, np.random.default_rng(1).permutation(y), batch)
    assert metrics["nmi"] < 0.1
    assert metrics["ari"] < 0.1
    assert metrics["avg_bio"] < good["avg_bio"] - 0.5


def test_avg_bio_is_the_mean_of_three(integrated):
    *_, metrics = integrated
    assert metrics["avg_bio"] == pytest.approx((metrics["nmi"] + metrics["ari"] + metrics["asw_label"]) / 3)


def test_silhouettes_are_those_of_scib_metrics(integrated):
    from scib_metrics import silhouette_batch, silhouette_label

    X, y, batches, metrics = integrated
    assert metrics["asw_label"] == pytest.approx(silhouette_label(X, y), abs=1e-5)
    assert metrics["asw_batch"] == pytest.approx(silhouette_batch(X, y, batches), abs=1e-5)


def test_asw_label_is_the_scaled_silhouette(integrated):
    X, y, _, metrics = integrated
    assert metrics["asw_label"] == pytest.approx((silhouette_score(X, y) + 1) / 2, abs=1e-5)


def test_graph_connectivity_is_the_largest_strong_component_of_each_type(integrated):
    X, y, _, metrics = integrated
    graph = kneighbors_graph(X, 14)  # and each cell itself: fifteen
    shares = []
    for label in np.unique(y):
        within = graph[y == label][:, y == label]
        _, component = connected_components(within, connection="strong")
        shares.append(np.bincount(component).max() / len(component))
    assert metrics["graph_connectivity"] == pytest.approx(np.mean(shares))


def test_batch_offset_lowers_asw_batch_and_spares_avg_bio(integrated):
    X, y, batch, mixed = integrated
    shifted = X.copy()
    shifted[batch == "two", 7] += 4
    metrics = tasks.zeroshot_integration(shifted, y, batch)
    assert metrics["asw_batch"] < mixed["asw_batch"] - 0.2
    assert metrics["avg_bio"] > mixed["avg_bio"] - 0.1


def test_integration_repeats(integrated):
    X, y, batch, metrics = integrated
    assert tasks.zeroshot_integration(X, y, batch) == metrics


def test_one_label_or_one_batch_is_refused():
    X, y = blobs()
    with pytest.raises(ValueError, match="all cells have the label 'a'; integration needs at least two"):
        tasks.zeroshot_integration(X, ["a"] * len(y), y)
    with pytest.raises(ValueError, match="all cells have the batch 'b'; integration needs at least two"):
        tasks.zeroshot_integration(X, y, ["b"] * len(y))


# Fine-tuned classification


def test_head_learns_separable_types_and_repeats():
    X, y = blobs(n_each=100)
    part = corpus.stratified_split(y, [0.8, 0.1, 0.1], seed=0)
    metrics = tasks.finetuned_classification(X, y, part, seed=0)
    assert metrics == {"micro_f1": 1.0, "macro_f1": 1.0, "balanced_accuracy": 1.0}
    # Scale and offset of a column mean nothing to the head.
    assert tasks.finetuned_classification(X * 1e3 + 50, y, part, seed=0)["micro_f1"] == 1


def test_same_seed_gives_the_same_head_and_another_seed_another():
    X, y = blobs(noise=8, n_each=300)
    part = corpus.stratified_split(y, [0.4, 0.1, 0.5], seed=0)
    recipe = training.Recipe(steps=60, batch_size=64, learning_rate=1e-3, decay="none", validate_every=20, patience=3)
    scores = [tasks.finetuned_classification(X, y, part, seed=seed, recipe=recipe) for seed in (0, 0, 1, 2, 3)]
    assert scores[0] == scores[1]
    assert len({score["micro_f1"] for score in scores}) > 1


def test_labels_of_test_cells_are_not_learnt():
    X, y = blobs(n_each=100)
    part = corpus.stratified_split(y, [0.8, 0.1, 0.1], seed=0)
    turned = {"type 0": "type 1", "type 1": "type 2", "type 2": "type 0"}
    y = np.where(part == 2, [turned[label] for label in y], y)
    assert tasks.finetuned_classification(X, y, part, seed=0)["micro_f1"] == 0


@pytest.mark.parametrize(("absent", "name"), [(0, "train"), (1, "validation"), (2, "test")])
def test_missing_part_is_named(absent, name):
    X, y = blobs()
    part = np.array([kept for kept in range(3) if kept != absent])[np.arange(len(y)) % 2]
    with pytest.raises(ValueError, match=f"no cell in the {name} part; use a larger data set"):
        tasks.finetuned_classification(X, y, part, seed=0)


# Perturbation response


def contexts_on_a_line(n=80, n_genes=40, seed=0):
    """Five contexts in a row, control and treated cells of each, and one shift common to all.

    The embedding is a context's place in the row, so that a head can tell what an unseen context is like.
    """
    rng = np.random.default_rng(seed)
    base, direction, shift = rng.normal(3, 1, n_genes), rng.normal(0, 0.4, n_genes), rng.normal(0, 1, n_genes)
    place = np.repeat(np.arange(5), 2 * n)
    treated = np.tile(np.arange(2 * n) % 2 == 1, 5)
    X = base + np.outer(place, direction) + np.outer(treated, shift) + rng.normal(0, 0.1, (len(place), n_genes))
    embedding = np.column_stack([place + rng.normal(0, 0.05, len(place)), rng.normal(0, 0.05, len(place))])
    return embedding, X, treated, np.array([f"context {p}" for p in place])


def no_change_metrics(X, treated, context, held_out):
    control, after = (X[(treated == is_treated) & (context == held_out)].mean(axis=0) for is_treated in (False, True))
    return perturbation.response_metrics(control, after, control)


def test_informative_embedding_beats_no_change_and_noise():
    embedding, X, treated, context = contexts_on_a_line()
    metrics = tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0)
    nothing = no_change_metrics(X, treated, context, "context 1")
    noise = np.random.default_rng(1).normal(size=embedding.shape)
    blind = tasks.perturbation_response(noise, X, treated, context, "context 1", seed=0)
    assert metrics["mse"] < 0.2 * nothing["mse"]
    assert metrics["mse"] < 0.5 * blind["mse"]
    assert metrics["pearson_delta"] > 0.95
    assert metrics == tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0)


@pytest.fixture
def predictions(monkeypatch):
    """What was predicted, by call."""
    captured, metrics = [], perturbation.response_metrics

    def spy(predicted, *others):
        captured.append(predicted)
        return metrics(predicted, *others)

    monkeypatch.setattr(perturbation, "response_metrics", spy)
    return captured


def test_held_out_treated_cells_never_reach_the_prediction(predictions):
    embedding, X, treated, context = contexts_on_a_line()
    secret = treated & (context == "context 1")
    changed_X, changed_embedding = X.copy(), embedding.copy()
    changed_X[secret] = 99
    changed_embedding[treated] = np.nan
    one = tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0)
    other = tasks.perturbation_response(changed_embedding, changed_X, treated, context, "context 1", seed=0)
    assert np.array_equal(predictions[0], predictions[1])
    assert other["mse"] > 100 * one["mse"]
    # Treated cells of the other contexts do.
    changed_X[treated & (context == "context 2")] += 1
    tasks.perturbation_response(embedding, changed_X, treated, context, "context 1", seed=0)
    assert np.abs(predictions[2] - predictions[0]).max() > 0.1


def test_prediction_needs_no_treated_cells_of_the_held_out_context_but_their_mean(predictions):
    embedding, X, treated, context = contexts_on_a_line()
    secret = np.flatnonzero(treated & (context == "context 1"))
    fewer = np.setdiff1d(np.arange(len(treated)), secret[1:])
    tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0)
    tasks.perturbation_response(embedding[fewer], X[fewer], treated[fewer], context[fewer], "context 1", seed=0)
    assert np.array_equal(predictions[0], predictions[1])


def test_response_metrics_by_hand():
    control, treated = np.array([1.0, 2, 3, 6]), np.array([2.0, 2, 5, 5])
    perfect = perturbation.response_metrics(treated, treated, control)
    assert perfect == pytest.approx({"mse": 0, "pearson_r": 1, "pearson_delta": 1})
    nothing = perturbation.response_metrics(control, treated, control)
    assert nothing == pytest.approx(
        {"mse": (1 + 0 + 4 + 1) / 4, "pearson_r": np.corrcoef(control, treated)[0, 1], "pearson_delta": 0}
    )
    opposite = perturbation.response_metrics(2 * control - treated, treated, control)
    assert opposite["pearson_delta"] == pytest.approx(-1)


def test_usable_contexts_have_control_and_treated_cells():
    context = np.array(["c", "c", "a", "a", "b", "d"])
    treated = np.array([True, False, False, True, True, False])
    assert perturbation.usable_contexts(treated, context) == ["a", "c"]


@pytest.mark.parametrize("held_out", ["nobody", "context 3"])
def test_context_that_cannot_be_held_out_is_named(held_out):
    embedding, X, treated, context = contexts_on_a_line(n=4)
    kept = ~treated | (context != "context 3")
    with pytest.raises(ValueError, match=rf"cannot hold out '{held_out}': .*context 0.*at least two"):
        tasks.perturbation_response(embedding[kept], X[kept], treated[kept], context[kept], held_out, seed=0)


def test_lone_context_is_refused():
    embedding, X, treated, context = contexts_on_a_line(n=4)
    lone = context == "context 0"
    with pytest.raises(ValueError, match="at least two are needed"):
        tasks.perturbation_response(embedding[lone], X[lone], treated[lone], context[lone], "context 0", seed=0)


def test_drug_response_of_real_patients_is_learnt_from_the_other_patients():
    adata = shared("glioblastoma_panobinostat.h5ad")[::2]
    treated = (adata.obs["condition"] == "panobinostat").to_numpy()
    donor = adata.obs["donor"].to_numpy().astype(str)
    X = expression.lognormalise(adata.X)
    embedding = expression.pca_scores(X, 20)
    X = X.toarray()
    learnt, undrugged = [], []
    for held_out in np.unique(donor):
        learnt.append(tasks.perturbation_response(embedding, X, treated, donor, held_out, seed=0)["pearson_delta"])
        # Other patients differ from this one, drug or no drug: that alone must not explain the agreement.
        control, after = (X[(treated == drugged) & (donor == held_out)].mean(axis=0) for drugged in (False, True))
        others = X[~treated & (donor != held_out)].mean(axis=0)
        undrugged.append(perturbation.response_metrics(others, after, control)["pearson_delta"])
    assert min(learnt) > 0.1
    assert np.mean(learnt) > 0.4
    assert np.mean(learnt) > np.mean(undrugged) + 0.1

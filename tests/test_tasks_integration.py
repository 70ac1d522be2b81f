"""Integration metrics against scib-metrics and umap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from datawall import tasks
from datawall.tasks import integration, neighbourhood, uncertainty

# umap, which scib-metrics imports, says so when first imported.
pytestmark = pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")


@pytest.fixture(scope="module")
def cells():
    """Four overlapping types of 90 cells in three batches of unequal size; the last type lacks one of them."""
    rng = np.random.default_rng(0)
    labels = np.repeat(list("abcd"), 90)
    batches = rng.choice(["one", "two", "three"], len(labels), p=[0.5, 0.3, 0.2])
    batches[(labels == "d") & (batches == "three")] = "one"
    X = 4 * np.eye(4, 6)[np.searchsorted(list("abcd"), labels)] + rng.normal(size=(len(labels), 6))
    before = X + 3 * np.eye(3, 6, k=3)[np.searchsorted(["one", "three", "two"], batches)]
    return X.astype(np.float32), labels, batches, before


@pytest.fixture(scope="module")
def metrics(cells):
    X, labels, batches, before = cells
    return tasks.zeroshot_integration(X, labels, batches, unintegrated=before)


@pytest.fixture(scope="module")
def embedded(cells):
    return integration._embedded(*cells)


def test_values_are_those_of_scib_metrics(cells, metrics, embedded, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import jax
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults
    from umap import umap_

    # For so few cells, to compile takes longer than not to.
    monkeypatch.setattr(umap_, "smooth_knn_dist", umap_.smooth_knn_dist.py_func)
    monkeypatch.setattr(umap_, "compute_membership_strengths", umap_.compute_membership_strengths.py_func)
    X, labels, batches, before = cells
    near = NeighborsResults(indices=embedded.indices, distances=embedded.distances)
    graph = near.subset_neighbors(15)
    ours = neighbourhood.similarities(graph.distances, graph.indices).toarray()
    np.testing.assert_allclose(ours, graph.knn_graph_connectivities.toarray(), atol=1e-4)
    clustered = scib_metrics.nmi_ari_cluster_labels_leiden(graph, labels, seed=0)
    fixed = scib_metrics.nmi_ari_cluster_labels_leiden(graph, labels, optimize_resolution=False, seed=0)
    with jax.disable_jit():
        kbet = []
        for label in np.unique(labels):
            some = X[labels == label]
            _, of = np.unique(batches[labels == label], return_inverse=True)
            k = min(70, max(10, int(np.bincount(of).mean() // 4))) + 1
            distances, indices = NearestNeighbors(n_neighbors=k).fit(some).kneighbors(some)
            kbet.append(scib_metrics.kbet(NeighborsResults(indices=indices, distances=distances), of)[0])
        expected = {
            "nmi": clustered["nmi"],
            "ari": clustered["ari"],
            "nmi_fixed": fixed["nmi"],
            "ari_fixed": fixed["ari"],
            "asw_label": scib_metrics.silhouette_label(X, labels),
            "isolated_labels": scib_metrics.isolated_labels(X, labels, batches),
            "clisi": scib_metrics.clisi_knn(near, labels),
            "asw_batch": scib_metrics.silhouette_batch(X, labels, batches),
            "graph_connectivity": scib_metrics.graph_connectivity(graph, labels),
            "ilisi": scib_metrics.ilisi_knn(near, batches),
            "kbet": np.mean(kbet),
            "pcr_comparison": scib_metrics.pcr_comparison(before, X, batches, categorical=True),
        }
    ours = dict(metrics)
    for part, clusters in (("", embedded.best_clusters), ("_fixed", embedded.fixed_clusters)):
        first = neighbourhood.contingency(clusters[0], embedded.labels, np.ones((1, len(labels))))
        ours |= {f"nmi{part}": neighbourhood.nmi(first)[0], f"ari{part}": neighbourhood.ari(first)[0]}
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert metrics["bras"] == pytest.approx(scib_metrics.bras(X, labels, batches), abs=1e-6)
    assert all(0.02 < value < 0.999 for value in expected.values()), expected  # none agrees for being trivial


def test_total_weighs_bio_and_batch_as_scib(metrics):
    bio = [metrics[name] for name in ("nmi", "ari", "asw_label", "isolated_labels", "clisi")]
    batch = [metrics[name] for name in ("bras", "graph_connectivity", "ilisi", "kbet", "pcr_comparison")]
    assert metrics["total"] == pytest.approx(0.6 * np.mean(bio) + 0.4 * np.mean(batch))
    assert metrics["avg_bio"] == pytest.approx(np.mean([metrics[name] for name in ("nmi", "ari", "asw_label")]))


def test_seeds_of_clustering_are_averaged_and_widen_the_interval():
    """A cloud without clusters: the seed decides where it is cut."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 2))
    labels, batches = [f"{x > 0} {y > 0}" for x, y in X], rng.choice(["x", "y"], 400)
    metrics = tasks.zeroshot_integration(X, labels, batches)
    cells = integration._embedded(X, labels, batches, None)
    ari = np.array([adjusted_rand_score(cells.labels, clusters) for clusters in cells.best_clusters])
    assert np.std(ari) > 0.005
    assert metrics["ari"] == pytest.approx(np.mean(ari))
    drawn = integration._drawn(np.repeat(ari[:, None], 20_001, axis=1))  # no cells are drawn anew, only seeds
    assert drawn[0] == pytest.approx(np.mean(ari))
    assert drawn[1:].std() == pytest.approx(np.std(ari, ddof=1) / np.sqrt(5), rel=0.05)
    low, high = metrics.intervals["ari"]
    of_one = neighbourhood.contingency(cells.best_clusters[0], cells.labels, uncertainty.resamples(400))
    assert high - low > np.subtract(*np.quantile(neighbourhood.ari(of_one), [0.975, 0.025]))


@settings(deadline=None)
@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 4)), st.randoms(use_true_random=False))
def test_weights_are_cells_repeated(labels, random):
    n_cells = len(labels)
    clusters = np.array([random.choice([0, 1, 2, label]) for label in labels])
    values = np.array([random.choice([0.0, 0.5, random.random()]) for _ in labels])
    weights = np.array([[random.randrange(4) for _ in labels] for _ in range(3)], dtype=float)
    weights[:, 0] += 1  # at least one cell
    tables = neighbourhood.contingency(clusters, labels, weights)
    for row, table_nmi, table_ari, median in zip(
        weights.astype(int),
        neighbourhood.nmi(tables),
        neighbourhood.ari(tables),
        integration._median(values, weights),
        strict=True,
    ):
        again = np.repeat(np.arange(n_cells), row)
        assert table_nmi == pytest.approx(normalized_mutual_info_score(labels[again], clusters[again]), abs=1e-7)
        assert table_ari == pytest.approx(adjusted_rand_score(labels[again], clusters[again]), abs=1e-7)
        assert median == pytest.approx(np.median(values[again]))


def test_every_metric_is_a_statistic_of_weights(embedded):
    weights = np.ones((3, len(embedded.labels)))
    weights[1] = 2
    weights[2] = np.arange(len(embedded.labels)) % 3 == 0
    for name, metric in integration.METRICS.items():
        values = metric(embedded, weights)
        assert values.shape[-1] == 3, name
        values = np.atleast_2d(values).mean(axis=0)
        assert values[0] == pytest.approx(values[1], abs=2e-3), name  # twice the cells; pairs of ari count a cell twice
        assert values[0] != values[2], name


def test_ceiling_is_what_batches_permuted_within_labels_reach(cells):
    X, labels, batches, _ = cells
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(8):
        mixed = batches.copy()
        for label in np.unique(labels):
            mixed[labels == label] = rng.permutation(mixed[labels == label])
        runs.append(tasks.zeroshot_integration(X, labels, mixed))
    assert np.mean([run["ilisi"] for run in runs]) == pytest.approx(runs[0].ceiling["ilisi"], abs=0.03)
    assert np.mean([run["kbet"] for run in runs]) == pytest.approx(runs[0].ceiling["kbet"], abs=0.03)
    assert runs[0].ceiling["ilisi"] < 0.95  # unequal batches cannot all be near


def test_a_metric_is_added_with_one_line_and_all_else_repeats(cells, metrics, monkeypatch):
    X, labels, batches, _ = cells
    monkeypatch.setitem(integration.METRICS, "first_batch", lambda cells, weights: weights @ (cells.batches == 0) / 360)
    again = tasks.zeroshot_integration(X, labels, batches)
    first_batch = again.pop("first_batch")
    assert first_batch == pytest.approx(np.mean(batches == "one"))
    low, high = again.intervals["first_batch"]
    assert low < first_batch < high
    # Without what was before integration, one metric and the total are not there, or other.
    assert again.keys() == metrics.keys() - {"pcr_comparison"}
    assert all(again[name] == metrics[name] for name in again.keys() - {"total"})


def test_unintegrated_must_be_of_the_same_cells(cells):
    X, labels, batches, before = cells
    with pytest.raises(ValueError, match="`unintegrated` has 359 cells, the embedding 360"):
        tasks.zeroshot_integration(X, labels, batches, unintegrated=before[1:])

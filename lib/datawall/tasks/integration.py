"""Zero-shot integration asks whether the embedding keeps cell types apart and batches together (scIB).

The metrics are those of Luecken et al. (2022, Nature Methods 19:41), on exact neighbours, with the values of
scib-metrics: tests hold them to it. It is not called, since each process would wait for it to compile, and again for
each new size of data set, longer than numpy takes for all of them.

Every metric is a statistic of the cells' weights: it gives a value for each row of weights, of which the first are all
one, and the others are how often a bootstrap resample holds each cell. Those of Leiden clusters give a row of values
for each seed of the clustering. Neighbours, clusters and silhouettes are those of the cells themselves throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_samples
from sklearn.metrics.cluster import expected_mutual_information
from sklearn.neighbors import NearestNeighbors

from datawall.tasks import neighbourhood, uncertainty
from datawall.tasks.classification import check_embedding
from datawall.tasks.metrics import Metrics

N_NEIGHBORS = 15  # of the graph, the cell itself among them
N_LOCAL = 90  # of LISI, the cell itself among them
RESOLUTIONS = np.arange(1, 11) / 5  # of Leiden clustering, as in scIB
SEEDS = range(5)  # of Leiden clustering; the first chooses the resolution


@dataclass(frozen=True)
class Embedded:
    """Cells to be judged, and what several metrics need of them."""

    embedding: np.ndarray  # (n_cells, n_latent) float32
    labels: np.ndarray  # (n_cells,) int from 0
    batches: np.ndarray  # (n_cells,) int from 0
    unintegrated: np.ndarray | None  # (n_cells, n_components)
    distances: np.ndarray  # (n_cells, at most N_LOCAL) to the nearest cells, itself first
    indices: np.ndarray  # of these
    nearness: np.ndarray  # weights of these in LISI

    @cached_property
    def graph(self) -> sp.csr_matrix:
        """(n_cells, n_cells) bool: whether the column is one of the row's nearest neighbours."""
        n_cells, indices = len(self.labels), self.indices[:, :N_NEIGHBORS]
        pointer = np.arange(0, indices.size + 1, indices.shape[1])
        return sp.csr_matrix((np.ones(indices.size, bool), indices.ravel(), pointer), shape=(n_cells, n_cells))

    @cached_property
    def leiden(self) -> Callable[[float, int], np.ndarray]:
        """Leiden clusters of the cells, (n_cells,) int, at a resolution and with a seed."""
        nearest = slice(None), slice(N_NEIGHBORS)
        return neighbourhood.leiden(neighbourhood.similarities(self.distances[nearest], self.indices[nearest]))

    @cached_property
    def best_clusters(self) -> list[np.ndarray]:
        """By seed, the clusters at the resolution with the highest NMI of the first seed."""
        once = np.ones((1, len(self.labels)))
        tables = (neighbourhood.contingency(self.leiden(at, SEEDS[0]), self.labels, once) for at in RESOLUTIONS)
        best = RESOLUTIONS[np.argmax([neighbourhood.nmi(table)[0] for table in tables])]
        return [self.leiden(best, seed) for seed in SEEDS]

    @cached_property
    def fixed_clusters(self) -> list[np.ndarray]:
        """By seed, the clusters at resolution 1."""
        return [self.leiden(1, seed) for seed in SEEDS]

    @cached_property
    def silhouettes(self) -> np.ndarray:
        """Silhouette of each cell among labels."""
        return silhouette_samples(self.embedding, self.labels)


def zeroshot_integration(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray, *, unintegrated: np.ndarray | None = None
) -> Metrics:
    """Metrics of scIB (Luecken et al. 2022), with the values of scib-metrics, on exact neighbours (`metrics.csv`).

    The embedding is (n_cells, n_latent), `unintegrated`, (n_cells, n_components), the principal components of the
    cells' expression without any model. A metric that these cells leave undefined is left out, of the total too:
    pcr_comparison without `unintegrated`, and kbet where no label has ten cells and two batches. Those of Leiden
    clusters are means over five seeds of the clustering, which varies in their intervals too. The total is not scaled.

    Raises ValueError if an array is not finite or not of the same cells, all cells have the same embedding, label or
    batch, or no label has cells in two batches.
    """
    cells = _embedded(embedding, labels, batches, unintegrated)
    weights = np.vstack([np.ones(len(embedding)), uncertainty.resamples(len(embedding))])
    draws = {name: _drawn(metric(cells, weights)) for name, metric in METRICS.items()}
    draws = {name: values for name, values in draws.items() if np.isfinite(values[0])}
    draws["avg_bio"] = np.mean([draws[name] for name in AVG_BIO], axis=0)
    bio, batch = ([draws[name] for name in names if name in draws] for names in (BIO, BATCH))
    draws["total"] = 0.6 * np.mean(bio, axis=0) + 0.4 * np.mean(batch, axis=0)
    return Metrics.of_draws(draws, _chance(cells), _ceiling(cells))


def _drawn(values: np.ndarray) -> np.ndarray:
    """Values of the rows of weights; of several seeds their mean, and in each resample that of seeds drawn anew.

    Deviations are scaled by √(n / (n - 1)), as the mean that they are taken from is that of the same few seeds.
    """
    if values.ndim == 1:
        return values
    n_seeds, n_weights = values.shape
    mean, picked = values.mean(axis=0), np.random.default_rng(0).integers(n_seeds, size=values.shape)
    drawn = mean + (values[picked, np.arange(n_weights)].mean(axis=0) - mean) * np.sqrt(n_seeds / (n_seeds - 1))
    return np.concatenate([mean[:1], drawn[1:]])


def _embedded(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray, unintegrated: np.ndarray | None
) -> Embedded:
    """The cells and their neighbours, after checks."""
    check_embedding(embedding)
    codes = []
    for name, values in (("label", np.asarray(labels).astype(str)), ("batch", np.asarray(batches).astype(str))):
        different, code = np.unique(values, return_inverse=True)
        if len(different) < 2:
            raise ValueError(f"all cells have the {name} {str(values[0])!r}; integration needs at least two.")
        codes.append(code)
    if unintegrated is not None:
        if len(unintegrated) != len(embedding):
            raise ValueError(f"`unintegrated` has {len(unintegrated)} cells, the embedding {len(embedding)}.")
        check_embedding(unintegrated)
    if (embedding == embedding[0]).all():
        raise ValueError("all cells have the same embedding; there are no neighbours to judge.")
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    # Each cell is its own first neighbour, as scanpy and scib-metrics count them.
    neighbours = NearestNeighbors(n_neighbors=min(N_LOCAL, len(embedding))).fit(embedding)
    distances, indices = neighbours.kneighbors(embedding)
    distances, itself = distances.astype(np.float32), indices == np.arange(len(indices))[:, None]
    nearness = neighbourhood.lisi_weights(distances, itself, perplexity=indices.shape[1] // 3)
    return Embedded(embedding, *codes, unintegrated, distances, indices, nearness)


# Metrics of distances between cells


def _mean_of_labels(values: np.ndarray, cells: Embedded, weights: np.ndarray) -> np.ndarray:
    """Mean over labels of the weighted mean of their cells that have a value; NaN where no label has weight."""
    sums, n_labels = np.zeros(len(weights)), np.zeros(len(weights))
    for label in np.unique(cells.labels[np.isfinite(values)]):
        inside = np.isfinite(values) & (cells.labels == label)
        total = weights[:, inside].sum(axis=1)
        sums += weights[:, inside] @ values[inside] / np.maximum(total, 1)
        n_labels += total > 0
    return np.where(n_labels > 0, sums / np.maximum(n_labels, 1), np.nan)


def _isolated_labels(cells: Embedded, weights: np.ndarray) -> np.ndarray:
    """Scaled silhouette of the labels that the fewest batches have."""
    labels, _ = np.unique(np.column_stack([cells.labels, cells.batches]), axis=0).T
    n_batches = np.bincount(labels)
    isolated = n_batches[cells.labels] == n_batches.min()
    return _mean_of_labels(np.where(isolated, (cells.silhouettes + 1) / 2, np.nan), cells, weights)


def _cosine_silhouettes(X: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Silhouettes of batches by mean cosine distances to the own and to all other batches (BRAS).

    A cell's silhouette is (outside - inside) / max(outside, inside): `inside` is its mean distance, 1 - x · y on the
    unit sphere, to the other cells y of its batch, `outside` that to the cells of all other batches together.
    """
    X = (X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)).astype(np.float64)
    _, code, sizes = np.unique(batches, return_inverse=True, return_counts=True)
    # The mean of products with many cells is the product with their mean.
    sums = np.stack([X[code == batch].sum(axis=0) for batch in range(len(sizes))])
    near, n_near = (X * sums[code]).sum(axis=1) - (X * X).sum(axis=1), sizes[code] - 1
    inside = 1 - near / np.maximum(n_near, 1)
    outside = 1 - (X * (sums.sum(axis=0) - sums[code])).sum(axis=1) / (len(X) - sizes[code])
    larger = np.maximum(inside, outside)
    return np.where((n_near > 0) & (larger > 0), (outside - inside) / np.where(larger > 0, larger, 1), 0)


def _mixing(
    silhouettes: Callable[[np.ndarray, np.ndarray], np.ndarray], cells: Embedded, weights: np.ndarray
) -> np.ndarray:
    """1 - |silhouette of batches| within labels; labels in one batch, or with no two cells of one, are left out."""
    mixing = np.full(len(cells.labels), np.nan)
    for label in np.unique(cells.labels):
        inside = cells.labels == label
        if 1 < len(np.unique(cells.batches[inside])) < inside.sum():
            mixing[inside] = 1 - np.abs(silhouettes(cells.embedding[inside], cells.batches[inside]))
    if np.isnan(mixing).all():
        raise ValueError("no label has cells in two batches; mixing of batches cannot be told from labels.")
    return _mean_of_labels(mixing, cells, weights)


def _pcr_comparison(cells: Embedded, weights: np.ndarray) -> np.ndarray:
    """Principal component regression before and after (Büttner et al. 2019)."""
    if cells.unintegrated is None:
        return np.full(len(weights), np.nan)
    before, after = (_batch_variance(X, cells.batches, weights) for X in (cells.unintegrated, cells.embedding))
    return np.maximum(0, (before - after) / np.where(before > 0, before, np.nan))


def _batch_variance(X: np.ndarray, batches: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the variance that lies between batches, 0 where there is none.

    That is the R² of each principal component regressed on batch, weighted by the component's variance: over all
    components, it does not depend on the axes, so that none need be found.
    """
    X = X - X.mean(axis=0, dtype=np.float64)
    n_cells = weights.sum(axis=1)
    middle = np.square(weights @ X).sum(axis=1) / n_cells
    total = weights @ np.square(X).sum(axis=1) - middle
    between = -middle
    for batch in np.unique(batches):
        own = weights[:, batches == batch]
        n_own = own.sum(axis=1)
        between += np.square(own @ X[batches == batch]).sum(axis=1) / np.where(n_own > 0, n_own, 1)
    return np.where(total > 0, between / np.where(total > 0, total, 1), 0)


# Metrics of neighbours


def _graph_connectivity(cells: Embedded, weights: np.ndarray) -> np.ndarray:
    """Share of a label's cells in the largest strongly connected part of its graph, mean over labels."""
    inside = np.zeros(len(cells.labels))
    for label in np.unique(cells.labels):
        rows = np.flatnonzero(cells.labels == label)
        _, part = connected_components(cells.graph[rows][:, rows], connection="strong")
        inside[rows] = part == np.bincount(part).argmax()
    return _mean_of_labels(inside, cells, weights)


def _lisi(cells: Embedded, groups: np.ndarray) -> np.ndarray:
    """Inverse Simpson index of the labels or batches near each cell: 1 / sum of p², p the weight that a group has."""
    near = groups[cells.indices]
    shares = (np.where(near == group, cells.nearness, 0).sum(axis=1) for group in np.unique(groups))
    return 1 / sum(share**2 for share in shares)


def _median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of the values, each repeated as often as its weight says."""
    return np.array([np.median(np.repeat(values, times)) for times in weights.astype(int)])


def _clisi(cells: Embedded, weights: np.ndarray) -> np.ndarray:
    n_labels = cells.labels.max() + 1
    return (n_labels - _median(_lisi(cells, cells.labels), weights)) / (n_labels - 1)


def _ilisi(cells: Embedded, weights: np.ndarray) -> np.ndarray:
    return (_median(_lisi(cells, cells.batches), weights) - 1) / cells.batches.max()


def _of_clusters(
    statistic: Callable[[np.ndarray], np.ndarray], seeds: list[np.ndarray], cells: Embedded, weights: np.ndarray
) -> np.ndarray:
    """A statistic of clusters and labels, (n_seeds, n_weights)."""
    return np.stack([statistic(neighbourhood.contingency(clusters, cells.labels, weights)) for clusters in seeds])


METRICS: dict[str, Callable[[Embedded, np.ndarray], np.ndarray]] = {
    "nmi": lambda cells, weights: _of_clusters(neighbourhood.nmi, cells.best_clusters, cells, weights),
    "ari": lambda cells, weights: _of_clusters(neighbourhood.ari, cells.best_clusters, cells, weights),
    "nmi_fixed": lambda cells, weights: _of_clusters(neighbourhood.nmi, cells.fixed_clusters, cells, weights),
    "ari_fixed": lambda cells, weights: _of_clusters(neighbourhood.ari, cells.fixed_clusters, cells, weights),
    "asw_label": lambda cells, weights: (weights @ cells.silhouettes / weights.sum(axis=1) + 1) / 2,
    "isolated_labels": _isolated_labels,
    "clisi": _clisi,
    "asw_batch": lambda cells, weights: _mixing(silhouette_samples, cells, weights),
    "bras": lambda cells, weights: _mixing(_cosine_silhouettes, cells, weights),
    "graph_connectivity": _graph_connectivity,
    "ilisi": _ilisi,
    "kbet": lambda cells, weights: _mean_of_labels(
        neighbourhood.kbet_acceptance(cells.embedding, cells.labels, cells.batches), cells, weights
    ),
    "pcr_comparison": _pcr_comparison,
}  # of the cells and (n_weights, n_cells) weights, n_weights values; a line here, and one in metrics.csv, adds a metric
AVG_BIO = ("nmi", "ari", "asw_label")
BIO = ("nmi", "ari", "asw_label", "isolated_labels", "clisi")
BATCH = ("bras", "graph_connectivity", "ilisi", "kbet", "pcr_comparison")


# What chance reaches


def _chance(cells: Embedded) -> dict[str, float]:
    """Levels of metrics for labels that have nothing to do with the embedding, permuted where there is no formula."""
    blind = replace(cells, labels=np.random.default_rng(0).permutation(cells.labels))
    once = np.ones((1, len(cells.labels)))
    chance = {
        name: float(METRICS[name](blind, once)[0])
        for name in ("asw_label", "isolated_labels", "clisi", "graph_connectivity")
    }
    for name, clusters in (("nmi", cells.best_clusters), ("nmi_fixed", cells.fixed_clusters)):
        chance[name] = _chance_nmi(clusters[0], cells.labels)
    chance |= {"ari": 0.0, "ari_fixed": 0.0}
    return chance | {"avg_bio": float(np.mean([chance[name] for name in AVG_BIO]))}


def _ceiling(cells: Embedded) -> dict[str, float]:
    """Levels of batch metrics for batches that are mixed at random within labels."""
    rng, mixed = np.random.default_rng(0), cells.batches.copy()
    for label in np.unique(cells.labels):
        mixed[cells.labels == label] = rng.permutation(mixed[cells.labels == label])
    ilisi = _ilisi(replace(cells, batches=mixed), np.ones((1, len(mixed))))
    return {"ilisi": float(ilisi[0]), "kbet": 1 - neighbourhood.KBET_ALPHA}


def _chance_nmi(clusters: np.ndarray, labels: np.ndarray) -> float:
    """NMI of the clusters with permuted labels, on average over permutations (Vinh et al. 2010)."""
    (table,) = neighbourhood.contingency(clusters, labels, np.ones((1, len(labels))))
    entropies = neighbourhood.entropy(table.sum(axis=1), 0) + neighbourhood.entropy(table.sum(axis=0), 0)
    expected = expected_mutual_information(sp.csr_matrix(table.T.astype(np.int64)), len(labels))
    return float(2 * expected / entropies)

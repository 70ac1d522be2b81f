"""Neighbours of cells: their similarity, clusters, weights and batches, as UMAP, scib-metrics and kBET have them."""

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import scipy.sparse as sp
from scipy.special import xlogy
from scipy.stats import chi2
from sklearn.neighbors import NearestNeighbors

KBET_ALPHA = 0.05  # level of the test
TOLERANCE = 1e-5  # at which both searches below end


def _search(excess: Callable[[np.ndarray], np.ndarray], n: int, steps: int) -> np.ndarray:
    """Positive numbers at which an increasing function of each is zero: doubled from 1 until above, then halved."""
    x, low, high = np.ones(n), np.zeros(n), np.full(n, np.inf)
    for _ in range(steps):
        over = excess(x)
        searching = np.abs(over) >= TOLERANCE
        if not searching.any():
            break
        low, high = np.where(over > 0, low, x), np.where(over > 0, x, high)
        x = np.where(searching, np.where(np.isinf(high), 2 * x, (low + high) / 2), x)
    return x


def similarities(distances: np.ndarray, indices: np.ndarray) -> sp.coo_matrix:
    """UMAP's similarities of neighbours (McInnes et al. 2018), whose graph scanpy and scib-metrics cluster.

    That of a neighbour at distance d is exp(-(d - rho) / sigma), 1 up to the nearest distance above zero, rho, and
    sigma such that those of a cell sum to log2 of the number of neighbours. Either side's a and b make a + b - a b.
    Given are distances and indices of the nearest cells, (n_cells, n_neighbours), the cell itself first; the result is
    symmetric, (n_cells, n_cells), and zero between a cell and itself.
    """
    n_cells, k = distances.shape
    d = distances.astype(np.float64)
    rho = np.where(d > 0, d, np.inf).min(axis=1)
    rho = np.where(np.isinf(rho), 0, rho)
    beyond = np.maximum(d - rho[:, None], 0)
    sigma = _search(lambda x: np.exp(-beyond[:, 1:] / x[:, None]).sum(axis=1) - np.log2(k), n_cells, steps=64)
    sigma = np.maximum(sigma, 1e-3 * np.where(rho > 0, d.mean(axis=1), d.mean()))
    values = np.where(indices == np.arange(n_cells)[:, None], 0, np.exp(-beyond / sigma[:, None]))
    pointer = np.arange(0, indices.size + 1, k)
    directed = sp.csr_matrix((values.ravel(), indices.ravel(), pointer), shape=(n_cells, n_cells))
    directed.eliminate_zeros()
    return (directed + directed.T - directed.multiply(directed.T)).tocoo()


def leiden(weights: sp.coo_matrix) -> Callable[[float, int], np.ndarray]:
    """A function of resolution and seed: Leiden clusters of a symmetric graph, (n_cells,) int, as in scib-metrics.

    In scanpy's and scib-metrics' graphs every edge is there twice. Here it is once, and half the randomness, `beta`,
    makes the clusters the same.
    """
    import igraph

    edges = sp.triu(weights).tocoo()
    graph = igraph.Graph(weights.shape[0], np.column_stack([edges.row, edges.col]).tolist())
    options = {"objective_function": "modularity", "weights": edges.data.tolist(), "beta": 0.005}

    @cache
    def clusters(resolution: float, seed: int) -> np.ndarray:
        igraph.set_random_number_generator(random.Random(seed))  # noqa: S311
        communities = graph.community_leiden(resolution=resolution, **options)
        igraph.set_random_number_generator(random)
        return np.array(communities.membership)

    return clusters


def contingency(clusters: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight of the cells of each cluster and label, (n_weights, n_clusters, n_labels)."""
    shape = clusters.max() + 1, labels.max() + 1
    pair, n_cells = clusters * shape[1] + labels, len(labels)
    one_hot = sp.csr_matrix((np.ones(n_cells), pair, np.arange(n_cells + 1)), shape=(n_cells, shape[0] * shape[1]))
    return (weights @ one_hot).reshape(-1, *shape)


def entropy(weights: np.ndarray, axis: int | tuple[int, int]) -> np.ndarray:
    """Entropy in nats of what weights are distributed over."""
    p = weights / weights.sum(axis=axis, keepdims=True)
    return -xlogy(p, p).sum(axis=axis)


def nmi(tables: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of the two entropies; 1 where both are zero.

    Of clusters and labels that is 2 (H(clusters) + H(labels) - H(both)) / (H(clusters) + H(labels)).
    """
    entropies = entropy(tables.sum(axis=2), 1) + entropy(tables.sum(axis=1), 1)
    return np.where(entropies > 0, 2 * (1 - entropy(tables, (1, 2)) / np.where(entropies > 0, entropies, 1)), 1)


def ari(tables: np.ndarray) -> np.ndarray:
    """Adjusted Rand index (Hubert and Arabie 1985); 1 where both sides are one group, or both all single cells.

    That is the number of pairs of cells in one cluster and one label, less that expected by chance, over the same of
    the mean of the pairs in one cluster and of those in one label.
    """

    def pairs(sizes: np.ndarray, axis: int | tuple[int, int]) -> np.ndarray:
        return (sizes * (sizes - 1) / 2).sum(axis=axis)

    n_cells = tables.sum(axis=(1, 2))
    of_clusters, of_labels = pairs(tables.sum(axis=2), 1), pairs(tables.sum(axis=1), 1)
    expected = of_clusters * of_labels / np.maximum(n_cells * (n_cells - 1) / 2, 1)
    span = (of_clusters + of_labels) / 2 - expected
    return np.where(span > 0, (pairs(tables, (1, 2)) - expected) / np.where(span > 0, span, 1), 1)


def lisi_weights(distances: np.ndarray, itself: np.ndarray, perplexity: float) -> np.ndarray:
    """Weights exp(-beta d) of each cell's neighbours in LISI (Korsunsky et al. 2019); rows that sum to 1.

    All are (n_cells, n_neighbours); `itself` says which neighbour is the cell itself, of weight 0. The perplexity is
    the number of neighbours that matter: beta is such that the entropy of the weights is its logarithm.
    """
    d = distances.astype(np.float64)

    def weights(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = np.where(itself, 0, np.exp(-d * beta[:, None]))
        total = np.maximum(p.sum(axis=1), np.finfo(float).tiny)
        p /= total[:, None]
        return p, np.log(total) + beta * (d * p).sum(axis=1)

    beta = _search(lambda beta: np.log(perplexity) - weights(beta)[1], len(d), steps=50)
    return weights(beta)[0]


def kbet_acceptance(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Whether a χ² test accepts that a cell's neighbours are drawn from the batches of its label (kBET).

    As in scIB, neighbours are those within the label, as many as a quarter of its mean batch but 10 to 70, beside the
    cell itself, and labels in one batch or with fewer than 10 cells are left out. scIB finds neighbours by diffusion
    over a graph of 50, so as to treat graphs and embeddings alike; of an embedding they are found directly
    (Büttner et al. 2019). So the values are those of `scib_metrics.kbet` on the neighbours within each label; on real
    cells `scib_metrics.kbet_per_label`, which diffuses, was .004 to .19 from them. 1 where the test accepts at the 5 %
    level, 0 where it rejects, NaN for labels left out.
    """
    accepted = np.full(len(labels), np.nan)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        present, code = np.unique(batches[rows], return_inverse=True)
        if len(rows) < 10 or len(present) < 2:
            continue
        k = min(min(70, max(10, len(rows) // len(present) // 4)) + 1, len(rows))
        nearest = NearestNeighbors(n_neighbors=k).fit(embedding[rows]).kneighbors(embedding[rows])[1]
        observed = np.stack([(code[nearest] == batch).sum(axis=1) for batch in range(len(present))], axis=1)
        expected = k * np.bincount(code) / len(rows)
        statistic = (np.square(observed - expected) / expected).sum(axis=1)
        accepted[rows] = chi2.sf(statistic, len(present) - 1) >= KBET_ALPHA
    return accepted

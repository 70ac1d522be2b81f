"""Zero-shot integration asks whether the embedding keeps cell types apart and batches together (scIB)."""

from __future__ import annotations

import numpy as np

from datawall.tasks.classification import check_embedding

N_NEIGHBORS = 15


def zeroshot_integration(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Metrics of scIB (Luecken et al. 2022), with the values of scib-metrics, on exact neighbours.

    Silhouettes are scikit-learn's: scib-metrics compiles its own anew in every process, for seconds.

    Parameters
    ----------
    embedding
        (n_cells, n_latent).
    labels, batches
        (n_cells,) cell type and batch.

    Returns
    -------
    nmi, ari
        Of Leiden clusters with the labels, at the resolution (of ten, 0.2 to 2) with the best nmi.
    asw_label
        Silhouette of the labels, scaled to 0 to 1.
    avg_bio
        Mean of the three: the original study's headline.
    asw_batch
        Silhouette of batches within labels: 1 where they overlap.
    graph_connectivity
        Share of each label's cells in its largest strongly connected part of the directed neighbour graph.

    Each is 1 at best.

    Raises
    ------
    ValueError
        If the embedding is not finite, there is only one label or one batch, or no label has cells in two batches.
    """
    import os

    # scib-metrics computes on jax: on the CPU, leaving a GPU to torch.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from scib_metrics import graph_connectivity, nmi_ari_cluster_labels_leiden
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    check_embedding(embedding)
    labels, batches = np.asarray(labels).astype(str), np.asarray(batches).astype(str)
    for name, values in (("label", labels), ("batch", batches)):
        if len(np.unique(values)) < 2:
            raise ValueError(f"all cells have the {name} {str(values[0])!r}; integration needs at least two.")
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    n_neighbors = min(N_NEIGHBORS, len(embedding))
    # Each cell is its own first neighbour, as scanpy and scib-metrics count them.
    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(embedding).kneighbors(embedding)
    neighbours = NeighborsResults(indices=indices, distances=distances.astype(np.float32))
    metrics = nmi_ari_cluster_labels_leiden(neighbours, labels, optimize_resolution=True, seed=0)
    metrics["asw_label"] = (silhouette_score(embedding, labels) + 1) / 2
    metrics["avg_bio"] = np.mean([metrics["nmi"], metrics["ari"], metrics["asw_label"]])
    metrics["asw_batch"] = _batch_silhouette(embedding, labels, batches)
    metrics["graph_connectivity"] = graph_connectivity(neighbours, labels)
    return {name: float(value) for name, value in metrics.items()}


def _batch_silhouette(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Mean over labels of the mean 1 - |silhouette of batches|, as in scIB; labels in one batch are left out."""
    from sklearn.metrics import silhouette_samples

    of_labels = []
    for label in np.unique(labels):
        cells = labels == label
        if 1 < len(np.unique(batches[cells])) < cells.sum():
            of_labels.append(1 - np.abs(silhouette_samples(embedding[cells], batches[cells])).mean())
    if not of_labels:
        raise ValueError("no label has cells in two batches; mixing of batches cannot be told from labels.")
    return float(np.mean(of_labels))

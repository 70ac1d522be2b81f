"""Normalised expression, variable genes and principal components: scanpy's and scikit-learn's, in one place."""

from __future__ import annotations

import anndata as ad
import numpy as np
import scipy.sparse as sp

TARGET_SUM = 1e4


def lognormalise(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts per 10,000, then log(1 + x): what `scanpy.pp.normalize_total` and `scanpy.pp.log1p` give.

    Parameters
    ----------
    counts
        (n_cells, n_genes) raw counts; left as they are. A cell without counts stays all zero.

    Returns
    -------
    (n_cells, n_genes) float32 CSR, in natural-log units.
    """
    from sklearn.preprocessing import normalize

    X = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    if X.shape[0]:
        X = normalize(X, norm="l1", copy=False) * np.float32(TARGET_SUM)
    return X.log1p()


def variable_genes(lognormalised: sp.csr_matrix, n_genes: int | None = None) -> np.ndarray:
    """Highly variable genes by `scanpy.pp.highly_variable_genes`, flavour `seurat` (Satija et al. 2015).

    Parameters
    ----------
    lognormalised
        (n_cells, n_genes) from `lognormalise`.
    n_genes
        Take this many of the highest normalised dispersion; by default scanpy's cut-offs decide (mean 0.0125 to
        3, dispersion at least 0.5), as in the original study.

    Returns
    -------
    (n_genes,) bool.

    Raises
    ------
    ValueError
        If no gene qualifies.
    """
    import scanpy as sc

    detected = lognormalised.getnnz(axis=0) > 0
    if n_genes is not None and n_genes >= detected.sum():
        return detected
    adata = ad.AnnData(lognormalised)
    chosen = sc.pp.highly_variable_genes(adata, n_top_genes=n_genes, inplace=False)["highly_variable"].to_numpy()
    chosen = chosen & detected
    if not chosen.any():
        raise ValueError(f"no gene is variable among {lognormalised.shape[0]} cells; use more cells.")
    return chosen


def principal_axes(X: sp.csr_matrix | np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of the centred matrix, through its covariance in double precision.

    Double precision and a fixed sign (the largest loading of each axis is positive) keep neighbours of cells the
    same from machine to machine.

    Parameters
    ----------
    X
        (n_cells, n_genes); dense in memory, so choose genes first.
    n_components
        Fewer are returned where the matrix has fewer cells or genes.

    Returns
    -------
    axes (n_components, n_genes) and the mean (n_genes,), float64.
    """
    from sklearn.decomposition import PCA

    dense = np.asarray(X.toarray() if sp.issparse(X) else X, dtype=np.float64)
    # A centred matrix of n cells has rank n - 1 at most; components past it would be noise.
    n_components = max(1, min(n_components, dense.shape[0] - 1, dense.shape[1]))
    solver = "covariance_eigh" if dense.shape[0] >= dense.shape[1] else "full"
    pca = PCA(n_components, svd_solver=solver).fit(dense)
    largest = np.abs(pca.components_).argmax(axis=1)
    signs = np.sign(pca.components_[np.arange(n_components), largest])
    return pca.components_ * signs[:, None], pca.mean_


def pca_scores(X: sp.csr_matrix | np.ndarray, n_components: int = 50) -> np.ndarray:
    """Principal component scores of the cells themselves, (n_cells, n_components) float32."""
    axes, mean = principal_axes(X, n_components)
    return np.asarray(X @ axes.T - mean @ axes.T, dtype=np.float32)

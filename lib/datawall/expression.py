"""Normalised expression, variable genes and principal components: scanpy's and scikit-learn's, in one place."""

from __future__ import annotations

import numpy as np
import pandas as pd
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
    detected = lognormalised.getnnz(axis=0) > 0
    if n_genes is not None and n_genes >= detected.sum():
        return detected
    mean, dispersion = _standardised_dispersion(lognormalised)
    if n_genes is None:
        chosen = (mean > 0.0125) & (mean < 3) & (dispersion > 0.5)
    else:
        chosen = dispersion >= np.sort(dispersion[np.isfinite(dispersion)])[-n_genes:][0]
    chosen &= detected
    if not chosen.any():
        raise ValueError(f"no gene is variable among {lognormalised.shape[0]} cells; use more cells.")
    return chosen


def _standardised_dispersion(lognormalised: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Log mean of each gene, and its log dispersion standardised among genes of like mean (Satija et al. 2015).

    scanpy's function of the same purpose compiles its sums anew in every process, for seconds.
    """
    X = lognormalised.astype(np.float64).expm1()
    n_cells = X.shape[0]
    mean = np.asarray(X.sum(axis=0)).ravel() / n_cells
    squares = np.asarray(X.multiply(X).sum(axis=0)).ravel() / n_cells
    variance = np.maximum(squares - mean**2, 0) * n_cells / max(1, n_cells - 1)
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = variance / mean
    genes = pd.DataFrame({"mean": np.log1p(mean), "dispersion": np.log(np.where(dispersion == 0, np.nan, dispersion))})
    of_bin = genes.groupby(pd.cut(genes["mean"], bins=20), observed=True)["dispersion"]
    centre, spread = of_bin.transform("mean"), of_bin.transform("std")
    # A gene alone in its bin has no spread; scanpy gives it a standardised dispersion of one.
    alone = spread.isna()
    spread, centre = spread.where(~alone, centre), centre.where(~alone, 0.0)
    return genes["mean"].to_numpy(), ((genes["dispersion"] - centre) / spread).to_numpy()


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

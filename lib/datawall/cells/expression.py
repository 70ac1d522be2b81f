"""Normalised expression, variable genes and principal components: scanpy's and scikit-learn's, in one place.

What is called `streamed` reads a corpus in blocks, once or more, in constant memory. `Blocks` gives them anew at each
call: raw counts, (n_cells of the block, n_genes) CSR, always in the same order.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from datawall.engine import disk

type Blocks = Callable[[], Iterable[sp.csr_matrix]]

TARGET_SUM = 1e4  # counts that a cell is scaled to
COMPONENTS = 50


def lognormalise(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts per 10,000, then natural log(1 + x), float32: scanpy's `normalize_total` and `log1p`; zeros stay zero."""
    from sklearn.preprocessing import normalize

    X = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    if X.shape[0]:
        X = normalize(X, norm="l1", copy=False) * np.float32(TARGET_SUM)
    return X.log1p()


def variable_genes(lognormalised: sp.csr_matrix, n_genes: int | None = None) -> np.ndarray:
    """Highly variable genes, (n_genes,) bool: `scanpy.pp.highly_variable_genes`, flavour `seurat` (Satija et al. 2015).

    The `n_genes` with the highest normalised dispersion; by default scanpy's cut-offs decide (mean 0.0125 to 3,
    dispersion at least 0.5), as in the original study, or all detected genes where none passes: cells of a small panel,
    scaled to 10,000, have means above 3. Raises ValueError if no gene is detected.
    """
    return _choose_genes(_moments(lognormalised), lognormalised.shape[0], n_genes)


def streamed_variable_genes(blocks: Blocks, n_genes: int | None = None) -> np.ndarray:
    """`variable_genes` of a corpus in blocks: exactly those, as its moments add up; no sample is drawn."""
    moments, n_cells = 0.0, 0
    for counts in tqdm(blocks(), desc="variable genes", unit="block", leave=False, delay=5):
        moments = moments + _moments(lognormalise(counts))
        n_cells += counts.shape[0]
    if not n_cells:
        raise ValueError("there are no cells to choose variable genes from.")
    return _choose_genes(moments, n_cells, n_genes)


def _moments(lognormalised: sp.csr_matrix) -> np.ndarray:
    """(3, n_genes): sum of each gene's normalised counts, sum of their squares, and the cells that have any."""
    X = lognormalised.astype(np.float64).expm1()
    sums, squares = X.sum(axis=0), X.multiply(X).sum(axis=0)
    return np.stack([np.asarray(sums).ravel(), np.asarray(squares).ravel(), X.getnnz(axis=0)])


def _choose_genes(moments: np.ndarray, n_cells: int, n_genes: int | None) -> np.ndarray:
    """The variable genes, (n_genes,) bool, from the moments of all cells."""
    detected = moments[2] > 0
    if n_genes is not None and n_genes >= detected.sum():
        return detected
    mean, dispersion = _standardised_dispersion(moments, n_cells)
    if n_genes is None:
        chosen = (mean > 0.0125) & (mean < 3) & (dispersion > 0.5)
    else:
        chosen = dispersion >= np.sort(dispersion[np.isfinite(dispersion)])[-n_genes:][0]
    if not detected.any():
        raise ValueError(f"no gene is variable among {n_cells} cells; use more cells.")
    chosen &= detected
    return chosen if chosen.any() else detected


def _standardised_dispersion(moments: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Log mean of each gene, and its log dispersion standardised among genes of like mean (Satija et al. 2015)."""
    mean, squares = moments[:2] / n_cells
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
    """Principal axes of the centred matrix, (n_components, n_genes), and its mean, (n_genes,), both float64.

    Double precision and a fixed sign (the largest loading of each axis is positive) keep neighbours of cells the same
    from machine to machine. The matrix is made dense; fewer cells or genes have fewer axes.
    """
    from sklearn.decomposition import PCA

    dense = np.asarray(X.toarray() if sp.issparse(X) else X, dtype=np.float64)
    # A centred matrix of n cells has rank n - 1 at most; components past it would be noise.
    n_components = max(1, min(n_components, dense.shape[0] - 1, dense.shape[1]))
    solver = "covariance_eigh" if dense.shape[0] >= dense.shape[1] else "full"
    pca = PCA(n_components, svd_solver=solver).fit(dense)
    return pca.components_, pca.mean_


def pca_scores(X: sp.csr_matrix | np.ndarray, n_components: int = COMPONENTS) -> np.ndarray:
    """Principal component scores of the cells themselves, (n_cells, n_components) float32."""
    axes, mean = principal_axes(X, n_components)
    return np.asarray(X @ axes.T - mean @ axes.T, dtype=np.float32)


def streamed_pca(blocks: Blocks, path: Path, *, then: Blocks = lambda: ()) -> np.ndarray:
    """Principal component scores of a corpus in blocks, on its variable genes, written to an `.npy` file atomically.

    They are `pca_scores` of all cells at once, up to rounding: covariances add up over blocks. Genes are centred, not
    scaled; the original study scales them and clips at 10, which gives noisy genes the same weight. Cells of `then` are
    scored after those of `blocks`, on their components. Returns a read-only memory map, (n_cells, 50 or fewer) float32.
    """
    genes = streamed_variable_genes(blocks)
    axes, mean, n_cells = streamed_axes(blocks, genes, COMPONENTS)
    n_cells += sum(counts.shape[0] for counts in then())

    def write(scratch: Path) -> None:
        scores, begin = np.lib.format.open_memmap(scratch, "w+", np.float32, (n_cells, len(axes))), 0
        every = itertools.chain(blocks(), then())
        for counts in tqdm(every, desc="principal component scores", unit="block", leave=False, delay=5):
            end = begin + counts.shape[0]
            scores[begin:end] = lognormalise(counts)[:, genes] @ axes.T - mean @ axes.T
            begin = end
        scores.flush()

    disk.write_atomically(path, write)
    return np.load(path, mmap_mode="r")


def streamed_axes(blocks: Blocks, genes: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray, int]:
    """`principal_axes` of chosen genes, (n_components, n_genes), their mean, (n_genes,), and the number of cells."""
    from scipy.linalg import eigh
    from sklearn.utils.extmath import svd_flip

    n_genes, n_cells = int(genes.sum()), 0
    total, products = np.zeros(n_genes), np.zeros((n_genes, n_genes))
    for counts in tqdm(blocks(), desc="covariance of variable genes", unit="block", leave=False, delay=5):
        X = lognormalise(counts)[:, genes].toarray().astype(np.float64)
        total += X.sum(axis=0)
        products += X.T @ X
        n_cells += len(X)
    mean = total / n_cells
    products -= n_cells * np.outer(mean, mean)
    n_components = max(1, min(n_components, n_cells - 1, n_genes))
    _, vectors = eigh(products, subset_by_index=[n_genes - n_components, n_genes - 1], overwrite_a=True)
    _, axes = svd_flip(None, np.array(vectors.T[::-1]), u_based_decision=False)
    return axes, mean, n_cells

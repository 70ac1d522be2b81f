"""How diverse a subset is, by labels (Shannon, Simpson) and expression (Vendi); ValueError where there are no cells."""

from collections.abc import Callable

import numpy as np
import pandas as pd


def _shares(labels: np.ndarray | pd.Categorical) -> np.ndarray:
    """Share of each label."""
    if not len(labels):
        raise ValueError("diversity of no cells is undefined.")
    counts = pd.Categorical(labels).value_counts().to_numpy()
    return counts[counts > 0] / counts.sum()


def shannon(labels: np.ndarray | pd.Categorical) -> float:
    """Shannon entropy in bits, -sum p log2 p: 0 for one label, log2 k for k equally common ones."""
    p = _shares(labels)
    return float(abs(-(p * np.log2(p)).sum()))


def inverse_simpson(labels: np.ndarray | pd.Categorical) -> float:
    """Inverse Simpson index, 1 / sum p²: the number of equally common labels that would be as diverse."""
    return float(1 / (_shares(labels) ** 2).sum())


def gini_simpson(labels: np.ndarray | pd.Categorical) -> float:
    """Gini-Simpson index, 1 - sum p²: the chance that two cells, drawn with replacement, differ in label."""
    return float(1 - (_shares(labels) ** 2).sum())


def vendi(X: np.ndarray) -> float:
    """Vendi score with the cosine kernel: the effective number of different cells (Friedman & Dieng 2023).

    exp of the entropy of the eigenvalues of K / n, K the cosine similarities of `X` (n_cells, n_features). They equal
    those of XᵀX / n with rows of length one, so the smaller of the two matrices is decomposed. It grows with n: compare
    at equal n. Raises ValueError if a row is all zero or not finite.
    """
    X = np.asarray(X, dtype=np.float64)
    if not len(X):
        raise ValueError("diversity of no cells is undefined.")
    length = np.linalg.norm(X, axis=1, keepdims=True)
    usable = (length > 0) & np.isfinite(length)
    if not usable.all():
        raise ValueError(f"row {int(np.argmin(usable))} is all zero or not finite, so no cell can be compared with it.")
    X = X / length
    gram = X @ X.T if len(X) < X.shape[1] else X.T @ X
    share = np.linalg.eigvalsh(gram / len(X))
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def at_equal_n(
    measure: Callable[[np.ndarray], float], cells: np.ndarray, n: int, *, repeats: int = 10, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation of a measure over draws of `n` cells, without replacement: any subsets compare.

    `cells` are labels (n_cells,), scores (n_cells, n_features) or rows to be looked up; ValueError if fewer than `n`.
    """
    if not 0 < n <= len(cells):
        raise ValueError(f"cannot draw {n} of {len(cells)} cells; compare at a number that every subset has.")
    rng = np.random.default_rng(seed)
    values = [measure(cells[np.sort(rng.choice(len(cells), n, replace=False))]) for _ in range(repeats)]
    return float(np.mean(values)), float(np.std(values, ddof=1))

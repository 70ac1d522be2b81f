"""How diverse a subset is: by its labels (Shannon, Simpson) and by its expression (Vendi)."""

from __future__ import annotations

import numpy as np


def _shares(labels: np.ndarray) -> np.ndarray:
    """Share of each label."""
    if not len(labels):
        raise ValueError("diversity of no cells is undefined.")
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return counts / counts.sum()


def shannon(labels: np.ndarray) -> float:
    """Shannon entropy in bits, -sum p log2 p: 0 for one label, log2 k for k equally common ones.

    Parameters
    ----------
    labels
        (n_cells,) the label of each cell.

    Raises
    ------
    ValueError
        If there are no cells.
    """
    p = _shares(labels)
    return float(abs(-(p * np.log2(p)).sum()))


def inverse_simpson(labels: np.ndarray) -> float:
    """Inverse Simpson index, 1 / sum p²: the number of equally common labels that would be as diverse.

    Parameters
    ----------
    labels
        (n_cells,) the label of each cell.

    Raises
    ------
    ValueError
        If there are no cells.
    """
    return float(1 / (_shares(labels) ** 2).sum())


def gini_simpson(labels: np.ndarray) -> float:
    """Gini-Simpson index, 1 - sum p²: the chance that two cells, drawn with replacement, differ in label.

    Parameters
    ----------
    labels
        (n_cells,) the label of each cell.

    Raises
    ------
    ValueError
        If there are no cells.
    """
    return float(1 - (_shares(labels) ** 2).sum())


def vendi(X: np.ndarray) -> float:
    """Vendi score with the cosine kernel: the effective number of different cells (Friedman & Dieng 2023).

    exp of the entropy of the eigenvalues of K / n, K the cosine similarities. They equal those of XᵀX / n with
    rows of length one, so the smaller of the two matrices is decomposed. It grows with n: compare at equal n.

    Parameters
    ----------
    X
        (n_cells, n_features) embedding or principal component scores.

    Raises
    ------
    ValueError
        If there are no cells, or a row is all zero or not finite.
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

"""Strategies that choose a subset of the corpus: each returns sorted row positions, and copies no cell.

`percentage` is of the cells it is given, 0 to 100; the subset has `subset_size` cells exactly.
"""

from __future__ import annotations

import numpy as np


def subset_size(n_cells: int, percentage: float) -> int:
    """Cells in a subset: the percentage of `n_cells`, rounded to the nearest, at least one.

    Raises
    ------
    ValueError
        If the percentage is not above 0 and at most 100, or there are no cells.
    """
    if not 0 < percentage <= 100:
        raise ValueError(f"percentage {percentage} must be above 0 and at most 100.")
    if n_cells < 1:
        raise ValueError("there are no cells to sample from.")
    return max(1, round(n_cells * percentage / 100))


def random(n_cells: int, percentage: float, *, seed: int) -> np.ndarray:
    """Uniform sample without replacement.

    Parameters
    ----------
    n_cells
        Size of the corpus.
    percentage
        Of the corpus, above 0 and at most 100.
    seed
        Of the sample.

    Returns
    -------
    rows, sorted int64, no repeats.

    Raises
    ------
    ValueError
        From `subset_size`.
    """
    size = subset_size(n_cells, percentage)
    return np.sort(np.random.default_rng(seed).choice(n_cells, size, replace=False).astype(np.int64))


def celltype_reweighted(cell_type: np.ndarray, percentage: float, *, seed: int) -> np.ndarray:
    """As equal a number of every cell type as the corpus allows, for the most diverse composition of its size.

    Types with fewer cells than an equal share are taken whole, and what they leave is shared among the others
    (water-filling), as in the original study's cell-type re-weighting. Unlike there, the budget is met exactly: a
    remainder of fewer cells than types goes to types drawn by the seed.

    Parameters
    ----------
    cell_type
        (n_cells,) type of each cell of the corpus.
    percentage
        Of the corpus, above 0 and at most 100.
    seed
        Of the remainder and of the cells within each type.

    Returns
    -------
    rows, sorted int64, no repeats.

    Raises
    ------
    ValueError
        From `subset_size`.
    """
    size = subset_size(len(cell_type), percentage)
    rng = np.random.default_rng(seed)
    _, type_of_cell, available = np.unique(np.asarray(cell_type), return_inverse=True, return_counts=True)
    taken = _water_fill(available, size, rng)
    rank = _random_rank_within(type_of_cell, rng)
    return np.flatnonzero(rank < taken[type_of_cell]).astype(np.int64)


def geometric_sketching(X_pca: np.ndarray, percentage: float, *, seed: int, n_boxes: int | None = None) -> np.ndarray:
    """As equal a number of cells from every occupied box of a grid as possible (Hie et al. 2019).

    The range of each principal component is cut into intervals of one common length, found by bisection so that
    about `n_boxes` of the boxes hold cells. Boxes are of equal volume, so dense regions of expression space give
    fewer of their cells than sparse ones: rare states are kept without knowing any label.

    Parameters
    ----------
    X_pca
        (n_cells, n_components) principal component scores of the corpus.
    percentage
        Of the corpus, above 0 and at most 100.
    seed
        Of the cells within each box, and of the boxes that give one more.
    n_boxes
        Occupied boxes aimed at; 1 % of the cells by default, as in the original study.

    Returns
    -------
    rows, sorted int64, no repeats.

    Raises
    ------
    ValueError
        From `subset_size`, or if the scores are not finite.
    """
    size = subset_size(len(X_pca), percentage)
    if not np.isfinite(X_pca).all():
        raise ValueError("principal component scores hold NaN or infinite values.")
    rng = np.random.default_rng(seed)
    box_of_cell = _occupied_boxes(np.asarray(X_pca, dtype=np.float64), n_boxes or max(1, len(X_pca) // 100))
    taken = _water_fill(np.bincount(box_of_cell), size, rng)
    rank = _random_rank_within(box_of_cell, rng)
    return np.flatnonzero(rank < taken[box_of_cell]).astype(np.int64)


def _occupied_boxes(X: np.ndarray, n_boxes: int, tolerance: float = 0.1) -> np.ndarray:
    """Number of the box that each cell lies in, for a grid with `n_boxes` occupied boxes within `tolerance`."""
    X = X - X.min(axis=0)
    low, high = 0.0, float(X.max()) * (1 + 1e-9) or 1.0  # a box longer than the data is wide holds every cell
    length = high
    for _ in range(60):
        boxes = np.floor(X / length).astype(np.int64) if length else np.zeros_like(X, np.int64)
        _, box_of_cell = np.unique(boxes, axis=0, return_inverse=True)
        occupied = int(box_of_cell.max()) + 1
        if abs(occupied - n_boxes) <= tolerance * n_boxes:
            break
        low, high = (low, length) if occupied < n_boxes else (length, high)
        length = (low + high) / 2
    return box_of_cell.ravel()


def _water_fill(available: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """How many to take of each group: as even as possible, never more than there are, `size` in all."""
    fill = np.sort(available)
    # Taking min(available, level) of each gives cumulative[level]; the level below the budget, then a remainder.
    n_groups = len(available)
    below = np.concatenate([[0], np.cumsum(fill)])
    full = np.searchsorted(below[:-1] + fill * (n_groups - np.arange(n_groups)), size, side="right")
    level = (size - below[full]) // max(1, n_groups - full) if full < n_groups else fill[-1]
    taken = np.minimum(available, level)
    spare = np.flatnonzero(available > taken)
    taken[rng.permutation(spare)[: size - taken.sum()]] += 1
    return taken


def _random_rank_within(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random rank of each cell among the cells of its group, from 0."""
    order = np.lexsort((rng.permutation(len(group)), group))
    begin = np.searchsorted(group[order], np.arange(group.max() + 1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - begin[group[order]]
    return rank

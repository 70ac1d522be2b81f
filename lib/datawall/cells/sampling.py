"""Strategies that choose a subset of the corpus: each returns sorted int64 row positions, and copies no cell.

`percentage` is of the cells given, above 0 and at most 100, and the subset has `subset_size` cells exactly; anything
else, and no cells, raise ValueError. Subsets of one strategy and seed are nested, the smaller in the larger. For
independent ones, as in the original study, give each size a seed of its own, such as `(seed, size)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

type Seed = int | Sequence[int]

BLOCK = 2048  # cells whose scores are gridded at a time, so that they stay in the processor's cache
ORDERS = 32  # of groups, of which a split takes the best
TRIES = 24  # of box lengths, at most: halved so often, single precision tells no finer boxes apart


def subset_size(n_cells: int, percentage: float) -> int:
    """Cells in a subset: the percentage of `n_cells`, rounded to the nearest, at least one."""
    if not 0 < percentage <= 100:
        raise ValueError(f"percentage {percentage} must be above 0 and at most 100.")
    if n_cells < 1:
        raise ValueError("there are no cells to sample from.")
    return max(1, round(n_cells * percentage / 100))


def fixed(n_cells: int, n: int | None) -> np.ndarray:
    """Sorted rows of `n` cells, or of all if they are fewer or it is None: always the same, whoever asks."""
    return np.sort(np.random.default_rng(0).permutation(n_cells)[:n])


def random(n_cells: int, percentage: float, *, seed: Seed) -> np.ndarray:
    """Uniform sample without replacement."""
    size = subset_size(n_cells, percentage)
    return np.sort(np.random.default_rng(seed).permutation(n_cells)[:size])


def celltype_reweighted(cell_type: np.ndarray | pd.Categorical, percentage: float, *, seed: Seed) -> np.ndarray:
    """As equal a number of every cell type as the corpus allows, for the most diverse composition of its size.

    Types with fewer cells than an equal share are taken whole, and what they leave is shared among the others
    (water-filling), as in the original study's cell-type re-weighting. Unlike there, the budget is met exactly: a
    remainder of fewer cells than types goes to types drawn by the seed. Raises ValueError if a cell has no type.
    """
    size = subset_size(len(cell_type), percentage)
    return _evenly(_codes(cell_type, "cell type"), size, seed)


def geometric_sketching(X_pca: np.ndarray, percentage: float, *, seed: Seed, n_boxes: int | None = None) -> np.ndarray:
    """As equal a number of cells from every occupied box of a grid as possible (Hie et al. 2019).

    The range of each principal component of `X_pca` (n_cells, n_components) is cut into intervals of one common length,
    such that 90 to 100 % of `n_boxes` boxes hold cells, where the scores allow: by default 1 % of the cells, as in the
    original study. So dense regions of expression space give fewer of their cells than sparse ones. geosketch, the
    authors' package, begins each interval at the first cell that lies past the last one, where ours lie end to end from
    the lowest score, and its sketches of one seed are not nested. Scores are read in blocks, five to ten times, and all
    else takes about 59 bytes a cell: a memory map will do. Raises ValueError if scores are not finite.
    """
    size = subset_size(len(X_pca), percentage)
    return _evenly(_occupied_boxes(X_pca, n_boxes or max(1, len(X_pca) // 100)), size, seed)


def spike_in(n_train: int, n_perturbed: int, percentage: float, *, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
    """Replace a percentage of the training cells by perturbed cells; the number of cells stays.

    Returns the kept rows of the training cells, of which there are `n_train` without perturbed ones, and the rows of
    the perturbed cells. Raises ValueError if no training cell would be left, or if there are too few perturbed cells.
    """
    size = subset_size(n_train, percentage)
    if size == n_train:
        raise ValueError(f"a spike-in of {percentage} % would leave none of the {n_train:,} training cells.")
    if size > n_perturbed:
        largest = np.floor(1e4 * n_perturbed / n_train) / 100
        raise ValueError(
            f"a spike-in of {percentage} % of {n_train:,} training cells needs {size:,} perturbed cells, and there are "
            f"{n_perturbed:,}; at most {largest:g} % is possible. Lower the percentage or spike into a smaller subset."
        )
    rng = np.random.default_rng(seed)
    perturbed = rng.permutation(n_perturbed)[:size]
    return np.sort(rng.permutation(n_train)[size:]), np.sort(perturbed)


def of_richest(n_genes: np.ndarray, percentage: float, *, seed: Seed) -> np.ndarray:
    """Uniform sample of that half of the cells in which most genes were detected; `n_genes` (n_cells,) are of each."""
    size, n_cells = subset_size(len(n_genes), percentage), len(n_genes)
    half = np.argsort(n_genes, kind="stable")[n_cells // 2 :]
    if size > len(half):
        raise ValueError(f"percentage {percentage} is more than the half of the cells that is drawn from.")
    return np.sort(half[np.random.default_rng(seed).permutation(len(half))[:size]])


def of_poorest(n_genes: np.ndarray, percentage: float, *, seed: Seed) -> np.ndarray:
    """Uniform sample of that half of the cells in which fewest genes were detected; `n_genes` (n_cells,) of each."""
    return of_richest(-n_genes, percentage, seed=seed)


def thin(counts: sp.csr_matrix, kept: float, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts as a shallower sequencing would have found them: each molecule is kept with the chance `kept`, 0 to 1."""
    data = rng.binomial(counts.data.astype(np.int64), kept).astype(counts.dtype)
    thinned = sp.csr_matrix((data, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
    thinned.eliminate_zeros()
    return thinned


def stratified_split(labels: np.ndarray, shares: list[float], *, seed: int) -> np.ndarray:
    """Part of each cell, (n_cells,) int64, where parts of exact size each hold every label in proportion.

    Cells are laid out label by label, in random order within each, and a part takes every so-manyth of them, so it has
    each label in proportion to within one cell (two, with more than two parts, as the next takes from what is left).
    `shares` are the parts' sizes; raises ValueError if one is negative or they do not add up to 1.
    """
    _check_shares(shares)
    rng = np.random.default_rng(seed)
    part = np.full(len(labels), len(shares) - 1, dtype=np.int64)
    left = np.lexsort((rng.permutation(len(labels)), np.asarray(labels)))
    sizes = np.diff(np.rint(np.cumsum([0, *shares]) * len(labels)).astype(int))
    for number, size in enumerate(sizes[:-1]):
        chosen = np.floor((np.arange(size) + rng.random()) * len(left) / max(1, size)).astype(int)
        part[left[chosen]] = number
        left = np.delete(left, chosen)
    return part


def split_by_group(groups: np.ndarray | pd.Categorical, shares: list[float], *, seed: Seed) -> np.ndarray:
    """Part of each cell, (n_cells,) int64, where parts consist of whole groups, such as donors.

    Groups are dealt out in random order, each to the part that lacks most of its cells; of `ORDERS` orders the one
    counts that leaves the least largest gap between a part's size and its share. Every part with a share has a group at
    least. Raises ValueError as `stratified_split`, and if there are fewer groups than parts or a cell has no group.
    """
    _check_shares(shares)
    group = _codes(groups, "group")
    sizes = np.bincount(group)
    present, wanted = np.flatnonzero(sizes), np.count_nonzero(shares)
    if len(present) < wanted:
        raise ValueError(f"{len(present)} groups cannot fill {wanted} parts; give fewer parts or split by cell.")
    rng = np.random.default_rng(seed)
    target = np.asarray(shares) * len(group)
    dealt = (_deal(sizes, rng.permutation(present), target) for _ in range(ORDERS))
    part_of_group, _ = min(dealt, key=lambda deal: np.abs(deal[1]).max())
    return part_of_group[group]


def _check_shares(shares: list[float]) -> None:
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares {shares} must be positive and add up to 1.")


def _deal(sizes: np.ndarray, order: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each group, dealt out in `order`, and how many cells each part lacks of its target."""
    part_of_group = np.zeros(len(sizes), np.int64)
    lacking, empty = target.astype(float), target > 0
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        # The last groups go to the parts that have none yet.
        open_to = empty if left <= empty.sum() else target > 0
        part = np.where(open_to, lacking, -np.inf).argmax()
        part_of_group[group] = part
        lacking[part] -= sizes[group]
        empty[part] = False
    return part_of_group, lacking


def _codes(labels: np.ndarray | pd.Categorical, role: str) -> np.ndarray:
    """Labels as small integers, in the order of their categories."""
    codes = pd.Categorical(labels).codes
    if (codes < 0).any():
        raise ValueError(f"{int((codes < 0).sum())} cells, such as row {int(codes.argmin())}, have no {role}.")
    return codes


def _evenly(group: np.ndarray, size: int, seed: Seed) -> np.ndarray:
    """`size` rows, sorted, as evenly from the groups as possible: in turns, one from each group that has any left."""
    # Turns, and the cells of a group, come up in orders drawn once, so that smaller subsets lie in larger ones.
    rng, n_of_group = np.random.default_rng(seed), np.bincount(group)
    order = rng.permutation(len(group))
    place_of_turn = rng.permutation(len(n_of_group))
    order = order[np.argsort(group[order], kind="stable")]  # group by group
    turn = np.arange(len(group)) - np.repeat(np.cumsum(n_of_group) - n_of_group, n_of_group)
    turn *= len(n_of_group)
    turn += np.repeat(place_of_turn, n_of_group)
    chosen = turn <= np.partition(turn, size - 1)[size - 1]
    return np.sort(order[chosen])


def _occupied_boxes(X: np.ndarray, n_boxes: int) -> np.ndarray:
    """Number of the box that each cell lies in, for a grid of which `n_boxes` or up to 10 % fewer are occupied."""
    low, high = X.min(axis=0), X.max(axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("principal component scores hold NaN or infinite values.")
    width = high - low
    if n_boxes == 1 or not width.any():
        return np.zeros(len(X), np.int32)
    # The number of boxes is about a power of their length, so logarithms are near a line: halve the length until
    # there are too many, then go to where the line between too few and too many has the number aimed at.
    aim, few, many = np.log(0.95 * n_boxes), (0.0, 0.0), None
    for _ in range(TRIES):
        if many is None:
            log_length = few[0] - np.log(2)
        else:
            log_length = few[0] + (many[0] - few[0]) * np.clip((aim - few[1]) / (many[1] - few[1]), 0.1, 0.9)
        box_of_cell, boxes = pd.factorize(_box_keys(X, low, width, width.max() * np.exp(log_length)))
        if len(boxes) > n_boxes:
            many = (log_length, np.log(len(boxes)))
        elif len(boxes) < 0.9 * n_boxes:
            few = (log_length, np.log(len(boxes)))
        else:
            break
    return box_of_cell.astype(np.int32)


def _box_keys(X: np.ndarray, low: np.ndarray, width: np.ndarray, length: float) -> np.ndarray:
    """A number for each cell, the same for cells of one box: a random weighted sum of its intervals' numbers."""
    # The sum is exact in any order, as it stays below 2**53. Two boxes share a number, and are taken as one, with a
    # chance of one in the largest weight: 6e-14 where the components have 500 intervals in all.
    cut = np.flatnonzero(width > length)
    low, per_length = low[cut], X.dtype.type(1 / length) if X.dtype.kind == "f" else 1 / length
    largest = 2**53 // int((np.floor(width[cut] / length) + 2).sum())
    weight = np.random.default_rng(0).integers(1, largest, len(cut)).astype(np.float64)
    keys = np.empty(len(X))
    for begin in range(0, len(X), BLOCK):
        block = X[begin : begin + BLOCK, cut] if len(cut) < X.shape[1] else X[begin : begin + BLOCK]
        keys[begin : begin + BLOCK] = np.floor((block - low) * per_length).astype(np.float64) @ weight
    return keys


@dataclass(frozen=True)
class Strategy:
    """A way to choose a subset: a line of `STRATEGIES`, whose name study files take."""

    choose: Callable[..., np.ndarray]  # rows, from what it chooses by, a percentage and a seed
    by: str  # `n_cells`, `cell_type`, `X_pca` (principal component scores) or `n_genes` (detected), of all cells
    of_all: bool = False  # whether it makes a choice at 100 % too
    spiked: float = 0.0  # share of the subset, in per cent, that perturbed cells take over
    depth: float = 1.0  # share of each cell's counts that is kept
    at_most: float = 100.0  # per cent of the cells that it can draw


STRATEGIES = {
    "random": Strategy(random, by="n_cells", of_all=True),
    "celltype_reweighted": Strategy(celltype_reweighted, by="cell_type"),
    "geometric_sketching": Strategy(geometric_sketching, by="X_pca"),
    "spikein_10": Strategy(random, by="n_cells", of_all=True, spiked=10.0),
    "spikein_50": Strategy(random, by="n_cells", of_all=True, spiked=50.0),
    "depth_30": Strategy(random, by="n_cells", of_all=True, depth=0.30),
    "depth_10": Strategy(random, by="n_cells", of_all=True, depth=0.10),
    "depth_3": Strategy(random, by="n_cells", of_all=True, depth=0.03),
    "richest": Strategy(of_richest, by="n_genes", at_most=50.0),
    "poorest": Strategy(of_poorest, by="n_genes", at_most=50.0),
}

"""Geometric sketching of 200,000 x 50 scores into 1 % by 2,000 boxes, against geosketch 1.3.

    python tests/benchmarks/geometric_sketching.py [SEEDS]

Besides the ratio it prints what a sketch is for, the mean over seeds: the partial Hausdorff distance (to the nearest
chosen cell, of the cell that only one in a thousand is farther than) and the cells kept of rare types (fewer than one
cell in a thousand), also those of a random sample. Both packages draw alike, so these differ by chance alone.

Floor: reading and gridding the scores once, for a length that is known, and handing out the cells.
"""

import sys

import numpy as np
from alternate import report, shortest
from geosketch import gs
from scipy.stats import sem
from sklearn.metrics import pairwise_distances_argmin_min

from datawall.cells import sampling

N_CELLS, N_COMPONENTS, N_BOXES = 200_000, 50, 2_000
N_SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5

rng = np.random.default_rng(0)
centres = rng.normal(0, 10, (60, N_COMPONENTS)) / np.sqrt(1 + np.arange(N_COMPONENTS))
share = rng.dirichlet(np.full(60, 0.3))
label = rng.choice(60, N_CELLS, p=share)
X = (centres[label] + rng.normal(size=(N_CELLS, N_COMPONENTS))).astype(np.float32)
rare = np.bincount(label, minlength=60)[label] < N_CELLS / 1_000

sketches = {"geosketch": [], "ours": []}


def peer():
    seed = len(sketches["geosketch"])
    sketches["geosketch"].append(np.array(gs(X, N_CELLS // 100, k=N_BOXES, seed=seed, replace=False)))


def ours():
    seed = len(sketches["ours"])
    sketches["ours"].append(sampling.geometric_sketching(X, 1, seed=seed, n_boxes=N_BOXES))


def floor():
    """One pass over the scores, and one sort of the cells by box."""
    low, width = X.min(axis=0), np.ptp(X, axis=0)
    keys = sampling._box_keys(X, low, width, float(width.max()) / 4)
    np.unique(keys, return_index=True)


floor()
report("cells", N_CELLS, peer, ours, repeats=N_SEEDS - 1, floor=shortest(floor))
sketches["random"] = [sampling.random(N_CELLS, 1, seed=seed) for seed in range(N_SEEDS)]
for name, of_seeds in sketches.items():
    gap = [np.quantile(pairwise_distances_argmin_min(X, X[rows])[1], 0.999) for rows in of_seeds]
    kept = [rare[rows].sum() for rows in of_seeds]
    print(f"{name}: partial Hausdorff {np.mean(gap):.3f} ± {sem(gap):.3f}, rare cells kept ", end="")
    print(f"{np.mean(kept):.1f} ± {sem(kept):.1f} of {rare.sum()} (mean of {len(of_seeds)} seeds ± standard error)")

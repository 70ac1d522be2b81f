"""Geometric sketching of 200,000 x 50 scores into 1 % by 2,000 boxes, against geosketch 1.3.

Floor: reading the scores once for each bisection of the box length, and one sort of the boxes.
"""

import numpy as np
from alternate import report
from geosketch import gs

from datawall.sampling import geometric_sketching

N_CELLS, N_COMPONENTS = 200_000, 50

rng = np.random.default_rng(0)
centres = rng.normal(0, 10, (60, N_COMPONENTS)) / np.sqrt(1 + np.arange(N_COMPONENTS))
share = rng.dirichlet(np.full(60, 0.3))
X = (centres[rng.choice(60, N_CELLS, p=share)] + rng.normal(size=(N_CELLS, N_COMPONENTS))).astype(np.float32)

rows = geometric_sketching(X, 1, seed=0)
assert len(np.unique(rows)) == N_CELLS // 100
report(
    "cells",
    N_CELLS,
    lambda: gs(X, N_CELLS // 100, k=2_000, seed=0, replace=False),
    lambda: geometric_sketching(X, 1, seed=0, n_boxes=2_000),
    repeats=3,
)

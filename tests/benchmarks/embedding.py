"""Cells a second to embed 10,000 cells x 19,331 genes, for every family at its published size, on this machine.

The original's seconds stand beside (one run, machine not stated; its Geneformer from cells, tokenisation included).
Floor: the multiplications of a cell's path through the network, of which the first layer's are needed at detected
genes only.
"""

import statistics
import sys
from functools import partial

import numpy as np
import torch
from alternate import N_GENES, cells, seconds_of

from datawall import models

N_CELLS = 10_000
ORIGINAL = {"PretrainedPCA": 0.522, "scVI": 3.876, "SSL": 1.226, "Geneformer": 174.4, "SCimilarity": 1.663}

rng = np.random.default_rng(0)
counts = cells(N_CELLS, rng, lambda n: rng.geometric(0.5, n))
print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, {torch.get_num_threads()} threads")
for family in sys.argv[1:] or models.hyperparameters.FAMILIES:
    model = models.create(family).untrained(N_GENES, seed=0)
    # On a CPU the transformer takes minutes for all cells; its time is linear in them.
    n_cells = 100 if family == "Geneformer" and not torch.cuda.is_available() else N_CELLS
    embed = partial(model.embed, counts[:n_cells])
    embed()
    rate = n_cells / statistics.median(seconds_of(embed) for _ in range(3))
    each = f"{family:14} {rate:10,.0f} cells a second; {N_CELLS / rate:7.2f} s for {N_CELLS:,} cells"
    print(f"{each}, the original {ORIGINAL[family]} s")

"""Cells a second into training: from memory, and streamed from a store, all of the corpus or a subset of it.

    loading.py [CELLS]

Peers read the same cells at random: annbatch's own loader from the same store, as it comes (chunks of 512 cells, 32
of them shuffled together), an h5ad file row by row (backed AnnData), and scDataset over that file (blocks as large and
as many shuffled together as ours), which is left out where it is not installed.

Subsets are random, and at 10 % also of the other strategies, for labels and scores that lie scattered over the corpus:
where cells of a kind lie side by side, as in an atlas, reading is faster.

Then the smallest model, scVI, is trained on each subset, from memory and from the disk. All runs take turns; rates are
medians. No cell of a subset is read twice in a run, so that one of 1 % does not end up in memory.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from alternate import seconds_of
from annbatch import Loader

from datawall import models
from datawall.cells import cellstore, sampling
from datawall.models import streaming, training

N_CELLS, N_GENES = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000, 19_331
BATCH, BATCHES, STEPS, ROUNDS = 512, 64, 6, 5
PERCENTAGES, BY_STRATEGY = (100, 25, 10, 1), 10


def simulated(n_cells, rng):
    """Counts of about 1,600 genes a cell."""
    share = np.cumsum(rng.lognormal(0, 2, N_GENES))
    totals = rng.lognormal(np.log(2700), 0.4, n_cells).astype(int)
    genes = np.searchsorted(share / share[-1], rng.random(totals.sum()))
    cells = np.repeat(np.arange(n_cells), totals)
    return sp.coo_matrix((np.ones(len(genes), np.float32), (cells, genes)), (n_cells, N_GENES)).tocsr()


def write(folder):
    rng = np.random.default_rng(0)
    var = pd.DataFrame(index=[f"gene {i}" for i in range(N_GENES)])
    blocks = []
    for first in range(0, N_CELLS, 4096):
        names = [f"cell {i}" for i in range(first, min(first + 4096, N_CELLS))]
        blocks.append(ad.AnnData(simulated(len(names), rng), obs=pd.DataFrame(index=names), var=var))
    cellstore.write(folder, blocks)
    cells = ad.concat(blocks)
    cells.write_h5ad(folder / "cells.h5ad", compression="lzf")
    print(f"{N_CELLS:,} cells of {cells.X.nnz / N_CELLS:,.0f} genes:", end=" ")
    for name in (cellstore.NAME, "cells.h5ad"):
        files = [folder / name, *(folder / name).rglob("*")]
        print(f"{name} {sum(file.stat().st_size for file in files if file.is_file()) / 1e6:,.0f} MB", end="  ")
    print(f"in memory {cellstore.Cells(folder / cellstore.NAME).nbytes() / 1e6:,.0f} MB")


def subsets():
    """Rows of each subset, by its name."""
    rng = np.random.default_rng(1)
    rows = {f"random {percentage} %": sampling.random(N_CELLS, percentage, seed=1) for percentage in PERCENTAGES}
    types, scores = rng.geometric(0.1, N_CELLS), rng.standard_normal((N_CELLS, 50), np.float32)
    rows[f"celltype_reweighted {BY_STRATEGY} %"] = sampling.celltype_reweighted(types, BY_STRATEGY, seed=1)
    rows[f"geometric_sketching {BY_STRATEGY} %"] = sampling.geometric_sketching(scores, BY_STRATEGY, seed=1)
    return rows


def ours(counts, n_batches):
    load = streaming.loader(counts, lambda counts: counts, BATCH)
    return lambda: sum(1 for _ in load(enumerate(training.minibatches(counts.shape[0], BATCH, n_batches, seed=0))))


def annbatch(store, n_batches):
    with zarr.config.set(cellstore.PIPELINE):
        X = ad.io.sparse_dataset(zarr.open_group(store)["X"])
        loader = Loader(batch_size=BATCH, chunk_size=512, preload_nchunks=32, shuffle=True).add_dataset(X)
        next(iter(loader))
    return lambda: sum(1 for _ in itertools.islice(loader, n_batches))


def backed(h5ad, n_batches):
    X = ad.read_h5ad(h5ad, backed="r").X
    batches = [np.sort(rows) for rows in training.minibatches(N_CELLS, BATCH, n_batches, seed=0)]
    return lambda: [X[rows] for rows in batches]


def scdataset(h5ad, n_batches):
    from scdataset import BlockShuffling, scDataset

    cells, settings = ad.read_h5ad(h5ad, backed="r"), {"batch_size": BATCH, "fetch_factor": training.MIXED // BATCH}
    blocks = BlockShuffling(block_size=training.NEIGHBOURS)
    data = scDataset(cells, blocks, fetch_transform=lambda some: some.X, **settings)
    return lambda: sum(1 for _ in itertools.islice(data, n_batches))


def fit(counts, steps):
    obs = pd.DataFrame(index=range(counts.shape[0]))
    return lambda: models.create("scVI", batch_size=BATCH).fit(counts, obs, steps=steps, seed=0)


def rates(runs):
    """Cells a second of each, runs in turn."""
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            seconds[name].append(seconds_of(run))
    return {name: runs[name][1] * BATCH / statistics.median(each) for name, each in seconds.items()}


def main(folder):
    write(folder)
    cells = cellstore.Cells(folder / cellstore.NAME)
    share = {name: cells.take(rows) for name, rows in subsets().items()}
    n_batches = {name: min(BATCHES, max(1, some.n_obs // BATCH)) for name, some in share.items()}  # none is read twice
    runs = {"in memory": (ours(cells.counts(), BATCHES), BATCHES)}
    runs |= {name: (ours(some, n_batches[name]), n_batches[name]) for name, some in share.items()}
    everything = next(iter(share))
    runs["annbatch alone"] = annbatch(folder / cellstore.NAME, n_batches[everything]), n_batches[everything]
    runs["h5ad, backed"] = backed(folder / "cells.h5ad", 2), 2
    try:
        runs["scDataset"] = scdataset(folder / "cells.h5ad", 32), 32
    except ModuleNotFoundError:
        print("scDataset is not installed (pip install scdataset) and left out")
    loading = rates(runs)
    for name, rate in loading.items():
        print(f"{name:24} {rate:10,.0f} cells a second")
    print(f"ratio annbatch alone / {everything}: {loading['annbatch alone'] / loading[everything]:.2f}")

    for name, some in share.items():
        steps = min(STEPS, n_batches[name])
        trained = rates({"memory": (fit(some.counts(), steps), steps), "disk": (fit(some, steps), steps)})
        print(
            f"scVI on {name}: {trained['memory']:,.0f} cells a second in memory, {trained['disk']:,.0f} streamed: "
            f"ratio {trained['disk'] / trained['memory']:.2f}"
        )


if __name__ == "__main__":
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
    print(f"{time.perf_counter() - begin:.0f} s")

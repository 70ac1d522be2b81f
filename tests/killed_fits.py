"""Fit every family named on real cells, undisturbed and killed: killed_fits.py FOLDER FAMILY ...

Every fit is a process of its own, forked before torch has computed anything. A disturbed one is killed (SIGKILL)
within a random optimiser step, twice, and then left to end from its checkpoint.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

from datawall import models
from datawall.cells import datasets
from datawall.models import training

STEPS = 12
SMALL = {
    "PretrainedPCA": {},
    "scVI": {"batch_size": 32, "n_hidden": 16, "n_genes": 50},
    "SSL": {"batch_size": 32, "n_hidden": [32, 16]},
    "ssl_vae": {"batch_size": 32, "n_hidden": [32, 16]},
    "Geneformer": {"batch_size": 8, "n_layers": 2, "n_embd": 16, "max_length": 32, "n_genes": 50},
    "SCimilarity": {"batch_size": 32, "n_hidden": [32, 16]},
}


def fit(family, counts, obs, folder, checkpoint, killed_in):
    training.CHECKPOINT_SECONDS = 0  # a checkpoint after every step
    taken = len(np.load(checkpoint)["losses"]) if checkpoint.exists() else 0

    def dies(step):
        def wrapped(*arguments, **keywords):
            nonlocal taken
            taken += 1
            if taken == killed_in:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **keywords)

        return wrapped

    for optimiser in (torch.optim.Adam, torch.optim.AdamW):
        optimiser.step = dies(optimiser.step)
    model = models.create(family, **SMALL[family])
    model.fit(counts, obs, steps=STEPS, seed=1, checkpoint=checkpoint)
    model.save(folder)


def in_a_process(*arguments):
    if (child := os.fork()) == 0:
        try:
            fit(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(folder, families):
    cells = datasets.load("pbmc68k")
    obs = cells.obs.assign(batch=np.where(np.arange(cells.n_obs) % 2, "a", "b"))
    rng = np.random.default_rng()
    for family in families:
        given = family, cells.X, obs
        assert in_a_process(*given, folder / family / "undisturbed", folder / family / "none.npz", None) == 0
        first, second = sorted(rng.choice(np.arange(2, STEPS + 1), 2, replace=False).tolist())
        print(family, "killed in steps", first, second)
        rest = folder / family / "disturbed", folder / family / "checkpoint.npz"
        for killed_in in (first, second) if family != "PretrainedPCA" else ():
            assert in_a_process(*given, *rest, killed_in) == signal.SIGKILL
        assert in_a_process(*given, *rest, None) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

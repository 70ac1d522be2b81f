"""Networks trained in one process, or in several: torchrun shared_fit.py FOLDER.

Batches are of 15 cells, which two processes do not divide. What a process draws for itself is not drawn here.

Of `late`, a head, seven steps run ahead before their losses are looked at, as on a GPU, and checkpoints are always due.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.distributed as dist
from torch import nn

from datawall import models
from datawall.models import training


def head(checkpoint=None):
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((60, 5)).astype(np.float32))
    y = X @ torch.arange(5.0)[:, None]
    module = training.seeded(lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)), 0)
    recipe = training.Recipe(steps=30, batch_size=15, learning_rate=1e-2, clip_norm=1.0)

    def loss_of(forward, rows, step):
        return ((forward(X[rows]) - y[rows]) ** 2).mean()

    options = {"validation_loss": lambda: loss_of(module, slice(None), 0), "checkpoint": checkpoint}
    return module, training.train(module, loss_of, 60, recipe, seed=0, **options)


def late(folder):
    training.LOSSES_AT_ONCE["cpu"], training.CHECKPOINT_SECONDS = 7, 0
    return head(folder / "checkpoint.npz")


def fit(name, counts, **settings):
    model = models.create(name, **settings, keep="last", dropout=0.0, batch_size=15, learning_rate=0.01)
    history = model.fit(counts, pd.DataFrame(index=range(counts.shape[0])), steps=30, seed=0)
    return model.module, history


def ssl():
    """As a variational autoencoder, whose loss is a mean over cells; its noise, which differs by process, is none."""
    torch.randn_like = torch.zeros_like
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (60, 40)).astype(np.float32))
    return fit("SSL", counts, n_hidden=[16, 12], n_latent=4, loss="vae")


def geneformer():
    """With the same genes hidden in every cell, so that processes have them in different numbers."""
    from datawall.models import geneformer, transformer

    def mask(ids, vocab_size):
        chosen = (ids % 5 == 0).nonzero().view(-1)
        return ids.index_fill(0, chosen, transformer.MASK), chosen, ids[chosen]

    geneformer.mask_tokens = mask
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 1, 40) * np.geomspace(0.1, 10, 60)[:, None]  # few genes in some cells, many in others
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    return fit("Geneformer", counts, n_layers=2, n_heads=2, n_embd=16, max_length=32)


def outcome(module, history):
    """Weights and losses by name."""
    return {"loss": history.loss} | {name: weight.numpy() for name, weight in module.state_dict().items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, train in {"head": head, "SSL": ssl, "Geneformer": geneformer, "late": lambda: late(folder)}.items():
        ended = outcome(*train())
        if dist.get_rank() == 0:
            np.savez(folder / name, **ended)
    dist.barrier()  # none leaves while another is at work
    dist.destroy_process_group()

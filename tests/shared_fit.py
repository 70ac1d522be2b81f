"""Train a network in one process, or in several under torchrun: FILE head|SSL|Geneformer [STEPS_BETWEEN_LOOKS]

With a third word, so many steps run ahead before their losses are looked at, as on a GPU, and checkpoints are always
due.
"""

import os
import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist

from datawall import training


def head(checkpoint):
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((60, 5)).astype(np.float32))
    y = X @ torch.arange(5.0)[:, None]
    module = training.seeded(lambda: training.Head(5, 1, n_hidden=16, dropout=0), 0)
    recipe = training.Recipe(steps=30, batch_size=BATCH, learning_rate=1e-2, clip_norm=1.0)
    history = training.train(
        module,
        lambda forward, rows, step: ((forward(X[rows]) - y[rows]) ** 2).mean(),
        60,
        recipe,
        seed=0,
        validation_loss=lambda: ((module(X) - y) ** 2).mean(),
        checkpoint=checkpoint,
    )
    return module, history


def ssl(checkpoint):
    """As a variational autoencoder, whose loss is a mean over cells; its noise, which differs by process, is none."""
    from datawall import models

    torch.randn_like = torch.zeros_like
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (60, 40)).astype(np.float32))
    settings = {"n_hidden": [16, 12], "n_latent": 4, "loss": "vae", "keep": "last", "dropout": 0.0}
    model = models.create("SSL", **settings, batch_size=BATCH, learning_rate=0.01)
    history = model.fit(counts, None, steps=30, seed=0, checkpoint=checkpoint)
    return model.module, history


def geneformer(checkpoint):
    """With dropout and masks, which differ by process, that are none and by token."""
    from datawall.models import geneformer
    from datawall.transformer import IGNORED, MASK

    def every_third(ids, vocab_size):
        chosen = ids % 3 == 0
        return torch.where(chosen, MASK, ids), torch.where(chosen, ids, IGNORED)

    geneformer.mask_tokens = every_third
    counts = sp.csr_matrix(
        np.random.default_rng(0).poisson(np.linspace(0.05, 1, 60)[:, None], (60, 40)).astype(np.float32)
    )
    settings = {"n_layers": 2, "n_embd": 16, "n_heads": 2, "max_length": 40, "dropout": 0.0, "learning_rate": 0.01}
    model = geneformer.Geneformer(**settings, batch_size=BATCH)
    history = model.fit(counts, None, steps=30, seed=0, checkpoint=checkpoint)
    return model.encoder, history


BATCH = 15  # which two processes do not divide
file, what, *ahead = sys.argv[1:]
if ahead:
    training.LOSSES_AT_ONCE["cpu"], training.CHECKPOINT_SECONDS = int(ahead[0]), 0
if "RANK" in os.environ:
    dist.init_process_group("gloo")
module, history = {"head": head, "SSL": ssl, "Geneformer": geneformer}[what](
    Path(f"{file}.checkpoint.npz") if ahead else None
)
if not dist.is_initialized() or dist.get_rank() == 0:
    weights = {name: weight.numpy() for name, weight in module.state_dict().items()}
    np.savez(file, loss=history.loss, **weights)
if dist.is_initialized():
    dist.destroy_process_group()

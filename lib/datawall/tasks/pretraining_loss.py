"""Reconstruction: how well a model does on held-out cells what it was pretrained to do."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from datawall.tasks import uncertainty
from datawall.tasks.metrics import Metrics

BLOCK = 128  # cells whose loss is taken at once


def reconstruction(model: Any, counts: sp.csr_matrix, obs: pd.DataFrame, *, seed: int = 0) -> Metrics:
    """Pretraining loss of a model on cells it was not trained on, and the share of the chance loss that is gone.

    The loss is each family's own, in its own units, so that it compares a family's models with one another and no
    family with another: PretrainedPCA, squared error per entry of log-normalised expression; scVI, negative evidence
    lower bound in nats per cell; SSL, squared error of the entries that were hidden, per entry; Geneformer,
    cross-entropy in nats of the genes that were hidden; SCimilarity, squared error per entry and its share of triplet
    loss. It is the mean over blocks of 128 cells in random order, weighted by their cells; its interval is over
    blocks. Models that see other panels of genes have other losses; what they explain, 1 - loss / chance, can be
    compared. The seed is that of the order of cells, and of what is hidden or drawn: alike for all models of a family.
    """
    n_cells = counts.shape[0]
    if not n_cells:
        raise ValueError("there are no held-out cells to reconstruct.")
    order = np.random.default_rng(seed).permutation(n_cells)
    blocks = np.array_split(order, -(-n_cells // BLOCK))
    losses = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        for i, cells in enumerate(blocks):
            torch.manual_seed(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]))
            losses.append(model.heldout_loss(counts[cells], obs.iloc[cells]))
    resamples = uncertainty.resamples(len(blocks))[: None if len(blocks) > 1 else 0]
    weights = np.vstack([np.ones(len(blocks)), resamples]) * [len(cells) for cells in blocks]
    loss = weights @ np.array(losses) / weights.sum(axis=1)
    chance = model.chance_loss(counts)
    return Metrics.of_draws({"loss": loss, "explained": 1 - loss / chance}, {"loss": chance, "explained": 0.0})

"""Reconstruction: how well a model does on held-out cells what it was pretrained to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from datawall.tasks import uncertainty
from datawall.tasks.metrics import Metrics

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

BLOCK = 128  # cells whose loss is taken at once


class Objective(Protocol):
    """What a model family says of its pretraining objective. `counts` are raw counts over the corpus's genes, CSR."""

    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Pretraining loss of cells in evaluation mode, in the family's units; random by torch's global generator."""

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """The same of a model that knows nothing of a cell but what the cells have in common."""


def reconstruction(model: Objective, counts: sp.csr_matrix, obs: pd.DataFrame, *, seed: int = 0) -> Metrics:
    """Pretraining loss of a model on cells it was not trained on.

    The loss is each family's own, in its own units, so that it compares a family's models with one another and no
    family with another: PretrainedPCA, squared error per entry of log-normalised expression; scVI, negative evidence
    lower bound in nats per cell; SSL, squared error of the entries that were hidden, per entry; Geneformer,
    cross-entropy in nats of the genes that were hidden; SCimilarity, squared error per entry and its share of triplet
    loss. What a family hides or draws is drawn from the seed, alike for all its models.

    Parameters
    ----------
    model
        A pretrained model.
    counts, obs
        The held-out cells; of `obs`, a family says which columns it reads.
    seed
        Of the order of cells, and of what is hidden or drawn.

    Returns
    -------
    loss
        Mean over blocks of 128 cells in random order, weighted by their cells; its interval is over blocks.
    explained
        Share of the loss of a model that knows nothing of a cell, which is gone: 1 - loss / chance. Models that see
        other panels of genes have other losses; their shares can be compared.

    Raises
    ------
    ValueError
        If there are no cells.
    """
    import torch

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
    weights = np.vstack([np.ones(len(blocks)), uncertainty.resamples(len(blocks))]) * [len(cells) for cells in blocks]
    draws = weights @ np.array(losses) / weights.sum(axis=1)
    chance = model.chance_loss(counts)
    known = {"loss": draws, "explained": 1 - draws / chance}
    intervals = {name: uncertainty.interval(of[0], of[1:]) for name, of in known.items()} if len(blocks) > 1 else {}
    return Metrics({name: of[0] for name, of in known.items()}, intervals, {"loss": chance, "explained": 0.0})

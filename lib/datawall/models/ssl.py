"""SSL: a masked autoencoder (Richter et al. 2025, Nature Machine Intelligence 7:68), and two twins of another loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall import models
from datawall.models import base, sparse, training
from datawall.models.sparse import Cells, DenseCells

TEMPERATURE = 0.1  # of InfoNCE


class Autoencoder(nn.Module):
    """Linear layers, SELU and dropout; its forward pass gives the loss of a batch (see `SSL`)."""

    def __init__(self, n_genes: int, h: models.hyperparameters.SSL) -> None:
        super().__init__()
        self.mask, self.n_latent = h.mask, h.n_latent
        self.variational, self.contrastive = h.loss == "vae", h.loss == "contrastive"

        def layers(widths: list[int]) -> list[nn.Module]:
            return [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.SELU(), nn.Dropout(h.dropout))]

        self.encoder = nn.Sequential(
            sparse.SparseLinear(n_genes, h.n_hidden[0]),
            nn.SELU(),
            nn.Dropout(h.dropout),
            *layers(h.n_hidden),
            nn.Linear(h.n_hidden[-1], 2 * h.n_latent if self.variational else h.n_latent),
        )
        if self.contrastive:
            return
        self.decoder = nn.Sequential(*layers([h.n_latent, *reversed(h.n_hidden)]))
        self.reconstruction = sparse.Reconstruction(h.n_hidden[0], n_genes, sigmoid=h.output == "sigmoid")

    def forward(self, cells: Cells | DenseCells) -> Tensor:
        if self.variational:
            mean, log_variance = self.encoder(cells).float().chunk(2, dim=1)  # (B, 2 L) to twice (B, L)
            latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2  # (B, L) to ()
            n_genes = self.reconstruction.out_features
            return self.reconstruction(self.decoder(latent), cells) / 2 + divergence / n_genes
        hidden = sparse.bernoulli(len(cells.data), self.mask, cells.data.device)  # (n_values,) of the non-zero ones
        seen = cells.thinned(1 - hidden, 1 / (1 - self.mask))
        if self.contrastive:
            others = cells.thinned(hidden, 1 / self.mask)
            return info_nce(self.encoder(seen), self.encoder(others)) / max(np.log(cells.n_cells), 1.0)
        return self.reconstruction(self.decoder(self.encoder(seen)), cells, hidden, self.mask)

    def encode(self, cells: Cells | DenseCells) -> Tensor:
        """Latent variables, (n_cells, n_latent); of the variational variant their mean."""
        return self.encoder(cells)[:, : self.n_latent]


def info_nce(first: Tensor, second: Tensor) -> Tensor:
    """How badly two views of each cell, (n_cells, n_latent) twice, find each other among all: cross-entropy in nats.

    Views are compared by their cosine over `TEMPERATURE`; each of the first looks for its own among the second, and the
    other way round (van den Oord et al. 2018, arXiv 1807.03748; Chen et al. 2020, arXiv 2002.05709).
    """
    first, second = (F.normalize(view.float(), dim=1) for view in (first, second))
    likeness = first @ second.T / TEMPERATURE  # (B, L) twice to (B, B)
    own = torch.arange(len(likeness), device=likeness.device)
    return (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2


class SSL(sparse.SparseNetwork):
    """Reconstruct hidden genes from the others.

    Defaults are the sizes and settings of DenAdel et al. 2026. Expression is log-normalised. Each entry of a cell is
    hidden with probability `mask`; the encoder sees 0 in its place, and the others divided by 1 - mask. The loss is
    the squared error of the hidden entries, zeros among them, summed and divided by the number of all entries.

    Three things differ from theirs by default, each with a switch back. The output is linear: a sigmoid cannot reach
    targets above one (`output`). The rate decays a number of times in the budget, and not every two passes, which
    left a large subset a hundred times the budget of a small one (`schedule`). The weights kept are the best
    (`base.hold_out`).

    With `loss="vae"` nothing is hidden: the encoder gives a mean and a log-variance of a latent Gaussian, and the
    loss is scVI's with a Gaussian likelihood of unit variance for log-normalised expression, divided by the number of
    genes: (½ Σ_genes (x̂ - x)² + KL(q ‖ N(0, 1))) / n_genes, averaged over cells.

    With `loss="contrastive"` nothing is reconstructed: the entries that would be hidden and those that would be seen
    are two views of a cell, which share no gene, and the loss is `info_nce` of their embeddings as a share of that of
    chance, the logarithm of the number of cells. Encoder, batches and steps are those of the masked one.
    """

    family = "SSL"

    def network(self, n_genes: int) -> Autoencoder:
        return Autoencoder(n_genes, self.hyperparameters)

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        return lambda forward, cells, step: forward(sparse.on_device(cells[1]))

    def course(self, steps: int, n_cells: int) -> dict[str, Any]:
        h = self.hyperparameters
        every = steps / h.n_decays if h.schedule == "steps" else 2 * max(1.0, n_cells / h.batch_size)  # two passes
        return {"decay": "stepwise", "decay_every": every, "decay_vectors": True}

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """The loss that is trained: of the masked one, of hidden entries alone."""
        return self.ready(counts)(sparse.on_device(self.prepare(counts))).item()

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        h = self.hyperparameters
        if h.loss == "contrastive":
            return 1.0
        return (0.5 if h.loss == "vae" else h.mask) * base.variance(self.prepare(counts))

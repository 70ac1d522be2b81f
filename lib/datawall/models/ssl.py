"""SSL: a masked autoencoder (Richter et al. 2025, Nature Machine Intelligence 7:68), and a variational variant."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from datawall.models import base, hyperparameters, sparse, training
from datawall.models.sparse import Cells


class Autoencoder(nn.Module):
    """Linear layers, SELU and dropout; its forward pass gives the loss of a batch (see `SSL`)."""

    def __init__(self, n_genes: int, h: hyperparameters.SSL) -> None:
        super().__init__()
        self.mask, self.n_latent, self.variational = h.mask, h.n_latent, h.loss == "vae"

        def layers(widths: list[int]) -> list[nn.Module]:
            return [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.SELU(), nn.Dropout(h.dropout))]

        self.encoder = nn.Sequential(
            sparse.SparseLinear(n_genes, h.n_hidden[0]),
            nn.SELU(),
            nn.Dropout(h.dropout),
            *layers(h.n_hidden),
            nn.Linear(h.n_hidden[-1], 2 * h.n_latent if self.variational else h.n_latent),
        )
        self.decoder = nn.Sequential(*layers([h.n_latent, *reversed(h.n_hidden)]))
        self.reconstruction = sparse.Reconstruction(h.n_hidden[0], n_genes, sigmoid=h.output == "sigmoid")

    def forward(self, cells: Cells) -> Tensor:
        if self.variational:
            mean, log_variance = self.encoder(cells).float().chunk(2, dim=1)  # (B, 2 L) to twice (B, L)
            latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2  # (B, L) to ()
            n_genes = self.reconstruction.out_features
            return self.reconstruction(self.decoder(latent), cells) / 2 + divergence / n_genes
        hidden = sparse.bernoulli(len(cells.data), self.mask, cells.data.device)  # (n_values,) of the non-zero ones
        seen = cells.thinned(1 - hidden, 1 / (1 - self.mask))
        return self.reconstruction(self.decoder(self.encoder(seen)), cells, hidden, self.mask)

    def encode(self, cells: Cells) -> Tensor:
        """Latent variables, (n_cells, n_latent); of the variational variant their mean."""
        return self.encoder(cells)[:, : self.n_latent]


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
    """

    family = "SSL"

    def network(self, n_genes: int) -> Autoencoder:
        return Autoencoder(n_genes, self.hyperparameters)

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        return lambda forward, cells, step: forward(Cells.of(cells[1]))

    def course(self, steps: int, n_cells: int) -> dict[str, Any]:
        h = self.hyperparameters
        every = steps / h.n_decays if h.schedule == "steps" else 2 * max(1.0, n_cells / h.batch_size)  # two passes
        return {"decay": "stepwise", "decay_every": every, "decay_vectors": True}

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """The loss that is trained: of hidden entries alone, unless `loss` is "vae"."""
        return self.ready(counts)(Cells.of(self.prepare(counts))).item()

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        h = self.hyperparameters
        return (0.5 if h.loss == "vae" else h.mask) * base.variance(self.prepare(counts))

"""scVI: a variational autoencoder with a negative binomial likelihood of raw counts (Lopez et al. 2018).

Nine in ten counts are zero: on a processor the encoder reads the others alone, and gamma functions are left for few;
the rest of the likelihood is taken with its gradient in blocks of cells that stay in the cache. A GPU takes it plainly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall import models
from datawall.models import sparse, training

ADAM = {"optimiser": "Adam", "epsilon": 0.01, "decay_vectors": True, "decay": "none"}  # as in scvi-tools
BLOCK = 64  # cells whose every gene is in a processor's cache at a time
KL_WARMUP_PASSES = 400  # scvi-tools' n_epochs_kl_warmup
NO_LIBRARY = 1e-20  # in place of a library of zero: the cell's likelihood and gradient vanish, without 0 / 0
SMALL = 32  # counts up to this one are worth a histogram


class ScVI(sparse.SparseNetwork):
    """A variational autoencoder of raw counts; the embedding is the posterior mean.

    The model is scvi-tools' `SCVI(gene_likelihood="nb", dispersion="gene", use_observed_lib_size=True)` without a
    batch key: with the same weights and noise it gives the same loss, gradients and embedding. Over the 19,331 genes
    of scTab it has 4,992,026 weights by default. scvi-tools has 12,454,434: it also makes an encoder of library sizes
    (2,475,010) and decoders of a cell's own dispersion and of dropout (2,493,699 each), all of them unused here.

    A cell without counts of the panel embeds as zero, the prior's mean; in training it counts in the KL term alone.
    A cell's library is its counts of the panel. Defaults are those of DenAdel et al. 2026.
    """

    family = "scVI"

    def network(self, n_genes: int) -> nn.Module:
        return Autoencoder(n_genes, self.hyperparameters)

    def prepare(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        return self.select_panel(counts)

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        return lambda forward, cells, step: forward(cells[1], self.kl_weight(step, recipe.steps, n_cells))

    def course(self, steps: int, n_cells: int) -> dict[str, Any]:
        return ADAM

    def kl_weight(self, step: int, steps: int, n_cells: int) -> float:
        """Weight of the KL term at a step, counted from 0: rising to 1 in a share of them, or by 1/400 each pass."""
        h = self.hyperparameters
        if h.schedule == "epochs":
            return min(1.0, step * h.batch_size // n_cells / KL_WARMUP_PASSES)
        return step / (h.kl_warmup * steps) if step < h.kl_warmup * steps else 1.0

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Negative evidence lower bound, in nats a cell, with the KL term in full."""
        return self.ready(counts)(self.prepare(counts), 1.0).item()

    @torch.no_grad()
    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """Negative log-likelihood of the mean cell's shares, in nats a cell, at the model's dispersions."""
        module, counts = self.ready(counts), self.prepare(counts)
        n_cells, n_genes = counts.shape
        share = torch.from_numpy(np.asarray(counts.sum(axis=0)).ravel()).to(module.log_theta)
        nothing = share.new_zeros(n_cells, 1), share.new_zeros(n_genes, 1)
        rates = _Rates.apply(*nothing, (share + 1e-6).log(), module.log_theta, counts)
        return (rates - log_binomials(module.log_theta.exp(), counts)).item() / n_cells


class Autoencoder(nn.Module):
    """Encoder, latent normal and decoder; calling it on CSR counts gives the loss, in nats a cell."""

    def __init__(self, n_genes: int, h: models.hyperparameters.ScVI) -> None:
        super().__init__()
        self.encoder = _layers(sparse.SparseLinear(n_genes, h.n_hidden), h.n_layers, h.dropout)
        self.mean = nn.Linear(h.n_hidden, h.n_latent)
        self.log_variance = nn.Linear(h.n_hidden, h.n_latent)
        self.decoder = _layers(nn.Linear(h.n_latent, h.n_hidden), h.n_layers, dropout=0)
        self.share = nn.Linear(h.n_hidden, n_genes)  # logits of the share that each gene has of a cell's counts
        self.log_theta = nn.Parameter(torch.randn(n_genes))  # theta: inverse dispersion of each gene

    @torch.autocast("cuda", enabled=False)  # batch statistics and likelihood in bfloat16 would be noise
    def forward(self, counts: sp.csr_matrix, kl_weight: float) -> Tensor:
        cells = sparse.on_device(counts)
        mean, variance = self.posterior(cells)  # each (B, L)
        z = mean + variance.sqrt() * torch.randn_like(mean)  # (B, L)
        divergence = (mean.square() + variance - 1 - variance.log()).sum(1).mean() / 2  # from N(0, 1): (B, L) to ()
        if isinstance(cells, sparse.DenseCells):
            return self.plain_reconstruction(cells.x, z) + kl_weight * divergence
        return self.reconstruction(counts, z) + kl_weight * divergence

    def posterior(self, cells: sparse.Cells | sparse.DenseCells) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x), each (n_cells, n_latent)."""
        hidden = self.encoder(cells.log1p())  # (B, n_hidden)
        return self.mean(hidden), self.log_variance(hidden).exp() + 1e-4

    def encode(self, cells: sparse.Cells | sparse.DenseCells) -> Tensor:
        """Posterior means, (n_cells, n_latent)."""
        return self.posterior(cells)[0]

    def reconstruction(self, counts: sp.csr_matrix, z: Tensor) -> Tensor:
        """Mean over cells of -log p(x | z): negative binomials around library * softmax(share)."""
        rates = _Rates.apply(self.decoder(z), self.share.weight, self.share.bias, self.log_theta, counts)
        return (rates - log_binomials(self.log_theta.exp(), counts)) / counts.shape[0]

    def plain_reconstruction(self, x: Tensor, z: Tensor) -> Tensor:
        """The same of dense counts, (n_cells, n_genes), as `_Rates` and `log_binomials` state it."""
        library, theta = x.sum(1, keepdim=True).clamp(min=NO_LIBRARY), self.log_theta.exp()
        log_u = self.share(self.decoder(z)).log_softmax(1) + library.log() - self.log_theta  # (B, G)
        binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return ((theta + x) * F.softplus(log_u) - x * log_u - binomial).sum(1).mean()


def _layers(first: nn.Module, n_layers: int, dropout: float) -> nn.Sequential:
    """The first linear layer and others as wide, each with what follows it."""
    layers, n_hidden = nn.Sequential(), len(first.bias)
    for linear in (first, *(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))):
        layers.extend([linear, nn.BatchNorm1d(n_hidden, eps=1e-3, momentum=0.01), nn.ReLU(), nn.Dropout(dropout)])
    return layers


class _Rates(torch.autograd.Function):
    """The part of the likelihood in which rates take part, summed over cells and genes, and its gradient.

    With mu = library * softmax(share) and u = mu / theta, scVI's negative binomial is

        -log p(x) = (theta + x) log(1 + u) - x log u - log[Gamma(x + theta) / (Gamma(theta) x!)]

    of which `log_binomials` is the last term. With v = (u - x / theta) / (1 + u), the gradient of the others is
    theta * v by log mu and theta * (log(1 + u) - v) by log theta. By share it is theta * (v - u * s), where s is a
    cell's sum of theta * v divided by its library.

    Nothing underflows on the way to log u, so that no small constant is added to mu as in scvi-tools.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, log_theta, counts) -> Tensor:
        n_cells, n_genes = counts.shape
        libraries = torch.from_numpy(np.asarray(counts.sum(axis=1)).ravel()).to(hidden).clamp(min=NO_LIBRARY)
        theta = log_theta.exp()
        bias = (bias - log_theta)[:, None]  # so that the exponential is a multiple of u, not of mu
        buffers = hidden.new_empty(5, n_genes * min(BLOCK, n_cells))
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        d_bias, d_log_theta = torch.zeros_like(theta), torch.zeros_like(theta)
        loss = hidden.new_zeros(())
        for first in range(0, n_cells, BLOCK):
            cells = slice(first, first + BLOCK)
            h, library = hidden[cells], libraries[cells]
            # Each (n_genes, BLOCK): the shape in which matrix products are fastest.
            x, u, one_and_u, log_one_and_u, lost = buffers[:, : n_genes * len(h)].view(5, n_genes, len(h))
            some = counts[cells]
            cell_of = np.repeat(np.arange(len(h)), np.diff(some.indptr))
            at = torch.from_numpy(some.indices * len(h) + cell_of).to(x.device)
            x.zero_().view(-1).scatter_(0, at, torch.from_numpy(some.data).to(x))

            log_u = torch.addmm(bias, weight, h.t(), out=u)  # up to a constant of each cell
            log_u -= log_u.amax(0)
            loss -= x.view(-1) @ log_u.view(-1)
            log_u.exp_()  # in `u`, from here on
            constant = library / (theta @ u)
            loss -= library @ constant.log()
            u *= constant

            torch.add(u, 1, out=one_and_u)
            torch.sub(u, torch.sub(one_and_u, 1, out=lost), out=lost)  # by rounding 1 + u
            torch.log(one_and_u, out=log_one_and_u).addcdiv_(lost, one_and_u)  # log1p at a fifth of its cost
            log_sum = log_one_and_u.sum(1)
            loss += x.view(-1) @ log_one_and_u.view(-1) + theta @ log_sum
            v = torch.addcmul(u, x, 1 / theta[:, None], value=-1, out=x).div_(one_and_u)
            d_log_theta += theta * (log_sum - v.sum(1))
            d_share = v.addcmul_(u, (theta @ v) / library, value=-1).mul_(theta[:, None])
            d_bias += d_share.sum(1)
            d_weight.addmm_(d_share, h)
            torch.mm(d_share.t(), weight, out=d_hidden[cells])
        ctx.save_for_backward(d_hidden, d_weight, d_bias, d_log_theta)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * each for each in ctx.saved_tensors), None


def log_binomials(theta: Tensor, counts: sp.csr_matrix) -> Tensor:
    """Sum of log[Gamma(x + theta) / (Gamma(theta) x!)] over cells and genes.

    A count x is the sum of log[(theta + k) / (1 + k)] for k below x, of which a histogram of each gene's counts tells
    how often each occurs. What a count has above `SMALL` is a difference of gamma functions, in double precision.
    """
    at = counts.indices * (SMALL + 1)
    at += np.minimum(counts.data, SMALL).astype(at.dtype)
    histogram = np.bincount(at, minlength=counts.shape[1] * (SMALL + 1)).reshape(-1, SMALL + 1)
    above = histogram[:, :0:-1].cumsum(1)[:, ::-1].copy()  # (n_genes, SMALL) cells that count more than k
    k = torch.arange(SMALL, device=theta.device)
    total = (torch.from_numpy(above).to(theta) * torch.log((theta[:, None] + k) / (1 + k))).sum()
    large = np.flatnonzero(counts.data > SMALL)
    x = torch.from_numpy(counts.data[large]).to(k.device).double()
    theta_of_x = theta[torch.from_numpy(counts.indices[large]).to(k.device)].double()
    rest = torch.lgamma(x + theta_of_x) - torch.lgamma(SMALL + theta_of_x) - torch.lgamma(x + 1)
    return total + (rest.sum() + len(large) * math.lgamma(SMALL + 1)).to(total)

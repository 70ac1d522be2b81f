"""SSL: a masked autoencoder, after Richter et al. (2025, Nature Machine Intelligence 7:68), and a variational variant.

Also the two layers that read and reconstruct sparse expression, for the other autoencoders: cells are nine tenths
zeros, and are never made dense.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall import expression, hyperparameters, training
from datawall.models import base

CELLS_AT_ONCE = 1024  # when embedding or validating: bounds memory
ENTRIES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}  # of a block of the reconstruction; a processor keeps it in its cache
HELD_OUT = 2000  # cells at most that choose the best weights
LOOKS = 10  # at their loss, at least


class Cells(NamedTuple):
    """A batch of cells by genes, sparse, on the device: its non-zero values by cell, and where each gene's are."""

    data: Tensor  # (n_values,) float32, cell after cell
    genes: Tensor  # (n_values,) int32, of each value
    offsets: Tensor  # (n_cells + 1,) int32, where each cell's values begin
    order: Tensor  # (n_values,) int32, positions in `data`, gene after gene
    cells: Tensor  # (n_values,) int32, of each value in that order
    gene_offsets: Tensor  # (n_genes + 1,) int32, where each gene's begin in that order

    @classmethod
    def of(cls, X: sp.csr_matrix) -> Self:
        """The cells of a matrix that has no entry twice."""
        by_gene = sp.csr_matrix((np.arange(X.nnz, dtype=np.int32), X.indices, X.indptr), shape=X.shape).tocsc()
        positions = (X.indices, X.indptr, by_gene.data, by_gene.indices, by_gene.indptr)
        arrays = (X.data.astype(np.float32), *(each.astype(np.int32) for each in positions))
        return cls(*(torch.from_numpy(array).to(training.device()) for array in arrays))

    def thinned(self, kept: Tensor, scale: float) -> Self:
        """The cells with those values alone that are kept, (n_values,) uint8 by cell, and scaled."""
        by_gene = kept.index_select(0, self.order)
        before, before_by_gene = (F.pad(each.cumsum(0, dtype=torch.int32), (1, 0)) for each in (kept, by_gene))
        left, left_by_gene = kept.nonzero().view(-1), by_gene.nonzero().view(-1)
        return Cells(
            self.data.index_select(0, left) * scale,
            self.genes.index_select(0, left),
            before.index_select(0, self.offsets),
            before.index_select(0, self.order.index_select(0, left_by_gene)),
            self.cells.index_select(0, left_by_gene),
            before_by_gene.index_select(0, self.gene_offsets),
        )


class SparseLinear(nn.Module):
    """A linear layer that reads `Cells`; weights are (n_inputs, n_outputs), and start as those of torch's own."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        bound = n_inputs**-0.5
        self.weight = nn.Parameter(torch.empty(n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_outputs).uniform_(-bound, bound))

    def forward(self, cells: Cells) -> Tensor:
        return _Product.apply(self.weight, cells) + self.bias


class _Product(torch.autograd.Function):
    """Cells times weights; the gradient is the transposed product. Both sum over non-zero values alone, in float32."""

    @staticmethod
    def forward(ctx, weight: Tensor, cells: Cells) -> Tensor:
        ctx.cells = cells
        # Detached: for a weight that wants a gradient torch takes twice as long, preparing its own way back.
        return _product(cells.data, cells.genes, cells.offsets, weight.detach())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        values, cells = ctx.cells.data.index_select(0, ctx.cells.order), ctx.cells
        return _product(values, cells.cells, cells.gene_offsets, gradient.contiguous()), None


def _product(values: Tensor, columns: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
    """A CSR matrix times a dense one."""
    return F.embedding_bag(columns, dense, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


class Reconstruction(nn.Linear):
    """The last layer of a decoder and its squared error in one, so that only a block of the output is ever in memory.

    Parameters
    ----------
    n_inputs, n_genes
        Sizes.
    sigmoid
        Whether the output is squashed between 0 and 1.
    """

    def __init__(self, n_inputs: int, n_genes: int, *, sigmoid: bool = False) -> None:
        super().__init__(n_inputs, n_genes)
        self.sigmoid = sigmoid

    def forward(self, inputs: Tensor, cells: Cells, hidden: Tensor | None = None, mask: float = 1.0) -> Tensor:
        """Squared error averaged over all cells and genes, in float32; an entry that is not hidden counts as 0.

        Parameters
        ----------
        inputs
            (n_cells, n_inputs).
        cells
            What is to be reconstructed.
        hidden
            (n_values,) uint8: which of the non-zero values were hidden. Without it, every entry counts.
        mask
            Share of the zeros that were hidden. They are drawn here: no layer before could see which.
        """
        learning = torch.is_grad_enabled()
        return _SquaredError.apply(inputs, self.weight, self.bias, cells, hidden, mask, self.sigmoid, learning)


class _SquaredError(torch.autograd.Function):
    """See `Reconstruction`. Gradients are taken on the way forward, block by block of genes."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, cells, hidden, mask, sigmoid, learning) -> Tensor:
        (n_cells, _), n_genes = inputs.shape, len(weight)
        targets = cells.data.index_select(0, cells.order)
        hidden = None if hidden is None else hidden.index_select(0, cells.order)
        d_inputs = torch.zeros_like(inputs, dtype=torch.float32)
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
        total = torch.zeros((), device=inputs.device)
        width = max(1, ENTRIES_AT_ONCE[inputs.device.type] // n_cells)
        starts = [*range(0, n_genes, width), n_genes]
        bounds = pairwise(cells.gene_offsets[starts].tolist())
        for (first, last), (begin, end) in zip(pairwise(starts), bounds, strict=True):
            block, some = slice(first, last), slice(begin, end)
            error = F.linear(inputs, weight[block], bias[block]).float()  # here still the output, with x taken as 0
            if sigmoid:
                error.sigmoid_()
                slope = error * (1 - error)
            counts = cells.gene_offsets[first : last + 1].diff()
            column = torch.arange(last - first, device=error.device).repeat_interleave(counts, output_size=end - begin)
            at = cells.cells[some] * (last - first) + column
            difference = error.take(at) - targets[some]
            if hidden is not None:
                error.mul_(bernoulli(error.numel(), mask, error.device).view_as(error))
                difference *= hidden[some]
            error.view(-1).scatter_(0, at, difference)
            total += torch.dot(error.view(-1), error.view(-1))
            if learning:
                error = error.mul_(slope) if sigmoid else error
                d_inputs += error @ weight[block]
                d_weight[block] = error.T @ inputs
                d_bias[block] = error.sum(0)
        ctx.gradients, ctx.n_entries = (d_inputs, d_weight, d_bias), n_cells * n_genes
        return total / ctx.n_entries

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so of use once
        return *(each.mul_(gradient * 2 / ctx.n_entries) for each in gradients), *[None] * 5


def bernoulli(n: int, share: float, where: torch.device) -> Tensor:
    """Independent draws that are 1 with a probability, (n,) uint8, from torch's global generator.

    On the CPU 64 are drawn at once, to the nearest 2⁻³²: torch's own take longer than the matrix products. Where a
    bit is 1 with probability p, it is with (1 + p) / 2 after OR with a fair bit, and with p / 2 after AND; so the
    binary digits of the share, the last one first, make fair bits into those wanted.
    """
    if where.type != "cpu":
        return torch.empty(n, dtype=torch.uint8, device=where).bernoulli_(share)
    digits = f"{min(max(round(share * 2**32), 1), 2**32 - 1):032b}".rstrip("0")
    words = torch.zeros(-(-n // 64), dtype=torch.int64)
    for digit in reversed(digits):
        fair = torch.empty_like(words).random_(-(2**63), None)
        words = words | fair if digit == "1" else words & fair
    return torch.from_numpy(np.unpackbits(words.numpy().view(np.uint8), count=n))


@torch.no_grad()
def embed(encode: Callable[[Cells], Tensor], counts: sp.csr_matrix, n_latent: int) -> np.ndarray:
    """Cells through an encoder of log-normalised expression, (n_cells, n_latent) float32; zero for one without counts.

    A block at a time, so that memory does not grow with the cells.
    """
    embedding = np.empty((counts.shape[0], n_latent), dtype=np.float32)
    for first in range(0, len(embedding), CELLS_AT_ONCE):
        block = slice(first, first + CELLS_AT_ONCE)
        embedding[block] = encode(Cells.of(expression.lognormalise(counts[block]))).cpu().numpy()
    embedding[np.asarray(counts.sum(axis=1)).ravel() == 0] = 0
    return embedding


class Autoencoder(nn.Module):
    """Linear layers, SELU and dropout; its forward pass gives the loss of a batch (see `SSL`)."""

    def __init__(self, n_genes: int, h: hyperparameters.SSL) -> None:
        super().__init__()
        self.mask, self.n_latent, self.variational = h.mask, h.n_latent, h.loss == "vae"

        def layers(widths: list[int]) -> list[nn.Module]:
            return [each for n, m in pairwise(widths) for each in (nn.Linear(n, m), nn.SELU(), nn.Dropout(h.dropout))]

        self.encoder = nn.Sequential(
            SparseLinear(n_genes, h.n_hidden[0]),
            nn.SELU(),
            nn.Dropout(h.dropout),
            *layers(h.n_hidden),
            nn.Linear(h.n_hidden[-1], 2 * h.n_latent if self.variational else h.n_latent),
        )
        self.decoder = nn.Sequential(*layers([h.n_latent, *reversed(h.n_hidden)]))
        self.reconstruction = Reconstruction(h.n_hidden[0], n_genes, sigmoid=h.output == "sigmoid")

    def forward(self, cells: Cells) -> Tensor:
        if self.variational:
            mean, log_variance = self.encoder(cells).float().chunk(2, dim=1)
            latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
            n_genes = self.reconstruction.out_features
            return self.reconstruction(self.decoder(latent), cells) / 2 + divergence / n_genes
        hidden = bernoulli(len(cells.data), self.mask, cells.data.device)
        seen = cells.thinned(1 - hidden, 1 / (1 - self.mask))
        return self.reconstruction(self.decoder(self.encoder(seen)), cells, hidden, self.mask)

    def encode(self, cells: Cells) -> Tensor:
        """Latent variables, (n_cells, n_latent); of the variational variant their mean."""
        return self.encoder(cells)[:, : self.n_latent]


class SSL(base.Network):
    """Reconstruct hidden genes from the others.

    Defaults are the sizes and settings of DenAdel et al. 2026. Expression is log-normalised. Each entry of a cell is
    hidden with probability `mask`; the encoder sees 0 in its place, and the others divided by 1 - mask. The loss is
    the squared error of the hidden entries, zeros among them, summed and divided by the number of all entries.

    Three things differ from theirs by default, each with a switch back. The output is linear: a sigmoid cannot reach
    targets above one (`output`). The rate decays a number of times in the budget, and not every two passes, which
    left a large subset a hundred times the budget of a small one (`schedule`). The weights kept are those of the
    lowest loss on a tenth of the subset (at least one cell, at most 2,000, drawn by the seed) that is not trained on;
    a subset of one cell serves as both; `keep="last"` trains on every cell and keeps what comes out.

    With `loss="vae"` nothing is hidden: the encoder gives a mean and a log-variance of a latent Gaussian, and the
    loss is scVI's with a Gaussian likelihood of unit variance for log-normalised expression, divided by the number of
    genes: (½ Σ_genes (x̂ - x)² + KL(q ‖ N(0, 1))) / n_genes, averaged over cells.

    Parameters
    ----------
    hyperparameters
        See `hyperparameters.SSL`; its defaults are used for those not given.
    """

    family = "SSL"

    def network(self, n_genes: int) -> Autoencoder:
        """The autoencoder."""
        return Autoencoder(n_genes, self.hyperparameters)

    def fit(
        self,
        counts: sp.csr_matrix,
        obs: pd.DataFrame,
        *,
        steps: int,
        seed: int,
        init_seed: int | None = None,
        checkpoint: Path | None = None,
        progress: str | None = None,
    ) -> training.History:
        """Train for a number of optimiser steps; no column of `obs` is read.

        Raises
        ------
        ValueError
            If there are no cells.
        training.NonFiniteLossError
            If training diverges.
        """
        h = self.hyperparameters
        X = expression.lognormalise(counts)
        cells = np.random.default_rng([seed, 1]).permutation(counts.shape[0])
        n_held = min(HELD_OUT, max(1, len(cells) // 10)) if h.keep == "best" else 0
        held, learned = cells[:n_held], cells[n_held:] if len(cells) > 1 else cells
        module = self.build(counts.shape[1], seed if init_seed is None else init_seed)

        def loss_of(forward: training.Forward, rows: np.ndarray, step: int) -> Tensor:
            return forward(Cells.of(X[rows]))

        def validation_loss() -> float:
            torch.manual_seed(0)  # the same masks at every look; the next step has its own seed
            blocks = (held[first : first + CELLS_AT_ONCE] for first in range(0, n_held, CELLS_AT_ONCE))
            return sum(len(rows) * module(Cells.of(X[rows])).item() for rows in blocks) / n_held

        passes = max(1.0, len(learned) / h.batch_size)  # steps of one; a pass takes a step at least
        recipe = training.Recipe(
            steps=steps,
            decay="stepwise",
            decay_every=steps / h.n_decays if h.schedule == "steps" else 2 * passes,
            decay_vectors=True,
            validate_every=max(1, steps // LOOKS),
            **h.model_dump(include={"batch_size", "learning_rate", "weight_decay", "clip_norm"}),
        )
        batches = (learned[rows] for rows in training.minibatches(len(learned), h.batch_size, steps, seed=seed))
        return training.train(
            module,
            loss_of,
            len(learned),
            recipe,
            seed=seed,
            batches=batches,
            validation_loss=validation_loss if n_held else None,
            checkpoint=checkpoint,
            progress=progress,
        )

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Output of the encoder for whole cells, nothing hidden, (n_cells, n_latent) float32."""
        return embed(self.ready(counts).encode, counts, self.hyperparameters.n_latent)

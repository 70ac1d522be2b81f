"""Layers of autoencoders that read and reconstruct sparse expression: cells are nine tenths zeros.

A processor never makes them dense. A GPU does, and takes the plain products: it has the operations to spare, and would
wait for the processor to sort a batch's values by gene.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall.cells import expression
from datawall.models import base, training

CELLS_AT_ONCE = 1024  # when embedding: bounds memory
ENTRIES_AT_ONCE = 2**20  # of a block of the reconstruction, which stays in a processor's cache


class Cells(NamedTuple):
    """A batch of cells by genes, sparse, on a processor: its non-zero values by cell, and where each gene's are."""

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
        arrays = (X.data.astype(np.float32), *(array.astype(np.int32) for array in positions))
        return cls(*map(torch.from_numpy, arrays))

    @property
    def n_cells(self) -> int:
        return len(self.offsets) - 1

    def log1p(self) -> Self:
        return self._replace(data=self.data.log1p())

    def thinned(self, kept: Tensor, scale: float) -> Self:
        """The cells with those values alone that are kept, (n_values,) uint8 by cell, and scaled."""
        by_gene = kept.index_select(0, self.order)
        before, before_by_gene = (F.pad(mask.cumsum(0, dtype=torch.int32), (1, 0)) for mask in (kept, by_gene))
        left, left_by_gene = kept.nonzero().view(-1), by_gene.nonzero().view(-1)
        return Cells(
            self.data.index_select(0, left) * scale,
            self.genes.index_select(0, left),
            before.index_select(0, self.offsets),
            before.index_select(0, self.order.index_select(0, left_by_gene)),
            self.cells.index_select(0, left_by_gene),
            before_by_gene.index_select(0, self.gene_offsets),
        )


class DenseCells(NamedTuple):
    """The same on a GPU: every value is written out, zeros too."""

    x: Tensor  # (n_cells, n_genes) float32

    @classmethod
    def of(cls, X: sp.csr_matrix) -> Self:
        """The cells of a matrix that has no entry twice, of which the device gets the non-zero values."""
        arrays = X.data.astype(np.float32), X.indices.astype(np.int64), np.diff(X.indptr)
        data, genes, n_values = (training.send(torch.from_numpy(array)) for array in arrays)
        row = torch.arange(X.shape[0], device=data.device).repeat_interleave(n_values, output_size=X.nnz)
        x = data.new_zeros(X.shape[0] * X.shape[1]).scatter_(0, row * X.shape[1] + genes, data)
        return cls(x.view(X.shape))

    @property
    def data(self) -> Tensor:
        return self.x.view(-1)

    @property
    def n_cells(self) -> int:
        return len(self.x)

    def log1p(self) -> Self:
        return DenseCells(self.x.log1p())

    def thinned(self, kept: Tensor, scale: float) -> Self:
        """The cells with zeros for those values that are not kept, (n_cells * n_genes,) uint8, and scaled."""
        return DenseCells(self.x * kept.view_as(self.x) * scale)


def on_device(X: sp.csr_matrix) -> Cells | DenseCells:
    """Cells as the device is fastest with them, on it."""
    return Cells.of(X) if training.device().type == "cpu" else DenseCells.of(X)


class SparseLinear(nn.Module):
    """A linear layer that reads `Cells`; weights are (n_inputs, n_outputs), and start as those of torch's own."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        bound = n_inputs**-0.5
        self.weight = nn.Parameter(torch.empty(n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_outputs).uniform_(-bound, bound))

    def forward(self, cells: Cells | DenseCells) -> Tensor:
        if isinstance(cells, DenseCells):
            return cells.x @ self.weight + self.bias
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

    With `sigmoid`, the output is squashed between 0 and 1.
    """

    def __init__(self, n_inputs: int, n_genes: int, *, sigmoid: bool = False) -> None:
        super().__init__(n_inputs, n_genes)
        self.sigmoid = sigmoid

    def forward(
        self, inputs: Tensor, cells: Cells | DenseCells, hidden: Tensor | None = None, mask: float = 1.0
    ) -> Tensor:
        """Squared error averaged over all cells and genes, in float32; an entry that is not hidden counts as 0.

        By definition that is ((output - x)² * is_hidden).mean(), of (n_cells, n_genes) that are never whole. `inputs`
        are (n_cells, n_inputs); `hidden`, (n_values,) uint8, says which of the values of the cells were hidden, and
        without it every entry counts; `mask` is the share of the zeros that were. Where the cells lack zeros, these are
        drawn here: no layer before could see which.
        """
        if isinstance(cells, DenseCells):
            output = super().forward(inputs).float()
            error = ((output.sigmoid() if self.sigmoid else output) - cells.x).square()
            return (error if hidden is None else error * hidden.view_as(error)).mean()
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
        width = max(1, ENTRIES_AT_ONCE // n_cells)
        starts = [*range(0, n_genes, width), n_genes]
        ends = cells.gene_offsets[starts].tolist()
        for (first, last), (begin, end) in zip(pairwise(starts), pairwise(ends), strict=True):
            block, values = slice(first, last), slice(begin, end)
            # (n_cells, last - first): the output, and so the error of the zeros; below, that of the values too
            error = F.linear(inputs, weight[block], bias[block]).float()
            if sigmoid:
                error.sigmoid_()
                slope = error * (1 - error)
            counts = cells.gene_offsets[first : last + 1].diff()
            column = torch.arange(last - first, device=error.device).repeat_interleave(counts, output_size=end - begin)
            at = cells.cells[values] * (last - first) + column
            difference = error.take(at) - targets[values]
            if hidden is not None:
                error.mul_(bernoulli(error.numel(), mask, error.device).view_as(error))
                difference *= hidden[values]
            error.view(-1).scatter_(0, at, difference)
            total += torch.linalg.vector_norm(error, dim=1).square().sum()  # by cell: all at once loses digits
            if learning:
                error = error.mul_(slope) if sigmoid else error
                d_inputs += error @ weight[block]
                d_weight[block] = error.T @ inputs
                d_bias[block] = error.sum(0)
        ctx.gradients, ctx.n_entries = (d_inputs, d_weight, d_bias), n_cells * n_genes
        return total / ctx.n_entries

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, ctx.gradients = ctx.gradients, None  # scaled in place, so of use once
        return *(part.mul_(gradient * 2 / ctx.n_entries) for part in parts), *[None] * 5


def bernoulli(n: int, share: float, where: torch.device) -> Tensor:
    """Independent draws that are 1 with a probability, (n,) uint8, from torch's global generator.

    On the CPU 64 are drawn at once, to the nearest 2⁻³²: torch's own would take a quarter of a step. Where a bit is 1
    with probability p, it is with (1 + p) / 2 after OR with a fair bit, and with p / 2 after AND; so the binary
    digits of the share, the last one first, make fair bits into those wanted. For 0.625, binary 0.101: OR makes 0 into
    1/2, AND this into 1/4, and OR that into 5/8.
    """
    if where.type != "cpu":
        return torch.empty(n, dtype=torch.uint8, device=where).bernoulli_(share)
    digits = f"{min(max(round(share * 2**32), 1), 2**32 - 1):032b}".rstrip("0")
    fair = torch.empty(len(digits), -(-n // 64), dtype=torch.int64).random_(-(2**63), None).numpy()
    words = np.zeros_like(fair[0])
    for digit, bits in zip(reversed(digits), fair, strict=True):
        (np.bitwise_or if digit == "1" else np.bitwise_and)(words, bits, out=words)
    return torch.from_numpy(np.unpackbits(words.view(np.uint8), count=n))


class SparseNetwork(base.Network):
    """A family whose module embeds `Cells` by its method `encode`, as a rule of log-normalised expression."""

    def prepare(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Log-normalised expression of the panel, (n_cells, n_panel); a cell is scaled by its counts of all genes."""
        return self.select_panel(expression.lognormalise(counts))

    @torch.no_grad()
    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Output of the encoder for whole cells, block by block; zero for a cell without counts of the panel."""
        module = self.ready(counts)
        embedding = np.empty((counts.shape[0], self.hyperparameters.n_latent), dtype=np.float32)
        for first in range(0, len(embedding), CELLS_AT_ONCE):
            block = slice(first, first + CELLS_AT_ONCE)
            X = self.prepare(counts[block])
            embedding[block] = np.where(X.sum(axis=1) > 0, module.encode(on_device(X)).cpu().numpy(), 0)
        return embedding

    def finetunable(self) -> tuple[nn.Module, Callable[[sp.csr_matrix], Tensor]]:
        """A copy of the network, and what embeds raw counts with it, (n_cells, n_latent), for gradients to pass."""
        network = copy.deepcopy(self.module)
        return network, lambda counts: network.encode(on_device(self.prepare(counts)))

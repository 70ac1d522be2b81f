"""Geneformer: a transformer that predicts masked genes in a cell's ranking of its genes (Theodoris et al. 2023)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from datawall.models import base, training
from datawall.models.tokenizer import RankTokenizer, Tokens, gene_medians, streamed_gene_medians
from datawall.models.transformer import N_SPECIAL, Encoder, EncoderConfig, Layout, mask_tokens

if TYPE_CHECKING:
    from datawall.cells.cellstore import Cells

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 16_384  # when embedding: bounds memory whatever the cells' lengths


class Geneformer(base.Network):
    """Rank-value tokens, a BERT encoder and masked-gene prediction; the panel is the vocabulary.

    Defaults are the sizes and settings of DenAdel et al. 2026. Two things differ on purpose: gene medians come
    from the pretraining subset itself (theirs came from 30 million other cells, whatever the subset), and warm-up
    is a share of the steps.
    """

    family = "Geneformer"
    statistics = ("medians",)  # (n_vocabulary,) of the genes' counts; see `tokenizer.gene_medians`

    def network(self, n_genes: int) -> Encoder:
        h = self.hyperparameters
        sizes = h.model_dump(include={"max_length", "n_layers", "n_heads", "n_embd", "dropout", "init_std"})
        return Encoder(EncoderConfig(vocab_size=n_genes + N_SPECIAL, n_inner=2 * h.n_embd, **sizes))

    def prepare(self, counts: sp.csr_matrix) -> Tokens:
        return RankTokenizer(self.medians, self.hyperparameters.max_length).encode(self.select_panel(counts))

    def learn_statistics(self, counts: sp.csr_matrix | Cells) -> np.ndarray:
        streamed = not sp.issparse(counts)
        medians = streamed_gene_medians(counts.count_blocks) if streamed else gene_medians(counts)
        self.medians = medians[self.genes]
        blocks = counts.count_blocks() if streamed else [counts]
        # A cell without a token teaches nothing.
        rows = np.flatnonzero(np.concatenate([(self.select_panel(block) > 0).getnnz(axis=1) for block in blocks]))
        if not len(rows):
            raise ValueError("Geneformer: no cell of the subset expresses a gene of the vocabulary.")
        return rows

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        def loss_of(forward: training.Forward, cells: tuple[np.ndarray, Tokens], step: int) -> tuple[Tensor, int]:
            batch = self._masked(cells[1])
            return forward(*batch), len(batch[-1])  # hidden tokens, of which processes have more or fewer

        return loss_of

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Random weights, and nothing learned from cells: all genes in the vocabulary, each with a median of one."""
        self.medians = np.ones(n_genes, dtype=np.float32)
        return super().untrained(n_genes, seed=seed)

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Mean over tokens of the second-to-last layer, (n_cells, n_embd) float32; zero for a cell without tokens."""
        module = self.ready(counts)
        tokens = self.prepare(counts)
        embedding = np.zeros((counts.shape[0], self.hyperparameters.n_embd), dtype=np.float32)
        if n_empty := int((np.diff(tokens.offsets) == 0).sum()):
            log.warning("%d cells express no gene of the vocabulary; they embed as zero.", n_empty)
        for cells in _of_like_length(tokens):
            embedding[cells] = module.embed(*_packed(tokens[cells])).cpu().numpy()
        return embedding

    def finetunable(self) -> tuple[nn.Module, Callable[[sp.csr_matrix], Tensor]]:
        """A copy of the encoder, and what embeds raw counts with it, (n_cells, n_embd), for gradients to pass."""
        encoder, n_layers = copy.deepcopy(self.module), self.hyperparameters.n_layers - 1

        def encode(counts: sp.csr_matrix) -> Tensor:
            tokens = self.prepare(counts)
            expressing = np.flatnonzero(np.diff(tokens.offsets))
            ids, layout = _packed(tokens[expressing])
            means = layout.mean(encoder.hidden(ids, layout, n_layers).float())  # (n_expressing, n_embd)
            rows = torch.from_numpy(expressing).to(training.device())
            return means.new_zeros(counts.shape[0], means.shape[1]).index_copy(0, rows, means)

        return encoder, encode

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Cross-entropy of hidden genes, in nats; NaN if no cell expresses a gene of the vocabulary."""
        tokens = self.prepare(counts)
        losses, n_hidden = [], []
        for cells in _of_like_length(tokens):
            batch = self._masked(tokens[cells])
            losses.append(self.module(*batch).item())
            n_hidden.append(len(batch[-1]))
        return float(np.average(losses, weights=n_hidden)) if losses else float("nan")

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """Cross-entropy of guessing each gene as often as it occurs among the cells' tokens."""
        share = np.bincount(self.prepare(counts).ids).astype(np.float64)
        share = share[share > 0] / share.sum()
        return float(-(share * np.log(share)).sum())

    def _masked(self, tokens: Tokens) -> tuple[Tensor, Layout, Tensor, Tensor]:
        """What the encoder learns from, on its device: ids with some tokens hidden, their layout, what is hidden."""
        ids, *hidden = mask_tokens(torch.from_numpy(tokens.ids).long(), len(self.medians) + N_SPECIAL)
        masked = Tokens(ids.numpy(), tokens.offsets)
        return *_packed(masked), *map(training.send, hidden)


def _of_like_length(tokens: Tokens) -> list[np.ndarray]:
    """Cells that have tokens, in batches of like length that fit into memory."""
    lengths = np.diff(tokens.offsets)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    batch = np.cumsum(lengths[order]) // TOKENS_PER_BATCH
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1) if len(order) else []


def _packed(tokens: Tokens) -> tuple[Tensor, Layout]:
    """Token ids and their layout, on the device."""
    ids = training.send(torch.from_numpy(tokens.ids).long())
    return ids, Layout(torch.from_numpy(tokens.offsets), ids.device)

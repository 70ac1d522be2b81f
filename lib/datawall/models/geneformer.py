"""Geneformer: a transformer that predicts masked genes in a cell's ranking of its genes (Theodoris et al. 2023)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn

from datawall.cells.cellstore import Cells
from datawall.models import base, streaming, training
from datawall.models.hyperparameters import check
from datawall.models.tokenizer import RankTokenizer, Tokens, gene_medians, streamed_gene_medians
from datawall.models.transformer import Encoder, EncoderConfig, Layout, mask_tokens, send, to_predict

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 16_384  # when embedding: bounds memory whatever the cells' lengths


class Geneformer:
    """Rank-value tokens, a BERT encoder and masked-gene prediction.

    Defaults are the sizes and settings of DenAdel et al. 2026. Two things differ on purpose: gene medians come
    from the pretraining subset itself (theirs came from 30 million other cells, whatever the subset), and warm-up
    is a share of the steps.

    Parameters
    ----------
    hyperparameters
        See `hyperparameters.Geneformer`; its defaults are used for those not given.
    """

    def __init__(self, **hyperparameters: Any) -> None:
        self.hyperparameters = check("Geneformer", hyperparameters)
        self.n_corpus_genes: int | None = None
        self.genes: np.ndarray | None = None  # (n_vocabulary,) positions in the corpus of the vocabulary's genes
        self.medians: np.ndarray | None = None  # (n_vocabulary,)
        self.encoder: Encoder | None = None

    def fit(
        self,
        counts: sp.csr_matrix | Cells,
        obs: pd.DataFrame,
        *,
        steps: int,
        seed: int,
        init_seed: int | None = None,
        checkpoint: Path | None = None,
    ) -> training.History:
        """Choose the vocabulary, take the medians, and predict masked genes for a number of optimiser steps.

        Raises
        ------
        ValueError
            If no cell expresses a gene of the vocabulary.
        training.NonFiniteLossError
            If training diverges.
        """
        h = self.hyperparameters
        self.n_corpus_genes, self.genes = counts.shape[1], base.choose_panel(counts, h.n_genes)
        streamed = isinstance(counts, Cells)
        medians = streamed_gene_medians(counts.count_blocks) if streamed else gene_medians(counts)
        self.medians = medians[self.genes]
        tokenizer = self._build(seed if init_seed is None else init_seed)
        # A cell without a token teaches nothing.
        lengths = [(block[:, self.genes] > 0).getnnz(axis=1) for block in streaming.blocks(counts)]
        rows = np.flatnonzero(np.concatenate(lengths))
        if not len(rows):
            raise ValueError("Geneformer: no cell of the subset expresses a gene of the vocabulary.")
        learned, validation_loss = base.hold_out(self, counts, None, rows, seed=seed)
        where = training.device()

        def loss_of(forward: training.Forward, cells: tuple[np.ndarray, Tokens], step: int) -> torch.Tensor:
            return forward(*_masked(cells[1], tokenizer.vocab_size, where))

        recipe = training.Recipe(
            steps=steps,
            batch_size=h.batch_size,
            learning_rate=h.learning_rate,
            warmup=h.warmup,
            weight_decay=h.weight_decay,
            validate_every=max(1, steps // base.LOOKS),
        )
        load = streaming.loader(
            counts, lambda cells: tokenizer.encode(cells[:, self.genes]), h.batch_size, take=Tokens.take
        )
        batches = training.minibatches(learned, h.batch_size, steps, seed=seed)
        options = {"batches": batches, "load": load, "validation_loss": validation_loss, "checkpoint": checkpoint}
        return training.train(self.encoder, loss_of, len(learned), recipe, seed=seed, **options)

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Random weights, and nothing learned from cells: all genes in the vocabulary, each with a median of one."""
        self.n_corpus_genes = n_genes
        self.genes = np.arange(n_genes)
        self.medians = np.ones(n_genes, dtype=np.float32)
        self._build(seed)
        self.encoder.eval()
        return self

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Mean over tokens of the second-to-last layer, (n_cells, n_embd) float32; zero for a cell without tokens."""
        if self.encoder is None:
            raise base.NotFittedError("Geneformer")
        base.check_genes(counts, self.n_corpus_genes, "Geneformer")
        tokens = self._tokenizer().encode(counts[:, self.genes])
        embedding = np.zeros((counts.shape[0], self.hyperparameters.n_embd), dtype=np.float32)
        if n_empty := int((np.diff(tokens.offsets) == 0).sum()):
            log.warning("%d cells express no gene of the vocabulary; they embed as zero.", n_empty)
        where = next(self.encoder.parameters()).device
        for cells in _alike(tokens):
            embedding[cells] = self.encoder.embed(*_packed(tokens.take(cells), where)).cpu().numpy()
        return embedding

    def finetunable(self) -> tuple[nn.Module, Callable[[sp.csr_matrix], torch.Tensor]]:
        """A copy of the encoder, and what embeds raw counts with it, (n_cells, n_embd), for gradients to pass."""
        encoder, tokenizer, n_layers = copy.deepcopy(self.encoder), self._tokenizer(), self.hyperparameters.n_layers - 1
        where = next(encoder.parameters()).device

        def encode(counts: sp.csr_matrix) -> torch.Tensor:
            tokens = tokenizer.encode(counts[:, self.genes])
            some = np.flatnonzero(np.diff(tokens.offsets))
            ids, layout = _packed(tokens.take(some), where)
            of_some = layout.mean(encoder.hidden(ids, layout, n_layers).float())
            rows = torch.from_numpy(some).to(where)
            return of_some.new_zeros(counts.shape[0], of_some.shape[1]).index_copy(0, rows, of_some)

        return encoder, encode

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Cross-entropy of hidden genes, in nats; NaN if no cell expresses a gene of the vocabulary."""
        tokenizer, where = self._tokenizer(), next(self.encoder.parameters()).device
        tokens = tokenizer.encode(counts[:, self.genes])
        losses, n_hidden = [], []
        for cells in _alike(tokens):
            batch = _masked(tokens.take(cells), tokenizer.vocab_size, where)
            losses.append(self.encoder(*batch).item())
            n_hidden.append(len(batch[-1]))
        return float(np.average(losses, weights=n_hidden)) if losses else float("nan")

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """Cross-entropy of guessing each gene as often as it occurs among the cells' tokens."""
        share = np.bincount(self._tokenizer().encode(counts[:, self.genes]).ids).astype(np.float64)
        share = share[share > 0] / share.sum()
        return float(-(share * np.log(share)).sum())

    def save(self, folder: Path) -> None:
        """Write vocabulary, medians, weights and hyper-parameters."""
        if self.encoder is None:
            raise base.NotFittedError("Geneformer")
        weights = {f"encoder.{name}": weight.cpu().numpy() for name, weight in self.encoder.state_dict().items()}
        n_corpus_genes = np.array([self.n_corpus_genes])
        arrays = {"n_corpus_genes": n_corpus_genes, "genes": self.genes, "medians": self.medians, **weights}
        base.write(Path(folder), "Geneformer", self.hyperparameters, arrays)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a saved model."""
        hyperparameters, arrays = base.read(Path(folder))
        model = cls(**hyperparameters)
        model.n_corpus_genes = int(arrays.pop("n_corpus_genes")[0])
        model.genes, model.medians = arrays.pop("genes"), arrays.pop("medians")
        model._build(seed=0)
        model.encoder.load_state_dict(
            {name.removeprefix("encoder."): torch.from_numpy(array) for name, array in arrays.items()}
        )
        model.encoder.eval()
        return model

    def _config(self, vocab_size: int) -> EncoderConfig:
        h = self.hyperparameters
        sizes = h.model_dump(include={"max_length", "n_layers", "n_heads", "n_embd", "dropout", "init_std"})
        return EncoderConfig(vocab_size=vocab_size, n_inner=2 * h.n_embd, **sizes)

    def _tokenizer(self) -> RankTokenizer:
        return RankTokenizer(self.medians, self.hyperparameters.max_length)

    def _build(self, seed: int) -> RankTokenizer:
        """Make the encoder for the vocabulary, with initial weights from the seed."""
        tokenizer = self._tokenizer()
        self.encoder = training.seeded(lambda: Encoder(self._config(tokenizer.vocab_size)), seed)
        return tokenizer


def _alike(tokens: Tokens) -> list[np.ndarray]:
    """Cells that have tokens, in batches of like length that fit into memory."""
    lengths = np.diff(tokens.offsets)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    batch = np.cumsum(lengths[order]) // TOKENS_PER_BATCH
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1) if len(order) else []


def _packed(tokens: Tokens, where: torch.device) -> tuple[torch.Tensor, Layout]:
    """Token ids and their layout on a device."""
    return send(torch.from_numpy(tokens.ids).long(), where), Layout(torch.from_numpy(tokens.offsets), where)


def _masked(
    tokens: Tokens, vocab_size: int, where: torch.device
) -> tuple[torch.Tensor, Layout, torch.Tensor, torch.Tensor]:
    """What the encoder learns from, on a device: ids with some tokens hidden, their layout, and what is hidden."""
    ids, targets = mask_tokens(torch.from_numpy(tokens.ids).long(), vocab_size)
    hidden = (send(each, where) for each in to_predict(targets))
    return send(ids, where), Layout(torch.from_numpy(tokens.offsets), where), *hidden

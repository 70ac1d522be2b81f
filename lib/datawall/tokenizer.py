"""Rank-value encoding: a cell as the list of its genes, most over-expressed first (Theodoris et al. 2023)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from datawall.transformer import N_SPECIAL


class Tokens(NamedTuple):
    """Packed token sequences: those of cell i are `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # (n_tokens,) int32, gene position plus the number of special tokens
    offsets: np.ndarray  # (n_cells + 1,) int64

    def take(self, cells: np.ndarray) -> Tokens:
        """The sequences of some cells, in the order given."""
        lengths = np.diff(self.offsets)[cells]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Tokens(self.ids[np.repeat(self.offsets[cells], lengths) + within], offsets)


def gene_medians(counts: sp.csr_matrix, target_sum: float = 1e4) -> np.ndarray:
    """Median of each gene's counts per `target_sum` over the cells that express it.

    Parameters
    ----------
    counts
        (n_cells, n_genes) raw counts: the pretraining subset, never cells of an evaluation (FACTS B22: the
        original took its medians from 30 million other cells).
    target_sum
        Counts per cell after scaling.

    Returns
    -------
    (n_genes,) float32; 1 for a gene that no cell expresses.
    """
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # Stored zeros would count as expressed; a copy, since the caller's matrix is not ours to prune.
    columns = sp.coo_matrix(counts)
    expressed = columns.data > 0
    rows, genes = columns.row[expressed], columns.col[expressed]
    values = columns.data[expressed] / totals[rows] * target_sum
    order = np.lexsort((values, genes))
    values, n_cells = values[order], np.bincount(genes, minlength=counts.shape[1])
    begin = np.concatenate([[0], np.cumsum(n_cells)[:-1]])
    medians = np.ones(counts.shape[1])
    seen = n_cells > 0
    low = values[(begin + (n_cells - 1) // 2)[seen]]
    high = values[(begin + n_cells // 2)[seen]]
    medians[seen] = (low + high) / 2
    return medians.astype(np.float32)


class RankTokenizer:
    """Encode cells as genes sorted by count over the gene's median, descending.

    The sum of a cell's counts scales all of its values alike, so it does not enter. Ties are broken by gene
    order: of two genes with equal value the one that comes first in the corpus comes first in the sequence.

    Parameters
    ----------
    medians
        (n_genes,) positive, the non-zero median of each gene (`gene_medians`).
    max_length
        Tokens kept per cell, the highest ranked ones.

    Raises
    ------
    ValueError
        If a median is not positive and finite.
    """

    def __init__(self, medians: np.ndarray, max_length: int = 2048) -> None:
        self.medians = np.asarray(medians, dtype=np.float32)
        if not (np.isfinite(self.medians) & (self.medians > 0)).all():
            gene = int(np.flatnonzero(~(np.isfinite(self.medians) & (self.medians > 0)))[0])
            raise ValueError(f"median of gene {gene} is {self.medians[gene]}; medians must be positive and finite.")
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the genes and the special tokens."""
        return len(self.medians) + N_SPECIAL

    def encode(self, counts: sp.csr_matrix) -> Tokens:
        """Rank-value encode cells.

        Parameters
        ----------
        counts
            (n_cells, n_genes) raw counts, genes in the order of `medians`. A cell without counts gets no token.

        Returns
        -------
        Tokens, at most `max_length` a cell.

        Raises
        ------
        ValueError
            If the matrix has another number of genes than there are medians.
        """
        if counts.shape[1] != len(self.medians):
            raise ValueError(
                f"counts have {counts.shape[1]} genes, the tokenizer {len(self.medians)}; align them first."
            )
        counts = sp.csr_matrix(counts)
        values = counts.data.astype(np.float32) / self.medians[counts.indices]
        # Bits of a positive float32 grow with its value; inverted they sort descending, and the gene's
        # position below them makes one integer key whose plain sort is the ranking with its tie rule.
        keys = (np.uint64(0xFFFFFFFF) - values.view(np.uint32)).astype(np.uint64) << np.uint64(32)
        keys |= counts.indices.astype(np.uint64)
        expressed = values > 0
        kept = []
        for first, last in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
            cell = np.sort(keys[first:last][expressed[first:last]])[: self.max_length]
            kept.append(cell.astype(np.uint32))
        offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in kept], dtype=np.int64)])
        genes = np.concatenate(kept) if kept else np.empty(0, np.uint32)
        return Tokens(genes.astype(np.int32) + N_SPECIAL, offsets)

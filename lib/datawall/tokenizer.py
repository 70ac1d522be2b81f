"""Rank-value encoding: a cell as the list of its genes, most over-expressed first (Theodoris et al. 2023)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from datawall.transformer import N_SPECIAL

ENTRIES_PER_BLOCK = 1 << 16  # detected genes encoded at once: what is made of them stays in a core's cache


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
    # A copy, since the caller's matrix is not ours to prune: stored zeros would count as expressed.
    genes = sp.csc_matrix(counts, copy=True)
    genes.eliminate_zeros()
    values = genes.data / totals[genes.indices] * target_sum
    begin, end = genes.indptr[:-1], genes.indptr[1:]
    for first, last in zip(begin.tolist(), end.tolist(), strict=True):
        values[first:last].sort()
    seen = end > begin
    low = values[((begin + end - 1) // 2)[seen]]
    high = values[((begin + end) // 2)[seen]]
    medians = np.ones(counts.shape[1])
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
        stored = np.diff(counts.indptr)
        begin = np.concatenate([[0], np.cumsum(np.minimum(stored, self.max_length), dtype=np.int64)])
        ids, lengths = np.zeros(begin[-1], dtype=np.int32), np.zeros(len(stored), dtype=np.int64)
        # Cells of about the same length together, since the longest of a block decides its width.
        order = np.argsort(stored, kind="stable")
        order = order[stored[order] > 0]
        cuts = np.flatnonzero(np.diff(np.cumsum(stored[order], dtype=np.int64) // ENTRIES_PER_BLOCK)) + 1

        def encode_block(cells: np.ndarray) -> None:
            tokens, ranking, lengths[cells] = self._rank(counts, cells)
            rows = zip(tokens, ranking, begin[cells].tolist(), lengths[cells].tolist(), strict=True)
            for of_cell, ranked, first, length in rows:
                of_cell.take(ranked[:length], out=ids[first : first + length], mode="clip")

        # numpy sorts without Python's lock. Where a study runs a process per core, torch and this pool have one thread.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(encode_block, np.split(order, cuts) if len(order) else ()))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Tokens(ids if offsets[-1] == len(ids) else ids[ids > 0], offsets)  # stored zeros left gaps

    def _rank(self, counts: sp.csr_matrix, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of some cells, padded to a row each; the columns in order of rank; tokens to keep of each cell."""
        bounds = list(zip(counts.indptr[cells].tolist(), counts.indptr[cells + 1].tolist(), strict=True))
        shape = len(cells), max(last - first for first, last in bounds)
        genes, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for (first, last), row_genes, row_values in zip(bounds, genes, values, strict=True):
            row_genes[: last - first] = counts.indices[first:last]
            row_values[: last - first] = counts.data[first:last]
        values /= self.medians.take(genes)
        # Bits of a positive float32 grow with its value; subtracted they sort it descending, and zeros last. In two
        # halves, because numpy sorts 16-bit integers by counting, in linear time.
        bits = np.uint32(0x7FFFFFFF) - values.view(np.uint32)
        keys = bits.astype(np.uint16), (bits >> 16).astype(np.uint16)
        ranking = np.lexsort(keys if counts.has_sorted_indices else (genes, *keys))
        return genes + N_SPECIAL, ranking, np.minimum((values > 0).sum(axis=1), self.max_length)

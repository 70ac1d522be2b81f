"""Rank-value encoding: a cell as the list of its genes, most over-expressed first (Theodoris et al. 2023)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
    for first, last in pairwise(genes.indptr.tolist()):
        values[first:last].sort()
    begin, n_cells = genes.indptr[:-1], np.diff(genes.indptr)
    seen = n_cells > 0
    low = values[(begin + (n_cells - 1) // 2)[seen]]
    high = values[(begin + n_cells // 2)[seen]]
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
        begin = np.concatenate([[0], np.cumsum(np.minimum(np.diff(counts.indptr), self.max_length), dtype=np.int64)])
        ids = np.zeros(begin[-1], dtype=np.int32)
        cuts = np.searchsorted(counts.indptr, np.arange(0, counts.nnz, ENTRIES_PER_BLOCK))
        blocks = pairwise(np.unique([0, *cuts, counts.shape[0]]).tolist())
        # numpy sorts without Python's lock. Where a study runs a process per core, torch and this pool have one thread.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            lengths = pool.map(lambda block: self._encode_block(counts, *block, ids, begin), blocks)
            offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        return Tokens(ids if len(ids) == offsets[-1] else ids[ids > 0], offsets)  # stored zeros left gaps

    def _encode_block(
        self, counts: sp.csr_matrix, first: int, last: int, ids: np.ndarray, begin: np.ndarray
    ) -> np.ndarray:
        """Write the tokens of cells `first` to `last`, those of cell i from `ids[begin[i]]` on; return how many."""
        bounds = counts.indptr[first : last + 1]
        entries = slice(bounds[0], bounds[-1])
        genes = counts.indices[entries]
        values = counts.data[entries].astype(np.float32, copy=False) / self.medians.take(genes)
        tokens = (genes + N_SPECIAL).astype(np.int32, copy=False)
        bounds, expressed = bounds - bounds[0], values > 0
        if not expressed.all():
            tokens, values = tokens[expressed], values[expressed]
            bounds = np.concatenate([[0], np.cumsum(expressed)])[bounds]
        # The bits of a positive float32 grow with its value, so inverted ones sort it descending. In two halves,
        # because numpy sorts 16-bit integers by counting, in linear time; stably, which keeps ties in gene order.
        bits = ~values.view(np.uint32)
        keys = [bits.astype(np.uint16), (bits >> 16).astype(np.uint16)]
        if not counts.has_sorted_indices:
            keys.insert(0, tokens)
        lengths = []
        for a, b, to in zip(bounds[:-1].tolist(), bounds[1:].tolist(), begin[first:last].tolist(), strict=True):
            ranking = np.lexsort([key[a:b] for key in keys])[: self.max_length]
            tokens[a:b].take(ranking, out=ids[to : to + len(ranking)], mode="clip")
            lengths.append(len(ranking))
        return np.array(lengths)

"""Rank-value encoding: a cell as the list of its genes, most over-expressed first (Theodoris et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch

from datawall.cells.expression import TARGET_SUM
from datawall.models.transformer import N_SPECIAL

N_BINS = 20 * 2**7  # of values, from the sum that cells are scaled to down to a millionth of it and what is below
N_GATHERED = 1 << 22  # at least, before equal values are put together
ENTRIES_PER_BLOCK = 1 << 16  # detected genes encoded at once: what is made of them stays in a core's cache


@dataclass(frozen=True)
class Tokens:
    """Packed token sequences: those of cell i are `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # (n_tokens,) int32, gene position plus the number of special tokens
    offsets: np.ndarray  # (n_cells + 1,) int64

    def __iter__(self) -> Iterator[np.ndarray]:
        """As `ids, offsets = tokens`."""
        return iter((self.ids, self.offsets))

    def __getitem__(self, cells: np.ndarray) -> Tokens:
        """The sequences of some cells, in the order given."""
        lengths = np.diff(self.offsets)[cells]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Tokens(self.ids[np.repeat(self.offsets[cells], lengths) + within], offsets)


def gene_medians(counts: sp.csr_matrix) -> np.ndarray:
    """Median of each gene's counts per 10,000 over the cells that express it, (n_genes,) float32; of none 1.

    `counts` are those of the pretraining subset, never of an evaluation. (The original took its medians from 30
    million other cells.)
    """
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # A copy, since the caller's matrix is not ours to prune: stored zeros would count as expressed.
    genes = sp.csc_matrix(counts, copy=True)
    genes.eliminate_zeros()
    values = genes.data / totals[genes.indices] * TARGET_SUM
    for first, last in pairwise(genes.indptr.tolist()):
        values[first:last].sort()
    begin, n_cells = genes.indptr[:-1], np.diff(genes.indptr)
    seen = n_cells > 0
    low = values[(begin + (n_cells - 1) // 2)[seen]]
    high = values[(begin + n_cells // 2)[seen]]
    medians = np.ones(counts.shape[1])
    medians[seen] = (low + high) / 2
    return medians.astype(np.float32)


def streamed_gene_medians(blocks: Callable[[], Iterable[sp.csr_matrix]]) -> np.ndarray:
    """`gene_medians` of a corpus in blocks: exactly those, in two passes.

    The first counts each gene's values in bins 0.4 to 0.8 % wide, and so finds the bins of its two middle values. The
    second gathers the different values in these, which are few, as counts and their sums are whole numbers. `blocks`
    gives the raw counts, CSR, anew at each call.
    """
    highest = int(np.float32(TARGET_SUM).view(np.uint32) >> 16)

    def values() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Genes, values and bins of the entries of each block."""
        for counts in blocks():
            totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
            values = counts.data / np.repeat(totals, np.diff(counts.indptr)) * TARGET_SUM
            genes, values = counts.indices[values > 0], values[values > 0]
            # The bits of a positive float32, read as an integer, rise with its value: sign (0), exponent, mantissa. The
            # first 16 of them have 7 of the mantissa, so that a bin is at most 1/128 of its value wide. Of 10,000 they
            # are 0x461C, the last bin's; 9,984 falls into that too, 9,920 (0x461B) into the one before.
            bits = values.astype(np.float32).view(np.uint32) >> 16
            yield genes, values, np.maximum(bits.astype(np.int64) - highest + N_BINS - 1, 0)

    n_genes = next(iter(blocks())).shape[1]
    n_until = np.zeros((n_genes, N_BINS), np.uint32)
    for genes, _, bins in values():
        np.add.at(n_until.reshape(-1), genes * np.int64(N_BINS) + bins, 1)
    np.cumsum(n_until, axis=1, out=n_until)
    n_cells = n_until[:, -1].astype(np.int64)
    middle = np.stack([(n_cells - 1) // 2, n_cells // 2])  # ranks of the two, from 0
    bin_of = np.stack([(n_until > rank[:, None]).argmax(axis=1) for rank in middle])
    n_below = np.where(bin_of[0] > 0, n_until[np.arange(n_genes), bin_of[0] - 1], 0)
    del n_until

    gathered, n_new = [(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))], 0
    for genes, value, bins in values():
        chosen = (bins == bin_of[0][genes]) | (bins == bin_of[1][genes])
        gathered.append((genes[chosen], value[chosen], np.ones(chosen.sum(), np.int64)))
        n_new += len(gathered[-1][0])
        if n_new > max(N_GATHERED, len(gathered[0][0])):
            gathered, n_new = [_tally(*gathered)], 0
    genes, value, times = _tally(*gathered)
    until = np.cumsum(times)
    n_before = np.concatenate([[0], until])[np.searchsorted(genes, np.arange(n_genes))]
    seen = n_cells > 0
    low, high = (value[np.searchsorted(until, (n_before + rank - n_below)[seen], "right")] for rank in middle)
    medians = np.ones(n_genes)
    medians[seen] = (low + high) / 2
    return medians.astype(np.float32)


def _tally(*parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different pairs of gene and value in order, and how often each occurs."""
    genes, values, times = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((values, genes))
    genes, values = genes[order], values[order]
    first = np.flatnonzero((np.diff(genes, prepend=-1) != 0) | (np.diff(values, prepend=-1) != 0))
    return genes[first], values[first], np.add.reduceat(times[order], first) if len(first) else times


class RankTokenizer:
    """Encode cells as genes sorted by count over the gene's median, descending.

    The sum of a cell's counts scales all of its values alike, so it does not enter. Ties are broken by gene
    order: of two genes with equal value the one that comes first in the corpus comes first in the sequence.

    Parameters
    ----------
    medians
        (n_genes,) positive and finite (`gene_medians`).
    max_length
        Tokens kept per cell, the highest ranked ones.
    """

    def __init__(self, medians: np.ndarray, max_length: int = 2048) -> None:
        self.medians = np.asarray(medians, dtype=np.float32)
        if not (np.isfinite(self.medians) & (self.medians > 0)).all():
            gene = int(np.flatnonzero(~(np.isfinite(self.medians) & (self.medians > 0)))[0])
            raise ValueError(f"median of gene {gene} is {self.medians[gene]}; medians must be positive and finite.")
        self.max_length = max_length

    def encode(self, counts: sp.csr_matrix) -> Tokens:
        """Rank-value encode raw counts, (n_cells, n_genes), genes in the order of `medians`; of no counts no token.

        By definition, the tokens of a cell are

            values = counts / medians
            ranked = np.argsort(-values, kind="stable")
            ranked[values[ranked] > 0][:max_length] + N_SPECIAL

        which a test holds all of this to.
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

        def encode_block(block: tuple[int, int]) -> np.ndarray:
            tokens, lengths = self._encode_block(counts, *block)
            ids[begin[block[0]] : begin[block[0]] + len(tokens)] = tokens
            return lengths

        # numpy sorts without Python's lock. Where a study runs a process per core, torch and this pool have one thread.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            offsets = np.cumsum(np.concatenate([[0], *pool.map(encode_block, blocks)]), dtype=np.int64)
        return Tokens(ids if len(ids) == offsets[-1] else ids[ids > 0], offsets)  # stored zeros left gaps

    def _encode_block(self, counts: sp.csr_matrix, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of cells `first` to `last`, end to end, and how many each got."""
        bounds = counts.indptr[first : last + 1]
        entries = slice(bounds[0], bounds[-1])
        genes = counts.indices[entries].astype(np.int32, copy=False)
        values = counts.data[entries].astype(np.float32, copy=False) / self.medians.take(genes)
        bounds, expressed = bounds - bounds[0], values > 0
        if not expressed.all():
            genes, values = genes[expressed], values[expressed]
            bounds = np.concatenate([[0], np.cumsum(expressed)])[bounds]
        lengths = np.diff(bounds)
        # The bits of a positive float32 grow with its value, so what they lack to the largest sorts it descending.
        # The highest bits, which that leaves free, number the cells: one call sorts as many as they tell apart.
        # Say cell 0 has values 1, 2 and cell 1 has 4. Their bits are 0x3F800000, 0x40000000, 0x40800000; they lack
        # 0x01000000, 0x00800000, 0 to the largest. That takes 25 bits, and 7 are free: they number 128 cells. With the
        # cell's number above them the keys are 0x01000000, 0x00800000, 0x02000000, whose order is the second gene and
        # the first of cell 0, then that of cell 1.
        keys = values.view(np.uint32)
        keys = keys.max(initial=0) - keys
        free = 32 - int(keys.max(initial=0)).bit_length()
        keys |= np.repeat(np.arange(len(lengths), dtype=np.uint32) << np.uint32(32 - free), lengths)
        # In two halves, because numpy sorts 16-bit integers by counting; stably, which keeps ties in gene order.
        keys = [keys.astype(np.uint16), (keys >> 16).astype(np.uint16)]
        if not counts.has_sorted_indices:
            keys.insert(0, genes)
        tokens = np.empty_like(genes)
        for a, b in pairwise([*bounds[: -1 : 1 << free].tolist(), len(genes)]):
            genes[a:b].take(np.lexsort([key[a:b] for key in keys]), out=tokens[a:b], mode="clip")
        tokens += N_SPECIAL
        if lengths.max(initial=0) > self.max_length:
            tokens = tokens[np.arange(len(tokens)) - np.repeat(bounds[:-1], lengths) < self.max_length]
        return tokens, np.minimum(lengths, self.max_length)

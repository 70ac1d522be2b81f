"""Rank-value encoding: a cell as the list of its genes, most over-expressed first (Theodoris et al. 2023)."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from datawall.cells.expression import TARGET_SUM
from datawall.models.transformer import N_SPECIAL

N_BINS = 20 * 2**7  # of values, from the sum that cells are scaled to down to a millionth of it and what is below
N_GATHERED = 1 << 22  # at least, before equal values are put together
CELLS_PER_BLOCK = 256  # encoded at once
GENE, GENES, TEN = np.uint64(32), np.uint64(2**32 - 1), np.uint64(2**10 - 1)  # of a key: where it ends, masks


@dataclass(frozen=True)
class Tokens:
    """Packed token sequences: those of cell i are `ids[offsets[i]:offsets[i + 1]]`. Also `ids, offsets = tokens`."""

    ids: np.ndarray  # (n_tokens,) int32, gene position plus the number of special tokens
    offsets: np.ndarray  # (n_cells + 1,) int64

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.ids, self.offsets))

    def __getitem__(self, cells: np.ndarray) -> Self:
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
    values = np.split(genes.data / totals[genes.indices] * TARGET_SUM, genes.indptr[1:-1])
    return np.array([np.median(of_gene) if len(of_gene) else 1 for of_gene in values], dtype=np.float32)


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

    gathered: list[pd.DataFrame] = []
    for genes, value, bins in values():
        chosen = (bins == bin_of[0][genes]) | (bins == bin_of[1][genes])
        gathered.append(pd.DataFrame({"gene": genes[chosen], "value": value[chosen], "n": 1}))
        if sum(map(len, gathered[1:])) > max(N_GATHERED, len(gathered[0])):
            gathered = [_tally(gathered)]
    genes, value, n = (column.to_numpy() for _, column in _tally(gathered).items())
    until = np.cumsum(n)
    n_before = np.concatenate([[0], until])[np.searchsorted(genes, np.arange(n_genes))]
    seen = n_cells > 0
    low, high = (value[np.searchsorted(until, (n_before + rank - n_below)[seen], "right")] for rank in middle)
    medians = np.ones(n_genes)
    medians[seen] = (low + high) / 2
    return medians.astype(np.float32)


def _tally(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Different pairs of gene and value in order, and how often each occurs."""
    return pd.concat(parts).groupby(["gene", "value"], as_index=False)["n"].sum()


class RankTokenizer:
    """Encode cells as genes sorted by count over the gene's median, descending; ties in the order of genes.

    The sum of a cell's counts scales all of its values alike, so it does not enter. `medians`, (n_genes,), must be
    positive and finite (see `gene_medians`); of a cell, the `max_length` highest ranked genes are kept.
    """

    def __init__(self, medians: np.ndarray, max_length: int = 2048) -> None:
        self.medians = np.asarray(medians, dtype=np.float32)
        sensible = np.isfinite(self.medians) & (self.medians > 0)
        if not sensible.all():
            gene = int(sensible.argmin())
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
            raise ValueError(f"counts have {counts.shape[1]} genes, the tokenizer {len(self.medians)}; align them.")
        counts = counts.tocsr()
        if not (counts.has_sorted_indices and counts.data.all()):
            counts = counts.sorted_indices()  # a copy
            counts.eliminate_zeros()
        offsets = np.concatenate([[0], np.cumsum(np.minimum(np.diff(counts.indptr), self.max_length))])
        ids = np.empty(offsets[-1], dtype=np.int32)
        rank = _compiled_rank()

        def encode_block(first: int) -> None:
            bounds = counts.indptr[first : first + CELLS_PER_BLOCK + 1].astype(np.int64)
            entries = slice(bounds[0], bounds[-1])
            genes = counts.indices[entries].astype(np.int32, copy=False)
            values = counts.data[entries].astype(np.float32, copy=False)
            places = offsets[first : first + len(bounds)]
            rank(values, genes, bounds - bounds[0], self.medians, places, ids)
            ids[places[0] : places[-1]] += N_SPECIAL

        # `rank` runs without Python's lock. Where a study runs a process per core, torch and this pool have one thread.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(encode_block, range(0, counts.shape[0], CELLS_PER_BLOCK)))
        return Tokens(ids, offsets)


def _rank(
    counts: np.ndarray,
    genes: np.ndarray,
    bounds: np.ndarray,
    medians: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
) -> None:
    """Write the genes of cells to `ids`, those of cell i, whose entries begin at `bounds[i]`, from `offsets[i]` on.

    The bits of a positive float32, read as an integer, rise with its value: 1.5 is 0x3FC00000, and 2.0 0x40000000. So
    what they lack of the highest sorts a cell's genes; it is the upper half of a key, the gene the lower. Keys are
    sorted by ten bits at a time, the last first, by counting, which leaves ties in the order of genes.
    """
    for cell in range(len(bounds) - 1):
        of_cell = genes[bounds[cell] : bounds[cell + 1]]
        if len(of_cell) == 0:
            continue
        bits = (counts[bounds[cell] : bounds[cell + 1]] / medians[of_cell]).view(np.uint32)
        highest, ranked = bits.max(), np.empty(len(bits), np.uint64)
        for i in range(len(bits)):
            ranked[i] = np.uint64(highest - bits[i]) << GENE | np.uint64(of_cell[i])
        moved, most, shift = np.empty_like(ranked), highest - bits.min(), GENE
        while most > 0:
            place = np.zeros(1025, np.uint32)  # of the next key with these ten bits
            for key in ranked:
                place[(key >> shift & TEN) + np.uint64(1)] += 1
            for digit in range(1024):
                place[digit + 1] += place[digit]
            for key in ranked:
                digit = key >> shift & TEN
                moved[place[digit]] = key
                place[digit] += 1
            ranked, moved, most, shift = moved, ranked, most >> 10, shift + np.uint64(10)
        for rank in range(offsets[cell + 1] - offsets[cell]):
            ids[offsets[cell] + rank] = ranked[rank] & GENES


@cache
def _compiled_rank() -> Callable[..., None]:
    """`_rank`, compiled when it is first used on a machine, in a second or two, and kept beside this file."""
    from numba import njit

    return njit(nogil=True, cache=True)(_rank)

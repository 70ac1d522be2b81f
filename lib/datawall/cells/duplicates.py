"""Cells that occur twice: within a corpus, and between a corpus and what a model is evaluated on."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells.corpus import gene_table

MIN_EXPRESSED = 20  # cells that express fewer genes can be equal by chance; of 12,000 real ones, in five at most


@cache
def _weights() -> np.ndarray:
    """(n_genes of the gene table, 2) random uint64: a gene has the same weights wherever it occurs."""
    return np.random.default_rng(0).integers(0, 2**64, (len(gene_table()), 2), dtype=np.uint64)


def cell_hashes(counts: sp.csr_matrix, genes: pd.Index, among: pd.Index | None = None) -> np.ndarray:
    """Hashes of the cells' count vectors, (n_cells, 2) uint64: equal for equal cells, whatever the order of the genes.

    The hash is the sum of the counts times random weights of their genes, modulo 2^64, twice (multilinear hashing,
    Carter and Wegman 1979). Two cells that differ are taken for equal with a probability of 2^-128 if any difference is
    odd, and 2^(2k - 128) if 2^k divides all of them. Columns are `genes`, Ensembl ids. A gene that a data set lacks
    counts as zero: compare on `among`, genes of both. With fewer than `MIN_EXPRESSED` expressed, they are 0: no match.
    """
    weights = _weights()[gene_table().index.get_indexer(genes)]
    compared = np.ones(len(genes), bool) if among is None else among.get_indexer(genes) >= 0
    hashes = counts.astype(np.uint64) @ (weights * compared[:, None].astype(np.uint64))
    expressed = (counts != 0).astype(np.int32) @ compared.astype(np.int32)
    hashes[expressed < MIN_EXPRESSED] = 0
    return hashes


class SeenCells:
    """The hashes of cells seen so far and where each came from: 20 bytes a cell."""

    def __init__(self) -> None:
        # Hashes sorted by their first half, and origins; runs that have grown alike are merged, so that there are few.
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(n_cells,) int32 origin of the first cell seen with the same hash, -1 where there is none."""
        origin = np.full(len(hashes), -1, np.int32)
        for seen, origins in self._runs:
            at = np.minimum(np.searchsorted(seen[:, 0], hashes[:, 0]), len(seen) - 1)
            same = (seen[at] == hashes).all(axis=1)
            origin[same] = origins[at[same]]
        return origin

    def add(self, hashes: np.ndarray, origin: int) -> np.ndarray:
        """Note new cells of one origin; what `find` gives for them, equal ones among themselves included."""
        found = self.find(hashes)
        comparable = hashes.any(axis=1)
        found[comparable & (found < 0) & pd.DataFrame(hashes).duplicated().to_numpy()] = origin
        new = hashes[comparable & (found < 0)]
        if len(new):
            origins = np.full(len(new), origin, np.int32)
            while self._runs and len(self._runs[-1][0]) < 2 * len(new):
                earlier, their_origins = self._runs.pop()
                new, origins = np.concatenate([earlier, new]), np.concatenate([their_origins, origins])
            order = np.argsort(new[:, 0], kind="stable")
            self._runs.append((new[order], origins[order]))
        return found


@dataclass(frozen=True)
class Contamination:
    """What an evaluation set shares with the corpus that models are pretrained on."""

    n_cells: int  # of the evaluation set
    duplicates: int  # cells of the evaluation set whose counts are also in the corpus
    shared_donors: tuple[str, ...]  # of both
    donor_cells: int  # cells of the evaluation set from these donors
    duplicate_rows: np.ndarray  # sorted rows of the corpus equal to a cell of the evaluation set
    donor_rows: np.ndarray  # sorted rows of the corpus from donors of both

    def row(self) -> dict[str, int]:
        """The record as a table's row, donors and rows of the corpus as their number."""
        return {name: value if isinstance(value, int) else len(value) for name, value in asdict(self).items()}

    def write(self, folder: Path) -> None:
        np.savez_compressed(folder / "contamination.npz", **asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        with np.load(folder / "contamination.npz", allow_pickle=False) as file:
            values = {name: array if name.endswith("rows") else array.tolist() for name, array in file.items()}
        return cls(**{**values, "shared_donors": tuple(values["shared_donors"])})

    def rows_to_drop(self) -> np.ndarray:
        """Rows to leave out of pretraining: duplicates, and all cells of shared donors."""
        return np.union1d(self.duplicate_rows, self.donor_rows)


def contamination(
    evaluation_hashes: np.ndarray,
    corpus_hashes: Iterable[np.ndarray],
    evaluation_donors: np.ndarray | None = None,
    corpus_donors: np.ndarray | None = None,
) -> Contamination:
    """Find the cells and donors that an evaluation set shares with the corpus.

    Hashes are from `cell_hashes`, among the genes that the two have in common; those of the corpus come in blocks.
    Donors are compared by name: put the data set's before a name that says nothing outside it, such as "1".
    """
    evaluated, pretrained = SeenCells(), SeenCells()
    evaluated.add(evaluation_hashes, 0)
    n_cells, duplicate_rows = 0, [np.empty(0, np.int64)]
    for hashes in corpus_hashes:
        again = np.flatnonzero(evaluated.find(hashes) >= 0)
        pretrained.add(hashes[again], 0)
        duplicate_rows.append(n_cells + again)
        n_cells += len(hashes)
    donors, donor_cells, donor_rows = (), 0, np.empty(0, np.int64)
    if evaluation_donors is not None and corpus_donors is not None:
        both = (pd.Categorical(given).remove_unused_categories() for given in (evaluation_donors, corpus_donors))
        of_cell, of_row = (given.rename_categories(str) for given in both)
        donors = tuple(sorted({*of_cell.categories} & {*of_row.categories}))
        donor_cells, donor_rows = int(of_cell.isin(donors).sum()), np.flatnonzero(of_row.isin(donors))
    duplicates = int((pretrained.find(evaluation_hashes) >= 0).sum())
    rows = np.concatenate(duplicate_rows)
    return Contamination(len(evaluation_hashes), duplicates, donors, donor_cells, rows, donor_rows)

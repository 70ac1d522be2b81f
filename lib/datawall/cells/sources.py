"""A corpus of `.h5ad` and `.zarr` files of any size: checked, joined by gene, and read in blocks at constant memory."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from datawall.cells import corpus
from datawall.cells.backed import CellFile
from datawall.cells.cellstore import CELLS_AT_ONCE
from datawall.cells.corpus import CorpusError, GeneMatch
from datawall.cells.duplicates import SeenCells, cell_hashes

log = logging.getLogger(__name__)

SAMPLE = 2048  # rows at the beginning, middle and end of a matrix by which the place of the counts is chosen
PARTS = ("spliced", "unspliced", "ambiguous", "nascent", "mature")  # layers with a part of the counts
SCAN = 65_536  # rows of names and labels read at once
RULE = 'counts must be finite, non-negative integers in every cell; put them into layers["counts"]'
QUALITY = ("n_genes", "n_counts", "mito_share")  # of a cell, see `quality`

type Columns = Mapping[str, str | Mapping[str, str]]


@dataclass(frozen=True)
class Options:
    """What is asked of the files; the filters are off by default, as in the original study."""

    min_matched: float = 0.5  # see `corpus.check_match`
    labels: Mapping[str, str] = field(default_factory=dict)  # cell types to call otherwise
    min_genes: int = 0  # least number of genes of the gene table that a cell must express
    min_counts: int = 0  # least sum of a cell's counts
    max_mito: float = 1.0  # greatest share of a cell's counts in the 13 mitochondrial genes of the gene table
    drop_duplicates: bool = True


@dataclass(frozen=True)
class _File:
    path: Path
    match: GeneMatch  # its `dataset` is the file's name
    n_cells: int
    position: np.ndarray  # column in the source of each column of the file, or -1
    keys: dict[str, str]  # column of obs by role


@dataclass
class Source:
    """Files opened as one corpus; made by `open_source`."""

    files: list[_File]
    matches: list[GeneMatch]  # of each file
    labels: dict[str, list[str]]  # of each role over all files, sorted: the categories of every block's columns
    notes: list[str]  # what a reader should know of the files: where counts and names of genes are, odd labels
    var: pd.DataFrame  # genes that some file has, by Ensembl id in the gene table's order; zero where one lacks them
    options: Options
    # What became of the cells, once `blocks` has ended. `cells` has a row per file: dataset, read, empty, filtered,
    # duplicate, kept; `duplicates` kept_in, dropped_from, n_cells.
    reports: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """Cells in the files; blocks have fewer where cells are dropped."""
        return sum(file.n_cells for file in self.files)

    @cached_property
    def shared_genes(self) -> pd.Index:
        """What every file has measured: nothing else can tell whether two cells are the same."""
        everywhere = [np.isin(np.arange(len(self.var)), file.position) for file in self.files]
        return self.var.index[np.all(everywhere, axis=0)]

    def blocks(self, block_size: int = CELLS_AT_ONCE) -> Iterator[ad.AnnData]:
        """The cells, file by file in order, as blocks that share `var` and the categories of `obs`.

        Cells without a count in any gene of `var` are dropped, then those that a filter refuses, then those whose
        counts in `shared_genes` equal an earlier cell's. `obs` has a column for each role, and `QUALITY` by the genes
        in `var`. Raises CorpusError if a file is damaged or holds what is no count, or if no cell is left.
        """
        outcomes = ["read", "empty", "filtered", "duplicate", "kept"]
        names = [match.dataset for match in self.matches]
        tally, twice, seen = pd.DataFrame(0, range(len(names)), outcomes), Counter(), SeenCells()
        with tqdm(total=self.n_cells, desc="reading cells", unit="cell", leave=False, delay=5) as bar:
            for number, file in enumerate(self.files):
                for block in self._aligned(file, block_size):
                    outcome, origin = self._outcomes(block, number, seen)
                    tally.loc[number] += [len(outcome), *(np.sum(outcome == name) for name in outcomes[1:])]
                    twice.update((int(first), number) for first in origin[outcome == "duplicate"])
                    if (kept := outcome == "kept").any():
                        yield block if kept.all() else block[kept].copy()
                    bar.update(block.n_obs)
        pairs = [(names[i], names[j], n) for (i, j), n in sorted(twice.items())]
        tally.insert(0, "dataset", names)
        duplicates = pd.DataFrame(pairs, columns=["kept_in", "dropped_from", "n_cells"])
        self.reports = {"cells": tally, "duplicates": duplicates}
        if not tally["kept"].sum():
            paths, (_, empty, filtered, duplicate, _) = [str(file.path) for file in self.files], tally[outcomes].sum()
            raise CorpusError(
                f"{', '.join(paths)}: no cell is left of {self.n_cells} ({empty} without counts, {filtered} filtered, "
                f"{duplicate} duplicates); loosen the filters, or give cells with counts."
            )

    def _aligned(self, file: _File, block_size: int) -> Iterator[ad.AnnData]:
        """All cells of a file in blocks, with the source's genes and categories, and their quality."""
        name, place = file.match.dataset, file.match.counts_from
        prefix = f"{name}_" if len(self.files) > 1 else ""
        with CellFile(file.path) as cells:
            counts, renamed = cells.counts(place), {"cell_type": self.options.labels}
            for start in range(0, file.n_cells, block_size):
                stop = min(start + block_size, file.n_cells)
                values = counts(start, stop)
                if fault := corpus.count_fault(values):
                    raise CorpusError(f"{file.path}: {place} {fault} in cells {start} to {stop - 1}; {RULE}.")
                X = corpus.place_columns(values, file.position, len(self.var))
                obs = {"dataset_id": np.full(stop - start, name, dtype=object)}
                for role, key in file.keys.items():
                    codes, texts = corpus.label_codes(cells.column(key, role, start, stop), renamed.get(role))
                    obs[role] = texts[codes]
                obs = {role: pd.Categorical(obs[role], self.labels[role]) for role in (*file.keys, *obs)}
                names = [f"{prefix}{cell}" for cell in cells.cell_names(start, stop)]
                yield ad.AnnData(X, obs=pd.DataFrame(obs | quality(X, self.var), index=names), var=self.var)

    def _outcomes(self, block: ad.AnnData, number: int, seen: SeenCells) -> tuple[np.ndarray, np.ndarray]:
        """What becomes of each cell of a block, and the file that has the same cell, or -1."""
        o, obs = self.options, block.obs
        full = obs["n_genes"].to_numpy() > 0
        good = (obs["n_genes"] >= o.min_genes) & (obs["n_counts"] >= o.min_counts) & (obs["mito_share"] <= o.max_mito)
        origin, rows = np.full(len(obs), -1), np.flatnonzero(full & good.to_numpy())
        if o.drop_duplicates and len(rows):
            origin[rows] = seen.add(cell_hashes(block.X[rows], self.var.index, self.shared_genes), number)
        return np.select([~full, ~good.to_numpy(), origin >= 0], ["empty", "filtered", "duplicate"], "kept"), origin


def quality(counts: sp.csr_matrix, var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Quality of cells, (n_cells,) each: n_genes (with stored counts), n_counts (their sum), mito_share (0 to 1)."""
    n_counts = np.asarray(counts.sum(axis=1)).ravel()
    mitochondrial = var["feature_name"].str.startswith("MT-").to_numpy()
    mito_share = (counts @ mitochondrial.astype(np.float32)) / np.maximum(n_counts, 1)
    return {"n_genes": counts.getnnz(axis=1).astype(np.int32), "n_counts": n_counts, "mito_share": mito_share}


def open_source(paths: Sequence[str | Path], columns: Columns, options: Options | None = None) -> Source:
    """Open files as one corpus: find their counts, join their genes, check the names and labels of all cells.

    All is checked here but the counts, which are sampled: of `X`, `raw.X` and the layers whose beginning, middle and
    end hold counts the one with the most genes is taken, one that looks scaled or binary only if there is no other.
    `Source.blocks` checks every value of it. What else is in a file is not read and does no harm.

    `columns` names the column of `obs` for each role (`cell_type`, `donor_id`, `batch`, …); where files differ, a
    mapping from the file's name to its column. A file is called by its stem, and by its folder too where stems are the
    same; `dataset_id` is that name unless it is given, and several files' cells have it before their own.
    """
    options = options or Options()
    paths = [Path(path) for path in paths]
    names = file_names(paths)
    table = corpus.gene_table()
    mitochondrial = table["feature_name"].str.startswith("MT-").to_numpy()
    files, found = [], {role: Counter() for role in (*columns, "dataset_id")}
    in_several = {role: set() for role in columns}
    for path, name in tqdm([*zip(paths, names, strict=True)], desc="opening files", unit="file", leave=False, delay=5):
        with CellFile(path) as cells:
            position, match = _counts_and_genes(cells, name, options)
            _check_cell_names(cells)
            if options.max_mito < 1 and not mitochondrial[position[position >= 0]].any():
                log.warning("%s: has no mitochondrial gene, so that max_mito keeps all its cells.", path)
            keys = {role: _key(columns, role, name, path) for role in columns}
            for role, key in keys.items():
                own = _all_labels(cells, key, role, {"cell_type": options.labels}.get(role))
                in_several[role] |= found[role].keys() & own.keys()
                found[role].update(own)
            files.append(_File(path, match, cells.n_cells, position, keys))
    for one, other in itertools.permutations(files, 2):
        _check_names_differ(one, other)
    if "dataset_id" not in columns:
        found["dataset_id"] = Counter(names)
    var, columns_of = corpus.compacted([file.position for file in files])
    files = [replace(file, position=of_file) for file, of_file in zip(files, columns_of, strict=True)]
    labels = {role: sorted(values) for role, values in found.items()}
    matches = [file.match for file in files]
    notes = [f"{match.dataset}: {note}" for match in matches for note in match.notes]
    for role, key in columns.items():
        where = f"{', '.join(names)}: {key if isinstance(key, str) else role!r}"
        notes += corpus.label_notes(found[role], where, role)
        if in_several[role] and role in ("donor_id", "batch"):
            some = ", ".join(sorted(in_several[role])[:5])
            notes.append(
                f"{where}: {len(in_several[role])} values are in more than one file, and count as one ({some})"
            )
    source = Source(files, matches, labels, notes, var, options)
    if len(files) > 1 and len(source.shared_genes) < len(var) / 2:
        what = f"the files share {len(source.shared_genes):,} of their {len(var):,} genes"
        notes.append(f"{', '.join(names)}: {what}; what a file has not measured is zero in its cells")
    return source


def file_names(paths: list[Path]) -> list[str]:
    """A name of its own for each file: the stem, with the folder's name before it where stems are the same."""
    if not paths:
        raise CorpusError("no files: a corpus needs at least one .h5ad or .zarr file.")
    for names in ([path.stem for path in paths], [f"{path.absolute().parent.name}_{path.stem}" for path in paths]):
        if len(set(names)) == len(names):
            return names
    twice = Counter(names).most_common(1)[0][0]
    raise CorpusError(f"{paths[names.index(twice)]}: {twice} names more than one file; rename one of them.")


def _key(columns: Columns, role: str, name: str, path: Path) -> str:
    """Column of a file for a role."""
    key = columns[role]
    if isinstance(key, str):
        return key
    if name not in key:
        known = ", ".join(key)
        raise CorpusError(f"{path}: no column is named for the {role}, only for {known}; name one for {name!r}.")
    return key[name]


@dataclass(frozen=True, eq=False)
class _Place:
    """A matrix of a file that holds counts, by a sample of its cells."""

    position: np.ndarray
    match: GeneMatch
    var: pd.DataFrame
    weights: np.ndarray  # (n_genes,) sums
    doubt: str | None  # what is odd about the counts


def _counts_and_genes(cells: CellFile, name: str, options: Options) -> tuple[np.ndarray, GeneMatch]:
    """Row of each gene of the best place in the gene table, and the record of the match."""
    places, faults, parts, refusal = [], {}, {}, None
    for place in cells.places():
        part = place.removeprefix("layers['").removesuffix("']")
        try:
            fault, weights, doubt = _sample(cells, place)
            if part in PARTS and not fault:
                parts[part], fault = weights, f"holds a part of the counts, the {part} molecules"
            if fault:
                faults[place] = fault
                continue
            var = cells.genes(place)
            places.append(_Place(*corpus.find_genes(var, cells.name, place, weights), var, weights, doubt))
        except CorpusError as error:
            refusal = error
            faults[place] = str(error).removeprefix(f"{cells.name}: ").removeprefix(f"{place} ")
    if not places:
        if refusal and len(faults) == 1:
            raise refusal
        told = "; ".join(f"{place} {fault}" for place, fault in faults.items())
        raise CorpusError(f"{cells.name}: no raw counts found ({told or 'X is empty'}); {RULE}.")
    best = max(places, key=lambda place: (place.doubt is None, place.match.matched))  # of equal ones, the first
    chosen = best.match.counts_from
    corpus.check_match(best.match, best.var, options.min_matched)
    notes = [f"{chosen} {best.doubt}: are these raw counts?"] if best.doubt else []
    if chosen == "X" and cells.says_logged():
        notes.append("uns['log1p'] says that X was logged, and it holds whole numbers: are these raw counts?")
    if "spliced" in parts and np.array_equal(parts["spliced"], best.weights):
        notes.append(f"{chosen} has the spliced molecules alone, as layers['spliced']; the others are left out")
    places.remove(best)
    others = [f"{p.match.counts_from} {p.doubt or 'holds counts too'} ({p.match.matched:,} genes)" for p in places]
    others += [f"{place} {fault}" for place, fault in faults.items()]
    if others:
        notes.append(f"counts are taken from {chosen}; besides, {'; '.join(others)}")
    return best.position, replace(best.match, dataset=name, notes=(*notes, *best.match.notes))


def _sample(cells: CellFile, place: str) -> tuple[str | None, np.ndarray | None, str | None]:
    """What is wrong with a matrix's beginning, middle and end; the sum of each gene, and what is odd about counts."""
    counts, n, weights, sums, greatest = cells.counts(place), cells.n_cells, 0.0, [], 0.0
    for start in sorted({0, max(0, (n - SAMPLE) // 2), max(0, n - SAMPLE)}):
        values = counts(start, min(start + SAMPLE, n))
        if fault := corpus.count_fault(values):
            return f"{fault}{corpus.likeness(values)}", None, None
        weights = weights + np.asarray(values.sum(axis=0, dtype=np.float64)).ravel()
        sums.append(np.asarray(values.sum(axis=1, dtype=np.float64)).ravel())
        greatest = max(greatest, float(values.max()))
    return None, weights, corpus.doubt(np.concatenate(sums), greatest)


def _check_cell_names(cells: CellFile) -> None:
    """Refuse a file in which a name occurs twice, at 8 bytes a cell: names are read again only if hashes agree."""
    starts = range(0, cells.n_cells, SCAN)
    hashes = np.concatenate([pd.util.hash_array(cells.cell_names(i, i + SCAN), categorize=False) for i in starts])
    values, times = np.unique(hashes, return_counts=True)
    for value in values[times > 1][:100]:
        one, other = (cells.cell_names(row, row + 1)[0] for row in np.flatnonzero(hashes == value)[:2])
        if one == other:
            raise CorpusError(f"{cells.name}: cell name {one[:100]!r} occurs more than once; make obs_names unique.")


def _check_names_differ(one: _File, other: _File) -> None:
    """Refuse files of which two cells get one name, as `b_1` of a file `a` and `1` of `a_b` would both be `a_b_1`."""
    longer = f"{other.match.dataset}_"
    if (rest := longer.removeprefix(f"{one.match.dataset}_")) == longer:
        return
    with CellFile(one.path) as cells, CellFile(other.path) as others:
        alike = {name.removeprefix(rest) for name in _cell_names(cells) if name.startswith(rest)}
        twice = alike.intersection(_cell_names(others) if alike else ())
    if twice:
        told = f"each has a cell that would be called {(longer + min(twice))[:100]!r}; rename one of the files"
        raise CorpusError(f"{one.path}, {other.path}: {told}.")


def _cell_names(cells: CellFile) -> Iterator[str]:
    for start in range(0, cells.n_cells, SCAN):
        yield from cells.cell_names(start, start + SCAN)


def _all_labels(cells: CellFile, key: str, role: str, renamed: Mapping[str, str] | None) -> Counter[str]:
    """Every label of a column, which must be complete, and its cells."""
    found, n_missing = Counter(), 0
    for start in range(0, cells.n_cells, SCAN):
        codes, labels = corpus.label_codes(cells.column(key, role, start, start + SCAN), renamed)
        n_missing += int((codes < 0).sum())
        n_cells = np.bincount(codes[codes >= 0], minlength=len(labels))
        found.update({label: int(n) for label, n in zip(labels, n_cells, strict=True) if n})
    corpus.check_labels(n_missing, cells.name, key, role)
    return found

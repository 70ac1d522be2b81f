"""From what a study names to its corpus on disk: read in blocks, labelled, split, and compared with evaluation sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

from datawall.cells import (
    backed,
    cellstore,
    census,
    corpus,
    datasets,
    duplicates,
    expression,
    sampling,
    simulate,
    sources,
)
from datawall.cells.cellstore import Cells
from datawall.engine import disk, store
from datawall.study.params import EvaluationSet, Params

SPIKE_IN = "spike-in"  # in place of a label that spiked-in cells lack
CLUSTERED = 20_000  # cells that clusters are found among; the others join that of their nearest neighbours
LABELS = ["cell_type", "batch", "perturbation"]  # what held-out cells have in proportion


def identity(p: Params) -> store.Record:
    """What fixes the content of the corpus, as JSON values.

    Raises
    ------
    datawall.cells.datasets.DatasetError
        If a file is missing or a name unknown.
    """
    if p.simulation is not None:
        source = simulate.identity(p.simulation)
    elif p.census is not None:
        source = census.identity(p.census)
    else:
        source = [datasets.identity(name) for name in p.sources()]
    spike_in = None if p.spike_in is None else datasets.identity(p.spike_in)
    filters = p.model_dump(include={"min_matched_genes", "min_genes", "min_counts", "max_mito"})
    named = {"columns": p.columns(), "clusters": p.clusters, "labels": p.labels}
    return {"corpus": source, "spike_in": spike_in, **named, **filters}


def make_corpus(p: Params, folder: Path) -> None:
    """Write the corpus into a folder, at constant memory.

    `cells.zarr` has the cells, those to spike in last, of which `spike_in.npy` has the rows. `genes.json` tells how
    genes were matched (`spike_in_genes.json` of those cells), `notes.json` what a reader should know of the sources,
    and `report_<table>.parquet` what else became of the cells on the way.

    Raises
    ------
    datawall.cells.corpus.CorpusError, datawall.cells.datasets.DatasetError
        If a source breaks a rule.
    """
    n_cells, reports = 0, {}

    def blocks() -> Iterator[ad.AnnData]:
        nonlocal n_cells
        for block in read_corpus(p, reports):
            n_cells += block.n_obs
            yield block
        if p.spike_in is not None:
            yield from read_spike_in(p, block, reports)

    cellstore.write(folder, tqdm(blocks(), desc="corpus", unit="block", leave=False, delay=5))
    if p.simulation is not None:
        simulate.truth(p.simulation).write(folder)
    for name in reports.keys() & {"genes", "spike_in_genes", "notes"}:
        disk.write_json(folder / f"{name}.json", reports.pop(name))
    for table, rows in reports.items():
        rows.to_parquet(folder / f"report_{table}.parquet", index=False)
    cells = cellstore.open(folder / cellstore.NAME)
    np.save(folder / "spike_in.npy", np.arange(n_cells, cells.n_obs))
    if p.clusters:
        cellstore.add_labels(folder, "cell_type", clusters(cells))


def read_corpus(p: Params, reports: dict[str, Any]) -> Iterator[ad.AnnData]:
    """The cells of the corpus in blocks, without those to spike in.

    `reports` is filled in the end: `genes`, how they were matched, a row a source; `notes`, what a reader should know;
    and tables of what became of the cells.
    """
    name = p.sources()[0]
    if p.simulation is None and p.census is None and name not in datasets.DATASETS:
        filters = p.model_dump(include={"min_genes", "min_counts", "max_mito"})
        source = _files(p, p.sources(), p.columns(), drop_duplicates=True, **filters)
        for block in source.blocks():
            block.obs = block.obs.drop(columns=list(sources.QUALITY))
            yield block
        matches, notes = source.matches, source.notes
        tables = {table: getattr(source.report, table) for table in ("cells", "duplicates")}
    else:
        tables, notes = {}, []
        if p.simulation is not None:
            blocks = simulate.blocks(p.simulation)
        elif p.census is not None:
            selection = census.select(p.census)
            tables = {"census": selection.report, "types": selection.types.reset_index()}
            blocks = census.blocks(p.census, selection)
        else:
            blocks = [datasets.load(name)]
        n_read = n_kept = 0
        n_cells = {role: Counter() for role in p.columns()}
        for block in blocks:
            aligned, match = corpus.align(block, name, min_matched=p.min_matched_genes)
            n_read, n_kept = n_read + block.n_obs, n_kept + aligned.n_obs
            aligned.obs = _roles(aligned, {role: p.key(role, name) for role in p.columns()}, name, p.labels)
            for role, counted in n_cells.items():
                counted.update(aligned.obs[role].value_counts().to_dict())
            yield from _in_blocks(aligned)
        matches = [match]
        notes = [f"{name}: {note}" for note in match.notes]
        notes += [note for role, of in n_cells.items() for note in corpus.label_notes(of, f"{name}: {role!r}", role)]
        became = {"dataset": [name], "read": [n_read], "empty": [n_read - n_kept], "kept": [n_kept]}
        tables = tables or {"cells": pd.DataFrame(became)}
    reports.update({"genes": [match.row() for match in matches], "notes": notes, **tables})


def _files(p: Params, names: list[str], columns: sources.Columns, **options: Any) -> sources.Source:
    """Files opened as a study wants them."""
    asked = sources.Options(min_matched=p.min_matched_genes, labels=p.labels, **options)
    return sources.open_source([datasets.file(name) for name in names], columns, asked)


def _roles(cells: ad.AnnData, columns: dict[str, str], dataset: str, labels: dict[str, str]) -> pd.DataFrame:
    """The columns that a study names, by role, and the data set of each cell."""
    renamed = {"cell_type": labels}
    obs = {role: corpus.column(cells, dataset, key, role, renamed.get(role)) for role, key in columns.items()}
    if "dataset_id" in cells.obs:
        obs["dataset_id"] = corpus.column(cells, dataset, "dataset_id", "data set")
    else:
        obs["dataset_id"] = pd.Categorical([dataset] * cells.n_obs)
    return pd.DataFrame(obs, index=cells.obs_names)


def _in_blocks(cells: ad.AnnData) -> Iterator[ad.AnnData]:
    for first in range(0, cells.n_obs, cellstore.CELLS_AT_ONCE):
        yield cells[first : first + cellstore.CELLS_AT_ONCE].copy()


def read_spike_in(p: Params, like: ad.AnnData, reports: dict[str, Any]) -> Iterator[ad.AnnData]:
    """Cells to spike in, with the genes and columns of a block of the corpus; fills `reports` as `read_corpus` does."""
    keys = {role: p.key(role, p.spike_in) for role in like.obs}
    if p.spike_in not in datasets.DATASETS:
        with backed.CellFile(datasets.file(p.spike_in)) as file:
            there = {role: key for role, key in keys.items() if key in file.columns()}
        source = _files(p, [p.spike_in], there, drop_duplicates=False)
        match, blocks = source.matches[0], source.blocks()
    else:
        aligned, match = corpus.align(datasets.load(p.spike_in), p.spike_in, min_matched=p.min_matched_genes)
        there = {role: key for role, key in keys.items() if key in aligned.obs}
        aligned.obs = pd.DataFrame({role: aligned.obs[key] for role, key in there.items()}, aligned.obs_names)
        blocks = _in_blocks(aligned)
    for block in blocks:
        obs = {role: block.obs[role].astype(str).to_numpy() if role in there else SPIKE_IN for role in keys}
        names = [f"{SPIKE_IN}_{name}" for name in block.obs_names]
        counts, genes = corpus.to_genes(block, like.var_names), block.var_names
        yield ad.AnnData(counts, obs=pd.DataFrame(obs, index=names), var=like.var)
    in_corpus = int(like.var_names.isin(genes).sum())
    reports["spike_in_genes"] = {**match.row(), "in_corpus": in_corpus}
    reports["notes"] += [f"{p.spike_in}: {note}" for note in match.notes]


def clusters(cells: Cells) -> pd.Categorical:
    """Leiden clusters, for a corpus without labels: found among some cells, and carried to all by their neighbours.

    As in scanpy (resolution 1, 15 neighbours) on 50 principal components. Neighbours of a cell among the `CLUSTERED`
    cells, drawn by a fixed seed, vote on its cluster.
    """
    import tempfile

    import scanpy as sc
    from sklearn.neighbors import KNeighborsClassifier

    with tempfile.TemporaryDirectory() as scratch:
        X = expression.streamed_pca(cells.count_blocks, Path(scratch) / "X_pca.npy")
        rows = np.sort(np.random.default_rng(0).permutation(len(X))[:CLUSTERED])
        some = ad.AnnData(np.asarray(X[rows]))
        sc.pp.neighbors(some, use_rep="X", random_state=0)
        sc.tl.leiden(some, random_state=0, flavor="igraph", n_iterations=2, directed=False)
        vote = KNeighborsClassifier(min(15, len(rows))).fit(some.X, some.obs["leiden"].cat.codes)
        parts = [vote.predict(X[first : first + CLUSTERED]) for first in range(0, len(X), CLUSTERED)]
    return pd.Categorical.from_codes(
        np.concatenate(parts), [f"cluster {name}" for name in some.obs["leiden"].cat.categories]
    )


def make_split(p: Params, cells: Cells, spike_in: np.ndarray, dropped: np.ndarray, folder: Path) -> None:
    """Write the rows of the corpus that models may be pretrained on, and those held out, into a folder.

    Parameters
    ----------
    p
        The study: the share held out, whether whole donors are, and the seed of the draw.
    cells
        The corpus.
    spike_in, dropped
        Rows that are neither, and rows that are not pretrained on.
    folder
        Takes `pretraining.npy` and `held_out.npy`, sorted int64.

    Raises
    ------
    ValueError
        If nothing is left to pretrain on, or there are too few donors.
    """
    rows = np.setdiff1d(np.arange(cells.n_obs), spike_in, assume_unique=True)
    part = held_out(p, cells.obs.iloc[rows])
    pretraining = np.setdiff1d(rows[~part], dropped, assume_unique=True)
    if not len(pretraining):
        raise corpus.CorpusError(
            f"{p.study}: no cell of the corpus is left to pretrain on; hold out less, or keep contaminated cells."
        )
    np.save(folder / "pretraining.npy", pretraining)
    np.save(folder / "held_out.npy", rows[part])


def held_out(p: Params, obs: pd.DataFrame) -> np.ndarray:
    """(n_cells,) bool: which cells of the corpus are held out, told by their labels.

    Raises
    ------
    datawall.cells.corpus.CorpusError
        If whole groups are to be held out and there is but one.
    """
    shares = [1 - p.held_out, p.held_out]
    if p.split_role is None:
        strata = obs.groupby([name for name in LABELS if name in obs], observed=True, sort=True).ngroup()
        return sampling.stratified_split(strata.to_numpy(), shares, seed=p.split_seed) == 1
    if obs[p.split_role].nunique() < 2:
        raise corpus.CorpusError(f"split_by: {p.split_by} has one value for all cells; name a column with more.")
    return sampling.split_by_group(obs[p.split_role].array, shares, seed=p.split_seed) == 1


def dataset_columns(p: Params, name: str) -> dict[str, str]:
    """Columns of an evaluation set by role: those that it names itself, or else the study's for types and donors."""
    one = p.evaluation_sets()[name]
    keys = {
        "cell_type": one.cell_type_key or p.key("cell_type", one.file),
        "donor_id": one.donor_key or p.key("donor_id", one.file),
        "batch": one.batch_key,
        "perturbation": one.perturbation_key,
    }
    return {role: key for role, key in keys.items() if key is not None}


def make_dataset(p: Params, name: str, var: pd.DataFrame, folder: Path) -> None:
    """Write an evaluation set, its genes those of the corpus, into a folder.

    `cells.h5ad` has the cells; `genes.json` how their genes were matched, and how many the corpus has too, which are
    marked in `measured.npy`.

    Raises
    ------
    datawall.cells.corpus.CorpusError, datawall.cells.datasets.DatasetError
        If it breaks a rule, or shares no gene with the corpus.
    """
    aligned, genes, notes = read_dataset(p, name, var)
    aligned.write_h5ad(folder / "cells.h5ad", compression="lzf")
    measured = var.index.isin(genes.pop("measured"))
    np.save(folder / "measured.npy", measured)
    disk.write_json(folder / "genes.json", genes)
    disk.write_json(folder / "notes.json", notes)


def read_dataset(p: Params, name: str, var: pd.DataFrame) -> tuple[ad.AnnData, dict[str, Any], list[str]]:
    """An evaluation set with the genes of the corpus, how its genes were matched, and what a reader should know.

    Raises
    ------
    datawall.cells.corpus.CorpusError, datawall.cells.datasets.DatasetError
        If it breaks a rule, or shares no gene with the corpus.
    """
    one, wanted = p.evaluation_sets()[name], dataset_columns(p, name)
    simulated = simulate.cells_named(one.file)
    if not simulated and one.file not in datasets.DATASETS:
        path = datasets.file(one.file, one.source)
        with backed.CellFile(path) as file:
            _drop_unnamed_donors(one, wanted, file.columns())
        source = _files(p, [one.file], wanted, drop_duplicates=False)
        blocks = list(source.blocks())
        aligned = ad.concat(blocks, merge="same") if len(blocks) > 1 else blocks[0]
        aligned.obs = aligned.obs.drop(columns=list(sources.QUALITY))
        for role in aligned.obs:
            aligned.obs[role] = aligned.obs[role].cat.remove_unused_categories()
        match, notes = source.matches[0], source.notes
        if n_empty := int(source.report.cells["empty"].sum()):
            notes = [*notes, f"{name}: {n_empty:,} cells have no count in any known gene and are left out"]
    else:
        if simulated:
            cells = simulate.Cells(simulate.truth(p.simulation)).block(simulated.start, simulated.stop)
        else:
            cells = datasets.load(one.file)
        _drop_unnamed_donors(one, wanted, cells.obs)
        aligned, match = corpus.align(cells, one.file, min_matched=p.min_matched_genes)
        aligned.obs = _roles(aligned, wanted, one.file, p.labels)
        notes = [f"{name}: {note}" for note in match.notes]
    measured = aligned.var_names.intersection(var.index)
    if not len(measured):
        raise corpus.CorpusError(f"{one.file}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
    genes = {**match.row(), "dataset": name, "in_corpus": len(measured), "measured": measured}
    return ad.AnnData(corpus.to_genes(aligned, var.index), obs=aligned.obs, var=var), genes, notes


def _drop_unnamed_donors(one: EvaluationSet, wanted: dict[str, str], columns: Iterable[str]) -> None:
    """Forget the study's column of donors, which not every data set has."""
    if one.donor_key is None and wanted.get("donor_id") not in columns:
        wanted.pop("donor_id", None)


def contamination(dataset: ad.AnnData | Cells, measured: np.ndarray, cells: Cells) -> duplicates.Contamination:
    """What an evaluation set shares with cells of the corpus: equal cells, and donors of the same name.

    What lies on disk is read in blocks; in memory are 36 bytes for each cell of the evaluation set.

    Parameters
    ----------
    dataset
        With the genes of the corpus.
    measured
        (n_genes,) bool: which of them the evaluation set has; cells are compared by these.
    cells
        Of the corpus; rows of the result count among them.
    """
    genes = cells.var.index

    def hashes(of: ad.AnnData | Cells) -> Iterator[np.ndarray]:
        blocks = of.count_blocks() if isinstance(of, Cells) else [of.X]
        return (duplicates.cell_hashes(counts, genes, genes[measured]) for counts in blocks)

    donors = (obs["donor_id"].array if "donor_id" in obs else None for obs in (dataset.obs, cells.obs))
    return duplicates.contamination(np.concatenate([*hashes(dataset)]), hashes(cells), *donors)

"""From what a study names to its corpus and evaluation sets: read in blocks, labelled, and with genes in one order."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

from datawall.cells import backed, cellstore, census, corpus, datasets, expression, sampling, simulate, sources
from datawall.cells.cellstore import Cells
from datawall.engine import disk, store
from datawall.study.params import Params

SPIKE_IN = "spike-in"  # in place of a label that spiked-in cells lack
CLUSTERED = 20_000  # cells that clusters are found among; the others join that of their nearest neighbours
LABELS = ["cell_type", "batch", "perturbation"]  # what held-out cells have in proportion


def identity(p: Params) -> store.Record:
    """What fixes the content of the corpus, as JSON values; raises DatasetError for a source that is not there."""
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
    and `report_<table>.parquet` what else became of the cells on the way. Raises CorpusError or DatasetError if a
    source breaks a rule.
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
    cells = cellstore.Cells(folder / cellstore.NAME)
    np.save(folder / "spike_in.npy", np.arange(n_cells, cells.n_obs))
    if p.clusters:
        cellstore.add_labels(folder, "cell_type", clusters(cells))


def read_corpus(p: Params, reports: dict[str, Any]) -> Iterator[ad.AnnData]:
    """The cells of the corpus in blocks, without those to spike in.

    `reports` is filled in the end: `genes`, how they were matched, a row a source; `notes`, what a reader should know;
    and tables of what became of the cells.
    """
    name, tables = p.sources()[0], {}
    if p.simulation is None and p.census is None and name not in datasets.DATASETS:
        filters = p.model_dump(include={"min_genes", "min_counts", "max_mito"})
        source = _files(p, p.sources(), p.columns(), drop_duplicates=True, **filters)
        for block in source.blocks():
            block.obs = block.obs.drop(columns=list(sources.QUALITY))
            yield block
        matches, notes = source.matches, source.notes
        tables = {table: getattr(source.report, table) for table in ("cells", "duplicates")}
    else:
        if p.simulation is not None:
            blocks = simulate.blocks(p.simulation)
        elif p.census is not None:
            selection = census.select(p.census)
            tables = {"census": selection.report, "types": selection.types.reset_index()}
            blocks = census.blocks(p.census, selection)
        else:
            blocks = [datasets.load(name)]
        n_read = n_kept = 0
        columns = {role: p.key(role, name) for role in p.columns()}
        n_cells = {role: Counter() for role in columns}
        for block in blocks:
            aligned, match = corpus.align(block, name, min_matched=p.min_matched_genes)
            n_read, n_kept = n_read + block.n_obs, n_kept + aligned.n_obs
            aligned.obs = _roles(p, aligned, columns, name)
            for role, counted in n_cells.items():
                counted.update(aligned.obs[role].value_counts().to_dict())
            yield from _in_blocks(aligned)
        matches = [match]
        notes = [f"{name}: {note}" for note in match.notes]
        for role, counted in n_cells.items():
            notes += corpus.label_notes(counted, f"{name}: {role!r}", role)
        became = {"dataset": [name], "read": [n_read], "empty": [n_read - n_kept], "kept": [n_kept]}
        tables = tables or {"cells": pd.DataFrame(became)}
    reports.update({"genes": [match.row() for match in matches], "notes": notes, **tables})


def _files(p: Params, names: list[str], columns: sources.Columns, **options: Any) -> sources.Source:
    """Files opened as a study wants them."""
    asked = sources.Options(min_matched=p.min_matched_genes, labels=p.labels, **options)
    return sources.open_source([datasets.file(name) for name in names], columns, asked)


def _roles(p: Params, cells: ad.AnnData, columns: dict[str, str], dataset: str) -> pd.DataFrame:
    """The columns that a study names, by role, and the data set of each cell."""
    renamed = {"cell_type": p.labels}
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
    names = [f"cluster {name}" for name in some.obs["leiden"].cat.categories]
    return pd.Categorical.from_codes(np.concatenate(parts), names)


def held_out(p: Params, obs: pd.DataFrame) -> np.ndarray:
    """(n_cells,) bool: which cells of the corpus are held out; raises CorpusError for groups if there is but one."""
    shares = [1 - p.held_out, p.held_out]
    if p.split_role is None:
        strata = obs.groupby([name for name in LABELS if name in obs], observed=True, sort=True).ngroup()
        return sampling.stratified_split(strata.to_numpy(), shares, seed=p.split_seed) == 1
    if obs[p.split_role].nunique() < 2:
        raise corpus.CorpusError(f"split_by: {p.split_by} has one value for all cells; name a column with more.")
    return sampling.split_by_group(obs[p.split_role].array, shares, seed=p.split_seed) == 1


def dataset_columns(p: Params, name: str, there: Iterable[str] | None = None) -> dict[str, str]:
    """Columns of an evaluation set by role: those that it names itself, or else the study's for types and donors.

    Of the columns that are `there`, if given: without the study's column of donors, which not every data set has.
    """
    dataset = p.evaluation_sets()[name]
    keys = {
        "cell_type": dataset.cell_type_key or p.key("cell_type", dataset.file),
        "donor_id": dataset.donor_key or p.key("donor_id", dataset.file),
        "batch": dataset.batch_key,
        "perturbation": dataset.perturbation_key,
    }
    if there is not None and dataset.donor_key is None and keys["donor_id"] not in there:
        del keys["donor_id"]
    return {role: key for role, key in keys.items() if key is not None}


def make_dataset(p: Params, name: str, var: pd.DataFrame, folder: Path) -> None:
    """Write an evaluation set, its genes those of the corpus, into a folder.

    `cells.h5ad` has the cells; `genes.json` how their genes were matched, and how many the corpus has too, which are
    marked in `measured.npy`; `notes.json` what a reader should know.
    """
    aligned, genes, notes = read_dataset(p, name, var)
    aligned.write_h5ad(folder / "cells.h5ad", compression="lzf")
    np.save(folder / "measured.npy", var.index.isin(genes.pop("measured")))
    disk.write_json(folder / "genes.json", genes)
    disk.write_json(folder / "notes.json", notes)


def read_dataset(p: Params, name: str, var: pd.DataFrame) -> tuple[ad.AnnData, dict[str, Any], list[str]]:
    """An evaluation set with the genes of the corpus, how its genes were matched, and what a reader should know.

    Raises CorpusError or DatasetError if it breaks a rule, or shares no gene with the corpus.
    """
    dataset = p.evaluation_sets()[name]
    simulated = simulate.cells_named(dataset.file)
    if not simulated and dataset.file not in datasets.DATASETS:
        with backed.CellFile(datasets.file(dataset.file, dataset.source)) as file:
            columns = dataset_columns(p, name, file.columns())
        source = _files(p, [dataset.file], columns, drop_duplicates=False)
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
            cells = datasets.load(dataset.file)
        aligned, match = corpus.align(cells, dataset.file, min_matched=p.min_matched_genes)
        aligned.obs = _roles(p, aligned, dataset_columns(p, name, cells.obs), dataset.file)
        notes = [f"{name}: {note}" for note in match.notes]
    measured = aligned.var_names.intersection(var.index)
    if not len(measured):
        raise corpus.CorpusError(f"{dataset.file}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
    genes = {**match.row(), "dataset": name, "in_corpus": len(measured), "measured": measured}
    return ad.AnnData(corpus.to_genes(aligned, var.index), obs=aligned.obs, var=var), genes, notes

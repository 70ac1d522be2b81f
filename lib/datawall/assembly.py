"""From what a study names to its corpus on disk: read in blocks, labelled, split, and compared with evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

from datawall import (
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
    store,
)
from datawall.cellstore import Cells
from datawall.params import Params

SPIKE_IN = "spike-in"  # in place of a label that spiked-in cells lack
CLUSTERED = 20_000  # cells that clusters are found among; the others join that of their nearest neighbours
LABELS = ["cell_type", "batch", "perturbation"]  # what held-out cells have in proportion


def identity(p: Params) -> store.Record:
    """What fixes the content of the corpus, as JSON values.

    Raises
    ------
    datawall.datasets.DatasetError
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
    return {"corpus": source, "columns": p.columns(), "clusters": p.clusters, "spike_in": spike_in, **filters}


def make_corpus(p: Params, folder: Path) -> None:
    """Write the corpus into a folder, at constant memory.

    `cells.zarr` has the cells, those to spike in last, of which `spike_in.npy` has the rows. `genes.json` tells how
    genes were matched (`spike_in_genes.json` of those cells), and `report_<table>.parquet` what else became of the
    cells on the way.

    Raises
    ------
    datawall.corpus.CorpusError, datawall.datasets.DatasetError
        If a source breaks a rule.
    """
    n_cells = 0

    def blocks() -> Iterator[ad.AnnData]:
        nonlocal n_cells
        for block in _blocks(p, folder):
            n_cells += block.n_obs
            yield block
        if p.spike_in is not None:
            yield from _spike_in(p, block, folder)

    cellstore.write(folder, tqdm(blocks(), desc="corpus", unit="block", leave=False, delay=5))
    cells = cellstore.open(folder / cellstore.NAME)
    np.save(folder / "spike_in.npy", np.arange(n_cells, cells.n_obs))
    if p.clusters:
        cellstore.add_labels(folder, "cell_type", clusters(cells))


def _blocks(p: Params, folder: Path) -> Iterator[ad.AnnData]:
    """The corpus without cells to spike in; its reports are written once it has been read."""
    name, reports = p.sources()[0], {}
    if name.endswith(backed.SUFFIXES):
        filters = p.model_dump(include={"min_genes", "min_counts", "max_mito"})
        options = sources.Options(min_matched=p.min_matched_genes, **filters)
        source = sources.open_source([datasets.file(path) for path in p.sources()], p.columns(), options)
        matches = source.matches
        for block in source.blocks():
            block.obs = block.obs.drop(columns=list(sources.QUALITY))
            yield block
        reports = {table: getattr(source.report, table) for table in ("cells", "duplicates")}
    else:
        if p.simulation is not None:
            simulate.truth(p.simulation).write(folder)
            blocks = simulate.blocks(p.simulation)
        elif p.census is not None:
            selection = census.select(p.census)
            reports = {"census": selection.report, "types": selection.types.reset_index()}
            blocks = census.blocks(p.census, selection)
        else:
            blocks = [datasets.load(name)]
        n_read = n_kept = 0
        for block in blocks:
            aligned, match = corpus.align(block, name, min_matched=p.min_matched_genes)
            n_read, n_kept = n_read + block.n_obs, n_kept + aligned.n_obs
            aligned.obs = _roles(aligned, {role: p.key(role, name) for role in p.columns()}, name)
            yield from _in_blocks(aligned)
        matches = [match]
        became = {"dataset": [name], "read": [n_read], "empty": [n_read - n_kept], "kept": [n_kept]}
        reports = reports or {"cells": pd.DataFrame(became)}
    store.write_json(folder / "genes.json", [match.row() for match in matches])
    for table, rows in reports.items():
        rows.to_parquet(folder / f"report_{table}.parquet", index=False)


def _roles(cells: ad.AnnData, columns: dict[str, str], dataset: str) -> pd.DataFrame:
    """The columns that a study names, by role, and the data set of each cell."""
    obs = {role: corpus.column(cells, dataset, key, role) for role, key in columns.items()}
    if "dataset_id" in cells.obs:
        obs["dataset_id"] = corpus.column(cells, dataset, "dataset_id", "data set")
    else:
        obs["dataset_id"] = pd.Categorical([dataset] * cells.n_obs)
    return pd.DataFrame(obs, index=cells.obs_names)


def _in_blocks(cells: ad.AnnData) -> Iterator[ad.AnnData]:
    for first in range(0, cells.n_obs, cellstore.CELLS_AT_ONCE):
        yield cells[first : first + cellstore.CELLS_AT_ONCE].copy()


def _spike_in(p: Params, like: ad.AnnData, folder: Path) -> Iterator[ad.AnnData]:
    """Cells to spike in, with the genes and columns of a block of the corpus."""
    keys = {role: p.key(role, p.spike_in) for role in like.obs}
    if p.spike_in.endswith(backed.SUFFIXES):
        path = datasets.file(p.spike_in)
        with backed.CellFile(path) as file:
            there = {role: key for role, key in keys.items() if key in file.columns()}
        options = sources.Options(min_matched=p.min_matched_genes, drop_duplicates=False)
        source = sources.open_source([path], there, options)
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
    store.write_json(folder / "spike_in_genes.json", {**match.row(), "in_corpus": in_corpus})


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
    obs = cells.obs.iloc[rows]
    shares = [1 - p.held_out, p.held_out]
    if p.split_role:
        part = sampling.split_by_group(obs[p.split_role].array, shares, seed=p.split_seed)
    else:
        strata = obs.groupby([name for name in LABELS if name in obs], observed=True, sort=True).ngroup()
        part = sampling.stratified_split(strata.to_numpy(), shares, seed=p.split_seed)
    pretraining = np.setdiff1d(rows[part == 0], dropped, assume_unique=True)
    if not len(pretraining):
        raise corpus.CorpusError(
            f"{p.study}: no cell of the corpus is left to pretrain on; hold out less, or keep contaminated cells."
        )
    np.save(folder / "pretraining.npy", pretraining)
    np.save(folder / "held_out.npy", rows[part == 1])


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
    datawall.corpus.CorpusError, datawall.datasets.DatasetError
        If it breaks a rule, or shares no gene with the corpus.
    """
    one, wanted = p.evaluation_sets()[name], dataset_columns(p, name)
    simulated = simulate.cells_named(one.file)
    if simulated:
        source = simulate.Cells(simulate.truth(p.simulation)).block(simulated.start, simulated.stop)
    else:
        source = datasets.load(one.file)
    if one.donor_key is None and wanted.get("donor_id") not in source.obs:
        wanted.pop("donor_id", None)  # the study's column, which not every data set has
    aligned, match = corpus.align(source, one.file, min_matched=p.min_matched_genes)
    measured = var.index.isin(aligned.var_names)
    if not measured.any():
        raise corpus.CorpusError(f"{one.file}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
    counts = corpus.to_genes(aligned, var.index)
    obs = _roles(aligned, wanted, one.file)
    ad.AnnData(counts, obs=obs, var=var).write_h5ad(folder / "cells.h5ad", compression="lzf")
    np.save(folder / "measured.npy", measured)
    store.write_json(folder / "genes.json", {**match.row(), "dataset": name, "in_corpus": int(measured.sum())})


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

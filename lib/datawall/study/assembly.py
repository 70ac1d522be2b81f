"""From what a study names to its corpus and evaluation sets: read in blocks, labelled, and with genes in one order."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

from datawall.cells import backed, cellstore, census, corpus, datasets, expression, sampling, simulate, sources
from datawall.cells.cellstore import Cells
from datawall.engine import disk, store
from datawall.study import joining
from datawall.study.params import CLUSTERS, Params

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
    given = p.model_dump(include={"min_matched_genes", "min_genes", "min_counts", "max_mito", "labels"})
    given |= {"columns": p.columns(), "clusters": p.cell_type_key == CLUSTERS}
    return {"corpus": source, "spike_in": spike_in, **given}


def make_corpus(p: Params, folder: Path) -> None:
    """Write the corpus into a folder, at constant memory.

    `cells.zarr` has the cells, those to spike in last, of which `spike_in.npy` has the rows. `genes.json` tells how
    genes were matched, `notes.json` what a reader should know of the sources, and `report_<table>.parquet` what became
    of the cells on the way. Raises CorpusError if a source, the control or a context breaks a rule.
    """
    reports = {}
    cellstore.write(folder, tqdm(read_corpus(p, reports), desc="corpus", unit="block", leave=False, delay=5))
    cells = cellstore.Cells(folder / cellstore.NAME)
    np.save(folder / "spike_in.npy", np.arange(cells.n_obs - reports.pop("n_spiked"), cells.n_obs))
    if p.simulation is not None:
        simulate.truth(p.simulation).write(folder)
    for name, content in reports.items():
        if isinstance(content, pd.DataFrame):
            content.to_parquet(folder / f"report_{name}.parquet", index=False)
        else:
            disk.write_json(folder / f"{name}.json", content)
    if p.cell_type_key == CLUSTERS:
        cellstore.add_labels(folder, "cell_type", clusters(cells))
    obs = cellstore.Cells(folder / cellstore.NAME).obs
    joining.check_contexts(p, obs["cell_type"].unique())
    joining.check_control(p, p.evaluation_sets()[p.held_out_name], obs)


def read_corpus(p: Params, reports: dict[str, Any]) -> Iterator[ad.AnnData]:
    """The cells of the corpus in blocks, those to spike in last.

    `reports` is filled in the end: `genes`, how they were matched, a row a source; `notes`, what a reader should know;
    `n_spiked`, how many cells are to be spiked in; and tables of what became of the others.
    """
    name, tables = p.sources()[0], {}
    columns = {role: p.key(role, name) for role in p.columns()}
    if p.simulation is not None:
        source = Loaded(p, name, simulate.blocks(p.simulation), columns)
    elif p.census is not None:
        selection = census.select(p.census)
        tables = {"census": selection.report, "types": selection.types.reset_index()}
        source = Loaded(p, name, census.blocks(p.census, selection), columns)
    elif name in datasets.DATASETS:
        source = Loaded(p, name, [datasets.load(name)], columns)
    else:
        filters = p.model_dump(include={"min_genes", "min_counts", "max_mito"})
        source = _files(p, p.sources(), p.columns(), drop_duplicates=True, **filters)
    for block in source.blocks():
        block.obs = block.obs.drop(columns=list(sources.QUALITY), errors="ignore")
        yield block
    tables = tables or source.reports
    genes = [{**match.row(), "in_corpus": match.matched} for match in source.matches]
    reports.update({"genes": genes, "notes": source.notes, "n_spiked": 0, **tables})
    if p.spike_in is not None:
        yield from _spike_in(p, block, reports)


def _spike_in(p: Params, like: ad.AnnData, reports: dict[str, Any]) -> Iterator[ad.AnnData]:
    """Cells to spike in, with the genes and columns of a block of the corpus."""
    keys = {role: p.key(role, p.spike_in) for role in like.obs}
    source = _beside(p, p.spike_in, lambda there: {role: key for role, key in keys.items() if key in there})
    for block in source.blocks():
        known = [role for role, key in keys.items() if key is not None and role in block.obs]
        obs = {role: block.obs[role].astype(str).to_numpy() if role in known else SPIKE_IN for role in keys}
        names = [f"{SPIKE_IN}_{name}" for name in block.obs_names]
        counts, genes = corpus.to_genes(block, like.var_names), block.var_names
        yield ad.AnnData(counts, obs=pd.DataFrame(obs, index=names), var=like.var)
        reports["n_spiked"] += block.n_obs
    (match,) = source.matches
    reports["genes"].append({**match.row(), "in_corpus": int(like.var_names.isin(genes).sum())})
    reports["notes"] += [f"{p.spike_in}: {note}" for note in match.notes]


class Loaded:
    """Cells in memory, of one data set, read as a file's are: like `sources.Source`, once `blocks` has ended."""

    def __init__(self, p: Params, name: str, cells: Iterable[ad.AnnData], columns: dict[str, str]) -> None:
        self.p, self.name, self.cells, self.columns = p, name, cells, columns

    def blocks(self) -> Iterator[ad.AnnData]:
        """Aligned cells, with a column for each role, and `dataset_id`."""
        n_read, n_kept, n_cells = 0, 0, {role: Counter() for role in self.columns}
        for cells in self.cells:
            aligned, match = corpus.align(cells, self.name, min_matched=self.p.min_matched_genes)
            columns = self.columns | ({"dataset_id": "dataset_id"} if "dataset_id" in cells.obs else {})
            obs, renamed = {}, {"cell_type": self.p.labels}
            for role, key in columns.items():
                obs[role] = corpus.column(aligned, self.name, key, role, renamed.get(role))
            obs.setdefault("dataset_id", pd.Categorical([self.name] * aligned.n_obs))
            aligned.obs = pd.DataFrame(obs, index=aligned.obs_names)
            n_read, n_kept = n_read + cells.n_obs, n_kept + aligned.n_obs
            for role, counted in n_cells.items():
                counted.update(aligned.obs[role].value_counts().to_dict())
            yield aligned
        self.matches, self.notes = [match], [f"{self.name}: {note}" for note in match.notes]
        for role, counted in n_cells.items():
            self.notes += corpus.label_notes(counted, f"{self.name}: {role!r}", role)
        became = {"dataset": [self.name], "read": [n_read], "empty": [n_read - n_kept], "kept": [n_kept]}
        self.reports = {"cells": pd.DataFrame(became)}


def _files(p: Params, names: list[str], columns: sources.Columns, **options: Any) -> sources.Source:
    """Files opened as a study wants them."""
    asked = sources.Options(min_matched=p.min_matched_genes, labels=p.labels, **options)
    return sources.open_source([datasets.file(name) for name in names], columns, asked)


def _beside(
    p: Params, name: str, columns_of: Callable[[Iterable[str]], dict[str, str]], origin: str | None = None
) -> sources.Source | Loaded:
    """A data set beside the corpus; `columns_of` tells, by role, which of its columns are wanted."""
    if simulated := simulate.cells_named(name):
        cells = simulate.Cells(simulate.truth(p.simulation)).block(simulated.start, simulated.stop)
    elif name in datasets.DATASETS:
        cells = datasets.load(name)
    else:
        with backed.CellFile(datasets.file(name, origin)) as file:
            columns = columns_of(file.columns())
        return _files(p, [name], columns, drop_duplicates=False)
    return Loaded(p, name, [cells], columns_of(cells.obs))


def clusters(cells: Cells) -> pd.Categorical:
    """Leiden clusters, for a corpus without labels, as in scanpy (resolution 1) on 50 principal components.

    They are found among `CLUSTERED` cells, drawn by a fixed seed, of which 15 neighbours vote on the cluster of others.
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

    The study's column of donors is left out where it is not among the columns that are `there`.
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
    """Write an evaluation set (see `read_dataset`) into a folder.

    `cells.h5ad` has the cells; `genes.json` how their genes were matched, and how many the corpus has too, which are
    marked in `measured.npy`; `notes.json` what a reader should know.
    """
    aligned, measured, genes, notes = read_dataset(p, name, var)
    aligned.write_h5ad(folder / "cells.h5ad", compression="lzf")
    np.save(folder / "measured.npy", measured)
    disk.write_json(folder / "genes.json", [genes])
    disk.write_json(folder / "notes.json", notes)


def read_dataset(p: Params, name: str, var: pd.DataFrame) -> tuple[ad.AnnData, np.ndarray, dict[str, Any], list[str]]:
    """An evaluation set with the genes of the corpus, which of them it measures, how they were matched, and notes.

    Raises CorpusError if it breaks a rule, or shares no gene with the corpus.
    """
    dataset = p.evaluation_sets()[name]
    source = _beside(p, dataset.file, partial(dataset_columns, p, name), dataset.source)
    blocks = list(source.blocks())
    aligned = ad.concat(blocks, merge="same") if len(blocks) > 1 else blocks[0]
    aligned.obs = aligned.obs.drop(columns=list(sources.QUALITY), errors="ignore")
    for role in aligned.obs:
        aligned.obs[role] = aligned.obs[role].cat.remove_unused_categories()
    joining.check_control(p, dataset, aligned.obs)
    notes = list(source.notes)
    if n_empty := int(source.reports["cells"]["empty"].sum()):
        notes.append(f"{name}: {n_empty:,} cells have no count in any known gene and are left out")
    measured = var.index.isin(aligned.var_names)
    if not measured.any():
        raise corpus.CorpusError(f"{dataset.file}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
    genes = {**source.matches[0].row(), "dataset": name, "in_corpus": int(measured.sum())}
    return ad.AnnData(corpus.to_genes(aligned, var.index), obs=aligned.obs, var=var), measured, genes, notes

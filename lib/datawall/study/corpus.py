"""The corpus of a study: its key, how it is read in blocks from what the study names, written, and read back.

Each kind of unit has a file like this: what decides its key (`…_unit`), what makes it (`make_…`), how it is read.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

from datawall.cells import backed, cellstore, census, corpus, datasets, expression, sampling, simulate, sources
from datawall.engine import disk
from datawall.engine.store import Artifact, Store, Unit
from datawall.study import joining
from datawall.study.params import CLUSTERS, Params

SPIKE_IN = "spike-in"  # in place of a label that spiked-in cells lack
CLUSTERED = 20_000  # cells that clusters are found among; the others join that of their nearest neighbours


class WithCorpus:
    """A checked study file, a run folder where all that is made goes, and the corpus."""

    def __init__(self, parameters: Params, folder: Path) -> None:
        self.params = parameters
        self.folder = folder
        self.store = Store(folder / "store", parameters.storage)
        self._obs: dict[str, pd.DataFrame] = {}  # labels of evaluation data sets
        self._in_memory: dict[str, ad.AnnData] = {}  # evaluation data sets, the one last used last

    @cached_property
    def corpus_unit(self) -> Unit:
        """The aligned corpus, with its labels; raises DatasetError for a source that is not there."""
        p = self.params
        if p.simulation is not None:
            source = simulate.identity(p.simulation)
        elif p.census is not None:
            source = census.identity(p.census)
        elif p.sources()[0] in datasets.DATASETS:
            source = datasets.identity(p.sources()[0])
        else:  # by name, which its cells have as their `dataset_id`
            names = sources.file_names([datasets.file(name) for name in p.sources()])
            source = dict(zip(names, map(datasets.identity, p.sources()), strict=True))
        record = p.model_dump(include={"min_matched_genes", "min_genes", "min_counts", "max_mito", "labels"})
        record |= {"corpus": source, "spike_in": None if p.spike_in is None else datasets.identity(p.spike_in)}
        record |= {"columns": p.columns(), "clusters": p.cell_type_key == CLUSTERS}
        return Unit("corpus", record, ("study/corpus",))

    def make_corpus(self, folder: Path) -> None:
        """Write the corpus into a folder, at constant memory.

        `cells.zarr` has the cells, those to spike in last, of which `spike_in.npy` has the rows. `genes.json` tells how
        genes were matched, `notes.json` what a reader should know of the sources, and `report_<table>.parquet` what
        became of the cells on the way. Raises CorpusError if a source, the control or a context breaks a rule.
        """
        p, reports = self.params, {}
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

    @cached_property
    def corpus_artifact(self) -> Artifact:
        """The corpus on disk."""
        return self.store.find_or_make(self.corpus_unit, self.make_corpus)

    @cached_property
    def corpus(self) -> cellstore.Cells:
        """The corpus, on disk: counts by row, genes by Ensembl id, `obs` with cell_type and what else is known.

        Raises CorpusError if a source breaks a rule, or lacks a column that the study names.
        """
        cells = cellstore.Cells(self.corpus_artifact.folder / cellstore.NAME)
        joining.check_contexts(self.params, cells.obs["cell_type"].unique())
        return cells


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
    source = open_beside(p, p.spike_in, lambda there: {role: key for role, key in keys.items() if key in there})
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
    asked = sources.Options(min_matched=p.min_matched_genes, labels=p.labels, **options)
    return sources.open_source([datasets.file(name) for name in names], columns, asked)


def open_beside(
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


def clusters(cells: cellstore.Cells) -> pd.Categorical:
    """Leiden clusters, for a corpus without labels, as in scanpy (resolution 1) on 50 principal components.

    They are found among `CLUSTERED` cells, drawn by a fixed seed, of which 15 neighbours vote on the cluster of others.
    """
    import scanpy as sc
    from sklearn.neighbors import KNeighborsClassifier

    with tempfile.TemporaryDirectory() as scratch:
        X = expression.streamed_pca(cells.count_blocks, Path(scratch) / "X_pca.npy")
        rows = sampling.fixed(len(X), CLUSTERED)
        some = ad.AnnData(np.asarray(X[rows]))
        sc.pp.neighbors(some, use_rep="X", random_state=0)
        sc.tl.leiden(some, random_state=0, flavor="igraph", n_iterations=2, directed=False)
        vote = KNeighborsClassifier(min(15, len(rows))).fit(some.X, some.obs["leiden"].cat.codes)
        parts = [vote.predict(X[first : first + CLUSTERED]) for first in range(0, len(X), CLUSTERED)]
    names = [f"cluster {name}" for name in some.obs["leiden"].cat.categories]
    return pd.Categorical.from_codes(np.concatenate(parts), names)

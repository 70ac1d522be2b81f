"""Evaluation data sets of a study, its held-out cells among them: keys, making and reading.

Three kinds of unit are made together. The split holds cells of the corpus out, which are the first data set, and leaves
out of pretraining what contamination finds; contamination compares the cells of a data set with those of the split.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells import datasets, duplicates, expression, sampling, sources
from datawall.cells.cellstore import Cells
from datawall.cells.corpus import CorpusError, to_genes
from datawall.engine import disk
from datawall.engine.store import Artifact, Unit
from datawall.study import joining
from datawall.study.corpus import WithCorpus, open_beside
from datawall.study.params import Params

LABELS = ["cell_type", "batch", "perturbation"]  # what held-out cells have in proportion
KEPT = 2**28  # bytes of evaluation data sets that a process keeps beside the one it works on
AT_ONCE = 16_384  # cells of an evaluation data set that are read in turn


class WithDatasets(WithCorpus):
    """A study with its split, its evaluation data sets and what these share with the corpus."""

    @cached_property
    def split_unit(self) -> Unit:
        """Which cells of the corpus are pretrained on, and which are held out."""
        p = self.params
        record = {"corpus": self.corpus_unit.key, "held_out": p.held_out, "by": p.split_by, "seed": p.split_seed}
        record["drop"] = [self.contamination_unit(each.dataset).key for each in p.evaluation if p.drop_contaminated]
        return Unit("split", record, ("study/dataset",))

    def make_split(self, folder: Path) -> None:
        """Write the sorted rows of the corpus that may be pretrained on and those held out, spiked-in cells apart."""
        p, rows = self.params, np.setdiff1d(np.arange(self.corpus.n_obs), self.split_rows("spike_in"))
        held_out = hold_out(p, self.corpus.obs.iloc[rows])
        pretraining = rows[~held_out]
        for dataset in p.evaluation if p.drop_contaminated else ():
            pretraining = np.setdiff1d(pretraining, self.contamination(dataset.dataset).rows_to_drop())
        if not len(pretraining):
            remedy = "hold out less, or keep contaminated cells"
            raise CorpusError(f"{p.study}: no cell of the corpus is left to pretrain on; {remedy}.")
        np.save(folder / "pretraining.npy", pretraining)
        np.save(folder / "held_out.npy", rows[held_out])

    def split_rows(self, part: str) -> np.ndarray:
        """Sorted rows of the corpus of a part: `pretraining`, `held_out`, or `spike_in`."""
        artifact = self.corpus_artifact if part == "spike_in" else self.dataset_artifact(self.params.held_out_name)
        return np.load(artifact.folder / f"{part}.npy", mmap_mode="r")  # those of an atlas would take gigabytes

    @cached_property
    def pretraining_cells(self) -> Cells:
        """The cells that models may be pretrained on, spiked-in ones apart."""
        return self.corpus.take(self.split_rows("pretraining"))

    @property
    def held_out_cells(self) -> Cells:
        """The corpus's held-out cells, on disk; `dataset` has them in memory."""
        return self.corpus.take(self.split_rows("held_out"))

    @cached_property
    def response_genes(self) -> np.ndarray:
        """(n_genes,) bool: the genes whose response is predicted, the most variable among the pretraining cells."""
        return expression.streamed_variable_genes(self.pretraining_cells.count_blocks, self.params.perturbation_genes)

    # Evaluation data sets

    @cache  # noqa: B019 - every key asks for it, and a folder's files take long to look through
    def dataset_unit(self, name: str) -> Unit:
        """An evaluation data set, its genes in the corpus's order; of held-out cells, the split."""
        if name == self.params.held_out_name:
            return self.split_unit
        p, dataset = self.params, self.params.evaluation_sets()[name]
        record = p.model_dump(include={"min_matched_genes", "labels"}) | {"corpus": self.corpus_unit.key}
        record |= {"dataset": datasets.identity(dataset.file, dataset.source), "columns": dataset_columns(p, name)}
        record["name"] = name  # which what is told of it begins with
        return Unit("dataset", record, ("study/dataset",))

    def make_dataset(self, name: str, folder: Path) -> None:
        """Write an evaluation set (see `read_dataset`) into a folder.

        `cells.h5ad` has the cells; `genes.json` how their genes were matched, and how many the corpus has too, which
        are marked in `measured.npy`; `notes.json` what a reader should know.
        """
        aligned, measured, genes, notes = read_dataset(self.params, name, self.corpus.var)
        aligned.write_h5ad(folder / "cells.h5ad", compression="lzf")
        np.save(folder / "measured.npy", measured)
        disk.write_json(folder / "genes.json", [genes])
        disk.write_json(folder / "notes.json", notes)

    def dataset_artifact(self, name: str) -> Artifact:
        """An evaluation data set on disk; of held-out cells, the split."""
        make = self.make_split if name == self.params.held_out_name else partial(self.make_dataset, name)
        return self.store.find_or_make(self.dataset_unit(name), make)

    def measured(self, name: str) -> np.ndarray:
        """(n_genes,) bool: which genes of the corpus an evaluation data set has."""
        if name == self.params.held_out_name:
            return np.ones(self.corpus.n_vars, bool)
        return np.load(self.dataset_artifact(name).folder / "measured.npy")

    def dataset(self, name: str) -> ad.AnnData:
        """An evaluation data set: counts in the corpus's gene order, `obs` with cell_type and what else is known."""
        if (adata := self._in_memory.pop(name, None)) is None:
            while sum(map(sys.getsizeof, self._in_memory.values())) > KEPT:
                del self._in_memory[next(iter(self._in_memory))]
            file = self.dataset_artifact(name).folder / "cells.h5ad"
            adata = self.held_out_cells.to_memory() if name == self.params.held_out_name else ad.read_h5ad(file)
        self._in_memory[name] = adata
        return adata

    def count_blocks(self, name: str) -> Iterator[sp.csr_matrix]:
        """Raw counts of an evaluation data set in turn; only one that is a single block is kept in memory."""
        self.dataset_artifact(name)
        if len(self.labels(name)) <= AT_ONCE:
            yield self.dataset(name).X
        elif name == self.params.held_out_name:
            yield from (counts for _, counts in self.held_out_cells.blocks(AT_ONCE))
        else:
            with h5py.File(self.dataset_artifact(name).folder / "cells.h5ad") as file:
                X = ad.io.sparse_dataset(file["X"])
                yield from (X[first : first + AT_ONCE] for first in range(0, X.shape[0], AT_ONCE))

    def labels(self, name: str) -> pd.DataFrame | None:
        """`obs` of an evaluation data set; None if that has not been made."""
        if name not in self._obs and self.store.folder.is_dir():
            with suppress(datasets.DatasetError):  # a file that is not there, of a study that is planned
                artifact = self.store.find(self.dataset_unit(name)) if self.store.find(self.corpus_unit) else None
                if artifact and name == self.params.held_out_name:
                    self._obs[name] = self.held_out_cells.obs
                elif artifact:
                    with h5py.File(artifact.folder / "cells.h5ad") as file:
                        self._obs[name] = ad.io.read_elem(file["obs"])
        return self._obs.get(name)

    # What a data set shares with the corpus

    def contamination_unit(self, name: str) -> Unit:
        """What an evaluation data set shares with the corpus; held-out cells, with those that are pretrained on."""
        within = self.split_unit if name == self.params.held_out_name else self.corpus_unit
        record = {"dataset": self.dataset_unit(name).key, "cells": within.key}
        return Unit("contamination", record, ("study/dataset",))

    def make_contamination(self, name: str, folder: Path) -> None:
        """Write what is shared, of genes that the data set has, in blocks, at 36 bytes a cell of the data set."""
        cells = self.pretraining_cells if name == self.params.held_out_name else self.corpus
        genes = cells.var.index[self.measured(name)]

        def hashes(blocks: Iterable[sp.csr_matrix]) -> Iterator[np.ndarray]:
            return (duplicates.cell_hashes(counts, cells.var.index, genes) for counts in blocks)

        ours = np.concatenate([*hashes(self.count_blocks(name))])
        donors = (obs["donor_id"].array if "donor_id" in obs else None for obs in (self.labels(name), cells.obs))
        duplicates.contamination(ours, hashes(cells.count_blocks()), *donors).write(folder)

    def contamination(self, name: str) -> duplicates.Contamination:
        """What an evaluation data set shares with the corpus: equal cells, and donors of one name.

        Rows are the corpus's; of held-out cells, they are positions among `pretraining_cells`.
        """
        made = self.store.find_or_make(self.contamination_unit(name), partial(self.make_contamination, name))
        return duplicates.Contamination.read(made.folder)


def hold_out(p: Params, obs: pd.DataFrame) -> np.ndarray:
    """(n_cells,) bool: which cells of the corpus are held out; raises CorpusError for groups if there is but one."""
    shares = [1 - p.held_out, p.held_out]
    if p.split_role is None:
        strata = obs.groupby([name for name in LABELS if name in obs], observed=True, sort=True).ngroup()
        return sampling.stratified_split(strata.to_numpy(), shares, seed=p.split_seed) == 1
    if obs[p.split_role].nunique() < 2:
        raise CorpusError(f"split_by: {p.split_by} has one value for all cells; name a column with more.")
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


def read_dataset(p: Params, name: str, var: pd.DataFrame) -> tuple[ad.AnnData, np.ndarray, dict[str, Any], list[str]]:
    """An evaluation set with the genes of the corpus, which of them it measures, how they were matched, and notes.

    Raises CorpusError if it breaks a rule, or shares no gene with the corpus.
    """
    dataset = p.evaluation_sets()[name]
    source = open_beside(p, dataset.file, partial(dataset_columns, p, name), dataset.source)
    blocks = list(source.blocks())
    aligned = ad.concat(blocks, merge="same") if len(blocks) > 1 else blocks[0]
    aligned.obs = aligned.obs.drop(columns=list(sources.QUALITY), errors="ignore")
    X, n_all, measured = to_genes(aligned, var.index), aligned.n_obs, var.index.isin(aligned.var_names)
    seen, share = np.flatnonzero(X.getnnz(axis=1)), X.sum() / aligned.X.sum()
    if not len(seen):
        raise CorpusError(f"{dataset.file}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
    X, aligned = X[seen], aligned[seen].copy()
    for role in aligned.obs:
        aligned.obs[role] = aligned.obs[role].cat.remove_unused_categories()
    joining.check_control(p, dataset, aligned.obs)
    notes = list(source.notes)
    if n_empty := int(source.reports["cells"]["empty"].sum()):
        notes.append(f"{name}: {n_empty:,} cells have no count in any known gene and are left out")
    if share < 0.5 or len(seen) < n_all:
        what = f"{measured.sum():,} of its genes, with {share:.0%} of its counts, are in the corpus"
        notes.append(f"{name}: {what}; {n_all - len(seen):,} cells have none of these counts and are left out")
    genes = {**source.matches[0].row(), "dataset": name, "in_corpus": int(measured.sum())}
    return ad.AnnData(X, obs=aligned.obs, var=var), measured, genes, notes

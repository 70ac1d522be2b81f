"""The curated data of a study: its corpus, split, evaluation sets and subsets, each made once and found again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from datawall.cells import cellstore, datasets, duplicates, expression, sampling
from datawall.cells.cellstore import Cells
from datawall.cells.corpus import CorpusError
from datawall.cells.duplicates import Contamination
from datawall.engine import code, store
from datawall.engine.store import Artifact, Unit
from datawall.study import assembly, joining
from datawall.study.params import Params
from datawall.study.units import Subset

HERE, ASSEMBLY = map(code.module_name, (__name__, assembly.__name__))
KEPT = 2**28  # bytes of evaluation data sets that a process keeps beside the one it works on


class Curated:
    """What a study works on: its checked study file, and the run folder, where all that is made goes."""

    def __init__(self, parameters: Params, folder: Path) -> None:
        self.params = parameters
        self.folder = folder
        self.store = store.Store(folder / "store", parameters.storage)
        self._obs: dict[str, pd.DataFrame] = {}  # labels of evaluation data sets
        self._in_memory: dict[str, ad.AnnData] = {}  # evaluation data sets, the one last used last

    def subsets(self) -> list[Subset]:
        """Every subset of the corpus."""
        return [subset for subset in self.params.subsets() if not subset.untrained]

    @property
    def held_out_name(self) -> str:
        """Name of the data set made of the corpus's held-out cells."""
        return self.params.held_out_name

    # Which data sets a task is judged on

    def first_dataset(self, task: str) -> str:
        """The data set by which a task is told: the held-out cells or, if they do not join it, the first that does."""
        return next(iter(self.joined(task)), self.held_out_name)

    def joined(self, task: str) -> list[str]:
        """Data sets that a task is judged on; until they have been read, all whose columns allow it."""
        apart = self.not_judged(task)
        return [
            name for name, dataset in self.params.evaluation_sets().items() if dataset.joins(task) and name not in apart
        ]

    def not_judged(self, task: str) -> dict[str, str]:
        """Data sets, read before, whose columns allow a task and whose cells do not, and why."""
        sets = {name: dataset for name, dataset in self.params.evaluation_sets().items() if dataset.joins(task)}
        read = {name: obs for name in sets if (obs := self._labels(name)) is not None}
        why = {name: joining.unfit(task, obs, sets[name], self.params) for name, obs in read.items()}
        return {name: reason for name, reason in why.items() if reason}

    def _labels(self, name: str) -> pd.DataFrame | None:
        """`obs` of an evaluation data set; None if that has not been made."""
        if name not in self._obs and self.store.folder.is_dir():
            with suppress(datasets.DatasetError):  # a file that is not there, of a study that is planned
                artifact = self.store.find(self.dataset_unit(name)) if self.store.find(self.corpus_unit) else None
                if artifact and name == self.held_out_name:
                    self._obs[name] = self.held_out_cells.obs
                elif artifact:
                    with h5py.File(artifact.folder / "cells.h5ad") as file:
                        self._obs[name] = ad.io.read_elem(file["obs"])
        return self._obs.get(name)

    # The corpus, and how it is split

    @cached_property
    def corpus_unit(self) -> Unit:
        """The aligned corpus, with its labels."""
        return Unit("corpus", assembly.identity(self.params), (f"{HERE}:corpus_artifact", ASSEMBLY))

    @cached_property
    def corpus_artifact(self) -> Artifact:
        """The corpus on disk (see `assembly.make_corpus`)."""

        def make(folder: Path) -> None:
            assembly.make_corpus(self.params, folder)
            joining.check_contexts(self.params, cellstore.Cells(folder / cellstore.NAME).obs["cell_type"].unique())

        return self.store.find_or_make(self.corpus_unit, make)

    @cached_property
    def corpus(self) -> Cells:
        """The corpus, on disk: counts by row, genes by Ensembl id, `obs` with cell_type and what else is known.

        Raises CorpusError if the data set breaks a rule of `corpus.align`, or lacks a column that the study names.
        """
        cells = cellstore.Cells(self.corpus_artifact.folder / cellstore.NAME)
        joining.check_contexts(self.params, cells.obs["cell_type"].unique())
        return cells

    @cached_property
    def split_unit(self) -> Unit:
        """Which cells of the corpus are pretrained on, and which are held out."""
        p = self.params
        drop = [self.contamination_unit(name).key for name in self._dropped_for]
        drawn = {"held_out": p.held_out, "by": p.split_by, "seed": p.split_seed}
        record = {"corpus": self.corpus_unit.key, **drawn, "drop": drop}
        return Unit("split", record, (f"{HERE}:_make_split", ASSEMBLY))

    @property
    def _dropped_for(self) -> list[str]:
        """Evaluation data sets whose cells and donors are left out of pretraining."""
        return [dataset.dataset for dataset in self.params.evaluation] if self.params.drop_contaminated else []

    def _make_split(self, folder: Path) -> None:
        """Write the sorted rows of the corpus that may be pretrained on and those held out, spiked-in cells apart."""
        rows = np.setdiff1d(np.arange(self.corpus.n_obs), self.split_rows("spike_in"), assume_unique=True)
        held_out = assembly.held_out(self.params, self.corpus.obs.iloc[rows])
        dropped = [self.contamination(name).rows_to_drop() for name in self._dropped_for]
        dropped = np.unique(np.concatenate([np.empty(0, np.int64), *dropped]))
        pretraining = np.setdiff1d(rows[~held_out], dropped, assume_unique=True)
        if not len(pretraining):
            raise CorpusError(
                f"{self.params.study}: no cell of the corpus is left to pretrain on; hold out less, or keep "
                "contaminated cells."
            )
        np.save(folder / "pretraining.npy", pretraining)
        np.save(folder / "held_out.npy", rows[held_out])

    def split_rows(self, part: str) -> np.ndarray:
        """Sorted rows of the corpus of a part: `pretraining`, `held_out`, or `spike_in`."""
        artifact = self.corpus_artifact if part == "spike_in" else self.dataset_artifact(self.held_out_name)
        return _mapped(artifact.folder / f"{part}.npy")

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
        if name == self.held_out_name:
            return self.split_unit
        p, dataset = self.params, self.params.evaluation_sets()[name]
        record = {
            "dataset": datasets.identity(dataset.file, dataset.source),
            "corpus": self.corpus_unit.key,
            "min_matched_genes": p.min_matched_genes,
            "columns": assembly.dataset_columns(p, name),
            "labels": p.labels,
        }
        return Unit("dataset", record, (f"{HERE}:dataset_artifact", ASSEMBLY))

    def dataset_artifact(self, name: str) -> Artifact:
        """An evaluation data set on disk (see `assembly.make_dataset`); of held-out cells, the split."""
        if name == self.held_out_name:
            return self.store.find_or_make(self.split_unit, self._make_split)
        return self.store.find_or_make(
            self.dataset_unit(name), lambda folder: assembly.make_dataset(self.params, name, self.corpus.var, folder)
        )

    def dataset(self, name: str) -> ad.AnnData:
        """An evaluation data set: counts in the corpus's gene order, `obs["cell_type"]` and what else is known.

        Those asked for before stay in memory, the latest first, as far as `KEPT` goes.
        """
        if (adata := self._in_memory.pop(name, None)) is None:
            while sum(map(sys.getsizeof, self._in_memory.values())) > KEPT:
                del self._in_memory[next(iter(self._in_memory))]
            if name == self.held_out_name:
                adata = self.held_out_cells.to_memory()
            else:
                adata = ad.read_h5ad(self.dataset_artifact(name).folder / "cells.h5ad")
        self._in_memory[name] = adata
        return adata

    def contamination_unit(self, name: str) -> Unit:
        """What an evaluation data set shares with the corpus; held-out cells, with those that are pretrained on."""
        within = self.split_unit if name == self.held_out_name else self.corpus_unit
        record = {"dataset": self.dataset_unit(name).key, "cells": within.key}
        return Unit("contamination", record, (f"{HERE}:contamination",))

    def contamination(self, name: str) -> Contamination:
        """What an evaluation data set shares with the corpus: equal cells, and donors of the same name.

        Rows count in the corpus. Cells are compared by the genes that the data set has; what lies on disk is read in
        blocks, and in memory are 36 bytes for each cell of the evaluation set.
        """

        def make(folder: Path) -> None:
            if name == self.held_out_name:
                dataset, cells = self.held_out_cells, self.pretraining_cells
                genes = cells.var.index
            else:
                dataset, cells = self.dataset(name), self.corpus
                genes = cells.var.index[np.load(self.dataset_artifact(name).folder / "measured.npy")]

            def hashes(of_cells: ad.AnnData | Cells) -> Iterator[np.ndarray]:
                blocks = of_cells.count_blocks() if isinstance(of_cells, Cells) else [of_cells.X]
                return (duplicates.cell_hashes(counts, cells.var.index, genes) for counts in blocks)

            donors = (obs["donor_id"].array if "donor_id" in obs else None for obs in (dataset.obs, cells.obs))
            duplicates.contamination(np.concatenate([*hashes(dataset)]), hashes(cells), *donors).write(folder)

        return Contamination.read(self.store.find_or_make(self.contamination_unit(name), make).folder)

    # Subsets

    @cached_property
    def sketch_unit(self) -> Unit:
        """Principal components of the pretraining cells, for geometric sketching and for diversity."""
        return Unit("sketch", {"split": self.split_unit.key}, (f"{HERE}:X_pca",))

    @cached_property
    def X_pca(self) -> np.ndarray:  # noqa: N802 - AnnData's name for it
        """Principal component scores, (n_cells, 50), a memory map: of pretraining cells, then of those to spike in.

        Variable genes and components are those of the pretraining cells.
        """

        def make(folder: Path) -> None:
            spike_in = self.corpus.take(self.split_rows("spike_in"))
            path = folder / "X_pca.npy"
            expression.streamed_pca(self.pretraining_cells.count_blocks, path, then=spike_in.count_blocks)

        return _mapped(self.store.find_or_make(self.sketch_unit, make).folder / "X_pca.npy")

    def pca_scores(self, rows: np.ndarray) -> np.ndarray:
        """Principal component scores of rows of the corpus that a subset takes."""
        scored = np.concatenate([self.split_rows("pretraining"), self.split_rows("spike_in")])
        return self.X_pca[np.searchsorted(scored, rows)]

    def subset_unit(self, subset: Subset) -> Unit:
        """Rows of a subset."""
        sketch = {"sketch": self.sketch_unit.key} if sampling.STRATEGIES[subset.strategy].by == "X_pca" else {}
        record = {**asdict(subset), "nested": self.params.nested, "split": self.split_unit.key, **sketch}
        return Unit("subset", record, (f"{HERE}:_make_subset",))

    @cache  # noqa: B019
    def rows(self, subset: Subset) -> np.ndarray:
        """Sorted rows of the corpus that a subset takes; none for `untrained`."""
        if subset.untrained:
            return np.empty(0, np.int64)
        artifact = self.store.find_or_make(self.subset_unit(subset), lambda folder: self._make_subset(subset, folder))
        return _mapped(artifact.folder / "rows.npy")

    def _make_subset(self, subset: Subset, folder: Path) -> None:
        strategy, pretraining = sampling.STRATEGIES[subset.strategy], self.split_rows("pretraining")
        seed = subset.seed if self.params.nested else (subset.seed, round(subset.percentage * 1e6))
        of_cells = {
            "n_cells": lambda: len(pretraining),
            "cell_type": lambda: self.pretraining_cells.obs["cell_type"].array,
            "X_pca": lambda: self.X_pca[: len(pretraining)],
        }
        rows = pretraining[strategy.choose(of_cells[strategy.by](), subset.percentage, seed=seed)]
        if strategy.spiked:
            perturbed = self.split_rows("spike_in")
            kept, spiked = sampling.spike_in(len(rows), len(perturbed), strategy.spiked, seed=seed)
            rows = np.union1d(rows[kept], perturbed[spiked])
        np.save(folder / "rows.npy", rows)


def _mapped(path: Path) -> np.ndarray:
    """An array that stays in its file: rows of every subset of an atlas would take gigabytes."""
    return np.load(path, mmap_mode="r", allow_pickle=False)

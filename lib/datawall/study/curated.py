"""The curated data of a study: its corpus, split, evaluation sets and subsets, each made once and found again."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from datawall.cells import cellstore, datasets, duplicates, expression, sampling
from datawall.cells.cellstore import Cells
from datawall.engine import code, store
from datawall.engine.store import Artifact, Unit
from datawall.study import assembly, joining
from datawall.study.params import Params

HERE, ASSEMBLY = map(code.module_name, (__name__, assembly.__name__))
KEPT = 2**28  # bytes of evaluation data sets that a process keeps beside the one it works on


@dataclass(frozen=True)
class Subset:
    """Cells chosen from the corpus by a strategy; `untrained` chooses none."""

    strategy: str
    percentage: float
    seed: int


class Curated:
    """What a study works on.

    Parameters
    ----------
    parameters
        The checked study file.
    folder
        The run folder, where all that is made goes.
    """

    def __init__(self, parameters: Params, folder: Path) -> None:
        self.params = parameters
        self.folder = folder
        self.store = store.Store(folder / "store", parameters.storage)
        self._obs: dict[str, pd.DataFrame] = {}  # labels of evaluation data sets
        self._in_memory: dict[str, ad.AnnData] = {}  # evaluation data sets, the one last used last

    def subsets(self) -> list[Subset]:
        """Every subset of the corpus."""
        return [Subset(*subset) for subset in self.params.subsets() if subset[0] != "untrained"]

    @property
    def held_out_name(self) -> str:
        """Name of the data set made of the corpus's held-out cells."""
        return self.params.held_out_name

    def first_dataset(self, task: str) -> str:
        """The data set by which a task is told: the held-out cells or, if they do not join it, the first that does."""
        return next(iter(self.joined(task)), self.params.held_out_name)

    def joined(self, task: str) -> list[str]:
        """Data sets that a task is judged on; until they have been read, all whose columns allow it."""
        apart = self.not_judged(task)
        return [name for name, one in self.params.evaluation_sets().items() if one.joins(task) and name not in apart]

    def not_judged(self, task: str) -> dict[str, str]:
        """Data sets, read before, whose columns allow a task and whose cells do not, and why."""
        sets = {name: one for name, one in self.params.evaluation_sets().items() if one.joins(task)}
        read = {name: obs for name in sets if (obs := self._labels(name)) is not None}
        why = {name: joining.unfit(task, obs, sets[name], self.params) for name, obs in read.items()}
        return {name: of for name, of in why.items() if of}

    def _labels(self, name: str) -> pd.DataFrame | None:
        """`obs` of an evaluation data set; None if that has not been made."""
        if name not in self._obs and self.store.folder.is_dir():
            with suppress(datasets.DatasetError):  # a file that is not there, of a study that is planned
                if self.store.find(self.dataset_unit(name)) and self.store.find(self.corpus_unit):
                    self._obs[name] = self._read_obs(name)
        return self._obs.get(name)

    def _read_obs(self, name: str) -> pd.DataFrame:
        if name == self.held_out_name:
            return self.held_out_cells.obs
        with h5py.File(self.dataset_artifact(name).folder / "cells.h5ad") as file:
            return ad.io.read_elem(file["obs"])

    @cached_property
    def corpus_unit(self) -> Unit:
        """The aligned corpus, with its labels."""
        return Unit("corpus", assembly.identity(self.params), (f"{HERE}:corpus_artifact", ASSEMBLY))

    @cached_property
    def split_unit(self) -> Unit:
        """Which cells of the corpus are pretrained on, and which are held out."""
        p = self.params
        drop = [self.contamination_unit(one.dataset).key for one in p.evaluation] if p.drop_contaminated else []
        drawn = {"held_out": p.held_out, "by": p.split_by, "seed": p.split_seed}
        record = {"corpus": self.corpus_unit.key, **drawn, "drop": drop}
        return Unit("split", record, (f"{HERE}:_make_split", ASSEMBLY))

    @cache  # noqa: B019 - every key asks for it, and a folder's files take long to look through
    def dataset_unit(self, name: str) -> Unit:
        """An evaluation data set, its genes in the corpus's order."""
        if name == self.held_out_name:
            return self.split_unit
        p, one = self.params, self.params.evaluation_sets()[name]
        record = {
            "dataset": datasets.identity(one.file, one.source),
            "corpus": self.corpus_unit.key,
            "min_matched_genes": p.min_matched_genes,
            "columns": assembly.dataset_columns(p, name),
            "labels": p.labels,
        }
        return Unit("dataset", record, (f"{HERE}:dataset_artifact", ASSEMBLY))

    def contamination_unit(self, name: str) -> Unit:
        """What an evaluation data set shares with the corpus; held-out cells, with those that are pretrained on."""
        within = self.split_unit if name == self.held_out_name else self.corpus_unit
        record = {"dataset": self.dataset_unit(name).key, "cells": within.key}
        return Unit("contamination", record, (f"{HERE}:contamination", ASSEMBLY))

    @cached_property
    def corpus_artifact(self) -> Artifact:
        """The corpus on disk (see `assembly.make_corpus`)."""

        def make(folder: Path) -> None:
            assembly.make_corpus(self.params, folder)
            joining.check_contexts(self.params, cellstore.open(folder / cellstore.NAME).obs["cell_type"].unique())

        return self.store.find_or_make(self.corpus_unit, make)

    @cached_property
    def corpus(self) -> Cells:
        """The corpus, on disk: counts by row, genes by Ensembl id, `obs` with cell_type and what else is known.

        Raises
        ------
        datawall.cells.corpus.CorpusError
            If the data set breaks a rule of `corpus.align`, or lacks a column that the study names.
        """
        cells = cellstore.open(self.corpus_artifact.folder / cellstore.NAME)
        joining.check_contexts(self.params, cells.obs["cell_type"].unique())
        return cells

    def split_rows(self, part: str) -> np.ndarray:
        """Sorted rows of the corpus of a part: `pretraining`, `held_out`, or `spike_in`."""
        if part == "spike_in":
            return _mapped(self.corpus_artifact.folder / "spike_in.npy")
        return _mapped(self.dataset_artifact(self.held_out_name).folder / f"{part}.npy")

    @cached_property
    def pretraining_cells(self) -> Cells:
        """The cells that models may be pretrained on, spiked-in ones apart."""
        return self.corpus.take(self.split_rows("pretraining"))

    @property
    def held_out_cells(self) -> Cells:
        """The corpus's held-out cells, on disk; `dataset` has them in memory."""
        return self.corpus.take(self.split_rows("held_out"))

    def dataset(self, name: str) -> ad.AnnData:
        """An evaluation data set: counts in the corpus's gene order, `obs["cell_type"]` and what else is known.

        Those asked for before stay in memory, the latest first, as far as `KEPT` goes.
        """
        if name in self._in_memory:
            self._in_memory[name] = self._in_memory.pop(name)
            return self._in_memory[name]
        while sum(map(sys.getsizeof, self._in_memory.values())) > KEPT:
            del self._in_memory[next(iter(self._in_memory))]
        self._in_memory[name] = self._read_dataset(name)
        return self._in_memory[name]

    def _read_dataset(self, name: str) -> ad.AnnData:
        if name == self.held_out_name:
            return self.held_out_cells.to_memory()
        return ad.read_h5ad(self.dataset_artifact(name).folder / "cells.h5ad")

    def dataset_artifact(self, name: str) -> Artifact:
        """An evaluation data set on disk (see `assembly.make_dataset`); of held-out cells, the split."""
        if name == self.held_out_name:
            return self.store.find_or_make(self.split_unit, self._make_split)
        return self.store.find_or_make(
            self.dataset_unit(name),
            lambda folder: assembly.make_dataset(self.params, name, self.corpus.var, folder),
        )

    def contamination(self, name: str) -> duplicates.Contamination:
        """What an evaluation data set shares with the corpus; rows count in the corpus."""

        def make(folder: Path) -> None:
            if name == self.held_out_name:
                everything = np.ones(self.corpus.n_vars, bool)
                found = assembly.contamination(self.held_out_cells, everything, self.pretraining_cells)
            else:
                measured = np.load(self.dataset_artifact(name).folder / "measured.npy")
                found = assembly.contamination(self.dataset(name), measured, self.corpus)
            found.write(folder)

        return duplicates.Contamination.read(self.store.find_or_make(self.contamination_unit(name), make).folder)

    @cached_property
    def response_genes(self) -> np.ndarray:
        """(n_genes,) bool: the genes whose response is predicted, the most variable among the pretraining cells."""
        return expression.streamed_variable_genes(self.pretraining_cells.count_blocks, self.params.perturbation_genes)

    def _make_split(self, folder: Path) -> None:
        p = self.params
        names = [one.dataset for one in p.evaluation] if p.drop_contaminated else []
        found = [self.contamination(name).rows_to_drop() for name in names]
        dropped = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
        assembly.make_split(p, self.corpus, self.split_rows("spike_in"), dropped, folder)

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
            expression.streamed_pca(
                self.pretraining_cells.count_blocks, folder / "X_pca.npy", then=spike_in.count_blocks
            )

        return np.load(self.store.find_or_make(self.sketch_unit, make).folder / "X_pca.npy", mmap_mode="r")

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
        if subset.strategy == "untrained":
            return np.empty(0, np.int64)
        artifact = self.store.find_or_make(self.subset_unit(subset), lambda folder: self._make_subset(subset, folder))
        return _mapped(artifact.folder / "rows.npy")

    def _make_subset(self, subset: Subset, folder: Path) -> None:
        percentage, seed = subset.percentage, subset.seed
        if not self.params.nested:
            seed = (seed, round(percentage * 1e6))
        strategy, pretraining = sampling.STRATEGIES[subset.strategy], self.split_rows("pretraining")
        of_cells = {
            "n_cells": lambda: len(pretraining),
            "cell_type": lambda: self.pretraining_cells.obs["cell_type"].array,
            "X_pca": lambda: self.X_pca[: len(pretraining)],
        }
        rows = pretraining[strategy.choose(of_cells[strategy.by](), percentage, seed=seed)]
        if strategy.spiked:
            perturbed = self.split_rows("spike_in")
            kept, spiked = sampling.spike_in(len(rows), len(perturbed), strategy.spiked, seed=seed)
            rows = np.union1d(rows[kept], perturbed[spiked])
        np.save(folder / "rows.npy", rows)


def _mapped(path: Path) -> np.ndarray:
    """Rows that stay in their file: those of every subset of an atlas would take gigabytes."""
    return np.load(path, mmap_mode="r", allow_pickle=False)

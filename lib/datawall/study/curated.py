"""The curated data of a study: its corpus, split, evaluation sets and subsets, each made once and found again."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from datawall.cells import cellstore, datasets, duplicates, expression, sampling
from datawall.cells.cellstore import Cells
from datawall.cells.corpus import CorpusError
from datawall.cells.duplicates import Contamination
from datawall.engine import store
from datawall.engine.store import Artifact, Unit
from datawall.study import assembly, joining
from datawall.study.params import Params
from datawall.study.units import Subset

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
        sets, apart = self.params.evaluation_sets(), self.not_judged(task)
        return [name for name, dataset in sets.items() if dataset.joins(task) and name not in apart]

    def not_judged(self, task: str) -> dict[str, str]:
        """Data sets, read before, whose columns allow a task and whose cells do not, and why."""
        sets = {name: dataset for name, dataset in self.params.evaluation_sets().items() if dataset.joins(task)}
        read = {name: obs for name in sets if (obs := self.labels(name)) is not None}
        why = {name: joining.unfit(task, obs, sets[name], self.params) for name, obs in read.items()}
        return {name: reason for name, reason in why.items() if reason}

    def labels(self, name: str) -> pd.DataFrame | None:
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
        return Unit("corpus", assembly.identity(self.params), ("study/curated:corpus_artifact", "study/assembly"))

    @cached_property
    def corpus_artifact(self) -> Artifact:
        """The corpus on disk (see `assembly.make_corpus`)."""
        return self.store.find_or_make(self.corpus_unit, partial(assembly.make_corpus, self.params))

    @cached_property
    def corpus(self) -> Cells:
        """The corpus, on disk: counts by row, genes by Ensembl id, `obs` with cell_type and what else is known.

        Raises CorpusError if a source breaks a rule, or lacks a column that the study names.
        """
        cells = cellstore.Cells(self.corpus_artifact.folder / cellstore.NAME)
        joining.check_contexts(self.params, cells.obs["cell_type"].unique())
        return cells

    @cached_property
    def split_unit(self) -> Unit:
        """Which cells of the corpus are pretrained on, and which are held out."""
        p = self.params
        record = {"corpus": self.corpus_unit.key, "held_out": p.held_out, "by": p.split_by, "seed": p.split_seed}
        record["drop"] = [self.contamination_unit(each.dataset).key for each in p.evaluation if p.drop_contaminated]
        return Unit("split", record, ("study/curated:_make_split", "study/assembly"))

    def _make_split(self, folder: Path) -> None:
        """Write the sorted rows of the corpus that may be pretrained on and those held out, spiked-in cells apart."""
        p, rows = self.params, np.setdiff1d(np.arange(self.corpus.n_obs), self.split_rows("spike_in"))
        held_out = assembly.held_out(p, self.corpus.obs.iloc[rows])
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
        record = p.model_dump(include={"min_matched_genes", "labels"}) | {"corpus": self.corpus_unit.key}
        record |= {"dataset": datasets.identity(dataset.file, dataset.source)}
        record |= {"columns": assembly.dataset_columns(p, name)}
        return Unit("dataset", record, ("study/curated:dataset_artifact", "study/assembly"))

    def dataset_artifact(self, name: str) -> Artifact:
        """An evaluation data set on disk (see `assembly.make_dataset`); of held-out cells, the split."""
        if name == self.held_out_name:
            return self.store.find_or_make(self.split_unit, self._make_split)
        make = partial(assembly.make_dataset, self.params, name)
        return self.store.find_or_make(self.dataset_unit(name), lambda folder: make(self.corpus.var, folder))

    def dataset(self, name: str) -> ad.AnnData:
        """An evaluation data set: counts in the corpus's gene order, `obs` with cell_type and what else is known."""
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
        return Unit("contamination", record, ("study/curated:contamination",))

    def contamination(self, name: str) -> Contamination:
        """What an evaluation data set shares with the corpus, whose rows count: equal cells, and donors of one name.

        Cells are compared by the genes that the data set has, in blocks, at 36 bytes a cell of the evaluation set.
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
        return Unit("sketch", {"split": self.split_unit.key}, ("study/curated:X_pca",))

    @cached_property
    def X_pca(self) -> np.ndarray:  # noqa: N802 - AnnData's name for it
        """Principal component scores, (n_cells, 50), a memory map: of pretraining cells, then of those to spike in."""

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
        return Unit("subset", record, ("study/curated:_make_subset",))

    def cells(self, subset: Subset) -> Cells:
        """The cells of a subset, on disk: those of the corpus or, of a strategy that thins counts, a copy."""
        rows = self.rows(subset)
        thinned = self.store.find(self.subset_unit(subset)).folder / cellstore.NAME
        return Cells(thinned) if thinned.is_dir() else self.corpus.take(rows)

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
            "n_genes": lambda: self.pretraining_cells.genes_detected,
        }
        rows = pretraining[strategy.choose(of_cells[strategy.by](), subset.percentage, seed=seed)]
        if strategy.spiked:
            perturbed = self.split_rows("spike_in")
            kept, spiked = sampling.spike_in(len(rows), len(perturbed), strategy.spiked, seed=seed)
            rows = np.union1d(rows[kept], perturbed[spiked])
        if strategy.depth < 1:
            cells, rng = self.corpus.take(rows), np.random.default_rng([subset.seed, 2])
            cellstore.write(folder, cells.to_blocks(lambda counts: sampling.thin(counts, strategy.depth, rng)))
        np.save(folder / "rows.npy", rows)


def _mapped(path: Path) -> np.ndarray:
    """An array that stays in its file: rows of every subset of an atlas would take gigabytes."""
    return np.load(path, mmap_mode="r", allow_pickle=False)

"""Subsets of a study's corpus, and the sketch that some are chosen by: keys, making and reading."""

from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np

from datawall.cells import cellstore, expression, sampling
from datawall.engine.store import Unit
from datawall.study.dataset import WithDatasets
from datawall.study.records import Subset


class WithSubsets(WithDatasets):
    """A study with its subsets: rows of the corpus, whose matrix is never copied."""

    def subsets(self) -> list[Subset]:
        """Every subset of the corpus."""
        return [subset for subset in self.params.subsets() if not subset.untrained]

    def subset_unit(self, subset: Subset) -> Unit:
        """Rows of a subset."""
        sketch = {"sketch": self.sketch_unit.key} if sampling.STRATEGIES[subset.strategy].by == "X_pca" else {}
        record = {**asdict(subset), "nested": self.params.nested, "split": self.split_unit.key, **sketch}
        return Unit("subset", record, ("study/subset",))

    def make_subset(self, subset: Subset, folder: Path) -> None:
        """Choose a subset's cells among those that are pretrained on: their rows; of a strategy that thins, a copy."""
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

    @cache  # noqa: B019
    def rows(self, subset: Subset) -> np.ndarray:
        """Sorted rows of the corpus that a subset takes; none for `untrained`."""
        if subset.untrained:
            return np.empty(0, np.int64)
        made = self.store.find_or_make(self.subset_unit(subset), partial(self.make_subset, subset))
        return np.load(made.folder / "rows.npy", mmap_mode="r")

    def cells(self, subset: Subset) -> cellstore.Cells:
        """The cells of a subset, on disk: those of the corpus or, of a strategy that thins counts, a copy."""
        rows = self.rows(subset)
        thinned = self.store.find(self.subset_unit(subset)).folder / cellstore.NAME
        return cellstore.Cells(thinned) if thinned.is_dir() else self.corpus.take(rows)

    @cached_property
    def sketch_unit(self) -> Unit:
        """Principal components of the pretraining cells, for geometric sketching and for diversity."""
        return Unit("sketch", {"split": self.split_unit.key}, ("study/subset",))

    def make_sketch(self, folder: Path) -> None:
        """Write the principal component scores of pretraining cells, then of those to spike in, at constant memory."""
        spike_in = self.corpus.take(self.split_rows("spike_in"))
        path = folder / "X_pca.npy"
        expression.streamed_pca(self.pretraining_cells.count_blocks, path, then=spike_in.count_blocks)

    @cached_property
    def X_pca(self) -> np.ndarray:  # noqa: N802 - AnnData's name for it
        """Principal component scores, (n_cells, 50), a memory map: of pretraining cells, then of those to spike in."""
        return np.load(self.store.find_or_make(self.sketch_unit, self.make_sketch).folder / "X_pca.npy", mmap_mode="r")

    def pca_scores(self, rows: np.ndarray) -> np.ndarray:
        """Principal component scores of rows of the corpus that a subset takes."""
        scored = np.concatenate([self.split_rows("pretraining"), self.split_rows("spike_in")])
        return self.X_pca[np.searchsorted(scored, rows)]

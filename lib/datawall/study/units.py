"""The records of a study's units of work: what is to be made, by its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from datawall.study.curated import Subset
from datawall.study.params import Embedding


@dataclass(frozen=True)
class Run:
    """A model to pretrain on a subset; its seed is the subset's."""

    model: str
    subset: Subset
    budget: float = 1.0  # share of the model's steps


type Source = Run | Embedding | str  # of an embedding; a string names a baseline


@dataclass(frozen=True)
class Layout:
    """A picture of an embedding: some cells of a data set in two dimensions."""

    source: Source
    dataset: str
    n_cells: int


@dataclass(frozen=True)
class Evaluation:
    """A task on a data set, for a pretraining run, an embedding from a file, or a baseline (its name)."""

    task: str
    dataset: str
    source: Source

    @property
    def seed(self) -> int:
        """Of heads: that of the run."""
        if isinstance(self.source, Run):
            return self.source.subset.seed
        return (self.source.seed or 0) if isinstance(self.source, Embedding) else 0

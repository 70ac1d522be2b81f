"""What every model family can do, and how models lie on disk (safetensors and JSON, never pickles)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from datawall.cells import expression
from datawall.cells.cellstore import Cells
from datawall.engine import disk
from datawall.models import training
from datawall.models.hyperparameters import Hyperparameters, check
from datawall.models.training import History

CONFIG, TENSORS = "model.json", "model.safetensors"
HELD_OUT = 500  # cells at most that choose the best weights
LOOKS = 10  # at their loss in the budget, at least


class Model(Protocol):
    """A model family. `counts` are raw counts, cells by genes in the corpus's gene order, CSR."""

    def fit(
        self,
        counts: sp.csr_matrix | Cells,
        obs: pd.DataFrame,
        *,
        steps: int,
        seed: int,
        init_seed: int | None = None,
        checkpoint: Path | None = None,
    ) -> History | None:
        """Pretrain on a subset; the history is None for a model that takes no optimiser steps.

        Parameters
        ----------
        counts, obs
            The subset's cells, in memory or on disk; of `obs`, a family says which columns it reads.
        steps
            Optimiser steps: the budget.
        seed, init_seed
            Of the training, and of the initial weights; by default one and the same.
        checkpoint
            See `training.train`.
        """

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Become the control that has seen no cell: random weights, and no statistics of any data."""

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Embedding of cells, (n_cells, n_latent) float32."""

    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Pretraining loss of cells in evaluation mode; random by torch's global generator."""

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """The loss of a model that knows of each cell what the cells have in common, and no more."""

    def save(self, folder: Path) -> None:
        """Write the model into a folder."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a model that `save` wrote; it gives the same embeddings bit for bit."""


class Network:
    """A family whose weights are one torch module over a panel of genes: its life apart from `fit` and `embed`.

    The panel is the `n_genes` most variable genes of the subset itself, or all genes. A subclass names itself
    (`family`) and makes its module (`network`).

    Parameters
    ----------
    hyperparameters
        See the family in `hyperparameters`; its defaults are used for those not given.
    """

    family: ClassVar[str]

    def __init__(self, **hyperparameters: Any) -> None:
        self.hyperparameters = check(self.family, hyperparameters)
        self.n_genes: int | None = None  # of the corpus
        self.genes: np.ndarray | None = None  # (n_panel,) positions in the corpus of the panel's genes
        self.module: nn.Module | None = None

    def network(self, n_genes: int) -> nn.Module:
        """The module for a number of genes, with random weights."""
        raise NotImplementedError

    def build(self, n_genes: int, seed: int, panel: np.ndarray | None = None) -> nn.Module:
        """Make the module for a panel, or all genes, with initial weights from a seed, on the device, to evaluate."""
        self.n_genes, self.genes = n_genes, np.arange(n_genes) if panel is None else panel
        self.module = training.seeded(lambda: self.network(len(self.genes)), seed).eval()
        return self.module

    def of_panel(self, X: sp.csr_matrix) -> sp.csr_matrix:
        """The columns of the panel, (n_cells, n_panel), of a matrix over the corpus's genes."""
        return X if len(self.genes) == X.shape[1] else X[:, self.genes]

    def ready(self, counts: sp.csr_matrix) -> nn.Module:
        """The module, if there is one and it was made for these genes."""
        if self.module is None:
            raise NotFittedError(self.family)
        check_genes(counts, self.n_genes, self.family)
        return self.module

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Random weights, over all genes: a panel would be learned from cells."""
        self.build(n_genes, seed)
        return self

    def save(self, folder: Path) -> None:
        """Write panel, weights and hyper-parameters."""
        if self.module is None:
            raise NotFittedError(self.family)
        weights = {f"module.{name}": weight.cpu().numpy() for name, weight in self.module.state_dict().items()}
        arrays = {"n_genes": np.array([self.n_genes]), "genes": self.genes, **weights}
        write(Path(folder), self.family, self.hyperparameters, arrays)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a saved model."""
        hyperparameters, arrays = read(Path(folder))
        model = cls(**hyperparameters)
        model.build(int(arrays.pop("n_genes")[0]), 0, arrays.pop("genes"))
        model.module.load_state_dict(
            {name.removeprefix("module."): torch.from_numpy(array) for name, array in arrays.items()}
        )
        return model


def choose_panel(counts: sp.csr_matrix | Cells, n_genes: int | None) -> np.ndarray:
    """Sorted positions of the `n_genes` most variable genes of a subset, or for None of all genes."""
    if n_genes is None:
        return np.arange(counts.shape[1])
    if isinstance(counts, Cells):
        return np.flatnonzero(expression.streamed_variable_genes(counts.count_blocks, n_genes))
    return np.flatnonzero(expression.variable_genes(expression.lognormalise(counts), n_genes))


def hold_out(
    model: Any, counts: sp.csr_matrix | Cells, obs: pd.DataFrame | None, rows: np.ndarray, *, seed: int
) -> tuple[np.ndarray, Callable[[], float] | None]:
    """Divide a subset into cells to train on and, with `keep="best"`, cells that choose which weights are kept.

    The latter are a tenth, at least one cell and at most 500, drawn by the seed; a subset of one cell serves as both.

    Parameters
    ----------
    model
        With hyper-parameters (`keep`) and a loss of cells (`heldout_loss`).
    counts, obs
        The subset; `obs` where the loss reads it.
    rows
        Its cells that can be trained on.

    Returns
    -------
    rows to train on, and the loss of the others in evaluation mode; None with `keep="last"`, which trains on all.
    """
    if model.hyperparameters.keep == "last" or not len(rows):
        return rows, None
    rows = np.random.default_rng([seed, 1]).permutation(rows)
    n_held = min(HELD_OUT, max(1, len(rows) // 10))
    held = np.sort(rows[:n_held])
    X, of_held = counts[held], None if obs is None else obs.iloc[held]

    def loss() -> float:
        torch.manual_seed(0)  # the same masks at every look; the next step has its own seed
        return model.heldout_loss(X, of_held)

    return rows[n_held:] if len(rows) > 1 else rows, loss


def check_genes(counts: sp.csr_matrix, n_genes: int, family: str) -> None:
    """Refuse counts over another number of genes than the model was made for.

    Raises
    ------
    ValueError
        Naming both numbers.
    """
    if counts.shape[1] != n_genes:
        raise ValueError(
            f"{family}: counts have {counts.shape[1]} genes, the model {n_genes}; align them to its corpus."
        )


def variance(lognormalised: sp.csr_matrix) -> float:
    """Squared difference from the gene's mean, averaged over all cells and genes: the error of the mean cell."""
    X = lognormalised.astype(np.float64)
    mean = np.asarray(X.mean(axis=0)).ravel()
    return float(X.multiply(X).mean() - np.square(mean).mean())


def write(folder: Path, family: str, hyperparameters: Hyperparameters, tensors: dict[str, np.ndarray]) -> None:
    """Write a model's hyper-parameters and arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / TENSORS)
    disk.write_json(folder / CONFIG, {"family": family, "hyperparameters": hyperparameters.model_dump()})


def read_config(folder: Path) -> dict[str, Any]:
    """The family and hyper-parameters of a saved model.

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model ({CONFIG} is missing).")
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hyper-parameters and arrays of a saved model."""
    return read_config(folder)["hyperparameters"], load_file(folder / TENSORS)


class NotFittedError(RuntimeError):
    """The model must be fitted, loaded or made untrained before it can embed or be saved."""

    def __init__(self, family: str) -> None:
        super().__init__(f"this {family} has no weights yet; call fit, untrained or load first.")

"""What every model family can do, and how models lie on disk (safetensors and JSON, never pickles)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from datawall import store, training
from datawall.cellstore import Cells
from datawall.hyperparameters import Hyperparameters, check
from datawall.training import History

CONFIG, TENSORS = "model.json", "model.safetensors"


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
    """A family whose weights are one torch module over all genes of the corpus: its life apart from `fit` and `embed`.

    A subclass names itself (`family`) and makes its module (`network`).

    Parameters
    ----------
    hyperparameters
        See the family in `hyperparameters`; its defaults are used for those not given.
    """

    family: ClassVar[str]

    def __init__(self, **hyperparameters: Any) -> None:
        self.hyperparameters = check(self.family, hyperparameters)
        self.n_genes: int | None = None
        self.module: nn.Module | None = None

    def network(self, n_genes: int) -> nn.Module:
        """The module for a number of genes, with random weights."""
        raise NotImplementedError

    def build(self, n_genes: int, seed: int) -> nn.Module:
        """Make the module with initial weights from a seed, on the device, in evaluation mode."""
        self.n_genes = n_genes
        self.module = training.seeded(lambda: self.network(n_genes), seed).eval()
        return self.module

    def ready(self, counts: sp.csr_matrix) -> nn.Module:
        """The module, if there is one and it was made for these genes."""
        if self.module is None:
            raise NotFittedError(self.family)
        check_genes(counts, self.n_genes, self.family)
        return self.module

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Random weights."""
        self.build(n_genes, seed)
        return self

    def save(self, folder: Path) -> None:
        """Write weights and hyper-parameters."""
        if self.module is None:
            raise NotFittedError(self.family)
        weights = {f"module.{name}": weight.cpu().numpy() for name, weight in self.module.state_dict().items()}
        write(Path(folder), self.family, self.hyperparameters, {"n_genes": np.array([self.n_genes]), **weights})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a saved model."""
        hyperparameters, arrays = read(Path(folder))
        model = cls(**hyperparameters)
        model.build(int(arrays.pop("n_genes")[0]), seed=0)
        model.module.load_state_dict(
            {name.removeprefix("module."): torch.from_numpy(array) for name, array in arrays.items()}
        )
        return model


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
    store.write_json(folder / CONFIG, {"family": family, "hyperparameters": hyperparameters.model_dump()})


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

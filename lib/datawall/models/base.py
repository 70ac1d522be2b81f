"""What every model family can do, and how models lie on disk (safetensors and JSON, never pickles)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from datawall import store
from datawall.hyperparameters import Hyperparameters
from datawall.training import History

CONFIG, TENSORS = "model.json", "model.safetensors"


class Model(Protocol):
    """A model family. `counts` are raw counts, cells by genes in the corpus's gene order, CSR."""

    def fit(
        self, counts: sp.csr_matrix, obs: pd.DataFrame, *, steps: int, seed: int, progress: str | None = None
    ) -> History | None:
        """Pretrain on a subset; the history is None for a model that takes no optimiser steps."""

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Become the control that has seen no cell: random weights, and no statistics of any data."""

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Embedding of cells, (n_cells, n_latent) float32."""

    def save(self, folder: Path) -> None:
        """Write the model into a folder."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a model that `save` wrote; it gives the same embeddings bit for bit."""


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
    return json.loads((folder / CONFIG).read_text())


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hyper-parameters and arrays of a saved model."""
    return read_config(folder)["hyperparameters"], load_file(folder / TENSORS)


class NotFittedError(RuntimeError):
    """The model must be fitted, loaded or made untrained before it can embed or be saved."""

    def __init__(self, family: str) -> None:
        super().__init__(f"this {family} has no weights yet; call fit, untrained or load first.")

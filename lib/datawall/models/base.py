"""What every model family can do, and how models lie on disk (safetensors and JSON, never pickles)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from datawall.cells import expression
from datawall.engine import disk
from datawall.models import streaming, training

if TYPE_CHECKING:
    from datawall.cells.cellstore import Cells
    from datawall.models.hyperparameters import Hyperparameters

CONFIG, TENSORS = "model.json", "model.safetensors"
HELD_OUT = 250  # cells at most that choose the best weights
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
    ) -> training.History | None:
        """Pretrain on a subset, in memory or on disk; the history is None if the model takes no optimiser steps.

        Of `obs`, a family says which columns it reads. `seed` is that of the training, and of the initial weights too
        unless these have `init_seed`; for `checkpoint` see `training.train`. Raises ValueError if the family can learn
        from no cell, `training.NonFiniteLossError` if training diverges.
        """

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Become the control that has seen no cell: random weights, and no statistics of any data."""

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        """Embedding of cells, (n_cells, n_latent) float32."""

    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Pretraining loss of cells in evaluation mode; random by torch's global generator."""

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """The loss of a guess that is the same for every cell: the mean cell, or how frequent genes or types are."""

    def save(self, folder: Path) -> None:
        """Write the model into a folder."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a model that `save` wrote; on a CPU it gives the same embeddings bit for bit."""


class Network:
    """A family whose weights are one torch module over a panel of genes, and whose hyper-parameters are a record.

    The panel is the `n_genes` most variable genes of the subset itself, or all genes. A subclass names itself, makes
    its module (`network`), and says what this reads (`prepare`) and how it learns (`objective`, `course`).
    """

    family: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]] = ()  # names of arrays that a model learns beside its weights

    def __init__(self, **hyperparameters: Any) -> None:
        from datawall.models.hyperparameters import check

        self.hyperparameters = check(self.family, hyperparameters)
        self.n_genes: int | None = None  # of the corpus
        self.genes: np.ndarray | None = None  # (n_panel,) positions in the corpus of the panel's genes
        self.module: nn.Module | None = None

    def network(self, n_genes: int) -> nn.Module:
        """The module for a number of genes, with random weights."""
        raise NotImplementedError

    def prepare(self, counts: sp.csr_matrix) -> Any:
        """What the module reads of raw counts over the corpus's genes, each cell on its own; indexed by cell."""
        raise NotImplementedError

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        """The loss of a batch, as `training.train` takes it; `n_cells` are trained on."""
        raise NotImplementedError

    def course(self, steps: int, n_cells: int) -> dict[str, Any]:
        """What the family's `training.Recipe` has beside its budget and what are hyper-parameters by the same name."""
        return {}

    def learn_statistics(self, counts: sp.csr_matrix | Cells) -> np.ndarray:
        """Take from the subset what the family keeps of it beside weights; gives the rows that can be learned from."""
        return np.arange(counts.shape[0])

    def batches(self, rows: np.ndarray, obs: pd.DataFrame, steps: int, seed: int) -> Iterable[np.ndarray]:
        """Rows of each step's batch."""
        return training.minibatches(rows, self.hyperparameters.batch_size, steps, seed=seed)

    def fit(
        self,
        counts: sp.csr_matrix | Cells,
        obs: pd.DataFrame,
        *,
        steps: int,
        seed: int,
        init_seed: int | None = None,
        checkpoint: Path | None = None,
    ) -> training.History:
        h = self.hyperparameters
        self.build(counts.shape[1], seed if init_seed is None else init_seed, choose_panel(counts, h.n_genes))
        learned, validation_loss = hold_out(self, counts, obs, self.learn_statistics(counts), seed=seed)
        recipe = training.Recipe(
            steps=steps,
            validate_every=max(1, steps // LOOKS),
            **h.model_dump(include={"batch_size", "learning_rate", "warmup", "weight_decay", "clip_norm"}),
            **self.course(steps, len(learned)),
        )
        return training.train(
            self.module,
            self.objective(obs, recipe, len(learned)),
            len(learned),
            recipe,
            seed=seed,
            batches=self.batches(learned, obs, steps, seed),
            load=streaming.loader(counts, self.prepare, h.batch_size),
            validation_loss=validation_loss,
            checkpoint=checkpoint,
        )

    def build(self, n_genes: int, seed: int, panel: np.ndarray | None = None) -> nn.Module:
        """Make the module for a panel, or all genes, with initial weights from a seed, on the device, to evaluate."""
        self.n_genes, self.genes = n_genes, np.arange(n_genes) if panel is None else panel
        self.module = training.seeded(lambda: self.network(len(self.genes)), seed).eval()
        return self.module

    def select_panel(self, X: sp.csr_matrix) -> sp.csr_matrix:
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
        if self.module is None:
            raise NotFittedError(self.family)
        arrays = {"n_genes": np.array([self.n_genes]), "genes": self.genes}
        arrays |= {name: getattr(self, name) for name in self.statistics}
        arrays |= {f"module.{name}": weight.cpu().numpy() for name, weight in self.module.state_dict().items()}
        write(Path(folder), self.family, self.hyperparameters, arrays)

    @classmethod
    def load(cls, folder: Path) -> Self:
        hyperparameters, arrays = read(Path(folder))
        model = cls(**hyperparameters)
        model.build(int(arrays.pop("n_genes")[0]), 0, arrays.pop("genes"))
        for name in cls.statistics:
            setattr(model, name, arrays.pop(name))
        model.module.load_state_dict(
            {name.removeprefix("module."): torch.from_numpy(array) for name, array in arrays.items()}
        )
        return model


def choose_panel(counts: sp.csr_matrix | Cells, n_genes: int | None) -> np.ndarray:
    """Sorted positions of the `n_genes` most variable genes of a subset, or for None of all genes."""
    if n_genes is None:
        return np.arange(counts.shape[1])
    if not sp.issparse(counts):
        return np.flatnonzero(expression.streamed_variable_genes(counts.count_blocks, n_genes))
    return np.flatnonzero(expression.variable_genes(expression.lognormalise(counts), n_genes))


def hold_out(
    model: Network, counts: sp.csr_matrix | Cells, obs: pd.DataFrame | None, rows: np.ndarray, *, seed: int
) -> tuple[np.ndarray, Callable[[], float] | None]:
    """Rows of a subset to train on, and the loss, in evaluation mode, of the others, by which weights are kept.

    The others are a tenth, at least one cell and at most 250, drawn by the seed; a subset of one cell serves as both.
    With `keep="last"` there are none, and no loss.
    """
    if model.hyperparameters.keep == "last" or not len(rows):
        return rows, None
    rows = np.random.default_rng([seed, 1]).permutation(rows)
    n_held = min(HELD_OUT, max(1, len(rows) // 10))
    held = np.sort(rows[:n_held])
    held_counts, held_obs = counts[held], None if obs is None else obs.iloc[held]

    def loss() -> float:
        torch.manual_seed(0)  # the same masks at every look; the next step has its own seed
        return model.heldout_loss(held_counts, held_obs)

    return rows[n_held:] if len(rows) > 1 else rows, loss


def check_genes(counts: sp.csr_matrix, n_genes: int, family: str) -> None:
    """Refuse counts over another number of genes than the model was made for."""
    if counts.shape[1] != n_genes:
        raise ValueError(f"{family}: counts have {counts.shape[1]} genes, the model {n_genes}; align them.")


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
    """The family and hyper-parameters of a saved model; raises FileNotFoundError where there is none."""
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

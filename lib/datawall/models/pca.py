"""PretrainedPCA: principal axes of the pretraining cells' variable genes, applied to any cell."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells import expression
from datawall.cells.cellstore import Cells
from datawall.models import base
from datawall.models.hyperparameters import check


class PretrainedPCA:
    """Principal component analysis as a pretrained model (DenAdel et al. 2026).

    Counts are normalised to 10,000 a cell and log-transformed; genes variable among the pretraining cells (scanpy's
    default cut-offs) are centred and decomposed. The embedding is the product with the axes, not centred, which no
    distance sees. `fit` is exact: steps, seeds and checkpoints are of no use to it.
    """

    def __init__(self, **hyperparameters: Any) -> None:
        self.hyperparameters = check("PretrainedPCA", hyperparameters)
        self.axes: np.ndarray | None = None  # (n_components, n_genes), zero for genes that are not variable

    def fit(self, counts: sp.csr_matrix | Cells, obs: pd.DataFrame, **_: Any) -> None:
        n_components = self.hyperparameters.n_components
        if isinstance(counts, Cells):
            variable = expression.streamed_variable_genes(counts.count_blocks)
            axes, *_ = expression.streamed_axes(counts.count_blocks, variable, n_components)
        else:
            X = expression.lognormalise(counts)
            variable = expression.variable_genes(X)
            axes, _ = expression.principal_axes(X[:, variable], n_components)
        self.axes = np.zeros((len(axes), counts.shape[1]), dtype=np.float32)
        self.axes[:, variable] = axes

    def untrained(self, n_genes: int, *, seed: int) -> Self:
        """Axes drawn from a standard normal distribution: a random projection."""
        rng = np.random.default_rng(seed)
        self.axes = rng.standard_normal((self.hyperparameters.n_components, n_genes)).astype(np.float32)
        return self

    def embed(self, counts: sp.csr_matrix) -> np.ndarray:
        return np.asarray(self._expression(counts) @ self.axes.T, dtype=np.float32)

    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """Squared error per entry of log-normalised expression, centred and put back together from the axes."""
        X = self._expression(counts)
        scores = X @ np.linalg.qr(self.axes.T.astype(np.float64))[0]
        explained = np.square(scores - scores.mean(axis=0)).sum()
        return base.variance(X) - float(explained) / np.prod(X.shape)

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        return base.variance(expression.lognormalise(counts))

    def save(self, folder: Path) -> None:
        if self.axes is None:
            raise base.NotFittedError("PretrainedPCA")
        base.write(Path(folder), "PretrainedPCA", self.hyperparameters, {"axes": self.axes})

    @classmethod
    def load(cls, folder: Path) -> Self:
        hyperparameters, tensors = base.read(Path(folder))
        model = cls(**hyperparameters)
        model.axes = tensors["axes"]
        return model

    def _expression(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        if self.axes is None:
            raise base.NotFittedError("PretrainedPCA")
        base.check_genes(counts, self.axes.shape[1], "PretrainedPCA")
        return expression.lognormalise(counts)

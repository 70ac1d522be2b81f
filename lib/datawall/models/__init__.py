"""The model families by name: create one, or load a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datawall.hyperparameters import check
from datawall.models.base import Model, read_config
from datawall.models.geneformer import Geneformer
from datawall.models.pca import PretrainedPCA

FAMILIES: dict[str, type[Model]] = {"PretrainedPCA": PretrainedPCA, "Geneformer": Geneformer}


def create(name: str, **hyperparameters: Any) -> Model:
    """A new model of a family, not yet fitted.

    Raises
    ------
    ValueError
        If the family, a hyper-parameter or its value is not allowed.
    """
    check(name, hyperparameters)
    return FAMILIES[name](**hyperparameters)


def load(folder: str | Path) -> Model:
    """A model saved with `save`.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    """
    return FAMILIES[read_config(Path(folder))["family"]].load(Path(folder))

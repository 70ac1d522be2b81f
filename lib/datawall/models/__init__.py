"""The model families by name: create one, or load a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
    if name not in FAMILIES:
        raise ValueError(f"unknown model {name!r}; the families are {', '.join(FAMILIES)}.")
    try:
        return FAMILIES[name](**hyperparameters)
    except ValidationError as error:
        mistakes = (f"{mistake['loc'][0]} {mistake['input']!r}: {mistake['msg']}" for mistake in error.errors())
        raise ValueError(f"{name}: {'; '.join(mistakes)}. Its class lists its hyper-parameters.") from None


def load(folder: str | Path) -> Model:
    """A model saved with `save`.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    """
    return FAMILIES[read_config(Path(folder))["family"]].load(Path(folder))

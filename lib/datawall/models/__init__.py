"""The model families by name: create one, or load a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datawall.hyperparameters import check, family
from datawall.models.base import Model, read_config
from datawall.models.geneformer import Geneformer
from datawall.models.pca import PretrainedPCA
from datawall.models.scimilarity import SCimilarity
from datawall.models.scvi import ScVI
from datawall.models.ssl import SSL

FAMILIES: dict[str, type[Model]] = {
    "PretrainedPCA": PretrainedPCA,
    "scVI": ScVI,
    "SSL": SSL,
    "Geneformer": Geneformer,
    "SCimilarity": SCimilarity,
}


def create(name: str, **hyperparameters: Any) -> Model:
    """A new model, not yet fitted.

    Parameters
    ----------
    name
        A family, or a variant of one (`hyperparameters.VARIANTS`, say `scvi_2x`).
    hyperparameters
        Those that differ from the family's or variant's own.

    Raises
    ------
    ValueError
        If there is no such model, or a hyper-parameter or its value is not allowed.
    """
    return FAMILIES[family(name)](**check(name, hyperparameters).model_dump())


def load(folder: str | Path) -> Model:
    """A model saved with `save`.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    """
    return FAMILIES[read_config(Path(folder))["family"]].load(Path(folder))

"""The model families by name: each makes, trains, saves and reads its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datawall.models import external
from datawall.models.base import Model, read_config
from datawall.models.geneformer import Geneformer
from datawall.models.hyperparameters import check, family
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


def model_class(name: str) -> type[Model]:
    """The class of a model: of its family, or the user's own."""
    return external.model_class(name) if external.is_external(name) else FAMILIES[family(name)]


def create(name: str, **hyperparameters: Any) -> Model:
    """A new model, not yet fitted.

    Parameters
    ----------
    name
        A family, a variant of one (`hyperparameters.VARIANTS`, say `scvi_2x`), or the user's own (`module:Class`).
    hyperparameters
        Those that differ from the family's or variant's own.

    Raises
    ------
    ValueError
        If there is no such model, or a hyper-parameter or its value is not allowed.
    """
    return model_class(name)(**check(name, hyperparameters).model_dump())


def load(folder: str | Path) -> Model:
    """Read a model of a family that `save` wrote, whichever it is; `model_class` reads one of the user's own."""
    return FAMILIES[read_config(Path(folder))["family"]].load(Path(folder))

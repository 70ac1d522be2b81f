"""What is pretrained: one file a family, which `hyperparameters` lists, tokens, networks, and the one training loop.

Serves notebook 2. May import `cells` and `engine`. Loads when first named, as most of it needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datawall.engine import lazy

if TYPE_CHECKING:
    from datawall.models.base import Model

__getattr__, _lazy_names = lazy.attach(
    __name__,
    {
        "Geneformer": "datawall.models.geneformer:Geneformer",
        "Model": "datawall.models.base:Model",
        "ModelSpec": "datawall.models.hyperparameters:ModelSpec",
        "PretrainedPCA": "datawall.models.pca:PretrainedPCA",
        "SCimilarity": "datawall.models.scimilarity:SCimilarity",
        "SSL": "datawall.models.ssl:SSL",
        "ScVI": "datawall.models.scvi:ScVI",
        "resolve": "datawall.models.hyperparameters:resolve",
    },
)


def __dir__() -> list[str]:
    return sorted([*_lazy_names(), "create", "load"])


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
    from datawall.models.hyperparameters import resolve

    return resolve(name, {name: hyperparameters}).create()


def load(folder: str | Path) -> Model:
    """Read a model of a family that `save` wrote, whichever it is; `ModelSpec.load` reads one of the user's own too."""
    from datawall.models.base import read_config
    from datawall.models.hyperparameters import resolve

    return resolve(read_config(Path(folder))["family"]).load(Path(folder))

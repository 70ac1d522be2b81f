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
    """A new model, not yet fitted; ValueError if there is no such model or hyper-parameter, or not such a value.

    `name` is a family, a variant of one (`hyperparameters.VARIANTS`, say `scvi_2x`), or the user's own, `module:Class`;
    the hyper-parameters are those that differ from the family's or variant's own.
    """
    from datawall.models.hyperparameters import resolve

    return resolve(name, {name: hyperparameters}).create()


def load(folder: str | Path) -> Model:
    """Read a model that `save` wrote, of any family; one of the user's own is read by its class."""
    from datawall.models.base import read_config
    from datawall.models.hyperparameters import resolve

    return resolve(read_config(Path(folder))["family"]).model_class.load(Path(folder))

"""What is pretrained: one file a family, which `families` lists, their tokens and networks, and the one training loop.

Serves notebook 2. May import `cells` and `engine`. Loads when first named, as most of it needs torch.
"""

from importlib import import_module
from typing import Any

_CLASSES = ("Geneformer", "Model", "PretrainedPCA", "SCimilarity", "SSL", "ScVI")
_OF_FAMILIES = (*_CLASSES, "FAMILIES", "create", "load", "model_class")


def __getattr__(name: str) -> Any:
    if name in _OF_FAMILIES:
        return getattr(import_module("datawall.models.families"), name)
    try:
        return import_module(f"datawall.models.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"datawall.models.{name}":
            raise
        raise AttributeError(f"module 'datawall.models' has no attribute {name!r}") from None

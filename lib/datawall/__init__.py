"""A study of how much pretraining data, and how diverse, a single-cell foundation model needs.

Eight packages, each of which may import from those after it: `reading`, `planning`, `study`, `analysis`, `tasks`,
`models`, `cells`, `engine`. What is for users has a short name here (`dw.sampling`, `dw.open_study`, …) and loads when
first named, so that `import datawall` costs nothing.
"""

import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# annbatch would have bars as widgets; the bars here are text, and come without them.
warnings.filterwarnings("ignore", message="IProgress not found")

_MODULES = {
    "cells": ("annotation", "corpus", "datasets", "diversity", "sampling", "simulate", "sources"),
    "models": ("external", "hyperparameters", "tokenizer", "training", "transformer"),
    "analysis": (
        *("adaptive", "effects", "foresight", "known_answer", "power", "published", "results", "saturation", "scaling"),
        "verdicts",
    ),
    "study": ("curated", "curation", "evaluation", "params"),
    "engine": ("code", "paths", "store"),
    "reading": ("messages", "plots", "plots_published"),
}
# The module that each public name is, or is in.
PLACES = {name: f"datawall.{package}.{name}" for package, names in _MODULES.items() for name in names}
PLACES |= {"models": "datawall.models", "tasks": "datawall.tasks"}  # packages that are for users themselves
PLACES |= dict.fromkeys(("Study", "open_study"), "datawall.study.study")
PLACES |= {"read_results": "datawall.analysis.results"}
__all__ = sorted(PLACES)


def __getattr__(name: str) -> Any:
    if place := PLACES.get(name):
        module = import_module(place)
        return module if place.endswith(f".{name}") else getattr(module, name)
    raise AttributeError(f"module 'datawall' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

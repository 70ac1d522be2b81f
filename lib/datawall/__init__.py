"""A study of how much pretraining data, and how diverse, a single-cell foundation model needs.

Eight packages, each of which may import from those after it: `reading`, `planning`, `study`, `analysis`, `tasks`,
`models`, `cells`, `engine`. What is for users has a short name here (`dw.sampling`, `dw.open_study`, …) and loads when
first named, so that `import datawall` costs nothing.
"""

import warnings

from datawall.engine import lazy

__version__ = "0.2.0"

# annbatch would have bars as widgets; the bars here are text, and come without them.
warnings.filterwarnings("ignore", message="IProgress not found")

_MODULES = {
    "cells": ("annotation", "corpus", "datasets", "diversity", "sampling", "simulate", "sources"),
    "models": ("external", "hyperparameters", "tokenizer", "training", "transformer"),
    "analysis": (
        *("adaptive", "effects", "known_answer", "power", "published", "results", "saturation", "scaling"),
        *("verdicts", "walls"),
    ),
    "study": ("curation", "evaluation", "params", "questions"),
    "engine": ("code", "paths", "store"),
    "reading": ("titles",),
}
# Where each public name is: a module, or what is in one after a colon.
PLACES = {name: f"datawall.{package}.{name}" for package, names in _MODULES.items() for name in names}
PLACES |= {"models": "datawall.models", "tasks": "datawall.tasks", "plots": "datawall.reading.plots"}
PLACES |= {
    "Study": "datawall.study.study:Study",
    "Subset": "datawall.study.records:Subset",
    "open_study": "datawall.study.study:open_study",
    "read_results": "datawall.analysis.results:read_results",
}
__all__ = sorted(PLACES)
__getattr__, __dir__ = lazy.attach(__name__, PLACES)

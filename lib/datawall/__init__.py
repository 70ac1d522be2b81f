"""A study of how much pretraining data, and how diverse, a single-cell foundation model needs.

Submodules load when first named (`dw.sampling`, `dw.models`, …), so that `import datawall` costs nothing.
"""

import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# annbatch would have bars as widgets; the bars here are text, and come without them.
warnings.filterwarnings("ignore", message="IProgress not found")

_FUNCTIONS = {"open_study": "study", "read_results": "results"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(f"datawall.{_FUNCTIONS[name]}"), name)
    try:
        return import_module(f"datawall.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"datawall.{name}":
            raise
        raise AttributeError(f"module 'datawall' has no attribute {name!r}") from None

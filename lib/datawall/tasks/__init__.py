"""The evaluation tasks: each takes arrays and labels, knows no model, and returns metrics by name.

Tasks load when first named, since some need torch and one needs jax.
"""

from importlib import import_module
from typing import Any

HEADLINE = {
    "zeroshot_classification": "micro_f1",
    "zeroshot_integration": "avg_bio",
    "finetuned_classification": "micro_f1",
    "perturbation_response": "pearson_r",
}  # the metric by which the original study judges each task

_MODULES = {
    "zeroshot_classification": "classification",
    "zeroshot_integration": "integration",
    "finetuned_classification": "finetuning",
    "perturbation_response": "perturbation",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"datawall.tasks.{_MODULES[name]}"), name)
    if name in _MODULES.values():
        return import_module(f"datawall.tasks.{name}")
    raise AttributeError(f"module 'datawall.tasks' has no attribute {name!r}")

"""How embeddings are judged: each task takes arrays and labels, knows no model, and returns metrics by name.

Serves notebooks 3 to 6. May import `models`, `cells` and `engine`. Tasks load when first named, since some need torch.
What each metric means, its best value and the level of chance are listed in `metrics.csv` beside this page.
"""

from importlib import import_module
from importlib.resources import files
from typing import Any

# Not when first named: a module that is loaded later would take the name from its function.
from datawall.tasks.reconstruction import reconstruction as reconstruction

# A task and the module of the function of that name; a line here adds one.
TASKS = {
    "zeroshot_classification": "classification",
    "zeroshot_integration": "integration",
    "finetuned_classification": "finetuning",
    "perturbation_response": "perturbation",
    "reconstruction": "reconstruction",
}
HEADLINE = {
    "zeroshot_classification": "micro_f1",
    "zeroshot_integration": "avg_bio",
    "finetuned_classification": "micro_f1",
    "perturbation_response": "pearson_r",
    "reconstruction": "explained",
}  # the metric by which the original study judges each task; it had no reconstruction of all families


def metrics_table() -> Any:
    """Every metric of every task.

    Returns
    -------
    table with the columns metric (of a metric by type or number of neighbours, that part is left out: `f1[]`,
    `knn_micro_f1`), task, definition, best, direction (`higher`, `lower`, or `none`), chance, version (counts up when
    a metric changes its meaning or a mistake in it is mended) and source.
    """
    import pandas as pd

    return pd.read_csv(files("datawall.tasks") / "metrics.csv", keep_default_na=False)


def registered(metric: str) -> str:
    """The name under which a metric stands in `metrics.csv`: `f1[]` for `f1[B cell]`, `knn_micro_f1` for k = 15."""
    import re

    return re.sub(r"^knn\d+_", "knn_", re.sub(r"(?s)\[.*\]\Z", "[]", metric))


def __getattr__(name: str) -> Any:
    if name in TASKS:
        return getattr(import_module(f"datawall.tasks.{TASKS[name]}"), name)
    try:
        return import_module(f"datawall.tasks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"datawall.tasks.{name}":
            raise
        raise AttributeError(f"module 'datawall.tasks' has no attribute {name!r}") from None

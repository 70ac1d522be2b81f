"""How embeddings are judged: each task takes arrays and labels, knows no model, and returns metrics by name.

Serves notebooks 3 to 6. May import `models`, `cells` and `engine`. Tasks load when first named, since some need torch.
What each metric means, its best value and the level of chance are listed in `metrics.csv` beside this page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from datawall.engine import lazy
from datawall.tasks.baselines import EMBEDDINGS


@dataclass(frozen=True)
class Task:
    """What the library knows of a task."""

    name: str
    module: str  # of this package, which has the function of the task's name
    headline: str | None = None  # the metric that decides: the original study's, where it has the task
    needs: tuple[str, ...] = ()  # keys of a study file, for the columns that are needed beside the cell type
    baselines: tuple[str, ...] = tuple(EMBEDDINGS)  # what models are compared with
    judges: Literal["embeddings", "models"] = "embeddings"
    repeated: Literal["once", "by split", "by context"] = "once"  # on a data set

    @property
    def function(self) -> Callable[..., dict[str, float]]:
        """What computes its metrics."""
        return getattr(import_module(f"{__name__}.{self.module}"), self.name)


TASKS = {
    task.name: task
    for task in (
        Task("zeroshot_classification", "classification", "micro_f1", repeated="by split"),
        Task("zeroshot_integration", "integration", "avg_bio", needs=("batch_key",)),
        Task(
            "finetuned_classification", "finetuning", "micro_f1", baselines=("LogisticRegression",), repeated="by split"
        ),
        Task(
            name="perturbation_response",
            module="perturbation",
            headline="pearson_r",
            needs=("perturbation_key", "control"),
            baselines=("NoChange", "MeanShift", "TreatedMean", "Oracle"),
            repeated="by context",
        ),
        Task("reconstruction", "pretraining_loss", "explained", baselines=(), judges="models"),
    )
}  # by name; a line here adds one
HEADLINE = {task.name: task.headline for task in TASKS.values() if task.headline}

__getattr__, __dir__ = lazy.attach(
    __name__,
    {task.name: f"{__name__}.{task.module}:{task.name}" for task in TASKS.values()}
    | {name: f"{__name__}.metrics:{name}" for name in ("metrics_table", "registered")},
)

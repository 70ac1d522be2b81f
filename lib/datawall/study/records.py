"""The records that a study is made of: data sets, subsets, pretraining runs, embeddings and evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from datawall import tasks
from datawall.cells.sampling import STRATEGIES
from datawall.models import external, hyperparameters

UNTRAINED = "untrained"  # the strategy that draws no cell


def _once_each[Value](values: list[Value]) -> list[Value]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]!r} is listed twice; list it once")
    return values


def _known_model(name: str) -> str:
    if hyperparameters.resolve(name).is_external:
        external.source_file(name)
    return name


StrategyName = Literal[*STRATEGIES, UNTRAINED]
TaskName = Literal[*tasks.TASKS]
Name = Annotated[str, Field(min_length=1)]
type Some[T] = Annotated[list[T], Field(min_length=1), AfterValidator(_once_each)]
ModelName = Annotated[str, AfterValidator(_known_model)]
Percentage = Annotated[float, Field(gt=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Treatments = Annotated[int, Field(ge=1)] | Some[str]


class Part(BaseModel):
    """A mapping in a study file; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Grid(Part):
    """Runs besides those of the study's grid: a grid of their own, in which what is not given is as in the study."""

    name: Name  # in the plan
    strategies: Some[StrategyName] | None = None
    percentages: Some[Percentage] | None = None
    seeds: Some[Seed] | None = None
    models: Some[ModelName] | None = None


class BudgetCheck(Part):
    """Runs of the study's own with other budgets, by default half and twice the steps: whether these limit them."""

    percentages: Some[Percentage]  # of random subsets
    seeds: Some[Seed]
    budgets: Some[Annotated[float, Field(gt=0)]] = [0.5, 2.0]  # shares of a model's steps

    @field_validator("budgets")
    @classmethod
    def _twice_is_asked(cls, budgets: list[float]) -> list[float]:
        if 1.0 in budgets:
            raise ValueError("1.0 is the budget of the study's own runs; leave it out")
        if 2.0 not in budgets:
            raise ValueError("2.0 is not among them, and what twice the steps gain says whether steps limit a curve")
        return budgets


class EvaluationSet(Part):
    """A data set to evaluate on, and its columns. It joins the tasks whose columns it names itself."""

    # Path of an .h5ad or .zarr file, a named data set, or cells of the simulated atlas beyond the corpus: simulated:6-9
    file: str
    name: Name | None = None  # in results; by default that of the file
    cell_type_key: Name | None = None  # by default the study's
    donor_key: Name | None = None  # by default the study's, if the data set has it
    batch_key: Name | None = None  # for integration
    perturbation_key: Name | None = None  # for perturbation response, together with
    control: str | None = None  # its value that means untreated
    treatments: Treatments | None = None  # as in the study, by default the study's
    held_out_contexts: list[str] | None = None  # as in the study
    tasks: list[TaskName] | None = None  # of the study's, those it joins; by default all that its columns allow
    source: str | None = None  # where to get the file, for people
    n_cells: Annotated[int, Field(ge=1)] | None = None  # of a file that is not there yet, for the plan

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given

    @model_serializer
    def _as_given(self) -> str | dict[str, Any]:
        given = {key: value for key, value in self if value is not None}
        return self.file if list(given) == ["file"] else given

    @property
    def dataset(self) -> str:
        """Its name in results."""
        return self.name or Path(self.file).stem

    def joins(self, task: str) -> bool:
        """Whether it has what a task needs, and is meant for it."""
        return (self.tasks is None or task in self.tasks) and not self.lacks(task)

    def lacks(self, task: str) -> list[str]:
        """Keys that a task needs and that are not named."""
        return [key for key in tasks.TASKS[task].needs if getattr(self, key) is None]


@dataclass(frozen=True)
class Subset:
    """Cells chosen from the corpus by a strategy; `untrained` chooses none."""

    strategy: str
    percentage: float
    seed: int

    @property
    def untrained(self) -> bool:
        """Whether it has no cells."""
        return self.strategy == UNTRAINED


@dataclass(frozen=True)
class Run:
    """A model to pretrain on a subset; its seed is the subset's."""

    model: str
    subset: Subset
    budget: float = 1.0  # share of the model's steps


class Embedding(Part):
    """An embedding of an evaluation data set that was made elsewhere: by a published checkpoint, or on a subset."""

    model: Name  # in results
    dataset: str  # name of the evaluation data set
    file: str  # an .h5ad file with its cells, matched by name,
    key: str | None = None  # and the embedding in obsm; by default "X_" and the model
    strategy: StrategyName | None = None  # of the subset that it was pretrained on: one of the study's,
    percentage: Annotated[float, Field(ge=0, le=100)] | None = None  # or all three left out for a checkpoint
    seed: Seed | None = None

    @model_validator(mode="after")
    def _complete_subset(self) -> Self:
        if 0 < [self.strategy, self.percentage, self.seed].count(None) < 3:
            raise ValueError("strategy, percentage and seed name a subset together; give all three, or none")
        external.embeddings_file(self.file)
        return self

    @property
    def obsm_key(self) -> str:
        """Key of the embedding in `obsm`."""
        return self.key or f"X_{self.model}"

    @property
    def subset(self) -> Subset | None:
        """The subset that the model was pretrained on; None of a checkpoint."""
        return None if self.strategy is None else Subset(self.strategy, self.percentage, self.seed)


type Source = Run | Embedding | str  # of an embedding; a string names a baseline


@dataclass(frozen=True)
class Evaluation:
    """A task on a data set, for a pretraining run, an embedding from a file, or a baseline (its name)."""

    task: str
    dataset: str
    source: Source

    @property
    def seed(self) -> int:
        """Seed of heads: that of the run; 0 of a baseline and of a checkpoint."""
        subset = None if isinstance(self.source, str) else self.source.subset
        return subset.seed if subset else 0

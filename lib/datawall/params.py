"""The study file: what a study is, checked before anything is done, with one clear message per mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from datawall import hyperparameters
from datawall.hyperparameters import Schedule
from datawall.simulate import Atlas

STRATEGIES = ("random", "celltype_reweighted", "geometric_sketching", "untrained")
TASKS = ("zeroshot_classification", "zeroshot_integration", "finetuned_classification", "perturbation_response")

Strategy = Literal["random", "celltype_reweighted", "geometric_sketching", "untrained"]
Task = Literal["zeroshot_classification", "zeroshot_integration", "finetuned_classification", "perturbation_response"]
Percentage = Annotated[float, Field(gt=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ParamsError(ValueError):
    """A study file breaks a rule; each line of the message names file, key, value, rule and remedy."""


class Params(BaseModel):
    """A study, complete. Keys are those of the study file; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names the run folder
    corpus: str = "kang2018"  # a named data set, `simulated`, or the path of an .h5ad
    simulation: Atlas | None = None  # settings of the corpus `simulated`; what is not given is as in `Atlas`
    cell_type_key: str = "cell_type"  # columns of obs: the label of a cell,
    batch_key: str | None = None  # its batch, for integration,
    perturbation_key: str | None = None  # and its treatment, for perturbation response
    control: str | None = None  # the value of perturbation_key that means untreated
    min_matched_genes: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of a data set's genes in the gene table
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.3  # share of the corpus kept for evaluation
    evaluation: list[str] = []  # more evaluation data sets: names or paths

    strategies: Annotated[list[Strategy], Field(min_length=1)]
    percentages: Annotated[list[Percentage], Field(min_length=1)]  # of the pretraining cells
    seeds: Annotated[list[Seed], Field(min_length=1)]

    models: Annotated[list[str], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]  # optimiser steps of every pretraining run, whatever its subset's size
    budget: Schedule = "steps"  # how schedules are counted; "epochs" is the original's confounded way
    init_seed: Seed | None = None  # of every model's initial weights; by default the subset's seed
    hyperparameters: dict[str, dict[str, Any]] = {}  # by model; what is not given is as in the original study

    tasks: Annotated[list[Task], Field(min_length=1)] = list(TASKS)
    k: Annotated[int, Field(ge=1)] = 5  # neighbours of zero-shot classification
    splits: Annotated[int, Field(ge=1)] = 5  # repeats of its 50/50 split
    held_out_contexts: list[str] | None = None  # cell types to hold out of perturbation response; all by default
    perturbation_genes: Annotated[int, Field(ge=1)] = 2000  # most variable genes whose response is predicted

    workers: Annotated[int, Field(ge=1)] | None = None  # processes side by side; by default one per core, or GPU

    @field_validator("strategies", "percentages", "seeds", "models", "tasks", "evaluation")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value!r} is listed twice; list it once")
        return values

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("corpus") == "simulated" and values.get("simulation") is None:
            return {**values, "simulation": {}}
        return values

    @model_validator(mode="after")
    def _agree(self) -> Params:
        for key, names in (("models", self.models), ("hyperparameters", self.hyperparameters)):
            try:
                for name in names:
                    hyperparameters.family(name)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        try:
            for name in [*self.models, *self.hyperparameters]:
                self.hyperparameters_of(name)
        except ValueError as error:
            raise ValueError(f"hyperparameters: {error}") from None
        if self.simulation is not None and self.corpus != "simulated":
            raise ValueError(
                f"simulation: the corpus is {self.corpus!r}; set `corpus: simulated`, or leave simulation out (null)"
            )
        if "simulated" in self.evaluation:
            raise ValueError(
                "evaluation: `simulated` can be the corpus only, whose held-out cells are evaluated on; leave it out"
            )
        if "zeroshot_integration" in self.tasks and self.batch_key is None:
            raise ValueError(
                "zeroshot_integration needs batch_key: name the batch column, or leave the task out of tasks"
            )
        if "perturbation_response" in self.tasks and None in (self.perturbation_key, self.control):
            raise ValueError(
                "perturbation_response needs perturbation_key and control: name them, or leave the task out of tasks"
            )
        if not self.subsets():
            raise ValueError("no subset: only `random` is drawn at 100 %; add `random` or a smaller percentage")
        return self

    def hyperparameters_of(self, model: str) -> hyperparameters.Hyperparameters:
        """Hyper-parameters of a model: the study's for its family, what its variant changes, the study's for itself.

        Raises
        ------
        ValueError
            If one is not allowed.
        """
        family = hyperparameters.family(model)
        schedule = {"schedule": self.budget} if "schedule" in hyperparameters.FAMILIES[family].model_fields else {}
        variant = hyperparameters.VARIANTS[model][1] if model in hyperparameters.VARIANTS else {}
        given = self.hyperparameters
        return hyperparameters.check(model, {**schedule, **given.get(family, {}), **variant, **given.get(model, {})})

    def subsets(self) -> list[tuple[str, float, int]]:
        """Strategy, percentage and seed of every subset; the whole corpus is drawn by `random` alone."""
        return [
            (strategy, percentage, seed)
            for strategy in self.strategies
            for percentage in ([0.0] if strategy == "untrained" else sorted(self.percentages))
            for seed in self.seeds
            if strategy in ("random", "untrained") or percentage < 100
        ]


def read(path: Path, overrides: dict[str, Any] | None = None) -> Params:
    """Read and check a study file.

    Parameters
    ----------
    path
        A YAML file with one level of keys.
    overrides
        Values that replace those of the file, by key.

    Raises
    ------
    ParamsError
        If the file is not a YAML mapping, or a key or value is not allowed; one line per mistake.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ParamsError(
            f"{path.name}: holds a {type(values).__name__}; a study file is a mapping, `key: value` a line."
        )
    return check({**values, **{key: _from_text(value) for key, value in (overrides or {}).items()}}, path.name)


def _from_text(value: Any) -> Any:
    """The list or mapping that a text spells: `papermill -p seeds "[0, 1]"` hands lists over as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def check(values: dict[str, Any], source: str) -> Params:
    """Check the values of a study; `source` names their origin in messages.

    Raises
    ------
    ParamsError
        One line per mistake.
    """
    try:
        return Params(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ParamsError("\n".join(_line(source, mistake) for mistake in error.errors())) from None


def _line(source: str, mistake: dict[str, Any]) -> str:
    """One line that names file, key, value, rule and remedy."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"{source}: {key}: no such key; {_nearest(key)}"
    if mistake["type"] == "missing":
        return f"{source}: {key}: missing; every study needs it."
    rule = mistake["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {rule.rstrip('.')}."
    rule = rule[0].lower() + rule[1:]
    return f"{source}: {key}: {mistake['input']!r} is not allowed: {rule}; change it in the study file or with --set."


def _nearest(key: str) -> str:
    """A hint at the key that was meant."""
    from difflib import get_close_matches

    within, _, name = key.rpartition(".")
    keys = Atlas.model_fields if within == "simulation" else Params.model_fields
    if near := get_close_matches(name, keys, n=1):
        return f"did you mean {near[0]!r}?"
    return f"the keys are {', '.join(keys)}."

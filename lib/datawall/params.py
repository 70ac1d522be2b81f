"""The study file: what a study is, checked before anything is done, with one clear message per mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from datawall import hyperparameters
from datawall.backed import SUFFIXES
from datawall.census import Recipe
from datawall.hyperparameters import Schedule
from datawall.simulate import Atlas

TASKS = ("zeroshot_classification", "zeroshot_integration", "finetuned_classification", "perturbation_response")
CLUSTERS = "leiden"  # as cell_type_key: the corpus has no labels, and is clustered

Strategy = Literal["random", "celltype_reweighted", "geometric_sketching", "spikein_10", "spikein_50", "untrained"]
Task = Literal["zeroshot_classification", "zeroshot_integration", "finetuned_classification", "perturbation_response"]
Key = Annotated[str, Field(min_length=1)] | dict[str, str]  # a column of obs; where files differ, by name of the file
Percentage = Annotated[float, Field(gt=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ParamsError(ValueError):
    """A study file breaks a rule; each line of the message names file, key, value, rule and remedy."""


class Params(BaseModel):
    """A study, complete. Keys are those of the study file; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names the run folder
    # A named data set, paths of .h5ad or .zarr files (one, or a list), `simulated` or `census`
    corpus: str | Annotated[list[str], Field(min_length=1)] = "kang2018"
    simulation: Atlas | None = None  # of the corpus `simulated`; what is not given is as in `simulate.Atlas`
    census: Recipe | None = None  # of the corpus `census`; what is not given is as in `census.Recipe`
    cell_type_key: Key = "cell_type"  # columns of obs: the label of a cell, or `leiden` for clusters in its place,
    batch_key: Key | None = None  # its batch, for integration,
    perturbation_key: Key | None = None  # its treatment, for perturbation response,
    donor_key: Key | None = None  # and its donor
    control: str | None = None  # the value of perturbation_key that means untreated
    min_matched_genes: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of a data set's genes in the gene table
    min_genes: Annotated[int, Field(ge=0)] = 0  # of a cell of the corpus's files, or it is left out,
    min_counts: Annotated[int, Field(ge=0)] = 0  # the sum of its counts,
    max_mito: Annotated[float, Field(ge=0, le=1)] = 1.0  # and their greatest share in mitochondrial genes
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.3  # share of the corpus kept for evaluation
    split_by: Literal["cell", "donor_id"] = "cell"  # whether whole donors are held out
    evaluation: list[str] = []  # more evaluation data sets: names or paths
    drop_contaminated: bool = False  # leave cells and donors of evaluation data sets out of pretraining
    spike_in: str | None = None  # perturbed cells for the strategies spikein_10 and spikein_50: a name or path

    strategies: Annotated[list[Strategy], Field(min_length=1)]
    percentages: Annotated[list[Percentage], Field(min_length=1)]  # of the pretraining cells
    seeds: Annotated[list[Seed], Field(min_length=1)]
    nested: bool = False  # whether a smaller subset lies within the larger of its seed, for comparison in pairs

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

    memory_gib: Annotated[float, Field(ge=0)] = 4.0  # a subset that takes more is streamed from the disk in training
    executor: Annotated[str, Field(pattern=r"^(local|slurm|(tcp|tls)://\S+)$")] = (
        "local"  # where units run: `cluster.py`
    )
    workers: Annotated[int, Field(ge=1)] | None = None  # processes side by side, or Slurm jobs; one per core, or GPU
    gpus: dict[str, Annotated[int, Field(ge=1)]] = {}  # by model: how many GPUs pretrain one together, if not one
    retries: Annotated[int, Field(ge=0)] = 1  # how often a unit that fails is begun again
    time_limit: Annotated[float, Field(gt=0)] | None = 86_400.0  # seconds after which a unit is taken to hang

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
        """Give a corpus made by settings all of its defaults."""
        for corpus, key in (("simulated", "simulation"), ("census", "census")):
            if values.get("corpus") == corpus and values.get(key) is None:
                values = {**values, key: {}}
        return values

    @model_validator(mode="after")
    def _agree(self) -> Params:
        for key in ("models", "hyperparameters", "gpus"):
            try:
                for name in getattr(self, key):
                    hyperparameters.family(name)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        try:
            for name in [*self.models, *self.hyperparameters]:
                self.hyperparameters_of(name)
        except ValueError as error:
            raise ValueError(f"hyperparameters: {error}") from None
        self._check_sources()
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

    def _check_sources(self) -> None:
        """Refuse settings of a corpus that the study does not have."""
        for corpus, key in (("simulated", "simulation"), ("census", "census")):
            if getattr(self, key) is not None and self.corpus != corpus:
                raise ValueError(f"{key}: the corpus is {self.corpus!r}; set `corpus: {corpus}`, or leave {key} out")
            if corpus in (*self.evaluation, self.spike_in):
                raise ValueError(
                    f"{corpus!r} can be the corpus only; name data sets or files to evaluate on or spike in"
                )
        files = all(name.endswith(SUFFIXES) for name in self.sources())
        if len(self.sources()) > 1 and not files:
            raise ValueError(f"corpus: {self.corpus} names several; only .h5ad and .zarr files can be joined")
        if not files and (self.min_genes > 0 or self.min_counts > 0 or self.max_mito < 1):
            raise ValueError("min_genes, min_counts and max_mito filter cells of files; leave them out for this corpus")
        if self.split_by == "donor_id" and self.donor_key is None:
            raise ValueError("split_by: donor_id needs donor_key: name the column, or split by cell")
        if self.spike_in is None and any(strategy.startswith("spikein") for strategy in self.strategies):
            raise ValueError("a spikein strategy needs spike_in: name perturbed cells, or leave the strategy out")

    def sources(self) -> list[str]:
        """Names of what the corpus is made of."""
        return [self.corpus] if isinstance(self.corpus, str) else self.corpus

    @property
    def clusters(self) -> bool:
        """Whether clusters stand in for labels."""
        return self.cell_type_key == CLUSTERS

    def key(self, role: str, dataset: str) -> str | None:
        """Column of a data set for a role of `columns`; None where the study names none, but for the cell type."""
        key = self.columns().get(role, "cell_type" if role == "cell_type" else None)
        return key.get(Path(dataset).stem, role) if isinstance(key, dict) else key

    def columns(self) -> dict[str, Key]:
        """Columns of the corpus by role."""
        cell_type = None if self.clusters else self.cell_type_key
        keys = {"cell_type": cell_type, "batch": self.batch_key, "perturbation": self.perturbation_key}
        return {role: key for role, key in {**keys, "donor_id": self.donor_key}.items() if key}

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
            if percentage < 100 or strategy in ("random", "untrained")
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
    keys = {"simulation": Atlas, "census": Recipe}.get(within, Params).model_fields
    if near := get_close_matches(name, keys, n=1):
        return f"did you mean {near[0]!r}?"
    return f"the keys are {', '.join(keys)}."

"""The study file: what a study is, checked before anything is done, with one clear message per mistake."""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from datawall import tasks
from datawall.cells import simulate
from datawall.cells.backed import names_file
from datawall.cells.census import Recipe
from datawall.cells.sampling import STRATEGIES
from datawall.cells.simulate import Atlas
from datawall.models import hyperparameters
from datawall.models.hyperparameters import ModelSpec, Schedule
from datawall.study import records
from datawall.study.records import ModelName, Name, Percentage, Seed, Some, StrategyName, TaskName, Treatments

EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")  # a number in YAML 1.2
# Columns of the corpus, and the keys that name them.
ROLES = {"cell_type": "cell_type_key", "batch": "batch_key"}
ROLES |= {"perturbation": "perturbation_key", "donor_id": "donor_key"}
CLUSTERS = "leiden"  # as cell_type_key: the corpus has no labels, and is clustered
MADE = {"simulated": "simulation", "census": "census"}  # corpora made by settings, and the keys of these
RECORDS = {"simulation": Atlas, "census": Recipe, "also": records.Grid}  # keys whose values are records
RECORDS |= {"evaluation": records.EvaluationSet, "embeddings": records.Embedding, "budget_check": records.BudgetCheck}

Key = Name | dict[str, str]  # a column of obs; where files differ, by name of the file
Steps = Annotated[int, Field(ge=1)]


class ParamsError(ValueError):
    """A study file breaks a rule; each line of the message names file, key, value, rule and remedy."""


class Params(BaseModel):
    """A study, complete. Keys are those of the study file; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names the run folder
    # A named data set, paths of .h5ad or .zarr files (one, or a list), `simulated` or `census`
    corpus: str | Some[str] = "kang2018"
    simulation: Atlas | None = None  # of the corpus `simulated`; what is not given is as in `simulate.Atlas`
    census: Recipe | None = None  # of the corpus `census`; what is not given is as in `census.Recipe`
    cell_type_key: Key = "cell_type"  # columns of obs: the label of a cell, or `leiden` for clusters in its place,
    batch_key: Key | None = None  # its batch, for integration,
    perturbation_key: Key | None = None  # its treatment, for perturbation response,
    donor_key: Key | None = None  # and its donor
    control: str | None = None  # the value of perturbation_key that means untreated
    labels: dict[str, str] = {}  # cell types to call otherwise, `old: new`: it joins the spellings of one type
    # Share of a data set's counts, or of the gene table's genes, that must be found, or else it is refused
    min_matched_genes: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_genes: Annotated[int, Field(ge=0)] = 0  # of a cell of the corpus's files, or it is left out,
    min_counts: Annotated[int, Field(ge=0)] = 0  # the sum of its counts,
    max_mito: Annotated[float, Field(ge=0, le=1)] = 1.0  # and their greatest share in mitochondrial genes
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.3  # share of the corpus kept for evaluation
    # What is held out: cells (`cell`), or whole donors (`donor_id`), data sets (`dataset_id`), groups of any column
    split_by: Name = "cell"
    split_seed: Seed = 0  # of the cells or groups held out
    held_out_tasks: list[TaskName] | None = None  # of the cells held out; by default all that their columns allow
    evaluation: list[records.EvaluationSet] = []  # more evaluation data sets: names, paths, or records with columns
    drop_contaminated: bool = False  # leave cells and donors of evaluation data sets out of pretraining
    spike_in: str | None = None  # perturbed cells for the strategies spikein_10 and spikein_50: a name or path

    strategies: Some[StrategyName]
    percentages: Some[Percentage]  # of the pretraining cells
    seeds: Some[Seed]
    adaptive: bool = False  # random subsets only until each verdict is settled: see `questions.pretrain_adaptively`
    margin: Annotated[float, Field(gt=0)] = 0.02  # difference in a score that does not matter
    nested: bool = False  # whether a smaller subset lies within the larger of its seed, for comparison in pairs

    models: Some[ModelName]
    steps: Steps  # optimiser steps of every pretraining run, whatever its subset's size,
    steps_by_model: dict[ModelName, Steps] = {}  # but for these models or families
    # How schedules are counted; "epochs" is the original's confounded way, for scVI's KL warm-up and SSL's decay of the
    # rate. Its early stopping, in epochs as well (patience 45 and 30), is not reproduced: all steps are taken.
    budget: Schedule = "steps"
    init_seed: Seed | None = None  # of initial weights, untrained controls' too; by default the subset's seed
    budget_check: records.BudgetCheck | None = None  # some runs with other budgets, of models that take steps
    hyperparameters: dict[ModelName, dict[str, Any]] = {}  # by model; what is not given is as in the original study
    also: list[records.Grid] = []  # more runs, which the plan counts apart
    embeddings: list[records.Embedding] = []  # models that enter by their embeddings of the evaluation data sets

    tasks: Some[TaskName] = list(tasks.TASKS)
    splits: Annotated[int, Field(ge=1)] = 5  # times that a data set of under 5,000 cells is divided; larger ones, once
    finetuned_splits: Annotated[int, Field(ge=1)] | None = None  # the same of fine-tuning; by default as many
    integration_cells: Annotated[int, Field(ge=100)] | None = None  # of a data set, at most; by default all
    k: Annotated[int, Field(ge=1)] = 5  # neighbours of zero-shot classification
    more_k: list[Annotated[int, Field(ge=1)]] = []  # further numbers of them to report beside
    finetune: Literal["head", "full"] = "head"  # "full": whole networks too
    class_weight: Literal["balanced"] | None = None  # of cell types in fine-tuning
    matching: Literal["mean", "nearest", "ot"] = "mean"  # what the perturbation head learns from a control cell
    treatments: Treatments = 5  # judged one by one against the control: by name, or so many with the most cells
    held_out_contexts: list[str] | None = None  # cell types to hold out of perturbation response; all by default
    perturbation_genes: Annotated[int, Field(ge=1)] = 2000  # most variable genes whose response is predicted

    memory_gib: Annotated[float, Field(ge=0)] = 4.0  # a subset that takes more is streamed from the disk in training
    executor: Annotated[str, Field(pattern=r"^(local|slurm|(tcp|tls)://\S+)$")] = "local"  # see `cluster`
    storage: Annotated[str, Field(pattern=r"^(s3|gs|hdfs)://\S+$")] | None = None  # artifacts too: `shared.py`
    workers: Annotated[int, Field(ge=1)] | None = None  # processes side by side, or Slurm jobs; one per core, or GPU
    gpus: dict[ModelName, Annotated[int, Field(ge=1)]] = {}  # by model: how many GPUs pretrain one together, if not one
    retries: Annotated[int, Field(ge=0)] = 1  # how often a unit that fails is begun again
    time_limit: Annotated[float, Field(gt=0)] | None = 86_400.0  # seconds after which a unit is taken to hang

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Give a corpus made by settings all of its defaults."""
        key = MADE.get(str(values.get("corpus")))
        return {**values, key: {}} if key and values.get(key) is None else values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        try:
            _ = self.specs
        except ValueError as error:
            raise ValueError(f"hyperparameters: {error}") from None
        for mistake in (*self._mistakes_of_cells(), *self._mistakes_of_tasks(), *self._mistakes_of_embeddings()):
            raise ValueError(mistake)
        return self

    def _mistakes_of_cells(self) -> Iterator[str]:
        """Settings of a corpus that the study does not have, and subsets that cannot be drawn."""
        for corpus, key in MADE.items():
            if getattr(self, key) is not None and self.corpus != corpus:
                yield f"{key}: the corpus is {self.corpus!r}; set `corpus: {corpus}`, or leave {key} out"
            if corpus in (*(dataset.file for dataset in self.evaluation), self.spike_in):
                yield f"{corpus!r} can be the corpus only; evaluate on, or spike in, data sets or files"
        files = all(map(names_file, self.sources()))
        if len(self.sources()) > 1 and not files:
            yield f"corpus: {self.corpus} names several; only .h5ad and .zarr files can be joined"
        if not files and (self.min_genes > 0 or self.min_counts > 0 or self.max_mito < 1):
            yield "min_genes, min_counts and max_mito filter cells of files; leave them out for this corpus"
        if self.split_by in ROLES and self.split_by not in self.columns():
            yield f"split_by: {self.split_by} needs {ROLES[self.split_by]}: name it, or split by cell"
        drawn = [subset for subset in self.subsets() if not subset.untrained]
        if self.spike_in is None and any(STRATEGIES[subset.strategy].spiked for subset in drawn):
            yield "a spikein strategy needs spike_in: name perturbed cells, or leave the strategy out"
        for subset in drawn:
            if subset.percentage > (most := STRATEGIES[subset.strategy].at_most):
                yield f"percentages: {subset.strategy} draws at most {most:g} %; leave {subset.percentage:g} out for it"
        if not drawn:
            yield "no subset: `untrained` draws none, at 100 % only `random` does; add `random` or a smaller percentage"
        if self.adaptive and ("random" not in self.strategies or min(len(self.percentages), len(self.seeds)) < 2):
            yield "adaptive needs the strategy random, two percentages and two seeds at least; add them"

    def _mistakes_of_tasks(self) -> Iterator[str]:
        """Evaluation data sets of one name or of the corpus's own cells, and tasks that none of them can join."""
        for file in (dataset.file for dataset in self.evaluation):
            cells, told = simulate.cells_named(file), "these are cells of a simulated corpus, counted beyond its own"
            if cells is not None and (self.simulation is None or cells.start < self.simulation.n_cells):
                yield f"evaluation: {file}: {told}; set `corpus: simulated`, and begin at its n_cells or above"
        sets = self.evaluation_sets()
        if len(sets) <= len(self.evaluation):
            names = [self.held_out_name, *(dataset.dataset for dataset in self.evaluation)]
            yield f"evaluation: the data sets are named {names}; give those that are alike a `name` each"
        for name, dataset in sets.items():
            for task in dataset.tasks or ():
                if lacking := dataset.lacks(task):
                    yield f"evaluation: {name}: {task} needs {' and '.join(lacking)}; name the column"
        for task in self.tasks:
            if not any(dataset.joins(task) for dataset in sets.values()):
                lacking = " and ".join(key for key in tasks.TASKS[task].needs if getattr(self, key) is None)
                remedy = f"needs {lacking}: name the column" if lacking else "has no data set: let one take it (tasks)"
                yield f"{task} {remedy}, or leave the task out of tasks"

    def _mistakes_of_embeddings(self) -> Iterator[str]:
        """Embeddings of data sets, or from subsets, that the study does not have."""
        entries = [(given.model, given.dataset, given.subset) for given in self.embeddings]
        sets = self.evaluation_sets()
        for model, dataset, subset in entries:
            if dataset not in sets:
                yield f"embeddings: {model}: {dataset!r} is no evaluation data set; there are {', '.join(sets)}"
            if any(run.model == model for run in self.runs()):
                yield f"embeddings: {model}: the study has a model of that name; call it otherwise"
            if subset and subset not in self.subsets():
                told = f"{subset.strategy} at {subset.percentage:g} %, seed {subset.seed}, is no subset of this study"
                yield f"embeddings: {model}: {told}; leave strategy, percentage and seed out, or give others"
            if entries.count((model, dataset, subset)) > 1:
                yield f"embeddings: {model} on {dataset} is listed twice; list each subset once"

    # The corpus, and what is held out of it

    @property
    def held_out_name(self) -> str:
        """Name of the evaluation data set made of the corpus's held-out cells."""
        return f"{Path(self.sources()[0]).stem}_held_out"

    def evaluation_sets(self) -> dict[str, records.EvaluationSet]:
        """Every evaluation data set by name, the corpus's held-out cells first."""
        held_out = records.EvaluationSet(
            file=self.held_out_name,
            name=self.held_out_name,
            batch_key=self.batch_key and "batch",  # the corpus's columns are named by role
            perturbation_key=self.perturbation_key and "perturbation",
            control=self.control,
            held_out_contexts=self.held_out_contexts,
            tasks=self.held_out_tasks,
        )
        sets = {each.dataset: each for each in (held_out, *self.evaluation)}
        treated = {"treatments": self.treatments}
        return {name: each if each.treatments else each.model_copy(update=treated) for name, each in sets.items()}

    def sources(self) -> list[str]:
        """Names of what the corpus is made of."""
        return [self.corpus] if isinstance(self.corpus, str) else self.corpus

    def key(self, role: str, dataset: str) -> str | None:
        """Column of a data set for a role of `columns`; None where the study names none, but for the cell type."""
        key = self.columns().get(role, "cell_type" if role == "cell_type" else None)
        path = Path(dataset).absolute()
        names = path.stem, f"{path.parent.name}_{path.stem}"  # see `sources.file_names`
        return next((key[name] for name in names if name in key), role) if isinstance(key, dict) else key

    def columns(self) -> dict[str, Key]:
        """Columns of the corpus by role."""
        named = {role: getattr(self, key) for role, key in ROLES.items()}
        if self.cell_type_key == CLUSTERS:
            del named["cell_type"]
        if self.split_by not in ("cell", "dataset_id", *ROLES):
            named["split"] = self.split_by
        return {role: key for role, key in named.items() if key}

    @property
    def split_role(self) -> str | None:
        """Column of the corpus, named by role, whose groups are held out whole; None if cells are held out."""
        return None if self.split_by == "cell" else "split" if "split" in self.columns() else self.split_by

    # Models and runs

    @cached_property
    def specs(self) -> dict[str, ModelSpec]:
        """What each model that the study names stands for, by name."""
        names = [*self.models, *(name for grid in self.also for name in grid.models or ()), *self.hyperparameters]
        return {name: hyperparameters.resolve(name, self.hyperparameters, schedule=self.budget) for name in names}

    def steps_of(self, model: str, budget: float = 1.0) -> int:
        """Optimiser steps of a model's runs: a share of its own, or those without its label, of its family, of all."""
        return max(1, round(self._for_model(model, self.steps_by_model, self.steps) * budget))

    def gpus_of(self, model: str, *, otherwise: int = 1) -> int:
        """How many GPUs pretrain a run of a model together: as said of it, or without its label, or of its family."""
        return self._for_model(model, self.gpus, otherwise)

    def _for_model(self, model: str, by_model: dict[str, int], default: int) -> int:
        names = model, hyperparameters.without_label(model), self.specs[model].family
        return next((by_model[name] for name in names if name in by_model), default)

    def runs(self) -> list[records.Run]:
        """Every pretraining run, once each: those of the study's grid, then those of `also`."""
        return list(dict.fromkeys(run for grid in (self, *self.also) for run in self.runs_of(grid)))

    def runs_of(self, grid: Self | records.Grid) -> list[records.Run]:
        """Every run of a grid; of the whole corpus only some strategies make a choice (`Strategy.of_all`)."""
        strategies, percentages = grid.strategies or self.strategies, grid.percentages or self.percentages
        subsets = [
            records.Subset(strategy, percentage, seed)
            for strategy in strategies
            for percentage in ([0.0] if strategy == records.UNTRAINED else sorted(percentages))
            for seed in grid.seeds or self.seeds
            if percentage < 100 or STRATEGIES[strategy].of_all
        ]
        return [records.Run(model, subset) for model in grid.models or self.models for subset in subsets]

    def subsets(self) -> list[records.Subset]:
        """Every subset that a run takes."""
        return list(dict.fromkeys(run.subset for run in self.runs()))


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as the number that it is in YAML 1.2; to PyYAML it is text."""


class _Dumper(yaml.SafeDumper):
    """Puts a text that `_Loader` would take for a number in quotes."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def from_yaml(text: str) -> Any:
    """The value that a text spells; raises YAMLError if it spells none."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe one


def to_yaml(value: Any, **style: Any) -> str:
    """Text that `from_yaml` reads as this value, in a style of `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **style)


def read(path: Path, overrides: dict[str, Any] | None = None) -> Params:
    """Read and check a study file, in YAML, whose keys are those of `Params`; `overrides` replace its values.

    Raises ParamsError, a line a mistake, if it is no mapping, or a key or value is not allowed.
    """
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path.name}: holds a {type(values).__name__}; a study file is a mapping, `key: value`.")
    return check({**values, **{key: _from_text(value) for key, value in (overrides or {}).items()}}, path.name)


def _from_text(value: Any) -> Any:
    """The list or mapping that a text spells: `papermill -p seeds "[0, 1]"` hands lists over as text."""
    with suppress(yaml.YAMLError):
        return from_yaml(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    return value


def check(values: dict[str, Any], source: str) -> Params:
    """Check the values of a study; raises ParamsError, a line a mistake, in which `source` names their origin."""
    values = {str(key): value for key, value in values.items()}
    try:
        return Params(**values)
    except ValidationError as error:
        raise ParamsError("\n".join(_lines(source, values, error.errors()))) from None


def _lines(source: str, values: dict[str, Any], mistakes: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each bad value, whichever of the forms that it may have it fails."""
    by_key = defaultdict(list)
    for mistake in mistakes:
        by_key[_key(values, mistake)].append(mistake)
    for key, forms in by_key.items():
        if key and any(other.startswith(f"{key}.") for other in by_key):
            continue  # one of its forms was right, but for a value within
        rules = dict.fromkeys(mistake["msg"].removeprefix("Value error, ") for mistake in forms)
        yield f"{source}: {_line(key, forms[0], list(rules))}"


def _key(values: dict[str, Any], mistake: dict[str, Any]) -> str:
    """Where in the study file a mistake is; pydantic puts its own names of the forms of a value between the keys."""
    keys, here = [], values
    for part in mistake["loc"]:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]
            keys.append(str(part))
    if mistake["type"] == "missing":
        keys.append(str(mistake["loc"][-1]))
    return ".".join(keys)


def _line(key: str, mistake: dict[str, Any], rules: list[str]) -> str:
    if mistake["type"] == "extra_forbidden":
        within, _, name = key.rpartition(".")
        keys = RECORDS.get(within.partition(".")[0], Params).model_fields
        near = get_close_matches(name, keys, n=1)
        return f"{key}: no such key; " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}.")
    if mistake["type"] == "missing":
        return f"{key}: missing; every study needs it."
    if not key:
        return f"{'; '.join(rules).rstrip('.')}."
    rule = ", or: ".join(rule[0].lower() + rule[1:] for rule in rules)
    return f"{key}: {mistake['input']!r} is not allowed: {rule}; change it in the study file or with --set."

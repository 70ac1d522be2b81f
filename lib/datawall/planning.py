"""What a study will cost: units, time, memory and disk of every stage, before anything is done and without a network.

Costs come from a calibration (see `calibration`), and grow as follows. Curation: a line in the corpus's cells. A
pretraining run: once, for each cell of its subset, for each step and for each cell of a step, the last two in
proportion to the multiplications of the model (`calibration.work`); a subset streamed from the disk is read too. An
embedding: a line in cells, in proportion to multiplications. A task: a power of the cells of the data set. A stage
takes as long as its units, dealt out to the workers, the longest first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from dask.system import CPU_COUNT

from datawall import backed, calibration, datasets, evaluation, hyperparameters, processes, simulate
from datawall.params import Params
from datawall.processes import Need
from datawall.scoring import EMBEDDING_BASELINES, SMALL, Evaluation
from datawall.study import Run, Study

BASE_GIB = 0.8  # of a process that has loaded torch and scanpy
BYTES_PER_COUNT = 8  # in memory
BYTES_PER_STEP = 12  # of a history
BYTES_PER_EVALUATION = 6_000
SECONDS_PER_UNIT = 0.03  # to write, hash and report one
NAMED = {"kang2018": 13_999, "pbmc68k": 700}  # cells of data sets that need not be opened to be counted
SCTAB = 22_190_622  # cells of the default recipe of the Census
CONTEXTS = 4  # of perturbation response, where the study does not name those to hold out
ASSUMED_FLOPS = 20e12  # of a GPU, sustained, where none was calibrated


@dataclass
class Stage:
    """What a stage costs."""

    name: str
    seconds: list[float] = field(default_factory=list)  # of each unit, on one core or GPU
    in_turn: float = 0.0  # seconds of what the notebook does by itself
    gpu_seconds: float = 0.0
    memory_gib: float = BASE_GIB  # of a process at most
    bytes: float = 0.0  # stored

    def wall_seconds(self, n_workers: int) -> float:
        """Time by the clock, with so many units side by side."""
        return self.in_turn + makespan(self.seconds, n_workers)


def makespan(seconds: Iterable[float], n_workers: int) -> float:
    """When the last of several units ends that begin in order of their length, the longest first."""
    ends = [0.0] * n_workers
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


class Plan:
    """The costs of a study.

    Parameters
    ----------
    study
        Its run folder need not exist.
    known
        A calibration; by default that of this user, or the one that comes along.
    """

    def __init__(self, study: Study, known: dict | None = None) -> None:
        self.study, self.p = study, study.params
        self.known = known or calibration.known()
        self.on_gpu = self.known["machine"].startswith("GPU")

    @cached_property
    def size(self) -> tuple[int, float]:
        """Genes of the corpus, and genes that a cell has counts of."""
        return calibration.size_of(self.p)

    @cached_property
    def n_cells(self) -> int:
        """Cells of the corpus."""
        return cells_of(self.p)

    @property
    def n_pretraining(self) -> float:
        """Cells that are not held out."""
        return self.n_cells * (1 - self.p.held_out)

    def cells_of_set(self, name: str) -> int:
        """Cells of an evaluation data set."""
        if name == self.p.held_out_name:
            return round(self.n_cells * self.p.held_out)
        one = self.p.evaluation_sets()[name]
        return one.n_cells or cells_in(one.file)

    def stages(self) -> list[Stage]:
        """Every stage of the study, with its cost."""
        tasks = [task for task in self.p.tasks if evaluation.evaluations(self.study, task)]
        embedded: set[tuple[object, str]] = set()
        return [
            self._curation(),
            self._pretraining(),
            *(self._task(task, embedded) for task in tasks),
            Stage("figures", in_turn=self.known["start"]),
        ]

    def need(self, item: Run | Evaluation) -> Need:
        """What a unit needs: of a model, or of an evaluation with its embedding."""
        if isinstance(item, Run):
            return Need(self._gpus(item.model), self._run_memory(item), self.run_seconds(item))
        source = item.source
        seconds = self.evaluation_seconds(item)
        if isinstance(source, Run):
            seconds += self.embedding_seconds(source.model, self.cells_of_set(item.dataset))
        gpus = min(1, self._gpus(source.model)) if isinstance(source, Run) else 0
        return Need(gpus, self._set_memory(item.dataset), seconds)

    # Units

    def run_seconds(self, run: Run) -> float:
        """A pretraining run."""
        cost, scale, batch_size = *self._model(run.model), self._batch_size(run.model)
        if run.subset.strategy == "untrained":
            return cost["once"]
        n_cells = self.n_pretraining * run.subset.percentage / 100
        steps = self.p.steps_of(run.model) if batch_size else 0
        per_cell = cost["step_cell"] * scale + (self._line("read", 1) if self._streamed(n_cells) else 0)
        grown = self.size[1] / self.known["genes_per_cell"]
        return cost["once"] + cost["cell"] * grown * n_cells + steps * (cost["step"] * scale + per_cell * batch_size)

    def embedding_seconds(self, model: str, n_cells: int) -> float:
        """Cells by a model."""
        cost, scale = self._model(model)
        return cost["embedding"][0] + cost["embedding"][1] * scale * n_cells

    def evaluation_seconds(self, one: Evaluation) -> float:
        """An evaluation, its embedding apart."""
        n_cells = self.cells_of_set(one.dataset)
        if one.task == "reconstruction":
            return 2 * self.embedding_seconds(one.source.model, min(2000, n_cells))
        costs = self.known["tasks"].get(one.task, {})
        source = one.source if isinstance(one.source, str) and one.source in costs else "model"
        seconds, power = costs.get(source, (0.0, 1.0))
        seconds *= (n_cells / calibration.EVALUATED[1]) ** power
        if one.task == "perturbation_response":
            return seconds * len(self.p.evaluation_sets()[one.dataset].held_out_contexts or range(CONTEXTS))
        return seconds * (self._splits(one.task) if n_cells < SMALL else 1)

    def _splits(self, task: str) -> int:
        if task == "zeroshot_classification":
            return self.p.splits
        return (self.p.finetuned_splits or self.p.splits) if task == "finetuned_classification" else 1

    def _model(self, name: str) -> tuple[dict, float]:
        """The calibrated model of the family that is most alike, and how many times its work this one is."""
        family = hyperparameters.family(name)
        of_family = [each for each in self.known["models"] if each["family"] == family]
        if not of_family:
            return {"once": 0, "cell": 0, "step": 0, "step_cell": 0, "embedding": [0, 0], "n_latent": 0, "bytes": 0}, 1
        work = calibration.work(self.p, name, *self.size)
        nearest = min(of_family, key=lambda each: abs(np.log(each["work"] / work)))
        return nearest, work / nearest["work"]

    def _batch_size(self, model: str) -> int:
        return getattr(self.p.hyperparameters_of(model), "batch_size", 0)

    def _gpus(self, model: str) -> int:
        return self.p.gpus.get(model, 1) if self._batch_size(model) else 0

    def _line(self, what: str, n: float) -> float:
        once, each = self.known["data"][what]
        return once + each * n * (self.size[1] / self.known["genes_per_cell"])

    def _streamed(self, n_cells: float) -> bool:
        return 2 * n_cells * self.size[1] * BYTES_PER_COUNT > self.p.memory_gib * 2**30

    def _run_memory(self, run: Run) -> float:
        cost, scale = self._model(run.model)
        counts = 2 * self.n_pretraining * run.subset.percentage / 100 * self.size[1] * BYTES_PER_COUNT / 2**30
        return BASE_GIB + min(counts, self.p.memory_gib) + 4 * cost["bytes"] * scale / 2**30

    def _set_memory(self, name: str) -> float:
        per_cell = 2 * self.size[1] * BYTES_PER_COUNT + 4 * self.p.perturbation_genes
        return BASE_GIB + self.cells_of_set(name) * per_cell / 2**30

    def _operations(self, model: str, n_cells: float, *, passes: int) -> float:
        """Seconds of an assumed GPU for cells on their way through a model, and back if they are learnt from."""
        return 2e6 * passes * calibration.work(self.p, model, *self.size) * n_cells / ASSUMED_FLOPS

    # Stages

    def _curation(self) -> Stage:
        n, m = self.n_cells, self.n_pretraining
        sets = [self.cells_of_set(one.dataset) for one in self.p.evaluation]
        drawn = Counter(subset.strategy for subset in self.study.subsets())
        in_turn = self.known["start"] + sum(self._line(what, n) for what in ("corpus", "split", "sketch", "tables"))
        in_turn += drawn["geometric_sketching"] * self._line("geometric_sketching", n)
        in_turn += sum(self._line("dataset", cells) for cells in sets)
        rows = sum(subset.percentage / 100 * m for subset in self.study.subsets())
        stored = self.known["data"]["bytes"]
        grown = self.size[1] / self.known["genes_per_cell"]
        size = n * stored["corpus"] * grown + 200 * m + 8 * rows + sum(sets) * stored["dataset"] * grown
        return Stage("curation", in_turn=in_turn, memory_gib=BASE_GIB + 0.5 + 100 * n / 2**30, bytes=size)

    def _pretraining(self) -> Stage:
        stage = Stage("pretraining", in_turn=self.known["start"])
        for run in self.study.pretraining_runs():
            seconds, steps = self.run_seconds(run), self.p.steps_of(run.model) * bool(self._batch_size(run.model))
            trained = run.subset.strategy != "untrained"
            stage.seconds.append(seconds + SECONDS_PER_UNIT)
            if self.on_gpu:
                stage.gpu_seconds += seconds * bool(steps)
            elif trained:
                stage.gpu_seconds += self._operations(run.model, steps * self._batch_size(run.model), passes=3)
            stage.memory_gib = max(stage.memory_gib, self._run_memory(run))
            cost, scale = self._model(run.model)
            stage.bytes += cost["bytes"] * scale + BYTES_PER_STEP * steps * trained
        return stage

    def _task(self, task: str, embedded: set[tuple[object, str]]) -> Stage:
        """A task, with the embeddings that no task before it needed."""
        stage = Stage(task, in_turn=self.known["start"])
        for one in evaluation.evaluations(self.study, task):
            n_cells, seconds = self.cells_of_set(one.dataset), self.evaluation_seconds(one) + SECONDS_PER_UNIT
            needs_embedding = isinstance(one.source, Run) or one.source in EMBEDDING_BASELINES
            if needs_embedding and task != "reconstruction" and (one.source, one.dataset) not in embedded:
                embedded.add((one.source, one.dataset))
                if isinstance(one.source, Run):
                    taken = self.embedding_seconds(one.source.model, n_cells)
                    assumed = self._operations(one.source.model, n_cells, passes=1)
                    stage.gpu_seconds += taken if self.on_gpu else assumed * bool(self._batch_size(one.source.model))
                    seconds += taken + SECONDS_PER_UNIT
                    stage.bytes += 4 * n_cells * self._model(one.source.model)[0]["n_latent"]
            stage.seconds.append(seconds)
            stage.memory_gib = max(stage.memory_gib, self._set_memory(one.dataset))
            stage.bytes += BYTES_PER_EVALUATION
        first = self.known["tasks"].get(task, {}).get("first", [0.0])[0]
        stage.in_turn += first * len({one.dataset for one in evaluation.evaluations(self.study, task)})
        return stage


def cells_of(p: Params) -> int:
    """Cells of a study's corpus, as far as can be told without reading it.

    Raises
    ------
    datawall.datasets.DatasetError, datawall.corpus.CorpusError
        If a file is missing or not readable.
    """
    if p.simulation is not None:
        return p.simulation.n_cells
    return SCTAB if p.census is not None else sum(map(cells_in, p.sources()))


def cells_in(name: str) -> int:
    """Cells of a data set: a named one, a file, or some of a simulated atlas."""
    if (simulated := simulate.cells_named(name)) or name in NAMED:
        return len(simulated) if simulated else NAMED[name]
    with backed.CellFile(datasets.file(name)) as file:
        return file.n_cells


def counts(study: Study) -> dict[str, dict[str, int]]:
    """Subsets, models and experiments (model x task x data set) of the study's grid, by name, then of each besides."""
    p, counted, seen = study.params, {}, set()
    every = [one for task in p.tasks for one in evaluation.evaluations(study, task)]
    for name, grid in {p.study: p, **{grid.name: grid for grid in p.also}}.items():
        runs = {run for run in p.runs_of(grid) if run not in seen}
        experiments = [one for one in every if isinstance(one.source, Run) and _plain(one.source) in runs]
        subsets = {subset for _, subset in runs if subset[0] != "untrained"} - {subset for _, subset in seen}
        counted[name] = {"subsets": len(subsets), "models": len(runs), "experiments": len(experiments)}
        seen |= runs
    counted[p.study]["baselines"] = len(every) - sum(each["experiments"] for each in counted.values())
    return counted


def _plain(run: Run) -> tuple[str, tuple[str, float, int]]:
    return run.model, (run.subset.strategy, run.subset.percentage, run.subset.seed)


def table(plan: Plan) -> str:
    """A study's stages and their costs, as text."""
    workers = plan.p.workers or len(processes.visible_gpus()) or CPU_COUNT
    rows = [
        (
            stage.name,
            len(stage.seconds) or 1,
            stage.wall_seconds(workers),
            (sum(stage.seconds) + stage.in_turn) / 3600,
            stage.gpu_seconds / 3600,
            stage.memory_gib,
            stage.bytes / 2**30,
        )
        for stage in plan.stages()
    ]
    _, *columns = zip(*rows, strict=True)
    rows.append(("all", *(sum(column) for column in columns[:4]), max(columns[4]), sum(columns[5])))
    head = f"{'stage':26}{'units':>8}{'time':>10}{'core-hours':>14}{'GPU-hours':>12}{'memory':>11}{'disk':>13}"
    lines = [
        f"{name:26}{units:>8,}{duration(wall):>10}{cores:>14,.2f}{gpus:>12,.2f}{memory:>7.1f} GiB{disk:>9,.2f} GiB"
        for name, units, wall, cores, gpus, memory, disk in rows
    ]
    side_by_side = f"time: {workers} side by side, each as fast as {plan.known['machine']}, the longest first"
    if not plan.on_gpu:
        side_by_side += f"; GPU-hours: no GPU was calibrated, {ASSUMED_FLOPS / 1e12:g} TFLOP/s assumed"
    return "\n".join([head, *lines, f"{side_by_side}. Memory is that of one process at most."])


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:,.0f} days"

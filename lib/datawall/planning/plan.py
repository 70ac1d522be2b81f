"""What a study will cost: units, time, memory and disk of every stage, before anything is done and without a network.

`costs` says what a unit costs. A stage takes as long as its units, dealt out to the workers, and its notebook.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pandas as pd
from dask.system import CPU_COUNT

from datawall.analysis import power
from datawall.engine import cluster, code, processes, store
from datawall.engine.processes import Need
from datawall.study import evaluation
from datawall.study.costs import BASE_GIB, BYTES_PER_STEP, FLOPS, Costs, calibration_file
from datawall.study.params import Params
from datawall.study.records import Embedding, Evaluation, Run
from datawall.study.study import Study
from datawall.tasks import TASKS

NOTEBOOK = 0.5  # of the time that a process takes to import all: a notebook's tables and figures
SECONDS_PER_UNIT = 0.02  # to hand one out, write it, hash it and read it again
BYTES_PER_EVALUATION = 6_000
SPREAD = 0.01  # of a score over seeds, as in the default study on its smaller data set
BYTES_PER_ROW = 200  # of the labels of a cell, and of its principal components


@dataclass
class Stage:
    """What a stage costs."""

    name: str
    around: float  # seconds before and after its units
    # Of each unit the family of its model, what it needs, optimiser steps, and hours on GPUs.
    units: list[tuple[str, Need, int, float]] = field(default_factory=list)
    in_turn: float = 0.0  # seconds of units that the notebook makes itself
    memory_gib: float = BASE_GIB  # of a process that makes no unit
    n_bytes: float = 0.0  # stored

    def computing_seconds(self, n_workers: int) -> float:
        """Time by the clock in which units are made, so many side by side."""
        return self.in_turn + makespan((need.seconds for _, need, *_ in self.units), n_workers)

    def wall_seconds(self, n_workers: int) -> float:
        """Time by the clock, all in all."""
        return self.around + SECONDS_PER_UNIT * len(self.units) + self.computing_seconds(n_workers)


def makespan(seconds: Iterable[float], n_workers: int) -> float:
    """When the last of several units ends that begin in order of their length, the longest first."""
    ends = [0.0] * n_workers
    for length in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def workers(study: Study) -> int:
    """How many units run side by side; on a Dask cluster, whose workers are not known, as many as here."""
    here = cluster.SLURM_JOBS if study.params.executor == "slurm" else len(processes.visible_gpus()) or CPU_COUNT
    return study.params.workers or here


def counts(study: Study) -> list[tuple[str, dict[str, int]]]:
    """Subsets, models and experiments (model x task x data set), by name: of the study, then of what it has besides."""
    p, counted, subsets, runs = study.params, [], set(), set()
    evaluated = Counter(item.source for task in p.tasks for item in evaluation.evaluations(study, task))
    grids = [(p.study, p.runs_of(p)), *((grid.name, p.runs_of(grid)) for grid in p.also)]
    if checked := study.budget_runs():
        budgets = dict.fromkeys(f"{run.budget:g}" for run in checked)
        grids.append((f"{' or '.join(budgets)} times the steps", checked))
    for name, of_grid in grids:
        new = set(of_grid).intersection(study.all_runs()) - runs
        drawn = {run.subset for run in new if not run.subset.untrained} - subsets
        experiments = sum(evaluated[run] for run in new)
        counted.append((name, {"subsets": len(drawn), "models": len(new), "experiments": experiments}))
        runs, subsets = runs | new, subsets | drawn
    counted[0][1]["experiments"] += sum(n for source, n in evaluated.items() if isinstance(source, Embedding))
    counted[0][1]["baselines"] = sum(n for source, n in evaluated.items() if isinstance(source, str))
    return counted


def counts_in_words(study: Study) -> list[str]:
    """The counts, a line for the study's grid and for each grid in `also`."""
    told = [(name, ", ".join(f"{n:,} {what}" for what, n in numbers.items() if n)) for name, numbers in counts(study)]
    return [told[0][1], *(f"besides, {name}: {numbers}" for name, numbers in told[1:])]


def verdicts_to_expect(p: Params) -> tuple[str, bool]:
    """In words, how often a flat curve would be shown flat, at `SPREAD`, and whether in four of five studies."""
    n_seeds, sizes = len(p.seeds), sorted(p.percentages)
    if "random" not in p.strategies or sizes[-1] != 100 or len(sizes) < 2 or n_seeds < 2:
        return "no verdict can be reached: one takes random subsets, the full corpus (100 %) and two seeds", False
    design = {"percentages": sizes, "n_curves": len(p.models)}
    flat = power.of_design(SPREAD, n_seeds, p.margin, n_draws=400, **design).set_index("truth").loc["flat"]
    needed = power.seeds_needed(SPREAD, p.margin, n_draws=200, **design)
    enough = bool(flat["right"] >= 0.8)
    more = "" if enough else f"; with {needed or 'more than 50'} seeds, four of five would"
    shown = f"of curves that are flat, {flat['right']:.0%} (± {flat['error']:.0%}) would be shown flat"
    return f"{shown} within {p.margin:g} with {n_seeds} seeds, at a spread of {SPREAD:g} over seeds{more}", enough


def stages(study: Study, missing: Callable[[Run | Evaluation], bool] = lambda item: True) -> list[Stage]:
    """Every stage of the study with its cost, of the units that are missing; by default, all are."""
    embedded: set[tuple[Run, str]] = set()
    judged = [_task(study, task, missing, embedded) for task in study.params.tasks]
    figures = Stage("figures", NOTEBOOK * study.costs.known["start"])
    return [_curation(study), _pretraining(study, missing), *judged, figures]


def _curation(study: Study) -> Stage:
    p, costs = study.params, study.costs
    around = (1 + NOTEBOOK) * costs.known["start"]  # that of the run among it, whose other processes are forks
    stage = Stage("curation", around, memory_gib=BASE_GIB + 0.5 + 100 * costs.n_cells / 2**30)
    sets = [costs.cells_of_set[dataset.dataset] for dataset in p.evaluation]
    stage.in_turn = sum(costs.known["named"].get(name, 0.0) for name in p.sources())
    stage.in_turn += costs.line("corpus", costs.n_cells) + sum(costs.line("dataset", n) for n in sets)
    rows = sum(subset.percentage / 100 * costs.n_pretraining for subset in study.subsets())
    sizes = costs.known["data"]["bytes"]
    stage.n_bytes = costs.density * (costs.n_cells * sizes["corpus"] + sum(sets) * sizes["dataset"])
    stage.n_bytes += BYTES_PER_ROW * costs.n_pretraining + 8 * rows
    return stage


def _pretraining(study: Study, missing: Callable[[Run], bool]) -> Stage:
    costs = study.costs
    stage = Stage("pretraining", NOTEBOOK * costs.known["start"])
    for run in filter(missing, study.all_runs()):
        need, steps, family = costs.run(run), costs.steps(run), study.params.specs[run.model].family
        hours = costs.gpu_hours(need, run, steps * costs.batch_size(run.model))
        stage.units.append((family, need, steps, hours))
        stage.n_bytes += costs.model_bytes(run.model) + BYTES_PER_STEP * steps
    return stage


def _task(study: Study, task: str, missing: Callable[[Evaluation], bool], embedded: set[tuple[Run, str]]) -> Stage:
    """A task, with the embeddings that no task before it needed."""
    costs = study.costs
    stage = Stage(task, NOTEBOOK * costs.known["start"])
    for item in filter(missing, evaluation.evaluations(study, task)):
        embedding = item.source, item.dataset
        need, n_cells = costs.evaluation(item, embedded=embedding in embedded), 0
        if isinstance(item.source, Run) and TASKS[task].judges == "embeddings" and embedding not in embedded:
            embedded.add(embedding)
            n_cells = costs.cells_of_set[item.dataset]
            stage.n_bytes += 4 * n_cells * costs.model(item.source.model)[0]["n_latent"]
        family = study.params.specs[item.source.model].family if isinstance(item.source, Run) else "others"
        stage.units.append((family, need, 0, costs.gpu_hours(need, item.source, n_cells / 3)))
    stage.n_bytes += BYTES_PER_EVALUATION * len(stage.units)
    return stage


def seconds_left(study: Study) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds that each stage with units left to make will compute, and how many units other versions have made."""
    made, otherwise = store.read_all(study.store.folder), Counter()

    def missing(item: Run | Evaluation) -> bool:
        unit = study.model_unit(item) if isinstance(item, Run) else evaluation.evaluation_unit(study, item)
        if unit.key in made:
            theirs = {**made[unit.key].made["versions"], "datawall": here["datawall"]}  # whose code is in the keys
            otherwise.update(filter(None, [code.differing(theirs, here)]))
        return unit.key not in made

    here = code.versions()
    begun = [stage for stage in stages(study, missing) if stage.units]
    return {stage.name: stage.computing_seconds(workers(study)) for stage in begun}, otherwise


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{seconds < 10 * unit:d}f}\u00a0{name}"
    return f"{seconds / 86_400:,.0f}\u00a0days"


def table(study: Study) -> str:
    """What a study's stages and families cost, as text; GPU-hours only where GPUs are asked for."""
    n_workers, known, made = workers(study), study.costs.known, stages(study)
    tables = [by_stage(made, n_workers), by_family(made)]
    notes = [f"time: {n_workers} side by side; costs as calibrated for {known['study']} on {known['machine']}"]
    if not study.params.workers and (executor := study.params.executor) not in ("local", "slurm"):
        notes.append(f"how many workers {executor} has is not known: here so many; --set workers= gives theirs")
    if not calibration_file(study.params.study).exists():
        notes.append("a calibration that came along; --calibrate in place of --plan measures on this machine")
    if not study.params.gpus and not study.costs.on_gpu:
        tables = [each.drop(columns=each.filter(like="GPU")) for each in tables]
    elif not study.costs.on_gpu:
        notes.append(f"GPU-hours: no GPU was calibrated, {FLOPS / 1e12:g} TFLOP/s are assumed of one, for all families")
    notes.append("memory: of one process at most; what comes over a network is not counted")
    notes.append(f"verdicts: {verdicts_to_expect(study.params)[0]}")
    written = dict.fromkeys(("units", "models", "steps", "evaluations"), "{:,.0f}".format) | {"time": duration}
    shown = [each.to_string(formatters=written, float_format="{:,.2f}".format) for each in tables]
    return "\n\n".join([*shown, "\n".join(notes)])


def by_stage(made: list[Stage], n_workers: int) -> pd.DataFrame:
    """What each stage costs, and all of them together."""
    columns = {
        "units": [len(stage.units) for stage in made],
        "time": [stage.wall_seconds(n_workers) for stage in made],
        "core-hours": [stage.wall_seconds(1) / 3600 for stage in made],
        "GPU-hours": [sum(hours for *_, hours in stage.units) for stage in made],
        "GiB of memory": [max(stage.memory_gib, *(unit[1].memory_gib for unit in stage.units), 0) for stage in made],
        "GiB on disk": [stage.n_bytes / 2**30 for stage in made],
    }
    table = pd.DataFrame(columns, [stage.name for stage in made])
    table.loc["all"] = {**table.sum(), "GiB of memory": table["GiB of memory"].max()}
    return table


def by_family(made: list[Stage]) -> pd.DataFrame:
    """What each family costs to pretrain and to evaluate; baselines and embeddings from files are `others`."""
    units = [(stage.name == "pretraining", *unit) for stage in made for unit in stage.units]
    table = pd.DataFrame(units, columns=["trains", "family", "need", "steps", "GPU-hours"])
    table["core-hours"] = [need.seconds / 3600 for need in table["need"]]
    trained, judged = (table[table["trains"] == trains].groupby("family") for trains in (True, False))
    columns = {"models": trained.size(), "steps": trained["steps"].sum()}
    for part, of_part in {"pretrain": trained, "evaluate": judged}.items():
        columns |= {f"{hours} to {part}": of_part[hours].sum() for hours in ("core-hours", "GPU-hours")}
    return pd.DataFrame(columns).fillna(0).rename_axis(index=None)


def speeds(costs: Costs) -> str:
    """How fast models train, as calibrated, as text: a line each."""
    lines, peak = [], processes.peak(costs.known["machine"])
    for model in filter(costs.step_seconds, costs.p.models):
        seconds = costs.step_seconds(model)
        rate = costs.batch_size(model) * costs.operations(model) / seconds
        share = f"{rate / peak:.0%} of the peak" if peak else "the peak is not known"
        lines.append(f"{model}: {seconds:.3g} s a step, {rate / 1e9:,.1f} GFLOP/s ({share})")
    return "\n".join(lines)

"""What units of work cost on this machine: measured on a miniature of a study, at the true size of its models.

The miniature has the study's hyper-parameters, tasks and number of genes, some thousand simulated cells, and a few
optimiser steps. On a processor, seconds are those that one core computes, so that a machine that does something else
beside is timed right; on a GPU they go by the clock. `run_all.py STUDY --calibrate` keeps the result for this user.
"""

from __future__ import annotations

import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datawall.cells import datasets, simulate
from datawall.engine import disk, processes
from datawall.engine.store import Record
from datawall.models import training
from datawall.study import curation, evaluation, scoring
from datawall.study.costs import calibration_file, size_of, work
from datawall.study.params import Params
from datawall.study.study import Study
from datawall.study.units import Evaluation, Run, Subset
from datawall.tasks import TASKS, baselines

CELLS = 800, 3200  # of the miniature's corpora, of which 70 % are pretrained on
CONTEXTS = 2  # of perturbation response
EVALUATED = 1000, 4000  # cells of the data sets that tasks are timed on
TYPES = ["classical monocyte", "natural killer cell", "naive B cell", "regulatory T cell", "type II pneumocyte"]
LARGE = 50.0  # million multiplications a cell; of larger models
BATCH = 128, 4  # cells of a step at most on a processor, of other models and of large ones: cost is in proportion
STEPS = (20, 60), (1, 3)
LONGEST = 3  # seed of the run of most steps, whose model embeds
EMBEDDED = EVALUATED, (16, 48)  # cells embedded, and reconstructed
LEFT_OUT = {  # keys of the study that are as by default in its miniature
    *("census", "spike_in", "min_genes", "min_counts", "max_mito", "cell_type_key", "donor_key", "split_by"),
    *("held_out", "held_out_tasks", "embeddings", "drop_contaminated", "also", "steps_by_model", "adaptive", "gpus"),
}
TABLES = curation.quality, curation.marker_expression, curation.contamination  # of notebook 1, of every cell


def calibrate(p: Params) -> Path:
    """Measure what the units of a study cost on this machine, with a progress bar; returns where that is kept."""
    processes.use_one_thread()
    path = calibration_file(p.study)
    with tempfile.TemporaryDirectory(prefix="datawall-") as folder:
        disk.write_json(path, _measure(p, Path(folder)))
    return path


def machine() -> str:
    """What is timed here, in words."""
    if training.device().type == "cuda":
        import torch

        return f"GPU {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"one core of {names[0] if names else platform.machine()}, no GPU"


def _measure(p: Params, folder: Path) -> Record:
    n_genes, genes_per_cell = size_of(p)
    first, few, many = (
        Study(_miniature(p, n_cells, n_genes, genes_per_cell), folder / str(i))
        for i, n_cells in enumerate([CELLS[0], *CELLS])
    )
    start, data = _start(), _data(first, few, many)
    named = {name: _seconds(lambda name=name: datasets.load(name)) for name in {*p.sources()} & {*datasets.DATASETS}}
    bar = partial(tqdm, desc="calibration", leave=False)
    models = [_model(many, name, work(p.specs[name], n_genes, genes_per_cell)) for name in bar(p.models, unit="model")]
    small = {model["family"]: name for name, model in zip(p.models, models, strict=True) if model["work"] < LARGE}
    embedders = list(small.values()) or p.models[:1]
    briefly = _shortened(many, STEPS[0][1], {name: _batch_size(many, name, large=False) for name in embedders})
    judged = [task for task in p.tasks if TASKS[task].judges == "embeddings"]
    tasks = {task: _task(briefly, task, embedders) for task in bar(judged, unit="task")}
    record = {"machine": machine(), "study": p.study, "genes_per_cell": genes_per_cell, "start": start, "data": data}
    return {**record, "named": named, "models": models, "evaluated": EVALUATED[1], "tasks": tasks}


def _miniature(p: Params, n_cells: int, n_genes: int, genes_per_cell: float) -> Params:
    """The study with few simulated cells, of as many genes each, and one subset of each strategy that costs."""
    atlas = {"n_genes": n_genes, "composition": dict.fromkeys(TYPES, 1.0)}
    if p.simulation is None:
        atlas["counts_per_cell"] = _counts_for(atlas, genes_per_cell)
    else:
        given = p.simulation.model_dump()
        atlas = {**given, "composition": given["composition"] or atlas["composition"]}
    atlas["n_cells"], contexts = n_cells, list(atlas["composition"])[:CONTEXTS]
    columns = {"batch_key": "dataset_id", "perturbation_key": "condition", "control": simulate.CONTROL}
    columns["held_out_contexts"] = contexts
    ends = np.cumsum([n_cells, *EVALUATED]).tolist()
    sets = [{"file": f"simulated:{a}-{b}", "name": str(b - a), **columns} for a, b in pairwise(ends)]
    grid = {"strategies": ["random", "geometric_sketching"], "percentages": [25.0, 100.0], "seeds": [0], "workers": 1}
    changes = {"corpus": "simulated", "simulation": atlas, "evaluation": sets, **columns, **grid}
    return Params(**{**p.model_dump(exclude=LEFT_OUT), **changes})


def _counts_for(atlas: Record, genes_per_cell: float) -> float:
    """Counts that give a simulated cell so many genes."""
    counts = 2 * genes_per_cell
    for _ in range(3):
        made = simulate.Atlas(**atlas, counts_per_cell=counts)
        cells = simulate.Cells(simulate.truth(made)).block(0, simulate.CHUNK)
        counts *= (genes_per_cell / (cells.X.nnz / cells.n_obs)) ** 1.5
    return counts


def _start() -> float:
    """Seconds of a process before it does anything: the start of Python, and imports."""
    modules = "datawall.study.evaluation, datawall.models.base, datawall.reading.plots, scanpy, torch._dynamo, IPython"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _data(first: Study, few: Study, many: Study) -> Record:
    """Costs of curation, as lines by cell of the corpus; and bytes a cell. The first study only warms up."""
    parts = {
        "corpus": lambda study: study.corpus_artifact,
        "split": lambda study: study.dataset_artifact(study.held_out_name),
        "sketch": lambda study: study.X_pca,
        "geometric_sketching": lambda study: study.rows(Subset("geometric_sketching", 25.0, 0)),
        "dataset": lambda study: study.dataset_artifact(str(EVALUATED[study is many])),
        "tables": lambda study: [table(study) for table in TABLES],
    }
    lines = {}
    for name, make in parts.items():
        seconds = [_seconds(partial(make, study)) for study in (first, few, many)][1:]
        lines[name] = _line(EVALUATED if name == "dataset" else CELLS, seconds)
    rows = np.random.default_rng(0).permutation(CELLS[1])
    lines["read"] = [0.0, _seconds(lambda: many.corpus.counts(rows)) / CELLS[1]]
    dataset = many.dataset_artifact(str(EVALUATED[1]))
    size = {"corpus": many.corpus_artifact.n_bytes / CELLS[1], "dataset": dataset.n_bytes / EVALUATED[1]}
    return {**lines, "bytes": size}


def _model(study: Study, name: str, millions: float) -> Record:
    """What it costs to pretrain a model, once, by cell of the subset, by step and by cell of a step; and to embed.

    Four runs that differ in cells, steps and batch size tell these apart, after one that is not counted.
    """
    from scipy.optimize import nnls

    large, spec = millions > LARGE, study.params.specs[name]
    few, more = STEPS[large]
    batch = _batch_size(study, name, large=large)
    runs = [(25.0, few, batch), (25.0, few, batch), (100.0, few, batch)]
    if batch:
        runs += [(100.0, more, batch), (100.0, more, max(2, batch // 2))]
    terms, seconds = [], []
    for seed, (percentage, steps, size) in enumerate(runs):
        variant, run = _shortened(study, steps, {name: size}), Run(name, Subset("random", percentage, seed))
        terms.append([1, len(variant.rows(run.subset)), steps * bool(batch), steps * size])
        seconds.append(_seconds(partial(variant.model_artifact, run)))
    relative = 1 / np.array(seconds[1:])  # so that a long run's error counts no more than a short one's
    costs = nnls(np.array(terms[1:]) * relative[:, None], np.ones(len(relative)))[0].tolist()
    sizes, dataset, reconstruction = EMBEDDED[large], study.dataset(str(EVALUATED[1])), [0, 0]
    n_latent = variant.model(run).embed(dataset.X[:2]).shape[1]
    embedding = [_seconds(lambda n=n: variant.model(run).embed(dataset.X[:n])) for n in sizes]
    if "reconstruction" in study.params.tasks and evaluation.reconstructs(spec):

        def reconstruct(n: int) -> None:
            TASKS["reconstruction"].function(variant.model(run), dataset.X[:n], dataset.obs.iloc[:n], seed=0)

        reconstruction = [_seconds(partial(reconstruct, n)) for n in (2, *sizes)][1:]  # once to warm up
    record = {"family": spec.family, "work": millions, "n_latent": n_latent}
    record |= dict(zip(("once", "cell", "step", "step_cell"), costs, strict=True))
    return {**record, "embedding": _line(sizes, embedding), "reconstruction": _line(sizes, reconstruction)}


def _batch_size(study: Study, name: str, *, large: bool) -> int:
    """Cells of a model's step here; 0 if it takes none."""
    size = getattr(study.params.specs[name].hyperparameters, "batch_size", 0)
    return min(size, BATCH[large]) if training.device().type == "cpu" else size


def _shortened(study: Study, steps: int, batch_sizes: dict[str, int]) -> Study:
    """The study with so many steps, and for some models batches of so many cells."""
    changed = {}
    for name, size in batch_sizes.items():
        changed[name] = study.params.specs[name].hyperparameters.model_dump() | ({"batch_size": size} if size else {})
        if changed[name].get("ontology"):
            changed[name]["ontology"] = str(simulate.ONTOLOGY)  # the simulated types are in it, and the file is there
    values = {"steps": steps, "hyperparameters": {**study.params.hyperparameters, **changed}}
    return Study(Params(**{**study.params.model_dump(), **values}), study.folder)


def _task(study: Study, task: str, embedders: list[str]) -> Record:
    """By source, what a split or context of a task costs on the larger data set, and the power of cells it grows with.

    Baselines have their names; `model` is an embedding by a model, the mean over some.
    """
    costs = {name: _growth(study, task, [name]) for name in TASKS[task].baselines}
    runs = [Run(name, Subset("random", 100.0, LONGEST)) for name in embedders]
    return {**costs, "model": _growth(study, task, runs)}


def _growth(study: Study, task: str, sources: list[Run] | list[str]) -> list[float]:
    seconds = []
    for n_cells in (EVALUATED[0], *EVALUATED):  # once to warm up
        took = []
        for source in sources:
            for embedding in {source, "PCA"}:
                if isinstance(embedding, Run) or embedding in baselines.EMBEDDINGS:
                    study.embedding(embedding, str(n_cells))
            item, splits = Evaluation(task, str(n_cells), source), []
            whole = _seconds(lambda item=item, splits=splits: splits.extend(scoring.score(study, item)))
            took.append(whole / len(splits))
        seconds.append(max(float(np.mean(took)), 1e-6))
    _, fewer, more = seconds
    power = math.log(more / fewer) / math.log(EVALUATED[1] / EVALUATED[0])
    return [more, min(2.0, max(0.0, power))]


def _seconds(make: Callable[[], object]) -> float:
    """Seconds that a call takes, of this process or, on a GPU, by the clock."""
    clock = time.perf_counter if training.device().type == "cuda" else time.process_time
    begin = clock()
    make()
    return clock() - begin


def _line(sizes: tuple[int, int], seconds: list[float]) -> list[float]:
    """What a unit costs at no size, and for each of its size."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return [max(0.0, seconds[1] - slope * sizes[1]), slope]

"""What units of work cost on this machine: measured on a miniature of a study, at the true size of its models.

The miniature has the study's hyper-parameters, tasks and number of genes, some thousand simulated cells, and a few
optimiser steps. On a processor, seconds are those that one core computes, whatever else the machine does; on a GPU
they go by the clock. `run_all.py STUDY --calibrate` keeps the result for this user.
"""

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
import torch
from scipy.optimize import nnls
from tqdm import tqdm

from datawall.cells import datasets, simulate
from datawall.engine import disk, processes
from datawall.engine.store import Record
from datawall.models import training
from datawall.study import curation, evaluation
from datawall.study.costs import calibration_file, size_of, work
from datawall.study.params import Params
from datawall.study.records import Evaluation, Run, Subset
from datawall.study.study import Study
from datawall.tasks import TASKS, baselines

CELLS = 800, 3200  # of the miniature's corpora, of which 70 % are pretrained on
CONTEXTS = 2  # of perturbation response
EVALUATED = 1000, 4000  # cells of the data sets that tasks are timed on
TYPES = ["classical monocyte", "natural killer cell", "naive B cell", "regulatory T cell", "type II pneumocyte"]
LARGE = 50.0  # million multiplications a cell; of larger models
BATCH = 128, 4  # cells of a step at most on a processor, of other models and of large ones: cost is in proportion
STEPS = (20, 60), (1, 3)
EMBEDDED = EVALUATED, (16, 48)  # cells
LEFT_OUT = {  # keys of the study that are as by default in its miniature
    *("census", "spike_in", "min_genes", "min_counts", "max_mito", "cell_type_key", "donor_key", "split_by"),
    *("held_out", "held_out_tasks", "embeddings", "drop_contaminated", "also", "steps_by_model", "adaptive", "gpus"),
    *("labels", "treatments", "executor", "storage"),
}


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
        return f"GPU {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"one core of {names[0] if names else platform.machine()}, no GPU"


def _measure(p: Params, folder: Path) -> Record:
    studies = [Study(_miniature(p, n_cells), folder / str(i)) for i, n_cells in enumerate([CELLS[0], *CELLS])]
    many, size = studies[-1], size_of(studies[-1].params)
    record = {"machine": machine(), "study": p.study, "genes_per_cell": size[1], "evaluated": EVALUATED[1]}
    record |= {"start": _start(), "data": _data(*studies)}
    record["named"] = {name: _seconds(datasets.load, name) for name in p.sources() if name in datasets.DATASETS}
    bar = partial(tqdm, desc="calibration", leave=False)
    record["models"] = [_model(many, name, work(p.specs[name], *size)) for name in bar(p.models, unit="model")]
    # Tasks are timed on embeddings by the smallest network.
    by_work = sorted(p.models, key=lambda name: (not _batch_size(many, name), work(p.specs[name], *size)))
    judge = _shortened(many, STEPS[0][1], by_work[0], _batch_size(many, by_work[0]))
    run = Run(by_work[0], Subset("random", 100.0, 0))
    judged = [task for task in p.tasks if TASKS[task].judges == "embeddings"]
    return record | {"tasks": {task: _task(judge, task, run) for task in bar(judged, unit="task")}}


def _miniature(p: Params, n_cells: int) -> Params:
    """The study with few simulated cells, about as full as its own, and one subset of each strategy that costs."""
    n_genes, genes_per_cell = size_of(p)
    given = p.simulation or simulate.Atlas(n_genes=n_genes, counts_per_cell=2 * genes_per_cell)
    atlas = {**given.model_dump(), "n_cells": n_cells}
    atlas["composition"] = atlas["composition"] or dict.fromkeys(TYPES, 1.0)
    columns = {"batch_key": "dataset_id", "perturbation_key": "condition", "control": simulate.CONTROL}
    columns["held_out_contexts"] = list(atlas["composition"])[:CONTEXTS]
    ends = np.cumsum([n_cells, *EVALUATED]).tolist()
    sets = [{"file": f"simulated:{a}-{b}", "name": str(b - a), **columns} for a, b in pairwise(ends)]
    grid = {"strategies": ["random", "geometric_sketching"], "percentages": [25.0, 100.0], "seeds": [0], "workers": 1}
    changes = {"corpus": "simulated", "simulation": atlas, "evaluation": sets, **columns, **grid}
    return Params(**{**p.model_dump(exclude=LEFT_OUT), **changes})


def _start() -> float:
    """Seconds of a process before it does anything: the start of Python, and imports."""
    modules = "datawall.study.evaluation, datawall.models.base, datawall.reading.plots, scanpy, torch._dynamo, IPython"
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # of the user and of the system
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def _data(first: Study, few: Study, many: Study) -> Record:
    """Costs of curation, as lines by cell; and bytes a cell. The first study only warms up."""

    def curate(study: Study) -> None:
        study.rows(Subset("geometric_sketching", 25.0, 0))  # of the corpus, its split and its sketch
        study.contamination(study.params.held_out_name)
        curation.quality(study)
        curation.marker_expression(study)

    corpus = _line(CELLS, [_seconds(curate, study) for study in (first, few, many)][1:])
    named = zip((first, few, many), map(str, (EVALUATED[0], *EVALUATED)), strict=True)
    dataset = _line(EVALUATED, [_seconds(study.dataset_artifact, name) for study, name in named][1:])
    rows = np.random.default_rng(0).permutation(CELLS[1])
    read = [0.0, _seconds(many.corpus.counts, rows) / CELLS[1]]
    n_bytes = {"corpus": many.corpus_artifact.n_bytes / CELLS[1]}
    n_bytes["dataset"] = many.dataset_artifact(str(EVALUATED[1])).n_bytes / EVALUATED[1]
    return {"corpus": corpus, "dataset": dataset, "read": read, "bytes": n_bytes}


def _model(study: Study, name: str, millions: float) -> Record:
    """What it costs to pretrain a model, once, by cell of the subset, by step and by cell of a step; and to embed."""
    large, dataset = millions > LARGE, study.dataset(str(EVALUATED[1]))
    (few, more), batch = STEPS[large], _batch_size(study, name, large=large)
    # What differs in cells, steps and batch size tells costs apart; the first run warms up.
    runs = [(25.0, few, batch), (25.0, few, batch), (100.0, few, batch)]
    if batch:
        runs += [(100.0, more, batch), (100.0, more, max(2, batch // 2))]
    terms, seconds = [], []
    for seed, (percentage, steps, size) in enumerate(runs):
        variant, run = _shortened(study, steps, name, size), Run(name, Subset("random", percentage, seed))
        terms.append([1, len(variant.rows(run.subset)), steps * bool(batch), steps * size])
        seconds.append(_seconds(variant.model_artifact, run))
    relative = 1 / np.array(seconds[1:])  # so that a long run's error counts no more than a short one's
    costs = nnls(np.array(terms[1:]) * relative[:, None], np.ones(len(relative)))[0].tolist()

    def embed(n: int) -> np.ndarray:
        return variant.model(run).embed(dataset.X[:n])

    record = {"family": study.params.specs[name].family, "work": millions, "n_latent": embed(2).shape[1]}
    record["bytes"] = variant.model_artifact(run).n_bytes
    record |= dict(zip(("once", "cell", "step", "step_cell"), costs, strict=True))
    return record | {"embedding": _line(EMBEDDED[large], [_seconds(embed, n) for n in EMBEDDED[large]])}


def _batch_size(study: Study, name: str, *, large: bool = False) -> int:
    """Cells of a model's step here; 0 if it takes none."""
    size = study.costs.batch_size(name)
    return min(size, BATCH[large]) if training.device().type == "cpu" else size


def _shortened(study: Study, steps: int, name: str, batch_size: int) -> Study:
    """The study with so many steps and, for a model, batches of so many cells."""
    changed = study.params.specs[name].hyperparameters.model_dump() | ({"batch_size": batch_size} if batch_size else {})
    if changed.get("ontology"):
        changed["ontology"] = str(simulate.ONTOLOGY)  # the simulated types are in it, and the file is there
    values = {"steps": steps, "hyperparameters": {**study.params.hyperparameters, name: changed}}
    return Study(Params(**{**study.params.model_dump(), **values}), study.folder)


def _task(study: Study, task: str, run: Run) -> Record:
    """By baseline, or `model` for a run: what a split costs on the larger set, and the power of cells it grows by."""
    costs = {}
    for name, source in [*((name, name) for name in TASKS[task].baselines), ("model", run)]:
        seconds = []
        for n_cells in map(str, (EVALUATED[0], *EVALUATED)):  # once to warm up
            for embedding in {source, "PCA"}:
                if isinstance(embedding, Run) or embedding in baselines.EMBEDDINGS:
                    study.embedding(embedding, n_cells)
            splits = []
            whole = _seconds(splits.extend, evaluation.score(study, Evaluation(task, n_cells, source)))
            seconds.append(max(whole / len(splits), 1e-6))
        power = math.log(seconds[2] / seconds[1]) / math.log(EVALUATED[1] / EVALUATED[0])
        costs[name] = [seconds[2], min(2.0, max(0.0, power))]
    return costs


def _seconds(make: Callable[..., object], *given: object) -> float:
    """Seconds that a call takes, of this process or, on a GPU, by the clock."""
    clock = time.perf_counter if training.device().type == "cuda" else time.process_time
    begin = clock()
    make(*given)
    return clock() - begin


def _line(sizes: tuple[int, int], seconds: list[float]) -> list[float]:
    """What a unit costs at no size, and for each of its size."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return [max(0.0, seconds[1] - slope * sizes[1]), slope]

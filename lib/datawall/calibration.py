"""What units of work cost on this machine: measured on a miniature of a study, at the true size of its models.

The miniature has the study's hyper-parameters, tasks and number of genes, some thousand simulated cells, and a few
optimiser steps. Its units are timed as they are made: seconds of one processor core or, on a GPU, by the clock.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from datawall import corpus, curation, evaluation, hyperparameters, paths, processes, scoring, simulate, store, training
from datawall.curated import Subset
from datawall.params import Params
from datawall.store import Artifact, Record
from datawall.study import Run, Study

SHIPPED = paths.PACKAGE_DATA / "calibration.json"
GENES_PER_CELL = 1_660.0  # of scTab
CELLS = 800, 3200  # of the miniature's corpora, of which 70 % are pretrained on
STEPS = 2, 6  # of its runs
BATCH = {"Geneformer": 4, "SSL": 512, "scVI": 512}  # cells a step at most on a processor, where cost is in proportion
EVALUATED = 500, 1500  # cells of the data sets that tasks are timed on,
EMBEDDED = 24, 72  # and of those that each model embeds
TIMED = Run("PretrainedPCA", Subset("random", 100.0, 0))  # whose embedding tasks are timed on; whose matters little
TYPES = ["classical monocyte", "natural killer cell", "naive B cell", "regulatory T cell", "type II pneumocyte"]


def calibration_file() -> Path:
    """Where this user's calibration is kept."""
    return paths.cache_folder() / "calibration.json"


@cache
def known() -> Record:
    """Costs as calibrated by this user, or else those that come along, of another machine."""
    return json.loads((calibration_file() if calibration_file().exists() else SHIPPED).read_text())


def calibrate(p: Params) -> Record:
    """Measure what the units of a study cost on this machine, and keep it for this user's plans.

    Models of earlier calibrations on this machine are kept too, so that a plan finds the one that is most alike.
    """
    processes.use_one_thread()
    with tempfile.TemporaryDirectory(prefix="datawall-") as folder:
        measured = _measure(p, Path(folder))
    if calibration_file().exists():
        before = json.loads(calibration_file().read_text())
        if before["machine"] == measured["machine"]:
            now = [(each["family"], each["work"]) for each in measured["models"]]
            measured["models"] += [each for each in before["models"] if (each["family"], each["work"]) not in now]
    store.write_json(calibration_file(), measured)
    known.cache_clear()
    return measured


def machine() -> str:
    """What is timed here, in words."""
    if training.device().type == "cuda":
        import torch

        return f"GPU {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"one core of {names[0] if names else platform.machine()}"


def size_of(p: Params) -> tuple[int, float]:
    """Genes of a study's corpus, and how many of them a cell has counts of, as far as can be told beforehand."""
    if p.simulation is None:
        return len(corpus.gene_table()), GENES_PER_CELL
    return p.simulation.n_genes, _genes_per_cell(p.simulation)


def _genes_per_cell(atlas: simulate.Atlas) -> float:
    cells = simulate.Cells(simulate.truth(atlas)).block(0, simulate.CHUNK)
    return cells.X.nnz / cells.n_obs


def work(p: Params, model: str, n_genes: int, genes_per_cell: float) -> float:
    """Multiplications for one cell on its way through a model, in millions: with it grows what a step costs."""
    h = p.hyperparameters_of(model)
    if hasattr(h, "max_length"):  # a transformer
        share = 1.0 if h.n_genes is None else min(1.0, h.n_genes / n_genes)
        length = min(h.max_length, genes_per_cell * share)
        per_token = h.n_layers * (8 * h.n_embd**2 + 2 * length * h.n_embd) + 0.15 * n_genes * share * h.n_embd
        return length * per_token / 1e6
    if not hasattr(h, "n_hidden"):
        return genes_per_cell / 1e6
    widths = h.n_hidden if isinstance(h.n_hidden, list) else [h.n_hidden] * h.n_layers
    inner = sum(a * b for a, b in zip(widths, [*widths[1:], h.n_latent], strict=True))
    return (widths[0] * (genes_per_cell + n_genes) + 2 * inner) / 1e6


def _measure(p: Params, folder: Path) -> Record:
    n_genes, genes_per_cell = size_of(p)
    few, many = (Study(_miniature(p, n_cells, n_genes, genes_per_cell), folder) for n_cells in CELLS)
    return {
        "machine": machine(),
        "genes_per_cell": genes_per_cell,
        "start": _start(),
        "data": _data(few, many),
        "models": [_model(many, name, work(p, name, n_genes, genes_per_cell)) for name in p.every_model()],
        "tasks": {task: _task(many, task) for task in p.tasks if task != "reconstruction"},
    }


def _miniature(p: Params, n_cells: int, n_genes: int, genes_per_cell: float) -> Params:
    """The study with few simulated cells, of as many genes each, and few steps."""
    atlas = {"n_genes": n_genes, "composition": dict.fromkeys(TYPES, 1.0), "n_cells": n_cells}
    if p.simulation is None:
        atlas["counts_per_cell"] = _counts_for(atlas, genes_per_cell)
    else:
        atlas = {**p.simulation.model_dump(), "n_cells": n_cells}
    columns = {"batch_key": "dataset_id", "perturbation_key": "condition", "control": simulate.CONTROL}
    ends = np.cumsum([n_cells, *EVALUATED, *EMBEDDED]).tolist()
    sets = [{"file": f"simulated:{a}-{b}", "name": str(b - a), **columns} for a, b in pairwise(ends)]
    given = {name: p.hyperparameters_of(name).model_dump() for name in p.every_model()}
    for name, values in given.items():
        if training.device().type == "cpu" and (most := BATCH.get(hyperparameters.family(name))):
            values["batch_size"] = min(values["batch_size"], most)
        values |= {"keep": "last"} if "keep" in values else {}  # no looks at held-out cells in every other step
    changes = {
        "corpus": "simulated", "simulation": atlas, "census": None, "spike_in": None, "min_genes": 0, "min_counts": 0,
        "max_mito": 1.0, **columns, "cell_type_key": "cell_type", "donor_key": "donor_id", "split_by": "cell",
        "held_out": 0.3, "held_out_tasks": [], "held_out_contexts": None, "evaluation": sets, "embeddings": [],
        "drop_contaminated": False, "also": [], "strategies": ["random", "geometric_sketching"],
        "percentages": [25.0, 100.0], "seeds": [0], "models": list(dict.fromkeys([TIMED.model, *given])),
        "hyperparameters": given, "steps": STEPS[0], "steps_by_model": {}, "splits": 1, "finetuned_splits": 1,
        "gpus": {}, "workers": 1,
    }  # fmt: skip
    return Params(**{**p.model_dump(), **changes})


def _counts_for(atlas: Record, genes_per_cell: float) -> float:
    """Counts that give a simulated cell so many genes."""
    counts = 2 * genes_per_cell
    for _ in range(3):
        counts *= (genes_per_cell / _genes_per_cell(simulate.Atlas(**atlas, counts_per_cell=counts))) ** 1.5
    return counts


def _data(few: Study, many: Study) -> Record:
    """Costs of curation, as lines by cell of the corpus or of those pretrained on; and bytes a cell."""
    drawn = Subset("geometric_sketching", 25.0, 0)
    made = {
        "corpus": lambda study: study.corpus_artifact,
        "split": lambda study: study.dataset_artifact(study.held_out_name),
        "sketch": lambda study: study.X_pca is not None and study.store.find(study.sketch_unit),
        "geometric_sketching": lambda study: len(study.rows(drawn)) and study.store.find(study.subset_unit(drawn)),
    }
    lines = {name: _line(CELLS, [_seconds(make(study)) for study in (few, many)]) for name, make in made.items()}
    lines["tables"] = _line(CELLS, [_timed(lambda study=study: _tables(study))[0] for study in (few, many)])
    rows = np.random.default_rng(0).permutation(CELLS[1])
    lines["read"] = [0.0, _timed(lambda: many.corpus.counts(rows))[0] / CELLS[1]]
    dataset = many.dataset_artifact(str(EVALUATED[1]))
    lines["dataset"] = [0.0, _seconds(dataset) / EVALUATED[1]]
    return {
        **lines,
        "bytes": {"corpus": _bytes(many.corpus_artifact) / CELLS[1], "dataset": _bytes(dataset) / EVALUATED[1]},
    }


def _start() -> float:
    """What a notebook costs before it does anything: the start of its process, and its imports."""
    import resource
    import subprocess
    import sys

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    imports = "import datawall.evaluation, datawall.models, datawall.plots, IPython"
    subprocess.run([sys.executable, "-c", imports], check=True)
    return spent() - before


def _tables(study: Study) -> None:
    """What the curation notebook computes of every cell."""
    curation.quality(study)
    curation.marker_expression(study)
    curation.contamination(study)


def _model(study: Study, name: str, millions: float) -> Record:
    """What it costs to pretrain a model, once, by cell of the subset, by step and by cell of a step; and to embed.

    Four runs that differ in cells, steps and batch size tell these apart.
    """
    from scipy.optimize import nnls

    given = study.params.hyperparameters[name]
    batch_size = given.get("batch_size", 0)
    runs = [(25.0, STEPS[0], batch_size), (100.0, STEPS[0], batch_size), (100.0, STEPS[1], batch_size)]
    runs += [(100.0, STEPS[1], max(2, batch_size // 4))]
    terms, seconds = [], []
    for percentage, steps, batch in runs if batch_size else runs[:2]:
        changed = {name: {**given, "batch_size": batch}} if batch_size else {name: given}
        values = {"steps": steps, "hyperparameters": {**study.params.hyperparameters, **changed}}
        variant, run = Study(study.params.model_copy(update=values), study.folder), _run(name, percentage)
        artifact = variant.model_artifact(run)
        terms.append([1, len(variant.rows(run.subset)), steps * bool(batch_size), steps * batch])
        seconds.append(_seconds(artifact))
    relative = 1 / np.array(seconds)  # so that a long run's error counts no more than a short one's
    costs = nnls(np.array(terms) * relative[:, None], np.ones(len(seconds)))[0].tolist()
    embedded = [study.embedding(_run(name, 100.0), str(n)) for n in EMBEDDED]
    units = [study.embedding_unit(_run(name, 100.0), str(n)) for n in EMBEDDED]
    return {
        "family": hyperparameters.family(name),
        "work": millions,
        **dict(zip(("once", "cell", "step", "step_cell"), costs, strict=True)),
        "embedding": _line(EMBEDDED, [_seconds(study.store.find(unit)) for unit in units]),
        "n_latent": embedded[0].shape[1],
        "bytes": _bytes(artifact),
    }


def _run(model: str, percentage: float) -> Run:
    return Run(model, Subset("random", percentage, 0))


def _task(study: Study, task: str) -> Record:
    """By source, what a task costs at the greater of two sizes, and the power of the cells with which that grows.

    The source `model` is any embedding; baselines have their names. Perturbation response is counted by context.
    `first` is what the first evaluation of a data set costs a process beside.
    """
    seconds: dict[str, list[float]] = {"first": []}
    for n_cells in EVALUATED:
        for one in evaluation.evaluations(study, task):
            if one.dataset != str(n_cells) or (isinstance(one.source, Run) and one.source != TIMED):
                continue
            if isinstance(one.source, Run) or one.source in scoring.EMBEDDING_BASELINES:
                study.embedding(one.source, one.dataset)
            took, splits = _timed(lambda one=one: list(scoring.score(study, one)))
            if isinstance(one.source, Run):
                first = took
                took, splits = _timed(lambda one=one: list(scoring.score(study, one)))
                seconds["first"].append(max(0.0, first - took))
            name = "model" if isinstance(one.source, Run) else one.source
            seconds.setdefault(name, []).append(took / (len(splits) if task == "perturbation_response" else 1))
    return {name: [b, _power(a, b)] for name, (a, b) in seconds.items()}


def _power(fewer: float, more: float) -> float:
    """With which power of the cells a cost grows between the two sizes; from 0 to 2."""
    growth = math.log(max(more, 1e-6) / max(fewer, 1e-6)) / math.log(EVALUATED[1] / EVALUATED[0])
    return min(2.0, max(0.0, growth))


def _timed[Made](make: Callable[[], Made]) -> tuple[float, Made]:
    """Seconds that a call takes, of this process or, on a GPU, by the clock; and what it returns."""
    clock = time.perf_counter if training.device().type == "cuda" else time.process_time
    begin = clock()
    made = make()
    return clock() - begin, made


def _seconds(artifact: Artifact) -> float:
    """What an artifact took to make."""
    return artifact.made["seconds" if training.device().type == "cuda" else "cpu_seconds"]


def _bytes(artifact: Artifact) -> int:
    return sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())


def _line(sizes: tuple[int, int], seconds: list[float]) -> list[float]:
    """What a unit costs at no size, and for each of its size."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return [max(0.0, seconds[1] - slope * sizes[1]), slope]

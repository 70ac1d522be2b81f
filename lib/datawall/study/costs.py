"""What a unit of work costs: seconds, memory and disk, predicted from a calibration (see `calibration`).

A pretraining run costs once, for each cell of its subset, for each step and for each cell of a step, the last two in
proportion to the multiplications of the model (`work`); an embedding, a line in cells, in that proportion; a task, a
power of the cells of the data set, times its splits, or its treatments and contexts; curation, a line in the corpus's
cells. What reads counts grows with the genes that a cell has.
"""

import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datawall import tasks
from datawall.cells import backed, corpus, datasets, simulate
from datawall.engine import paths
from datawall.engine.processes import Need
from datawall.engine.store import Record
from datawall.models.hyperparameters import ModelSpec
from datawall.study import joining
from datawall.study.params import Params
from datawall.study.records import Evaluation, Run, Source

SHIPPED = paths.PACKAGE_DATA / "calibration"  # measured elsewhere, each names its machine
DEFAULT = "quick"  # the study whose calibration stands in for others
BASE_GIB = 0.8  # of a process that has loaded torch and scanpy
BYTES_PER_COUNT = 8  # in memory
VARIABLE_GENES = 2000  # that baselines hold dense
BYTES_PER_STEP = 12  # of a history
SCTAB_CELLS = 22_190_622  # of the default recipe of the Census,
GENES_PER_CELL = 1_660.0  # and genes of which such a cell has counts
RECONSTRUCTION = 5  # times an embedding of the same cells
CONTEXTS = 4  # of perturbation response, where the study does not name those to hold out
FLOPS = 20e12  # of a GPU, sustained: assumed where none was calibrated
MASKED = 0.15  # of a cell's tokens are predicted
TRAINED = 6e6  # operations of a million multiplications: each is followed by an addition; there once, back twice


def calibration_file(study: str) -> Path:
    """Where this user's calibration for a study is kept."""
    return paths.cache_folder() / "calibration" / f"{study}.json"


def calibration_of(study: str) -> Record:
    """A study's calibration: this user's, else the one that comes along, else that of the default study."""
    files = calibration_file(study), SHIPPED / f"{study}.json", SHIPPED / f"{DEFAULT}.json"
    return json.loads(next(path for path in files if path.exists()).read_text(encoding="utf-8"))


def size_of(p: Params) -> tuple[int, float]:
    """Genes of a study's corpus, and of how many of them a cell has counts, as far as can be told beforehand."""
    if p.simulation is None:
        dataset = datasets.DATASETS.get(p.sources()[0])
        return len(corpus.gene_table()), (dataset and dataset.genes_per_cell) or GENES_PER_CELL
    cells = simulate.Cells(simulate.truth(p.simulation)).block(0, simulate.CHUNK)
    return p.simulation.n_genes, cells.X.nnz / cells.n_obs


def work(spec: ModelSpec, n_genes: int, genes_per_cell: float, n_tokens: float = 0) -> float:
    """Multiplications for one cell on its way through a model, in millions: with it grows what a step costs."""
    h = spec.hyperparameters
    if spec.is_external or not hasattr(h, "n_genes"):
        return genes_per_cell / 1e6
    share = min(h.n_genes or n_genes, n_genes) / n_genes  # of the corpus's genes, those in the panel
    if hasattr(h, "max_length"):  # a transformer
        length = n_tokens or min(h.max_length, genes_per_cell * share)  # where tokens were not counted
        per_token = h.n_layers * (8 * h.n_embd**2 + 2 * length * h.n_embd) + MASKED * n_genes * share * h.n_embd
        return length * per_token / 1e6
    widths = h.n_hidden if isinstance(h.n_hidden, list) else [h.n_hidden] * h.n_layers
    others = sum(a * b for a, b in zip(widths, [*widths[1:], h.n_latent], strict=True))  # but for an encoder's first
    return (widths[0] * share * (genes_per_cell + n_genes) + 2 * others) / 1e6  # there and back


def speed(spec: ModelSpec, n_genes: int, genes_per_cell: float, history: Any) -> Record:
    """How fast a model was trained, and where: seconds of its steps, their cells, tokens and operations, by `work`."""
    import torch

    n_cells, is_transformer = history.n_timed, not spec.is_external and hasattr(spec.hyperparameters, "max_length")
    n_tokens = round(history.n_averaged / MASKED) if is_transformer else 0
    millions = 0.0 if spec.is_external else work(spec, n_genes, genes_per_cell, n_tokens / max(n_cells, 1))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {"machine": machine, "gpus": history.n_processes, "seconds": round(history.seconds, 3)}
    return record | {"cells": n_cells, "tokens": n_tokens, "operations": TRAINED * millions * n_cells}


class Costs:
    """The costs of a study's units, one core or GPU each, by what is known: its calibration, unless one is given."""

    def __init__(self, p: Params, known: Record | None = None) -> None:
        self.p, self.known = p, known or calibration_of(p.study)
        self.on_gpu = self.known["machine"].startswith("GPU")
        self.sets = p.evaluation_sets()
        self.size = size_of(p)  # genes of the corpus, and of how many of them a cell has counts
        self.density = self.size[1] / self.known["genes_per_cell"]  # counts of a cell, relative to the calibration's

    @cached_property
    def n_cells(self) -> int:
        """Cells of the corpus, before any is filtered out; raises as `backed.CellFile` does."""
        if self.p.simulation is not None:
            return self.p.simulation.n_cells
        return SCTAB_CELLS if self.p.census is not None else sum(map(_cells_in, self.p.sources()))

    @property
    def n_pretraining(self) -> float:
        """Cells that are not held out."""
        return self.n_cells * (1 - self.p.held_out)

    @cached_property
    def cells_of_set(self) -> dict[str, int]:
        """Cells of each evaluation data set."""
        cells = {dataset.dataset: dataset.n_cells or _cells_in(dataset.file) for dataset in self.p.evaluation}
        return cells | {self.p.held_out_name: round(self.n_cells * self.p.held_out)}

    def run(self, run: Run) -> Need:
        """Pretraining a model."""
        cost = self.model(run.model)[0]
        n_cells, steps = self.n_pretraining * run.subset.percentage / 100, self.steps(run)
        bytes_of_counts = 2 * n_cells * self.size[1] * BYTES_PER_COUNT
        streamed = bytes_of_counts > self.p.memory_gib * 2**30
        read = self.line("read", 1) * self.batch_size(run.model) if streamed else 0
        seconds = cost["once"] + cost["cell"] * self.density * n_cells + steps * (self.step_seconds(run.model) + read)
        in_memory = min(bytes_of_counts / 2**30, self.p.memory_gib)
        memory = BASE_GIB + in_memory + 4 * self.model_bytes(run.model) / 2**30  # and an optimiser's
        return Need(0 if run.subset.untrained else self._gpus(run.model), memory, seconds)

    def evaluation(self, evaluation: Evaluation, *, embedded: bool = False) -> Need:
        """A task, and the embedding that it is of, unless that is there already."""
        n_cells, source = self.cells_of_set[evaluation.dataset], evaluation.source
        if tasks.TASKS[evaluation.task].judges == "models":
            seconds = RECONSTRUCTION * self._embedding_seconds(source, min(joining.RECONSTRUCTED, n_cells))
        else:
            seconds = self._scoring_seconds(evaluation, n_cells)
            seconds += 0 if embedded else self._embedding_seconds(source, n_cells)
        per_cell = 2 * self.size[1] * BYTES_PER_COUNT + 8 * VARIABLE_GENES
        per_cell += 4 * self.p.perturbation_genes * (evaluation.task == "perturbation_response")
        gpus = self._gpus(source.model) if isinstance(source, Run) else 0
        return Need(min(1, gpus), BASE_GIB + n_cells * per_cell / 2**30, seconds)

    def _gpus(self, model: str) -> int:
        """GPUs that a model asks for: as named; else one if it takes steps, none if not."""
        return self.p.gpus_of(model, otherwise=int(self.batch_size(model) > 0))

    def _embedding_seconds(self, source: Source, n_cells: int) -> float:
        if not isinstance(source, Run):
            return 0.0
        cost, scale = self.model(source.model)
        return cost["embedding"][0] + cost["embedding"][1] * scale * n_cells

    def _scoring_seconds(self, evaluation: Evaluation, n_cells: int) -> float:
        task, source = tasks.TASKS[evaluation.task], evaluation.source
        if task.name == "zeroshot_integration":
            n_cells = min(n_cells, self.p.integration_cells or n_cells)
        costs = self.known["tasks"].get(task.name, {"model": [0.0, 1.0]})
        seconds, power = costs.get(source if isinstance(source, str) else "model", costs["model"])
        return seconds * (n_cells / self.known["evaluated"]) ** power * self._times(evaluation, n_cells)

    def _times(self, evaluation: Evaluation, n_cells: int) -> int:
        """How often a task is done on a data set: once, or once a split, or once a treatment and context held out."""
        task, dataset = tasks.TASKS[evaluation.task], self.sets[evaluation.dataset]
        if task.repeated == "by context":
            return self._n_treatments(evaluation.dataset) * len(dataset.held_out_contexts or range(CONTEXTS))
        by_donor = (dataset.donor_key or self.p.donor_key) is not None
        return 1 if task.repeated == "once" else joining.n_splits(self.p, task.name, n_cells) * (1 + by_donor)

    @cache  # noqa: B019 - as long as its study
    def _n_treatments(self, name: str) -> int:
        """Treatments that are judged: those named, or as many as there are in files, up to the number; else one."""
        dataset, values = self.sets[name], set()
        if not isinstance(dataset.treatments, int):
            return len(dataset.treatments)
        held_out = name == self.p.held_out_name
        for file in filter(backed.names_file, self.p.sources() if held_out else [dataset.file]):
            if dataset.n_cells is None:
                key = self.p.key("perturbation", file) if held_out else dataset.perturbation_key
                with backed.CellFile(datasets.file(file)) as cells:
                    values.update(cells.column(key, "perturbation", 0, cells.n_cells))
        return min(dataset.treatments, max(1, len(values) - 1))

    def line(self, what: str, n: float) -> float:
        """Seconds of a part of curation, of so many cells."""
        once, per_cell = self.known["data"][what]
        return once + per_cell * n * self.density

    @cache  # noqa: B019
    def model(self, name: str) -> tuple[Record, float]:
        """The calibrated model of the family that is most alike, and how many times its work this one is."""
        spec = self.p.specs[name]
        if not (alike := [model for model in self.known["models"] if model["family"] == spec.family]):
            nothing = dict.fromkeys(("once", "cell", "step", "step_cell", "n_latent", "bytes"), 0)
            return {**nothing, "embedding": [0, 0]}, 1.0  # of the user's own
        millions = work(spec, *self.size)
        nearest = min(alike, key=lambda model: abs(np.log(model["work"] / millions)))
        return nearest, millions / nearest["work"]

    def model_bytes(self, name: str) -> int:
        """A model on disk, and its weights in memory."""
        cost, scale = self.model(name)
        return round(cost.get("bytes", 0) * scale)  # calibrations of version 0.2 have none

    def steps(self, run: Run) -> int:
        """Optimiser steps of a run: none of an untrained model, or of one that takes no batches."""
        trains = not run.subset.untrained and self.batch_size(run.model)
        return self.p.steps_of(run.model, run.budget) if trains else 0

    def batch_size(self, model: str) -> int:
        """Cells a step; 0 for a model that takes no steps."""
        spec = self.p.specs[model]
        return 0 if spec.is_external else getattr(spec.hyperparameters, "batch_size", 0)

    def step_seconds(self, model: str) -> float:
        """Of an optimiser step; 0 for a model that takes none."""
        cost, scale = self.model(model)
        return (cost["step"] + cost["step_cell"] * self.batch_size(model)) * scale

    @cache  # noqa: B019
    def operations(self, model: str) -> float:
        """Of training a model with one cell; 0 if it takes no steps."""
        return TRAINED * work(self.p.specs[model], *self.size) if self.batch_size(model) else 0.0

    def gpu_hours(self, need: Need, source: Source, n_trained: float) -> float:
        """Of a unit, as calibrated, or those of a GPU of `FLOPS` that trains its model with so many cells."""
        operations = self.operations(source.model) if isinstance(source, Run) else 0.0
        return (need.gpus * need.seconds if self.on_gpu else n_trained * operations / FLOPS) / 3600


def _cells_in(name: str) -> int:
    """Cells of a data set: a named one, a file, or some of a simulated atlas."""
    if simulated := simulate.cells_named(name):
        return len(simulated)
    if name in datasets.DATASETS:
        return datasets.DATASETS[name].n_cells or datasets.load(name).n_obs
    with backed.CellFile(datasets.file(name)) as file:
        return file.n_cells

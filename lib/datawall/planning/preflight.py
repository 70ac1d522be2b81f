"""What a study will do and what would stop it, found out before hours are spent: `run_all.py --check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datawall.cells import sampling
from datawall.cells.corpus import CorpusError
from datawall.cells.datasets import DatasetError
from datawall.models import external
from datawall.planning import inspection
from datawall.planning import plan as planning
from datawall.planning.starter import FEW
from datawall.study import assembly, joining, params
from datawall.study.params import Params
from datawall.study.study import Study
from datawall.study.units import EvaluationSet
from datawall.tasks import TASKS

CONTEXTS = 3  # of perturbation response; when one is held out, two are too few to learn from
RARE = 10  # held-out cells; on fewer, a type or context is judged by chance


@dataclass
class Findings:
    """What a check found, a line each."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what would stop the study


def check(path: Path, overrides: dict[str, Any] | None = None) -> Findings:
    """Read every data set that a study file names, as the run would, and say what the study will do.

    A first look, in which counts are sampled, collects mistakes. If there are none, all cells are read by the code
    that a run reads them with, counted as it counts them, and split as it splits them. A simulated corpus is not
    made, a Census not opened, and clusters that stand in for types are not sought.
    """
    try:
        p = params.read(path, overrides)
    except params.ParamsError as error:
        return Findings(errors=str(error).splitlines())
    findings = Findings()
    if p.census is not None:
        findings.facts.append("corpus: selected from the CELLxGENE Census when the study runs")
    elif p.simulation is not None:
        findings.facts.append(f"corpus: {p.simulation.n_cells:,} simulated cells")
        _subsets(p, round(p.simulation.n_cells * (1 - p.held_out)), findings)
    else:
        _look(p, findings)
        if not findings.errors:
            _read(p, findings)
    findings.facts.append(f"tasks: {', '.join(p.tasks)}")
    for task in (task for name, task in TASKS.items() if name not in p.tasks):
        lacking = [key for key in task.needs if getattr(p, key) is None]
        findings.facts.append(f"left out: {task.name}" + (f", which needs {' and '.join(lacking)}" if lacking else ""))
    study = Study(p, Path())
    findings.facts += (f"work: {line}" for line in planning.counts_in_words(study))
    if not findings.errors:
        said, enough = planning.verdicts_to_expect(p)
        (findings.facts if enough else findings.warnings).append(f"verdicts: {said}")
        passes = planning.passes(study)
        if few := ", ".join(f"{name} {n:.2g}" for name, n in passes.items() if n < 1):
            what = f"a cell of the full corpus is drawn less than once on average ({few} times)"
            findings.warnings.append(f"{what}: raise steps, or verdicts will be the budget's.")
        if passes and p.budget_check is None:
            findings.warnings.append("budget_check is not set: whether twice the steps would help stays unknown.")
    return findings


def _look(p: Params, findings: Findings) -> None:
    """Look into every data set and its columns, and collect what is wrong."""
    keys = {name: {role: p.key(role, name) for role in p.columns()} for name in p.sources()}
    found = [_look_into(p, name, keys[name], "corpus", findings) for name in keys]
    of_all = {role: set().union(*(labels[role] for labels in found)) for role in set(found[0]).intersection(*found)}
    if "perturbation_response" in p.tasks and "perturbation" in of_all:
        try:
            joining.check_treatments(sorted(of_all["perturbation"]), p.control, p.treatments)
            if "cell_type" in of_all:
                joining.check_contexts(p, {p.labels.get(name, name) for name in of_all["cell_type"]})
        except CorpusError as error:
            findings.errors.append(f"{p.perturbation_key}: {error}")
    for dataset in p.evaluation:
        columns = assembly.dataset_columns(p, dataset.dataset, there=())
        found.append(_look_into(p, dataset.file, columns, f"evaluation set {dataset.dataset}", findings))
    if p.spike_in is not None:
        _look_into(p, p.spike_in, {}, "cells to spike in", findings)
    elif unused := sorted(set(p.labels).difference(*(labels.get("cell_type", ()) for labels in found))):
        findings.warnings.append(f"labels: no cell is of the types {unused}; correct them, or leave them out.")


def _look_into(p: Params, name: str, keys: dict[str, str], what: str, findings: Findings) -> dict[str, set[str]]:
    """Look into a data set; the labels of its sound columns by role."""
    try:
        looked = inspection.look(name, keys.values(), others=False, min_matched=p.min_matched_genes)
    except (CorpusError, DatasetError) as error:
        findings.errors.append(str(error))
        return {}
    findings.facts.append(f"{what}: {looked}")
    findings.errors += looked.faults(dict.fromkeys(keys.values()))
    return {role: set(map(str, looked.obs[key].unique())) for role, key in keys.items() if not looked.faults([key])}


def _read(p: Params, findings: Findings) -> None:
    """Read all cells as the run does; what it has of them, and what it can be judged by."""
    reports: dict[str, Any] = {}
    try:
        labels, n_spike_in = [], 0
        for block in assembly.read_corpus(p, reports):
            labels.append(block.obs)
        obs = pd.concat(labels)
        if p.spike_in is not None:
            n_spike_in = sum(perturbed.n_obs for perturbed in assembly.read_spike_in(p, block, reports))
        findings.warnings += reports["notes"]
        became = reports["cells"].drop(columns="dataset").sum()
        told = ", ".join(f"{n:,} {what}" for what, n in became.items() if n or what == "kept")
        findings.facts.append(f"cells of the corpus: {told}")
        held_out = assembly.held_out(p, obs)
        if held_out.all():
            findings.errors.append(f"{p.study}: no cell of the corpus is left to pretrain on; hold out less.")
            return
        _labels(p, obs, held_out, findings)
        _subsets(p, int((~held_out).sum()), findings, n_spike_in)
        sets = {p.held_out_name: obs[held_out]}
        for name in [dataset.dataset for dataset in p.evaluation]:
            aligned, _, notes = assembly.read_dataset(p, name, block.var)
            findings.warnings += notes
            sets[name] = aligned.obs
    except (CorpusError, DatasetError, ValueError) as error:
        findings.errors.append(str(error))
        return
    _tasks(p, sets, findings)
    for given in p.embeddings:
        try:
            external.read_embedding(given.file, given.obsm_key, sets[given.dataset].index, given.dataset)
        except ValueError as error:
            findings.errors.append(str(error))
    if p.drop_contaminated:
        findings.facts.append("pretraining leaves out cells and donors of evaluation sets: sizes will be smaller")


def _labels(p: Params, obs: pd.DataFrame, held_out: np.ndarray, findings: Findings) -> None:
    """What the labels of the corpus are, and who is held out."""
    for role in (role for role in obs if role in p.columns()):
        counts = obs[role].value_counts().loc[lambda n_cells: n_cells > 0]
        rarest = f"; the rarest is {counts.index[-1]!r} with {counts.iloc[-1]:,} cells" if len(counts) > 1 else ""
        findings.facts.append(f"{role.removesuffix('_id').replace('_', ' ')}: {len(counts)} values{rarest}")
        if role == "cell_type" and len(counts) > inspection.MANY:
            key = p.key(role, p.sources()[0])
            findings.warnings.append(f"{key!r} has {len(counts):,} cell types; is it the column?")
    whose = ""
    if p.split_role:
        groups = sorted(obs.loc[held_out, p.split_role].astype(str).unique())
        whose = f", those of {', '.join(groups[:5])}{', …' if len(groups) > 5 else ''}"
        if not p.held_out / 2 <= (share := held_out.mean()) <= 2 * p.held_out:
            findings.warnings.append(f"{share:.0%} of the cells are held out, not {p.held_out:.0%}: groups stay whole.")
    findings.facts.append(f"held out: {held_out.sum():,} cells{whose}")
    if "cell_type" in obs:
        _few(obs.loc[held_out, "cell_type"].value_counts(), "cell types", findings)


def _subsets(p: Params, n_pretraining: int, findings: Findings, n_spike_in: int | None = None) -> None:
    """Sizes of the subsets; raises ValueError if there are too few cells to spike in."""
    sizes = {percentage: sampling.subset_size(n_pretraining, percentage) for percentage in sorted(p.percentages)}
    listed = ", ".join(f"{percentage:g} % is {size:,}" for percentage, size in sizes.items())
    findings.facts.append(f"subsets of {n_pretraining:,} cells: {listed}")
    if small := ", ".join(f"{percentage:g} %" for percentage, size in sizes.items() if size < FEW):
        findings.warnings.append(f"under {FEW} cells to pretrain on at {small}; larger percentages teach more.")
    for subset in (subset for subset in p.subsets() if not subset.untrained and n_spike_in is not None):
        if spiked := sampling.STRATEGIES[subset.strategy].spiked:
            size = sampling.subset_size(n_pretraining, subset.percentage)
            sampling.spike_in(size, n_spike_in, spiked, seed=subset.seed)


def _tasks(p: Params, sets: dict[str, pd.DataFrame], findings: Findings) -> None:
    """Which tasks cannot be judged on which data sets, and which contexts have few cells."""
    judged, datasets = 0, p.evaluation_sets()
    for task, name in [(task, name) for task in p.tasks for name in datasets if datasets[name].joins(task)]:
        obs, dataset = sets[name], datasets[name]
        if "cell_type" in obs and (why := joining.unfit(task, obs, dataset, p)):
            findings.facts.append(f"left out: {task} on {name}: {why}")
            continue
        judged += 1
        if task == "perturbation_response" and "cell_type" in obs:
            _contexts(name, dataset, obs, findings)
    if not judged:
        findings.errors.append("no task is left to judge by; give more cells, types or columns.")


def _contexts(name: str, dataset: EvaluationSet, obs: pd.DataFrame, findings: Findings) -> None:
    """Warn of few contexts to learn from, and of contexts with few cells."""
    cells = pd.crosstab(obs["cell_type"].astype(str), obs["perturbation"].astype(str))
    both = int(((cells[dataset.control] > 0) & (cells.drop(columns=dataset.control) > 0).any(axis=1)).sum())
    if both <= CONTEXTS:
        learns = f"perturbation response learns from {both - 1} context{'s' * (both > 2)} at a time"
        enough = f"data of {CONTEXTS + 1} contexts or more can"
        findings.warnings.append(f"{name}: {learns}, from which it cannot tell an embedding from noise; {enough}.")
    for treatment, contexts in joining.treatments(obs, dataset).items():
        few = cells.loc[contexts, [treatment, dataset.control]].min(axis=1)
        _few(few, f"contexts of {treatment!r} in {name}", findings)


def _few(n_held_out: pd.Series, what: str, findings: Findings) -> None:
    """Warn of groups with few held-out cells."""
    if few := sorted(map(str, n_held_out.index[n_held_out < RARE])):
        told = f"{len(few)} of {len(n_held_out)} {what} have under {RARE} held-out cells, on which scores are chance"
        findings.warnings.append(f"{told}: {', '.join(few[:5])}{', …' if len(few) > 5 else ''}.")

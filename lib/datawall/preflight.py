"""What a study will do and what would stop it, found out before hours are spent: `run_all.py --check`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from datawall import assembly, inspection, joining, params, planning, sampling, tasks
from datawall.corpus import CorpusError
from datawall.datasets import DatasetError
from datawall.inspection import Looked
from datawall.params import Params
from datawall.starter import FEW
from datawall.study import Study

CONTEXTS = 3  # of perturbation response; when one is held out, two are too few to learn from
RARE = 10  # held-out cells; on fewer, a type or context is judged by chance


@dataclass
class Findings:
    """What a check found, a line each."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what would stop the study


def check(path: Path, overrides: dict[str, Any] | None = None) -> Findings:
    """Open every data set that a study file names and say what the study will do; mistakes are collected.

    Counts are sampled, and cells counted before filters and duplicates. A Census corpus is not opened.

    Parameters
    ----------
    path
        The study file.
    overrides
        As in `params.read`.
    """
    try:
        p = params.read(path, overrides)
    except params.ParamsError as error:
        return Findings(errors=str(error).splitlines())
    found = Findings()
    if p.census is not None:
        found.facts.append("corpus: selected from the CELLxGENE Census when the study runs")
    elif p.simulation is not None:
        found.facts.append(f"corpus: {p.simulation.n_cells:,} simulated cells")
        _subsets(p, p.simulation.n_cells, found)
    elif (obs := _corpus(p, found)) is not None:
        _labels(p, obs, found)
        _subsets(p, len(obs), found)
    for name, one in list(p.evaluation_sets().items())[1:]:  # the first is the corpus's held-out cells
        keys = assembly.dataset_columns(p, name)
        if one.donor_key is None:
            keys.pop("donor_id", None)  # the study's column, which not every data set has
        _look(p, one.file, keys.values(), f"evaluation set {name}", found)
    if p.spike_in is not None:
        _look(p, p.spike_in, (), "cells to spike in", found)
    found.facts.append(f"tasks: {', '.join(p.tasks)}")
    for task in (task for task in tasks.TASKS if task not in p.tasks):
        lacking = [key for key in params.NEEDED.get(task, ()) if getattr(p, key) is None]
        found.facts.append(f"left out: {task}" + (f", which needs {' and '.join(lacking)}" if lacking else ""))
    found.facts += (f"work: {line}" for line in planning.work(Study(p, Path())))
    return found


def _look(p: Params, name: str, keys: Iterable[str], what: str, found: Findings) -> Looked | None:
    """Look into a data set and its columns, and collect what is wrong; None if it cannot be used at all."""
    keys = list(dict.fromkeys(keys))
    try:
        looked = inspection.look(name, keys, min_matched=p.min_matched_genes)
    except (CorpusError, DatasetError) as error:
        found.errors.append(str(error))
        return None
    found.facts.append(f"{what}: {looked}")
    found.errors += looked.faults(keys)
    return looked


def _corpus(p: Params, found: Findings) -> pd.DataFrame | None:
    """Labels of all cells of the corpus, a column per role that has no fault; None if a source cannot be used."""
    tables = []
    for name in p.sources():
        keys = {role: p.key(role, name) for role in p.columns()}
        looked = _look(p, name, keys.values(), "corpus", found)
        if looked is not None:
            sound = {role: looked.obs[key].astype(object) for role, key in keys.items() if not looked.faults([key])}
            tables.append(pd.DataFrame(sound, index=range(looked.n_cells)))
    return pd.concat(tables, join="inner", ignore_index=True) if len(tables) == len(p.sources()) else None


def _labels(p: Params, obs: pd.DataFrame, found: Findings) -> None:
    """What the labels of the corpus allow."""
    for role in obs:
        counts = obs[role].value_counts()
        rarest = f"; the rarest is {counts.index[-1]!r} with {counts.iloc[-1]:,} cells" if len(counts) > 1 else ""
        found.facts.append(f"{role.removesuffix('_id').replace('_', ' ')}: {len(counts)} values{rarest}")
        if role == "cell_type" and len(counts) > inspection.MANY:
            found.warnings.append(f"{p.key(role, p.sources()[0])!r} has {len(counts):,} cell types; is it the column?")
        if role in ("batch", "donor_id") and len(counts) < 2:
            found.errors.append(f"{role}: {p.key(role, p.sources()[0])!r} has one value; name a column with more.")
    if "cell_type" in obs:
        _few(obs["cell_type"].value_counts() * p.held_out, "cell types", found)
    if "perturbation_response" in p.tasks and "perturbation" in obs:
        _perturbation(p, obs, found)


def _subsets(p: Params, n_cells: int, found: Findings) -> None:
    """Sizes of the subsets."""
    n_pretraining = round(n_cells * (1 - p.held_out))
    sizes = {percentage: sampling.subset_size(n_pretraining, percentage) for percentage in sorted(p.percentages)}
    listed = ", ".join(f"{percentage:g} % is {size:,}" for percentage, size in sizes.items())
    found.facts.append(f"subsets of {n_pretraining:,} cells: {listed}")
    if small := [f"{percentage:g} %" for percentage, size in sizes.items() if size < FEW]:
        found.warnings.append(f"under {FEW} cells to pretrain on at {', '.join(small)}; larger percentages teach more.")


def _perturbation(p: Params, obs: pd.DataFrame, found: Findings) -> None:
    """Whether there are two treatments, and contexts to hold out and to learn from."""
    try:
        obs = obs if "cell_type" in obs else obs.assign(cell_type="")
        joining.treatments(obs, p.evaluation_sets()[p.held_out_name], p)
    except CorpusError as error:
        found.errors.append(f"{p.perturbation_key}: {error}")
        return
    both = (pd.crosstab(obs["cell_type"], obs["perturbation"] == p.control) > 0).all(axis=1).sum()
    if both <= CONTEXTS:
        found.warnings.append(
            f"perturbation response learns from {both - 1} context{'s' * (both > 2)} at a time, from which it cannot "
            f"tell an embedding from noise; data of {CONTEXTS + 1} contexts or more can."
        )


def _few(n_held_out: pd.Series, what: str, found: Findings) -> None:
    """Warn of groups with few held-out cells."""
    if few := sorted(n_held_out.index[n_held_out < RARE]):
        found.warnings.append(
            f"{len(few)} of {len(n_held_out)} {what} have under {RARE} held-out cells, on which scores are chance: "
            f"{', '.join(few[:5])}{', …' if len(few) > 5 else ''}."
        )

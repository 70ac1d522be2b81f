"""What a study will do and what would stop it, found out before hours are spent: `run_all.py --check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from datawall import backed, datasets, evaluation, inspection, params, sampling
from datawall.corpus import CorpusError
from datawall.datasets import DatasetError
from datawall.inspection import Looked
from datawall.params import Params
from datawall.starter import FEW
from datawall.study import Study

RARE = 10  # held-out cells; a type or context with fewer is judged by chance


@dataclass
class Findings:
    """What a check found, line by line."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what would stop the study


def check(path: Path, overrides: dict[str, Any] | None = None) -> Findings:
    """Open every data set that a study file names and say what the study will do, all mistakes together.

    Counts are sampled, and cells counted before filters and duplicates; a corpus from the Census is not opened.

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
    looked = _corpus(p, found)
    if looked is not None:
        _labels(p, looked, found)
        _subsets(p, looked.n_cells, found)
        _perturbation(p, looked.obs, found)
    elif p.simulation is not None:
        found.facts.append(f"corpus: simulated, {p.simulation.n_cells:,} cells")
        _subsets(p, p.simulation.n_cells, found)
    for name in p.evaluation:
        _evaluation(p, name, found)
    missing = [task for task in params.TASKS if task not in p.tasks]
    found.facts.append(f"tasks: {', '.join(p.tasks)}" + (f"; left out: {', '.join(missing)}" if missing else ""))
    if not found.errors:
        plan = evaluation.plan(Study(p, Path()))
        found.facts.append("work: " + ", ".join(f"{count:,} {what}" for what, count in plan.items()))
    return found

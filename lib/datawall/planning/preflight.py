"""What a study will do and what would stop it, found out before hours are spent: `run_all.py --check`."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from datawall.cells import corpus, duplicates, sampling
from datawall.engine import paths
from datawall.models import external
from datawall.planning import plan as planning
from datawall.planning.starter import FEW, MANY, look
from datawall.study import curation, joining, params
from datawall.study.corpus import read_corpus
from datawall.study.dataset import dataset_columns, hold_out, read_dataset
from datawall.study.params import Params
from datawall.study.study import Study
from datawall.tasks import TASKS

CONTEXTS = 3  # of perturbation response; when one is held out, two are too few to learn from
RARE = 10  # held-out cells; on fewer, a type or context is judged by chance


@dataclass
class Findings:
    """What a check found, a line each."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what would stop the study

    @contextmanager
    def errors_within(self) -> Iterator[None]:
        """Take down what a block raises of wrong data."""
        try:
            yield
        except ValueError as error:
            self.errors.append(str(error))


def check(path: Path, overrides: dict[str, Any] | None = None) -> Findings:
    """Read every data set that a study file names, as the run would, and say what the study will do.

    What would stop it is named, the first mistake of each data set. A simulated corpus is not made, a Census not
    opened, and clusters that stand in for types are not sought.
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
        with findings.errors_within():
            _subsets(p, round(p.simulation.n_cells * (1 - p.held_out)), findings)
    else:
        _read(p, findings)
    findings.facts.append(f"tasks: {', '.join(p.tasks)}")
    for task in (task for name, task in TASKS.items() if name not in p.tasks):
        lacking = [key for key in task.needs if getattr(p, key) is None]
        findings.facts.append(f"left out: {task.name}" + (f", which needs {' and '.join(lacking)}" if lacking else ""))
    study = Study(p, paths.run_folder(path, p.study))
    findings.facts += (f"work: {line}" for line in planning.counts_in_words(study))
    if not findings.errors:
        said, enough = planning.verdicts_to_expect(p)
        (findings.facts if enough else findings.warnings).append(f"verdicts: {said}")
        seen = {name: p.steps_of(name) * study.costs.batch_size(name) for name in p.models}  # cells, again and again
        passes = {name: n / study.costs.n_pretraining for name, n in seen.items() if n}
        if few := ", ".join(f"{name} {n:.2g}" for name, n in passes.items() if n < 1):
            what = f"a cell of the full corpus is drawn less than once on average ({few} times)"
            findings.warnings.append(f"{what}: raise steps, or verdicts will be the budget's.")
        checked = {(run.subset.percentage, run.subset.seed) for run in study.budget_runs()}
        asked = itertools.product(p.budget_check.percentages, p.budget_check.seeds) if p.budget_check else ()
        if checked and (
            ignored := [f"{size:g} % of seed {seed}" for size, seed in asked if (size, seed) not in checked]
        ):
            findings.warnings.append(f"budget_check: the study has no random subset of {', '.join(ignored)}: left out.")
        if passes and not checked:
            what = "budget_check is not set" if p.budget_check is None else "no run of the study is one of budget_check"
            findings.warnings.append(f"{what}: whether twice the steps would help stays unknown.")
    return findings


def _read(p: Params, findings: Findings) -> None:
    """Read all cells as the run does; what it has of them, and what it can be judged by."""
    reports, sets, var = {}, {}, corpus.gene_table()
    with findings.errors_within():
        labels = []
        for block in read_corpus(p, reports):
            labels.append(block.obs)
        obs, var = pd.concat(labels), block.var
        obs = obs.iloc[: len(obs) - reports["n_spiked"]].astype("category")
        findings.facts += map(curation.match_in_words, reports["genes"])
        findings.warnings += reports["notes"]
        became = reports["cells"].drop(columns="dataset").sum()
        told = ", ".join(f"{n:,} {what}" for what, n in became.items() if n or what == "kept")
        findings.facts.append(f"cells of the corpus: {told}")
        held_out = hold_out(p, obs)
        if "cell_type" in obs:
            joining.check_contexts(p, obs["cell_type"].unique())
        joining.check_control(p, p.evaluation_sets()[p.held_out_name], obs)
        _labels(p, obs, held_out, findings)
        sets[p.held_out_name], pretraining = obs[held_out], np.flatnonzero(~held_out)
    for name in [dataset.dataset for dataset in p.evaluation]:
        with findings.errors_within():
            aligned, measured, genes, notes = read_dataset(p, name, var)
            findings.facts.append(curation.match_in_words(genes))
            findings.warnings += notes
            sets[name] = aligned.obs
            if p.drop_contaminated and not findings.errors:
                pretraining = np.setdiff1d(pretraining, _contaminated(p, obs, aligned, var.index[measured]))
    if findings.errors:
        return
    if p.drop_contaminated:
        n_dropped = len(obs) - len(sets[p.held_out_name]) - len(pretraining)
        findings.facts.append(f"left out of pretraining: {n_dropped:,} cells of evaluation sets, or of their donors")
    if not len(pretraining):
        remedy = "hold out less, or keep contaminated cells"
        findings.errors.append(f"{p.study}: no cell of the corpus is left to pretrain on; {remedy}.")
        return
    with findings.errors_within():
        _subsets(p, len(pretraining), findings, reports["n_spiked"])
    if p.labels and p.spike_in is None:
        keys = {name: p.key("cell_type", name) for name in p.sources()}
        keys |= {each.file: dataset_columns(p, each.dataset)["cell_type"] for each in p.evaluation}
        types = [look([name], [key], min_matched=p.min_matched_genes).obs.get(key, ()) for name, key in keys.items()]
        if unused := sorted(set(p.labels).difference(*(map(str, labels) for labels in types))):
            findings.warnings.append(f"labels: no cell is of the types {unused}; correct them, or leave them out.")
    _tasks(p, sets, findings)
    for given in p.embeddings:
        with findings.errors_within():
            external.read_embedding(given.file, given.obsm_key, sets[given.dataset].index, given.dataset)


def _contaminated(p: Params, obs: pd.DataFrame, cells: ad.AnnData, genes: pd.Index) -> np.ndarray:
    """Rows of the corpus with cells, or from donors, of an evaluation set; `genes` are those that both have."""
    hashes = (duplicates.cell_hashes(block.X, block.var_names, genes) for block in read_corpus(p, {}))
    donors = (each["donor_id"].array if "donor_id" in each else None for each in (cells.obs, obs))
    evaluated = duplicates.cell_hashes(cells.X, cells.var_names, genes)
    return duplicates.contamination(evaluated, hashes, *donors).rows_to_drop()


def _labels(p: Params, obs: pd.DataFrame, held_out: np.ndarray, findings: Findings) -> None:
    """What the labels of the corpus are, and who is held out."""
    for role in (role for role in obs if role in p.columns()):
        counts = obs[role].value_counts().loc[lambda n_cells: n_cells > 0]
        rarest = f"; the rarest is {counts.index[-1]!r} with {counts.iloc[-1]:,} cells" if len(counts) > 1 else ""
        findings.facts.append(f"{role.removesuffix('_id').replace('_', ' ')}: {len(counts)} values{rarest}")
        if role == "cell_type" and len(counts) > MANY:
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
    """Sizes of the subsets; raises ValueError if one is a single cell, or there are too few cells to spike in."""
    sizes = {percentage: sampling.subset_size(n_pretraining, percentage) for percentage in sorted(p.percentages)}
    listed = ", ".join(f"{percentage:g} % is {size:,}" for percentage, size in sizes.items())
    findings.facts.append(f"subsets of {n_pretraining:,} cells: {listed}")
    if small := ", ".join(f"{percentage:g} %" for percentage, size in sizes.items() if size < FEW):
        findings.warnings.append(f"under {FEW} cells to pretrain on at {small}; larger percentages teach more.")
    for subset in (subset for subset in p.subsets() if not subset.untrained):
        size = sampling.subset_size(n_pretraining, subset.percentage)
        if size < 2:
            raise ValueError(f"percentages: {subset.percentage:g} % is one cell, of which no model learns; give more.")
        if n_spike_in is not None and (spiked := sampling.STRATEGIES[subset.strategy].spiked):
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
        if task != "perturbation_response" or "cell_type" not in obs:
            continue
        cells = pd.crosstab(obs["cell_type"].astype(str), obs["perturbation"].astype(str))
        both = int(((cells[dataset.control] > 0) & (cells.drop(columns=dataset.control) > 0).any(axis=1)).sum())
        if both <= CONTEXTS:
            learns = f"perturbation response learns from {both - 1} context{'s' * (both > 2)} at a time"
            enough = f"data of {CONTEXTS + 1} contexts or more can"
            findings.warnings.append(f"{name}: {learns}, from which it cannot tell an embedding from noise; {enough}.")
        for treatment, contexts in joining.treatments(obs, dataset).items():
            few = cells.loc[contexts, [treatment, dataset.control]].min(axis=1)
            _few(few, f"contexts of {treatment!r} in {name}", findings)
    if not judged:
        findings.errors.append("no task is left to judge by; give more cells, types or columns.")


def _few(n_held_out: pd.Series, what: str, findings: Findings) -> None:
    """Warn of groups with few held-out cells."""
    if few := sorted(map(str, n_held_out.index[n_held_out < RARE])):
        told = f"{len(few)} of {len(n_held_out)} {what} have under {RARE} held-out cells, on which scores are chance"
        findings.warnings.append(f"{told}: {', '.join(few[:5])}{', …' if len(few) > 5 else ''}.")

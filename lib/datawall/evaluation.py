"""Evaluations of a study: every task on every model and baseline, and the results table they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datawall import baselines, cluster, corpus, expression, results, store, tasks
from datawall.store import Artifact, Unit
from datawall.study import Run, Study

BASELINES = {
    "zeroshot_classification": ("HVG", "PCA"),
    "zeroshot_integration": ("HVG", "PCA"),
    "finetuned_classification": ("LogisticRegression",),
    "perturbation_response": ("NoChange", "MeanShift"),
}
# The modules whose code decides the metrics of each task.
CODE = {
    "zeroshot_classification": ("evaluation", "tasks/classification", "corpus"),
    "zeroshot_integration": ("evaluation", "tasks/integration"),
    "finetuned_classification": (
        "evaluation", "tasks/finetuning", "tasks/classification", "training", "corpus", "baselines", "expression",
    ),
    "perturbation_response": ("evaluation", "tasks/perturbation", "training", "baselines", "expression"),
}  # fmt: skip

type Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A task on a data set, for a pretraining run or for a baseline (its name)."""

    task: str
    dataset: str
    source: Run | str


def evaluations(study: Study, task: str) -> list[Evaluation]:
    """Every evaluation of a task: the baselines, then each pretraining run; none if the study leaves it out.

    Batches and treatments are known of the corpus alone, so integration and perturbation response use its held-out
    cells.
    """
    if task not in study.params.tasks:
        return []
    on_corpus = task in ("zeroshot_integration", "perturbation_response")
    names = [study.held_out_name] if on_corpus else study.evaluation_datasets()
    sources = [*BASELINES[task], *study.pretraining_runs()]
    return [Evaluation(task, name, source) for source in sources for name in names]


def plan(study: Study) -> dict[str, int]:
    """How many subsets, models, experiments (model x task x data set) and baselines the study has."""
    every = [evaluation for task in study.params.tasks for evaluation in evaluations(study, task)]
    n_baselines = sum(isinstance(evaluation.source, str) for evaluation in every)
    return {
        "subsets": len(study.subsets()),
        "models": len(study.pretraining_runs()),
        "experiments": len(every) - n_baselines,
        "baselines": n_baselines,
    }


def evaluate(study: Study, task: str) -> pd.DataFrame:
    """Make, or find, every evaluation of a task, and write the study's results table.

    Returns
    -------
    the task's tidy results (see `results.read_results`).
    """
    missing = [one for one in evaluations(study, task) if not study.store.find(evaluation_unit(study, one))]
    if missing:
        for name in study.evaluation_datasets():
            study.dataset_artifact(name)
        study.pretrain()
    cluster.run_units(study, make, missing, task)
    table = tidy_results(study)
    results.write_results(table, study.folder)
    return results.select(table, task=task)


def tidy_results(study: Study) -> pd.DataFrame:
    """Tidy results of every evaluation of the study, as it is defined now, that has been made."""
    rows = []
    for task in study.params.tasks:
        for evaluation in evaluations(study, task):
            if artifact := study.store.find(evaluation_unit(study, evaluation)):
                rows.extend(_rows(study, evaluation, artifact))
    return pd.DataFrame(rows, columns=results.COLUMNS)


def evaluation_unit(study: Study, evaluation: Evaluation) -> Unit:
    """The metrics of an evaluation."""
    task, source, p = evaluation.task, evaluation.source, study.params
    record = {"task": task, "dataset": study.dataset_unit(evaluation.dataset).key}
    if isinstance(source, Run) or source in ("HVG", "PCA"):
        record["embedding"] = study.embedding_unit(source, evaluation.dataset).key
    else:
        record["baseline"] = source
    if task == "zeroshot_classification":
        record |= {"k": p.k, "splits": p.splits}
    if task == "perturbation_response":
        record |= {"held_out_contexts": p.held_out_contexts, "genes": p.perturbation_genes, "control": p.control}
    if isinstance(source, Run) and task in ("finetuned_classification", "perturbation_response"):
        record["seed"] = source.subset.seed
    return Unit("evaluation", record, CODE[task])


def make(study: Study, evaluation: Evaluation) -> Artifact:
    """Make, or find, one evaluation: its metrics, by split."""

    def write(folder: Path) -> None:
        splits = SCORES[evaluation.task](study, evaluation)
        store.write_json(folder / "metrics.json", dict(splits))

    return study.store.find_or_make(evaluation_unit(study, evaluation), write)


def _rows(study: Study, evaluation: Evaluation, artifact: Artifact) -> Iterator[dict[str, Any]]:
    """Rows of the results table, of one evaluation."""
    source = evaluation.source
    if isinstance(source, Run):
        of = {"model": source.model, **asdict(source.subset), "n_cells": len(study.rows(source.subset))}
    else:
        of = {"model": source, "strategy": results.BASELINE, "percentage": 0.0, "seed": -1, "n_cells": 0}
    for split, metrics in json.loads((artifact.folder / "metrics.json").read_text()).items():
        for metric, value in metrics.items():
            yield of | {
                "study": study.params.study,
                "task": evaluation.task,
                "dataset": evaluation.dataset,
                "metric": metric,
                "value": value,
                "split": split,
                "run_id": artifact.key,
            }


def _zeroshot_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Repeated 50/50 splits, the same for every model."""
    embedding = study.embedding(evaluation.source, evaluation.dataset)
    labels = study.dataset(evaluation.dataset).obs["cell_type"].to_numpy().astype(str)
    for seed in range(study.params.splits):
        test = corpus.stratified_split(labels, [0.5, 0.5], seed=seed) == 1
        yield (
            f"cells {seed}",
            tasks.zeroshot_classification(
                embedding[~test], labels[~test], embedding[test], labels[test], k=study.params.k
            ),
        )


def _zeroshot_integration(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """All cells at once: nothing is fitted to labels, so there is nothing to split."""
    obs = study.dataset(evaluation.dataset).obs
    embedding = study.embedding(evaluation.source, evaluation.dataset)
    yield "all cells", tasks.zeroshot_integration(embedding, obs["cell_type"].to_numpy(), obs["batch"].to_numpy())


def _finetuned_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """One split into 80 % training, 10 % validation and 10 % test cells, the same for every model."""
    data = study.dataset(evaluation.dataset)
    labels = data.obs["cell_type"].to_numpy().astype(str)
    part = corpus.stratified_split(labels, [0.8, 0.1, 0.1], seed=0)
    if isinstance(evaluation.source, Run):
        embedding = study.embedding(evaluation.source, evaluation.dataset)
        seed = evaluation.source.subset.seed
        yield "cells 0", tasks.finetuned_classification(embedding, labels, part, seed=seed)
    else:
        train, test = part == 0, part == 2
        predicted = baselines.logistic_regression(data.X[train], labels[train], data.X[test])
        yield "cells 0", tasks.classification.classification_metrics(labels[test], predicted)


def _perturbation_response(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """One context held out at a time."""
    data, p = study.dataset(evaluation.dataset), study.params
    treatment = data.obs["perturbation"].to_numpy().astype(str)
    if p.control not in treatment or len(np.unique(treatment)) != 2:
        raise corpus.CorpusError(
            f"{evaluation.dataset}: {p.perturbation_key} has the values {np.unique(treatment).tolist()}; perturbation "
            f"response needs two, one of them the control {p.control!r}. Keep one treatment, or name the control."
        )
    treated = treatment != p.control
    context = data.obs["cell_type"].to_numpy().astype(str)
    X = expression.lognormalise(data.X)[:, study.response_genes].toarray()
    for held_out in p.held_out_contexts or tasks.perturbation.usable_contexts(treated, context):
        if isinstance(evaluation.source, Run):
            embedding = study.embedding(evaluation.source, evaluation.dataset)
            seed = evaluation.source.subset.seed
            metrics = tasks.perturbation_response(embedding, X, treated, context, held_out, seed=seed)
        else:
            metrics = _baseline_response(evaluation.source, X, treated, context, held_out)
        yield f"{held_out} held out", metrics


def _baseline_response(name: str, X: np.ndarray, treated: np.ndarray, context: np.ndarray, held_out: str) -> Metrics:
    """Metrics of the no-change or the mean-shift prediction."""
    control, other = X[~treated & (context == held_out)], context != held_out
    if name == "NoChange":
        predicted = baselines.no_change(control)
    else:
        of = context[~treated & other], context[treated & other]
        predicted = baselines.mean_shift(control, X[~treated & other], X[treated & other], of)
    truth = X[treated & (context == held_out)].mean(axis=0)
    return tasks.perturbation.response_metrics(predicted, truth, control.mean(axis=0))


SCORES = {
    "zeroshot_classification": _zeroshot_classification,
    "zeroshot_integration": _zeroshot_integration,
    "finetuned_classification": _finetuned_classification,
    "perturbation_response": _perturbation_response,
}

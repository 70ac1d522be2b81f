"""Evaluations of a study, a task on a data set each: key, making (how a task is fed; `tasks` has metrics), reading."""

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall import tasks
from datawall.analysis import results
from datawall.cells import expression, sampling
from datawall.cells.corpus import CorpusError
from datawall.engine import cluster, disk
from datawall.engine.store import Artifact, Unit
from datawall.study import joining
from datawall.study.records import Evaluation, Run
from datawall.study.study import Study
from datawall.tasks import baselines
from datawall.tasks.metrics import Metrics


def evaluations(study: Study, task: str) -> list[Evaluation]:
    """Every evaluation of a task: baselines, pretraining runs, embeddings from files; none if the study leaves it out.

    Reconstruction is of the corpus's held-out cells, by families and by those models of the user's own that can tell.
    """
    p = study.params
    if task not in p.tasks:
        return []
    names, runs = study.joined(task), study.all_runs()
    given = [embedding for embedding in p.embeddings if embedding.dataset in names]
    if tasks.TASKS[task].judges == "models":
        names, given = [name for name in names if name == study.params.held_out_name], []
        runs = [run for run in runs if can_judge(study, task, run.model)]
    sources = [*tasks.TASKS[task].baselines, *runs]
    by_dataset = [Evaluation(task, name, source) for source in sources for name in names]
    return by_dataset + [Evaluation(task, embedding.dataset, embedding) for embedding in given]


def can_judge(study: Study, task: str, model: str) -> bool:
    """Whether a task judges a model: reconstruction takes one of the user's own only if it can tell its loss."""
    spec = study.params.specs[model]
    return tasks.TASKS[task].judges != "models" or not spec.is_external or hasattr(spec.model_class, "heldout_loss")


def evaluation_unit(study: Study, evaluation: Evaluation) -> Unit:
    """The metrics of an evaluation."""
    task, source, p = evaluation.task, evaluation.source, study.params
    record = {"task": task, "dataset": study.dataset_unit(evaluation.dataset).key}
    if tasks.TASKS[task].judges == "models":
        record["model"] = study.model_unit(source).key
    elif not isinstance(source, str) or source in baselines.EMBEDDINGS:
        record["embedding"] = study.embedding_unit(source, evaluation.dataset).key
        if not task.startswith("zeroshot"):
            record["seed"] = evaluation.seed
    else:
        record["baseline"] = source
    if task == "zeroshot_classification":
        record |= {"k": p.k, "more_k": p.more_k, "splits": p.splits}
    if task == "zeroshot_integration":
        record |= {"unintegrated": study.embedding_unit("PCA", evaluation.dataset).key, "cells": p.integration_cells}
    if task == "finetuned_classification":
        record |= {"finetune": p.finetune, "class_weight": p.class_weight, "splits": p.finetuned_splits or p.splits}
    if task == "perturbation_response":
        dataset = p.evaluation_sets()[evaluation.dataset]
        record |= {key: getattr(dataset, key) for key in ("control", "treatments", "held_out_contexts")}
        record |= {"genes": p.perturbation_genes, "matching": p.matching}
    return Unit("evaluation", record, ("study/evaluation", "study/joining", f"tasks/{tasks.TASKS[task].module}"))


def make_evaluation(study: Study, evaluation: Evaluation, folder: Path) -> None:
    """Write metrics by split and, of classification, the labels predicted of test cells, into a folder."""
    splits = dict(score(study, evaluation))
    disk.write_json(folder / "metrics.json", {split: metrics.rows() for split, metrics in splits.items()})
    called = {name: split.predicted.astype(str) for name, split in splits.items() if split.predicted is not None}
    if called:
        np.savez_compressed(folder / "predicted.npz", **called)


def score(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Metrics of an evaluation, by split."""
    return {feed.__name__: feed for feed in FED}.get(evaluation.task, own_task)(study, evaluation)


def zeroshot_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Each half of the cells by the other."""
    embedding, obs = study.embedding(evaluation.source, evaluation.dataset), study.labels(evaluation.dataset)
    labels, p = obs["cell_type"].to_numpy().astype(str), study.params
    for split, half in joining.halves(p, obs):
        yield split, tasks.classification.crossvalidated_classification(embedding, labels, half, p.k, more_k=p.more_k)


def zeroshot_integration(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """All cells at once, or the same sample for every model: nothing is fitted to labels, so nothing is split."""
    embedding, obs = study.embedding(evaluation.source, evaluation.dataset), study.labels(evaluation.dataset)
    rows = joining.integration_rows(study.params, len(obs))
    labels, batches = (obs[key].to_numpy().astype(str)[rows] for key in ("cell_type", "batch"))
    unintegrated = study.embedding("PCA", evaluation.dataset)[rows]
    yield "all cells", tasks.zeroshot_integration(embedding[rows], labels, batches, unintegrated=unintegrated)


def finetuned_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Heads on frozen embeddings; with `finetune: full`, families that can are trained whole beside."""
    p, source = study.params, evaluation.source
    data = study.dataset(evaluation.dataset)
    labels = data.obs["cell_type"].to_numpy().astype(str)
    options = {"seed": evaluation.seed, "class_weight": p.class_weight}
    model = study.model(source) if isinstance(source, Run) and p.finetune == "full" else None
    for split, part in joining.three_parts(p, data.obs):
        if source == "LogisticRegression":
            predicted = np.empty_like(labels)
            for fold in np.atleast_2d(part):
                train, test = fold == tasks.finetuning.TRAIN, fold == tasks.finetuning.TEST
                predicted[test] = baselines.logistic_regression(data.X[train], labels[train], data.X[test])
            tested = np.atleast_2d(part == tasks.finetuning.TEST).any(axis=0)
            learnt = tasks.finetuning.training_labels(labels, part)
            yield split, tasks.classification.classification_metrics(labels[tested], predicted[tested], learnt)
            continue
        embedding = study.embedding(source, evaluation.dataset)
        metrics = tasks.finetuned_classification(embedding, labels, part, **options)
        if model is not None and hasattr(model, "finetunable"):
            full = tasks.finetuning.fully_finetuned_classification(model, data.X, labels, part, **options)
            metrics = metrics.merged(full)
        yield split, metrics


def perturbation_response(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """One context held out at a time, by genes that are chosen without a look at treated cells."""
    obs, name, source = study.dataset(evaluation.dataset).obs, evaluation.dataset, evaluation.source
    for treatment, contexts in joining.treatments(obs, study.params.evaluation_sets()[name]).items():
        rows, *cells = _screen(study, name, treatment)
        for held_out in contexts:
            response = _response(study, name, treatment, held_out)
            if isinstance(source, str):
                metrics = _baseline_response(source, response, *cells, held_out)
            else:
                options = {"seed": evaluation.seed, "matching": study.params.matching, "response": response}
                embedding = study.embedding(source, name)[rows]
                metrics = tasks.perturbation_response(embedding, *cells, held_out, **options)
            of_treatment = f"{treatment}, " if obs["perturbation"].nunique() > 2 else ""
            yield f"{of_treatment}{held_out} held out", metrics


@lru_cache(maxsize=1)  # for one model after the other, as below
def _screen(study: Study, name: str, treatment: str) -> tuple[np.ndarray, ...]:
    """Rows of treated and control cells of a data set, their expression, whether each is treated, and its context."""
    X, treatments, contexts = _expression(study, name)
    rows = np.flatnonzero(np.isin(treatments, [treatment, study.params.evaluation_sets()[name].control]))
    return rows, X[rows].toarray(), treatments[rows] == treatment, contexts[rows]


@lru_cache(maxsize=1)
def _expression(study: Study, name: str) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Log-normalised expression of the genes that are predicted, and the treatment and the context of each cell.

    Of the corpus's held-out cells they are the most variable among the pretraining cells; of another data set, which
    may measure few of those, the most variable among its own control cells.
    """
    data, control = study.dataset(name), study.params.evaluation_sets()[name].control
    treatments, contexts = (data.obs[key].to_numpy().astype(str) for key in ("perturbation", "cell_type"))
    X = expression.lognormalise(data.X)
    if name == study.params.held_out_name:
        return X[:, study.response_genes], treatments, contexts
    genes = expression.variable_genes(X[treatments == control], study.params.perturbation_genes)
    return X[:, genes], treatments, contexts


@lru_cache(maxsize=8)
def _response(study: Study, name: str, treatment: str, held_out: str) -> "tasks.perturbation.Response":
    """What the treatment does to the context held out, which is the same for every model."""
    _, *cells = _screen(study, name, treatment)
    return tasks.perturbation.Response.of(*cells, held_out)


def _baseline_response(
    name: str, response: Any, X: np.ndarray, treated: np.ndarray, context: np.ndarray, held_out: str
) -> Metrics:
    """Metrics of a prediction that needs no embedding, or of the ceiling, `Oracle`."""
    control, elsewhere = response.control, treated & (context != held_out)
    if name == "Oracle":
        return tasks.perturbation.oracle(response.treated, control)
    predict = {
        "NoChange": lambda: control,
        "TreatedMean": lambda: baselines.treated_mean(X[elsewhere], context[elsewhere]),
        "MeanShift": lambda: control + response.others.mean(axis=0),  # in which each of the other contexts counts alike
    }
    return response.metrics(predict[name]())


def reconstruction(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """The pretraining loss of held-out cells, in the family's own units; of a sample where they are many."""
    data = study.dataset(evaluation.dataset)
    rows = sampling.fixed(data.n_obs, joining.RECONSTRUCTED)
    yield "all cells", tasks.reconstruction(study.model(evaluation.source), data.X[rows], data.obs.iloc[rows], seed=0)


def own_task(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """A task that this page does not know, a line in `tasks.TASKS`: it gets the embedding and the table of cells."""
    embedding, obs = study.embedding(evaluation.source, evaluation.dataset), study.dataset(evaluation.dataset).obs
    yield "all cells", Metrics(tasks.TASKS[evaluation.task].function(embedding, obs, seed=evaluation.seed))


FED = zeroshot_classification, zeroshot_integration, finetuned_classification, perturbation_response, reconstruction


def evaluation_artifact(study: Study, evaluation: Evaluation) -> Artifact:
    """An evaluation on disk."""
    return study.store.find_or_make(evaluation_unit(study, evaluation), partial(make_evaluation, study, evaluation))


def evaluate(study: Study, task: str) -> pd.DataFrame:
    """Make, or find, every evaluation of a task, and write the study's tables; returns the task's tidy results."""
    missing = study.store.missing((evaluation_unit(study, item), item) for item in evaluations(study, task))
    if missing:
        for name in study.params.evaluation_sets():
            study.dataset_artifact(name)
        joined = study.joined(task)
        missing = [item for item in missing if item.dataset in joined]
    if (reasons := study.not_judged(task)) and not study.joined(task):
        raise CorpusError(f"{task} is left out: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}.")
    if missing:
        study.pretrain()
    cluster.run_units(study, evaluation_artifact, missing, task, lambda study, item: study.costs.evaluation(item))
    return results.select(_tabulate(study), task=task)


def _tabulate(study: Study) -> pd.DataFrame:
    """Write the tables of all evaluations that have been made, unless this process has; returns the results."""
    wanted = [evaluation for task in study.params.tasks for evaluation in evaluations(study, task)]
    made = [(item, artifact) for item in wanted if (artifact := study.store.find(evaluation_unit(study, item)))]
    keys = [artifact.key for _, artifact in made]
    if study.tabulated is None or study.tabulated[0] != keys:
        rows = [row for evaluation, artifact in made for row in _rows(study, evaluation, artifact)]
        tables = results.tables(pd.DataFrame(rows, columns=results.ALL_COLUMNS))
        results.write_tables(tables, study.folder, study.params.model_dump(mode="json"))
        study.tabulated = keys, tables["results"]
    return study.tabulated[1]


def _rows(study: Study, evaluation: Evaluation, artifact: Artifact) -> Iterator[dict[str, Any]]:
    columns = {"study": study.params.study, "task": evaluation.task, "dataset": evaluation.dataset}
    columns |= {"run_id": artifact.key, "budget": getattr(evaluation.source, "budget", 1.0)}
    columns |= study.columns_of(evaluation.source)
    for split, metrics in json.loads((artifact.folder / "metrics.json").read_text(encoding="utf-8")).items():
        for row in metrics:
            yield {**columns, "split": split, **row}

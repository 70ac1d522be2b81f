"""How each task is fed from a study: its splits, its labels, its baselines; the metrics come from `tasks`."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from datawall import tasks
from datawall.cells import expression, sampling
from datawall.study import joining
from datawall.study.study import Study
from datawall.study.units import Evaluation, Run
from datawall.tasks import baselines
from datawall.tasks.metrics import Metrics

FOLDS = 3  # of fine-tuning on a small data set, so that every cell is tested


def score(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Metrics of an evaluation, by split."""
    return {feed.__name__: feed for feed in FED}.get(evaluation.task, own_task)(study, evaluation)


def halves(study: Study, dataset: str) -> Iterator[tuple[str, np.ndarray]]:
    """Divisions in two, the same for every model: by cell in proportion to types, and by donor where there are two.

    Yields the name of each (`cells 0`, `donors 0`, …), and (n_cells,) the half of each cell, 0 or 1.
    """
    p, obs = study.params, study.dataset(dataset).obs
    labels = obs["cell_type"].to_numpy().astype(str)
    n_splits = joining.n_splits(p, "zeroshot_classification", len(obs))
    for seed in range(n_splits):
        yield f"cells {seed}", sampling.stratified_split(labels, [0.5, 0.5], seed=seed)
    for seed, part in donor_splits(obs, [0.5, 0.5], n_splits, fewest=max(p.k, *p.more_k, 0), in_turn=True):
        yield f"donors {seed}", part


def three_parts(study: Study, dataset: str) -> Iterator[tuple[str, np.ndarray]]:
    """Divisions into training, validation and test cells, the same for every model.

    Of a small data set every cell is tested: each third in turn, with a tenth of the others to stop by. A larger one
    has 80, 10 and 10 %. By donor, about a fifth of the cells are tested, those of whole donors. Yields the name of each
    division, and (n_folds, n_cells) or (n_cells,) the part of each cell: 0, 1 or 2.
    """
    obs = study.dataset(dataset).obs
    labels = obs["cell_type"].to_numpy().astype(str)
    n_splits = joining.n_splits(study.params, "finetuned_classification", len(obs))

    def divided(tested: np.ndarray, validation: float, seed: int) -> np.ndarray:
        part = np.full(len(labels), 2)
        part[~tested] = sampling.stratified_split(labels[~tested], [1 - validation, validation], seed=seed)
        return part

    for seed in range(n_splits):
        if len(obs) < joining.SMALL:
            fold = sampling.stratified_split(labels, [1 / FOLDS] * FOLDS, seed=seed)
            yield f"cells {seed}", np.stack([divided(fold == number, 1 / 10, seed) for number in range(FOLDS)])
        else:
            yield f"cells {seed}", sampling.stratified_split(labels, [0.8, 0.1, 0.1], seed=seed)
    for seed, held_out in donor_splits(obs, [0.8, 0.2], n_splits):
        yield f"donors {seed}", divided(held_out == 1, 1 / 9, seed)


def donor_splits(
    obs: pd.DataFrame, shares: list[float], n_splits: int, *, fewest: int = 10, in_turn: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Seeds and parts of splits by whole donors, each split once; none where fewer than two donors are known.

    There are `fewest` training cells at least, of two types: in the first part or, `in_turn`, in each.
    """
    if "donor_id" not in obs or obs["donor_id"].nunique() < 2:
        return
    seen = set()
    for seed in range(n_splits):
        part = sampling.split_by_group(obs["donor_id"].array, shares, seed=seed)
        trained_on = [obs["cell_type"].array[part == number] for number in range(2 if in_turn else 1)]
        enough = all(len(types) >= fewest and len(types.unique()) > 1 for types in trained_on)
        if enough and part.tobytes() not in seen:  # few donors leave few ways to part them
            seen.add(part.tobytes())
            yield seed, part


def zeroshot_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Each half of the cells by the other."""
    p = study.params
    embedding = study.embedding(evaluation.source, evaluation.dataset)
    labels = study.dataset(evaluation.dataset).obs["cell_type"].to_numpy().astype(str)
    for split, half in halves(study, evaluation.dataset):
        yield split, tasks.classification.crossvalidated_classification(embedding, labels, half, p.k, more_k=p.more_k)


def zeroshot_integration(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """All cells at once, or the same sample for every model: nothing is fitted to labels, so nothing is split."""
    obs = study.dataset(evaluation.dataset).obs
    rows = np.sort(np.random.default_rng(0).permutation(len(obs))[: study.params.integration_cells])
    labels, batches = (obs[key].to_numpy().astype(str)[rows] for key in ("cell_type", "batch"))
    embedding = study.embedding(evaluation.source, evaluation.dataset)[rows]
    unintegrated = study.embedding("PCA", evaluation.dataset)[rows]
    yield "all cells", tasks.zeroshot_integration(embedding, labels, batches, unintegrated=unintegrated)


def finetuned_classification(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """Heads on frozen embeddings; with `finetune: full`, families that can are trained whole beside."""
    p, source = study.params, evaluation.source
    data = study.dataset(evaluation.dataset)
    labels = data.obs["cell_type"].to_numpy().astype(str)
    options = {"seed": evaluation.seed, "class_weight": p.class_weight}
    model = study.model(source) if isinstance(source, Run) and p.finetune == "full" else None
    for split, part in three_parts(study, evaluation.dataset):
        if source == "LogisticRegression":
            predicted = np.empty_like(labels)
            for fold in np.atleast_2d(part):
                train, test = fold == tasks.finetuning.TRAIN, fold == tasks.finetuning.TEST
                predicted[test] = baselines.logistic_regression(data.X[train], labels[train], data.X[test])
            tested = np.atleast_2d(part == tasks.finetuning.TEST).any(axis=0)
            yield split, tasks.classification.classification_metrics(labels[tested], predicted[tested], labels)
            continue
        embedding = study.embedding(source, evaluation.dataset)
        metrics = tasks.finetuned_classification(embedding, labels, part, **options)
        if model is not None and hasattr(model, "finetunable"):
            full = tasks.finetuning.fully_finetuned_classification(model, data.X, labels, part, **options)
            metrics = metrics.merged(full)
        yield split, metrics


def perturbation_response(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """One context held out at a time, by genes that are chosen without a look at treated cells.

    Of the corpus's held-out cells they are the most variable among the pretraining cells; of another data set, which
    may measure few of those, the most variable among its own control cells.
    """
    data, dataset = study.dataset(evaluation.dataset), study.params.evaluation_sets()[evaluation.dataset]
    treatment, context = (data.obs[key].to_numpy().astype(str) for key in ("perturbation", "cell_type"))
    X = expression.lognormalise(data.X)
    if evaluation.dataset == study.held_out_name:
        X = X[:, study.response_genes]
    else:
        X = X[:, expression.variable_genes(X[treatment == dataset.control], study.params.perturbation_genes)]
    for name, contexts in joining.treatments(data.obs, dataset).items():
        rows = np.flatnonzero(np.isin(treatment, [name, dataset.control]))
        cells = X[rows].toarray(), treatment[rows] == name, context[rows]
        for held_out in contexts:
            if isinstance(evaluation.source, str):
                metrics = _baseline_response(evaluation.source, *cells, held_out)
            else:
                embedding = study.embedding(evaluation.source, evaluation.dataset)[rows]
                options = {"seed": evaluation.seed, "matching": study.params.matching}
                metrics = tasks.perturbation_response(embedding, *cells, held_out, **options)
            of_treatment = f"{name}, " if data.obs["perturbation"].nunique() > 2 else ""
            yield f"{of_treatment}{held_out} held out", metrics


def _baseline_response(name: str, X: np.ndarray, treated: np.ndarray, context: np.ndarray, held_out: str) -> Metrics:
    """Metrics of a prediction that needs no embedding, or of the ceiling, `Oracle`."""
    response = tasks.perturbation.Response.of(X, treated, context, held_out)
    control, elsewhere = response.control, context != held_out
    if name == "Oracle":
        return tasks.perturbation.oracle(response.treated, control)
    if name == "NoChange":
        return response.metrics(control)
    if name == "TreatedMean":
        return response.metrics(baselines.treated_mean(X[treated & elsewhere], context[treated & elsewhere]))
    return response.metrics(control + response.others.mean(axis=0))  # in which each other context counts alike


def reconstruction(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """The pretraining loss of held-out cells, in the family's own units; of a sample where they are many."""
    data = study.dataset(evaluation.dataset)
    rows = np.sort(np.random.default_rng(0).permutation(data.n_obs)[: joining.RECONSTRUCTED])
    yield "all cells", tasks.reconstruction(study.model(evaluation.source), data.X[rows], data.obs.iloc[rows], seed=0)


def own_task(study: Study, evaluation: Evaluation) -> Iterator[tuple[str, Metrics]]:
    """A task that this page does not know, a line in `tasks.TASKS`: it gets the embedding and the table of cells."""
    obs = study.dataset(evaluation.dataset).obs
    embedding = study.embedding(evaluation.source, evaluation.dataset)
    yield "all cells", Metrics(tasks.TASKS[evaluation.task].function(embedding, obs, seed=evaluation.seed))


FED = zeroshot_classification, zeroshot_integration, finetuned_classification, perturbation_response, reconstruction

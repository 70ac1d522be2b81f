"""Zero-shot classification asks whether cells near each other in the embedding share a cell type."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datawall.tasks import uncertainty
from datawall.tasks.metrics import Metrics

log = logging.getLogger(__name__)


def zeroshot_classification(
    train_embedding: np.ndarray,
    train_labels: np.ndarray,
    test_embedding: np.ndarray,
    test_labels: np.ndarray,
    k: int = 5,
    *,
    more_k: Sequence[int] = (),
    probe: bool = True,
) -> Metrics:
    """Classify test cells by their k nearest training cells, and by a linear probe of the embedding.

    Embeddings are (n_cells, n_latent), labels (n_cells,) cell types. The neighbours, at Euclidean distance, vote alike;
    `k` was 5 in the original study. Test cells whose embedding a training cell has too are counted in a warning.

    Returns `classification_metrics`, and those of all types together by further numbers of neighbours, `more_k`
    (`knn15_micro_f1`), and by a `linear_probe` (`probe_micro_f1`). Raises ValueError if an embedding is not finite, or
    there are fewer training cells than neighbours.
    """
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    predicted = _predictions(train_embedding, train_labels, test_embedding, [k, *more_k], probe)
    return _all_metrics(test_labels, predicted, train_labels)


def crossvalidated_classification(
    embedding: np.ndarray, labels: np.ndarray, part: np.ndarray, k: int = 5, *, more_k: Sequence[int] = ()
) -> Metrics:
    """`zeroshot_classification` of every cell by those of the other parts; `part`, (n_cells,), says which is whose."""
    labels, predicted = np.asarray(labels), {}
    for tested in np.unique(part):
        train, test = part != tested, part == tested
        predictions = _predictions(embedding[train], labels[train], embedding[test], [k, *more_k])
        for name, types in predictions.items():
            predicted.setdefault(name, np.empty_like(labels))[test] = types
    return _all_metrics(labels, predicted, labels)


def _predictions(
    train_embedding: np.ndarray, train_labels: np.ndarray, test_embedding: np.ndarray, ks: list[int], probe: bool = True
) -> dict[str, np.ndarray]:
    """Predicted labels by the prefix of their metrics; that of the first number of neighbours is empty."""
    if len(train_embedding) < max(ks):
        raise ValueError(f"{len(train_embedding)} training cells are fewer than k={max(ks)} neighbours; lower k.")
    check_embedding(train_embedding)
    check_embedding(test_embedding)
    if n_shared := len(shared_rows(train_embedding, test_embedding)):
        log.warning("%d of %d test cells have the embedding of a training cell.", n_shared, len(test_embedding))
    neighbours = NearestNeighbors(n_neighbors=max(ks)).fit(train_embedding)
    types, codes = np.unique(train_labels, return_inverse=True)  # sklearn is slow at strings
    nearest = codes[neighbours.kneighbors(test_embedding, return_distance=False)]  # (n_test_cells, k)
    predicted = {}
    for k in ks:
        votes = (nearest[:, :k, None] == np.arange(len(types))).sum(axis=1)  # (n_test_cells, n_types)
        predicted["" if k == ks[0] else f"knn{k}_"] = types[votes.argmax(axis=1)]
    if probe:
        predicted["probe_"] = types[linear_probe(train_embedding, codes, test_embedding)]
    return predicted


def _all_metrics(truth: np.ndarray, predicted: dict[str, np.ndarray], train_labels: np.ndarray) -> Metrics:
    """Metrics of each kind of prediction under its prefix; those of types of the first alone."""
    (_, first), *others = predicted.items()
    metrics = classification_metrics(truth, first, train_labels)
    for name, types in others:
        metrics = metrics.merged(classification_metrics(truth, types, train_labels, by_type=False).prefixed(name))
    return metrics


def linear_probe(train_embedding: np.ndarray, train_labels: np.ndarray, test_embedding: np.ndarray) -> np.ndarray:
    """Labels predicted by a logistic regression on the embedding, (n_test_cells,).

    Columns are scaled to mean 0 and variance 1 over the training cells, the penalty is scikit-learn's default (L2,
    C = 1), and classes are not weighted. Where all training cells are of one type, that one is predicted.
    """
    if len(np.unique(train_labels)) == 1:
        return np.repeat(train_labels[:1], len(test_embedding))
    probe = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg"))
    return probe.fit(train_embedding, train_labels).predict(test_embedding)


def _balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    return recall_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "micro_f1": lambda truth, predicted: np.mean(truth == predicted),
    "macro_f1": lambda truth, predicted: f1_by_type(truth, predicted).mean(),
    "balanced_accuracy": _balanced_accuracy,
    "error_rate": lambda truth, predicted: 1 - np.mean(truth == predicted),
}  # of true and predicted labels, as whole numbers; a line here, and one in metrics.csv, adds a metric


def f1_by_type(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 of each type among the true labels, in their order."""
    return f1_score(truth, predicted, labels=np.unique(truth), average=None, zero_division=0)


def classification_metrics(
    truth: np.ndarray, predicted: np.ndarray, train_labels: np.ndarray | None = None, *, by_type: bool = True
) -> Metrics:
    """What is right of predicted labels, (n_cells,), by every metric of labels (`metrics.csv`).

    With one label a cell, micro-averaged F1 is accuracy. Means over types are over those among the true labels. Labels
    of the training cells are for the levels of chance (see `uncertainty.chance_levels`).
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    types, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true, called = np.split(codes, 2)
    values = {name: metric(true, called) for name, metric in METRICS.items()}
    intervals = uncertainty.classification_intervals(truth, predicted)
    chance = {} if train_labels is None else uncertainty.chance_levels(train_labels, truth)
    if added := [name for name in METRICS if name not in intervals]:
        draws = np.random.default_rng(0).integers(len(truth), size=(uncertainty.N_RESAMPLES, len(truth)))
        for name in added:
            resampled = np.array([METRICS[name](true[cells], called[cells]) for cells in draws])
            intervals[name] = uncertainty.interval(values[name], resampled)
    if by_type:
        present, support = np.unique(true, return_counts=True)
        for kind, numbers in (("f1", f1_by_type(true, called)), ("support", support)):
            values |= {f"{kind}[{name}]": number for name, number in zip(types[present], numbers, strict=True)}
    return Metrics(values, intervals, chance, predicted=predicted)


def shared_rows(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Sorted rows of `test` that are equal, number by number, to a row of `train`, both of the same number type."""
    seen = {row.tobytes() for row in train + 0}  # -0.0 becomes 0.0
    return np.flatnonzero([row.tobytes() in seen for row in test + 0])


def check_embedding(embedding: np.ndarray) -> None:
    """Refuse an embedding with NaN or infinite values, naming the first such cell."""
    wrong = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(wrong):
        raise ValueError(f"the embedding of {len(wrong)} cells (first: cell {wrong[0]}) is NaN or infinite.")

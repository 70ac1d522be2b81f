"""Zero-shot classification asks whether neighbours in the embedding share a cell type."""

from __future__ import annotations

import numpy as np


def zeroshot_classification(
    train_embedding: np.ndarray,
    train_labels: np.ndarray,
    test_embedding: np.ndarray,
    test_labels: np.ndarray,
    k: int = 5,
) -> dict[str, float]:
    """Classify test cells by their k nearest training cells, uniform votes, Euclidean distance.

    Parameters
    ----------
    train_embedding, test_embedding
        (n_cells, n_latent).
    train_labels, test_labels
        (n_cells,) cell types.
    k
        Neighbours that vote; 5 in the original study.

    Returns
    -------
    `classification_metrics`.

    Raises
    ------
    ValueError
        If an embedding is not finite, or there are fewer training cells than k.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if len(train_embedding) < k:
        raise ValueError(f"{len(train_embedding)} training cells are fewer than k={k} neighbours; lower k.")
    check_embedding(train_embedding)
    check_embedding(test_embedding)
    classifier = KNeighborsClassifier(k).fit(train_embedding, np.asarray(train_labels))
    return classification_metrics(test_labels, classifier.predict(test_embedding))


def classification_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """micro_f1 (accuracy, for one label a cell), macro_f1 (each true type counts alike), balanced_accuracy.

    Each is 1 at best. Only types among the true labels enter macro_f1 and balanced_accuracy.
    """
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    truth, predicted = np.asarray(truth), np.asarray(predicted)
    types = np.unique(truth)
    return {
        "micro_f1": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=types, average="macro", zero_division=0)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=types, average="macro", zero_division=0)),
    }


def check_embedding(embedding: np.ndarray) -> None:
    """Refuse an embedding with NaN or infinite values.

    Raises
    ------
    ValueError
        Naming the first such cell.
    """
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the embedding of {int((~finite).sum())} cells (first: cell {int(np.argmin(finite))}) is NaN or infinite."
        )

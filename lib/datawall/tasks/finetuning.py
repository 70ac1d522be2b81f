"""Fine-tuned classification: a small network learns the cell types on top of the frozen embedding."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from datawall import training
from datawall.tasks.classification import check_embedding, classification_metrics

RECIPE = training.Recipe(steps=3000, batch_size=128, learning_rate=3e-3, decay="none", validate_every=100, patience=3)
TRAIN, VALIDATION, TEST = 0, 1, 2


def finetuned_classification(
    embedding: np.ndarray, labels: np.ndarray, part: np.ndarray, *, seed: int, recipe: training.Recipe = RECIPE
) -> dict[str, float]:
    """Train an MLP head (128 hidden units) with early stopping, and score it on the test cells.

    Columns of the embedding are scaled to mean 0 and variance 1 over the training cells, so that every family's
    head starts from the same scale. Classes are not weighted. Budget and patience are in steps, so that a small
    data set trains as long as a large one (the original's epochs left small ones under-trained).

    Parameters
    ----------
    embedding
        (n_cells, n_latent).
    labels
        (n_cells,) cell types.
    part
        (n_cells,) `TRAIN`, `VALIDATION` or `TEST`.
    seed
        Of the initial weights, the order of cells and dropout.
    recipe
        Of the training.

    Returns
    -------
    `classification_metrics`.

    Raises
    ------
    ValueError
        If the embedding is not finite or a part is empty.
    """
    check_embedding(embedding)
    if missing := [name for name, value in (("train", 0), ("validation", 1), ("test", 2)) if not (part == value).any()]:
        raise ValueError(f"no cell in the {' and '.join(missing)} part; use a larger data set.")
    types, target = np.unique(np.asarray(labels), return_inverse=True)
    train = part == TRAIN
    deviation = embedding[train].std(axis=0)
    X = (embedding - embedding[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    where = training.device()
    X = torch.from_numpy(X.astype(np.float32)).to(where)
    y = torch.from_numpy(target).to(where)
    X_train, y_train = X[torch.from_numpy(train)], y[torch.from_numpy(train)]
    validation = torch.from_numpy(part == VALIDATION)
    head = training.seeded(lambda: training.Head(X.shape[1], len(types)), seed)
    training.train(
        head,
        lambda forward, rows, step: F.cross_entropy(forward(X_train[rows]), y_train[rows]),
        len(X_train),
        recipe,
        seed=seed,
        validation_loss=lambda: F.cross_entropy(head(X[validation]), y[validation]).item(),
    )
    test = part == TEST
    with torch.no_grad():
        predicted = head(X[torch.from_numpy(test)]).argmax(dim=1).cpu().numpy()
    return classification_metrics(np.asarray(labels)[test], types[predicted])

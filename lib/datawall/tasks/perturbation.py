"""Perturbation response: predict the treated mean expression of a context never seen treated."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from datawall import training
from datawall.tasks.classification import check_embedding

RECIPE = training.Recipe(steps=200, batch_size=128, learning_rate=1e-3)


def perturbation_response(
    embedding: np.ndarray,
    expression: np.ndarray,
    treated: np.ndarray,
    context: np.ndarray,
    held_out: str,
    *,
    seed: int,
    recipe: training.Recipe = RECIPE,
) -> dict[str, float]:
    """Train an MLP head from control embeddings to treated expression on all contexts but one; score it on that.

    The head learns from control cells, each paired with the mean of its own context's treated cells. (The
    original paired it with one treated cell drawn at random, whose expectation is that mean: the same optimum, a
    noisier path.) The prediction for the held-out context is the mean over its control cells.

    Parameters
    ----------
    embedding
        (n_cells, n_latent); only those of control cells are used.
    expression
        (n_cells, n_genes) log-normalised expression.
    treated
        (n_cells,) bool: treated or control.
    context
        (n_cells,) cell type, cell line or patient.
    held_out
        The context to predict.
    seed
        Of the initial weights, the order of cells and dropout.
    recipe
        Of the training.

    Returns
    -------
    `response_metrics`.

    Raises
    ------
    ValueError
        If the embedding is not finite, or the held-out context or the others lack control or treated cells.
    """
    check_embedding(embedding[~treated])
    context = np.asarray(context).astype(str)
    train_contexts = usable_contexts(treated, context)
    if held_out not in train_contexts or len(train_contexts) < 2:
        raise ValueError(
            f"cannot hold out {held_out!r}: contexts with control and treated cells are {train_contexts}, and at least "
            "two are needed."
        )
    train_contexts.remove(held_out)
    control = np.flatnonzero(~treated & np.isin(context, train_contexts))
    means = np.stack([expression[treated & (context == name)].mean(axis=0) for name in train_contexts])
    target = np.searchsorted(train_contexts, context[control])
    where = training.device()
    mean, deviation = embedding[control].mean(axis=0), embedding[control].std(axis=0)
    X = torch.from_numpy(((embedding - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)).to(where)
    X_train = X[torch.from_numpy(control)]
    Y_train, y = torch.from_numpy(means.astype(np.float32)).to(where), torch.from_numpy(target).to(where)
    head = training.seeded(lambda: training.Head(X.shape[1], expression.shape[1]), seed)
    # Starting from the mean response leaves the steps to what tells contexts apart.
    with torch.no_grad():
        head[-1].bias.copy_(Y_train[y].mean(dim=0))
    training.train(
        head,
        lambda forward, rows, step: F.mse_loss(forward(X_train[rows]), Y_train[y[rows]]),
        len(control),
        recipe,
        seed=seed,
    )
    test = ~treated & (context == held_out)
    with torch.no_grad():
        predicted = head(X[torch.from_numpy(test)]).mean(dim=0).cpu().numpy()
    return response_metrics(
        predicted, expression[treated & (context == held_out)].mean(axis=0), expression[test].mean(axis=0)
    )


def usable_contexts(treated: np.ndarray, context: np.ndarray) -> list[str]:
    """Contexts, sorted, that have control and treated cells."""
    return np.intersect1d(context[treated].astype(str), context[~treated].astype(str)).tolist()


def response_metrics(predicted: np.ndarray, treated: np.ndarray, control: np.ndarray) -> dict[str, float]:
    """How well predicted mean expression agrees with the treated mean.

    Parameters
    ----------
    predicted, treated, control
        (n_genes,) mean log-normalised expression.

    Returns
    -------
    mse
        Mean squared error over genes; 0 at best.
    pearson_r
        Pearson correlation over genes, which the original study prints as R2; 1 at best. High for any prediction,
        since genes differ in abundance far more than a treatment changes them.
    pearson_delta
        Pearson correlation of the predicted with the true change from control; 1 at best, 0 for no change.
    """
    return {
        "mse": float(np.mean((predicted - treated) ** 2)),
        "pearson_r": _pearson(predicted, treated),
        "pearson_delta": _pearson(predicted - control, treated - control),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; 0 where one side is constant, as it then says nothing of the other."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 0 else 0.0

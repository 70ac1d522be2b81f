"""Fine-tuned classification: cell types are learnt on top of the embedding, frozen or trained along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall import training
from datawall.tasks.classification import check_embedding, classification_metrics
from datawall.tasks.uncertainty import Metrics

# Budget, warm-up and patience are in steps, so that a small data set trains as long as a large one: the original's, in
# passes over the data, left small ones under-trained.
RECIPE = training.Recipe(steps=1500, batch_size=128, learning_rate=3e-3, decay="none", validate_every=25, patience=5)
FULL_RECIPE = training.Recipe(
    steps=1000, batch_size=64, learning_rate=3e-4, warmup=0.1, clip_norm=1.0, validate_every=50, patience=5
)
TRAIN, VALIDATION, TEST = 0, 1, 2
CELLS_AT_ONCE = 256  # of an encoder that is not learning

type ClassWeight = Literal["balanced"] | None


class Finetunable(Protocol):
    """A family whose encoder can be trained on."""

    def finetunable(self) -> tuple[nn.Module, Callable[[sp.csr_matrix], Tensor]]:
        """A copy of the network, and what embeds raw counts with it, (n_cells, n_latent), for gradients to pass."""


def can_finetune(model: Any) -> bool:
    """Whether a model's encoder can be trained on."""
    return hasattr(model, "finetunable")


def finetuned_classification(
    embedding: np.ndarray,
    labels: np.ndarray,
    part: np.ndarray,
    *,
    seed: int,
    recipe: training.Recipe = RECIPE,
    class_weight: ClassWeight = None,
) -> Metrics:
    """Train an MLP head (128 hidden units) with early stopping, and score it on the test cells.

    Columns of the embedding are scaled to mean 0 and variance 1 over the training cells, so that every family's
    head starts from the same scale.

    Parameters
    ----------
    embedding
        (n_cells, n_latent).
    labels
        (n_cells,) cell types.
    part
        (n_cells,) `TRAIN`, `VALIDATION` or `TEST`, by cell or by donor.
    seed
        Of the initial weights, the order of cells and dropout.
    recipe
        Of the training.
    class_weight
        Weight of a cell in the loss: 1, or "balanced", the mean number of training cells of a type over that of its
        own.

    Returns
    -------
    `classification_metrics`.

    Raises
    ------
    ValueError
        If the embedding is not finite or a part is empty.
    """
    check_embedding(embedding)
    task = _Task(labels, part, class_weight)
    X = _scaled(embedding, task.rows[TRAIN])
    head = _fit_head(X, task, seed, recipe)
    with torch.no_grad():
        return task.score(head(X[task.rows[TEST]]))


def fully_finetuned_classification(
    model: Finetunable,
    counts: sp.csr_matrix,
    labels: np.ndarray,
    part: np.ndarray,
    *,
    seed: int,
    recipe: training.Recipe = FULL_RECIPE,
    head_recipe: training.Recipe = RECIPE,
    class_weight: ClassWeight = None,
) -> Metrics:
    """Train the encoder and a head on top of it, with early stopping, and score them on the test cells.

    The head is first trained on the frozen embedding, as in `finetuned_classification`, and then with the encoder: a
    head of random weights would lead the encoder astray (Kumar et al. 2022, "Fine-tuning can distort pretrained
    features and underperform out-of-distribution"). The model itself is left as it was.

    Parameters
    ----------
    model
        A pretrained model with a method `finetunable` (see `can_finetune`).
    counts
        (n_cells, n_genes) raw counts, CSR, in the corpus's gene order.
    labels, part, seed, class_weight
        See `finetuned_classification`.
    recipe, head_recipe
        Of the training of both, and of the head alone before.

    Returns
    -------
    `classification_metrics` of all types together, named `full_micro_f1` and so on.

    Raises
    ------
    ValueError
        If an embedding is not finite or a part is empty.
    """
    task = _Task(labels, part, class_weight)
    encoder, encode = model.finetunable()
    encoder.to(training.device()).eval()
    embedding = np.concatenate([each.cpu().numpy() for each in _embedded(encode, counts, np.arange(len(labels)))])
    check_embedding(embedding)
    mean, deviation = _moments(embedding[task.rows[TRAIN]])
    head = _fit_head(_scaled(embedding, task.rows[TRAIN]), task, seed, head_recipe)
    both = nn.ModuleList([encoder, head])

    def logits(embedded: Tensor) -> Tensor:
        return head((embedded - mean) / deviation)

    def scores(cells: np.ndarray) -> Tensor:
        return torch.cat([logits(embedded) for embedded in _embedded(encode, counts, cells)])

    rows = task.rows[TRAIN]
    training.train(
        both,
        lambda forward, cells, step: task.loss(logits(encode(counts[rows[cells]])), rows[cells]),
        len(rows),
        recipe,
        seed=seed,
        validation_loss=lambda: task.loss(scores(task.rows[VALIDATION]), task.rows[VALIDATION]).item(),
    )
    return task.score(scores(task.rows[TEST]), by_type=False).prefixed("full_")


class _Task:
    """The labels to learn: their codes, the cells of each part, the loss and the score."""

    def __init__(self, labels: np.ndarray, part: np.ndarray, class_weight: ClassWeight) -> None:
        self.rows = [np.flatnonzero(part == value) for value in (TRAIN, VALIDATION, TEST)]
        names = ("train", "validation", "test")
        if missing := [name for name, rows in zip(names, self.rows, strict=True) if not len(rows)]:
            raise ValueError(f"no cell in the {' and '.join(missing)} part; use a larger data set.")
        self.labels = np.asarray(labels)
        self.types, codes = np.unique(self.labels, return_inverse=True)
        self.target = torch.from_numpy(codes).to(training.device())
        self.weight = None
        if class_weight == "balanced":
            n = np.bincount(codes[self.rows[TRAIN]], minlength=len(self.types))
            # A type without training cells is never called, whatever its weight in the validation loss.
            weight = np.where(n > 0, n[n > 0].mean() / np.maximum(n, 1), 1)
            self.weight = torch.from_numpy(weight.astype(np.float32)).to(training.device())
        elif class_weight is not None:
            raise ValueError(f"class_weight {class_weight!r} is neither None nor 'balanced'.")

    def loss(self, logits: Tensor, cells: np.ndarray) -> Tensor:
        """Cross-entropy of cells."""
        return F.cross_entropy(logits, self.target[torch.from_numpy(cells)], self.weight)

    def score(self, logits: Tensor, *, by_type: bool = True) -> Metrics:
        """Metrics of the test cells."""
        predicted = self.types[logits.argmax(dim=1).cpu().numpy()]
        train, test = (self.labels[self.rows[value]] for value in (TRAIN, TEST))
        return classification_metrics(test, predicted, train, by_type=by_type)


def _moments(embedding: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column, a deviation of zero as 1, on the device."""
    deviation = embedding.std(axis=0)
    moments = embedding.mean(axis=0), np.where(deviation > 0, deviation, 1)
    return tuple(torch.from_numpy(np.asarray(each, dtype=np.float32)).to(training.device()) for each in moments)


def _scaled(embedding: np.ndarray, train: np.ndarray) -> Tensor:
    """The embedding with mean 0 and variance 1 over the training cells, on the device."""
    mean, deviation = _moments(embedding[train])
    return (torch.from_numpy(embedding.astype(np.float32)).to(training.device()) - mean) / deviation


def _fit_head(X: Tensor, task: _Task, seed: int, recipe: training.Recipe) -> training.Head:
    """A head trained on the embedding as it is."""
    head = training.seeded(lambda: training.Head(X.shape[1], len(task.types)), seed)
    train, validation = task.rows[TRAIN], task.rows[VALIDATION]
    training.train(
        head,
        lambda forward, cells, step: task.loss(forward(X[train[cells]]), train[cells]),
        len(train),
        recipe,
        seed=seed,
        validation_loss=lambda: task.loss(head(X[validation]), validation).item(),
    )
    return head


@torch.no_grad()
def _embedded(encode: Callable[[sp.csr_matrix], Tensor], counts: sp.csr_matrix, cells: np.ndarray) -> list[Tensor]:
    """Embedding of cells, a block at a time, so that memory does not grow with the cells."""
    return [encode(counts[cells[first : first + CELLS_AT_ONCE]]) for first in range(0, len(cells), CELLS_AT_ONCE)]

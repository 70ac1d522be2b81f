"""Fine-tuned classification: cell types are learnt on top of the embedding, frozen or trained along."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from datawall.models import training
from datawall.tasks.classification import check_embedding, classification_metrics
from datawall.tasks.heads import Heads
from datawall.tasks.metrics import Metrics

# Budget, warm-up and patience are in steps, so that a small data set trains as long as a large one: the original's, in
# passes over the data, left small ones under-trained.
RECIPE = training.Recipe(steps=1500, batch_size=256, learning_rate=6e-3, decay="none", validate_every=15, patience=3)
FULL_RECIPE = training.Recipe(
    steps=1000, batch_size=64, learning_rate=3e-4, warmup=0.1, clip_norm=1.0, validate_every=50, patience=5
)
TRAIN, VALIDATION, TEST = 0, 1, 2
CELLS_AT_ONCE = 256  # of an encoder that is not learning


def finetuned_classification(
    embedding: np.ndarray,
    labels: np.ndarray,
    part: np.ndarray,
    *,
    seed: int,
    recipe: training.Recipe = RECIPE,
    class_weight: Literal["balanced"] | None = None,
) -> Metrics:
    """Train an MLP head (128 hidden units) with early stopping; `classification_metrics` of the test cells.

    The embedding is (n_cells, n_latent); its columns are scaled to mean 0 and variance 1 over the training cells, so
    that every family's head starts from the same scale. The parts of (n_cells,) cells are `TRAIN`, `VALIDATION` or
    `TEST`; for cross-validation they are (n_folds, n_cells), each cell is a test cell once at most, and the heads of
    the folds are trained side by side, each as if alone. The seed is of initial weights, order of cells and dropout. A
    cell weighs 1 in the loss or, if "balanced", the mean number of training cells of a type over that of its own.
    """
    check_embedding(embedding)
    folds = _Folds(labels, part, class_weight)
    X = torch.from_numpy(embedding.astype(np.float32)).to(training.device())
    X = torch.stack([_scaling(embedding[rows])(X) for rows in folds.rows[TRAIN]])
    heads = _fit_heads(X, folds, seed, recipe)
    with torch.no_grad():
        return folds.score([heads(X[:, rows])[fold] for fold, rows in enumerate(folds.rows[TEST])])


def fully_finetuned_classification(
    model: Any,
    counts: sp.csr_matrix,
    labels: np.ndarray,
    part: np.ndarray,
    *,
    seed: int,
    recipe: training.Recipe = FULL_RECIPE,
    head_recipe: training.Recipe = RECIPE,
    class_weight: Literal["balanced"] | None = None,
) -> Metrics:
    """Train the encoder and a head on top of it, with early stopping, and score them on the test cells.

    The model has a method `finetunable`, as `geneformer.Geneformer` has; it is left as it was, and each fold begins
    from it. Counts are raw, (n_cells, n_genes), in the corpus's gene order; all else is as in
    `finetuned_classification`. The head is first trained on the frozen embedding, and then with the encoder: a head of
    random weights would lead the encoder astray (Kumar et al. 2022, "Fine-tuning can distort pretrained features and
    underperform out-of-distribution"). Metrics are those of all types together, named `full_micro_f1` and so on.
    """
    folds = _Folds(labels, part, class_weight)
    logits = [
        _fully_finetuned(model, counts, _Folds(labels, fold, class_weight), seed, recipe, head_recipe)
        for fold in folds.part
    ]
    return folds.score(logits, by_type=False).prefixed("full_")


def _fully_finetuned(
    model: Any, counts: sp.csr_matrix, fold: "_Folds", seed: int, recipe: training.Recipe, head_recipe: training.Recipe
) -> Tensor:
    """Logits of the test cells of one fold, (n_types, n_cells)."""
    train, validation, test = (rows for (rows,) in fold.rows)
    encoder, encode = model.finetunable()
    encoder.to(training.device()).eval()
    blocks = _embedded(encode, counts, np.arange(counts.shape[0]))
    embedding = np.concatenate([block.cpu().numpy() for block in blocks])
    check_embedding(embedding)
    scaled = _scaling(embedding[train])
    head = _fit_heads(scaled(torch.from_numpy(embedding).to(training.device()))[None], fold, seed, head_recipe)

    def logits(embedded: list[Tensor]) -> Tensor:
        return torch.cat([head(scaled(block)[None]) for block in embedded], dim=2)  # (1, n_types, n_cells)

    def loss(embedded: list[Tensor], cells: np.ndarray) -> Tensor:
        return fold.loss(logits(embedded), cells[None])[0].sum()

    training.train(
        nn.ModuleList([encoder, head]),
        lambda forward, cells, step: loss([encode(counts[train[cells]])], train[cells]),
        len(train),
        recipe,
        seed=seed,
        validation_loss=lambda: loss(_embedded(encode, counts, validation), validation).item(),
    )
    return logits(_embedded(encode, counts, test))[0]


class _Folds:
    """The labels to learn: their codes, the cells of each part of each fold, the loss and the score."""

    def __init__(self, labels: np.ndarray, part: np.ndarray, class_weight: str | None) -> None:
        self.part = np.atleast_2d(part)
        # By part, a list of the rows of each fold.
        self.rows = [[np.flatnonzero(fold == value) for fold in self.part] for value in (TRAIN, VALIDATION, TEST)]
        names = ("train", "validation", "test")
        if missing := [name for name, rows in zip(names, self.rows, strict=True) if not all(map(len, rows))]:
            raise ValueError(f"no cell in the {' and '.join(missing)} part; use a larger data set.")
        self.labels = np.asarray(labels)
        self.types, codes = np.unique(self.labels, return_inverse=True)
        self.target = torch.from_numpy(codes).to(training.device())
        weight = np.ones((len(self.part), len(self.types)))
        if class_weight == "balanced":
            n = np.stack([np.bincount(codes[rows], minlength=len(self.types)) for rows in self.rows[TRAIN]])
            mean = n.sum(axis=1, keepdims=True) / (n > 0).sum(axis=1, keepdims=True)
            # A type without training cells is never called, whatever its weight in the validation loss.
            weight = np.where(n > 0, mean / np.maximum(n, 1), 1)
        elif class_weight is not None:
            raise ValueError(f"class_weight {class_weight!r} is neither None nor 'balanced'.")
        self.weight = torch.from_numpy(weight.astype(np.float32)).to(training.device())

    def alike(self, part: int) -> np.ndarray:
        """Rows of a part, (n_folds, n_rows): those of a fold that has fewer begin again at its end."""
        length = max(map(len, self.rows[part]))
        return np.stack([np.resize(rows, length) for rows in self.rows[part]])

    def loss(self, logits: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean weighted cross-entropy of each fold's cells, (n_folds,), and its gradient by the logits.

        These are (n_folds, n_types, n_rows), and rows (n_folds, n_rows).
        """
        target = self.target[training.send(torch.from_numpy(rows))][:, None]  # (n_folds, 1, n_rows)
        weight = self.weight.gather(1, target[:, 0])[:, None]
        weight = weight / weight.sum(2, keepdim=True)
        log_p = logits.log_softmax(1)
        gradient = log_p.detach().exp().scatter_add_(1, target, torch.full_like(weight, -1)) * weight
        return -(log_p.gather(1, target) * weight).sum((1, 2)), gradient

    def score(self, logits: list[Tensor], *, by_type: bool = True) -> Metrics:
        """Metrics of the test cells of all folds; logits (n_types, n_test_cells) of each."""
        test = np.concatenate(self.rows[TEST])
        predicted = self.types[torch.cat(logits, dim=1).argmax(dim=0).cpu().numpy()]
        order = np.argsort(test)  # predictions in the order of the cells
        train = training_labels(self.labels, self.part)
        return classification_metrics(self.labels[test[order]], predicted[order], train, by_type=by_type)


def training_labels(labels: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Labels of the training cells, by which chance guesses; of several folds those of all cells, which take turns."""
    folds = np.atleast_2d(part)
    return labels if len(folds) > 1 else labels[folds[0] == TRAIN]


def _fit_heads(X: Tensor, folds: _Folds, seed: int, recipe: training.Recipe) -> Heads:
    """A head for each fold, trained on its embedding, (n_folds, n_cells, n_latent), as it is.

    Each keeps the weights of its own lowest validation loss, and stops looking once its own patience is over.
    """
    n_folds, patience = len(X), np.inf if recipe.patience is None else recipe.patience
    heads = training.seeded(lambda: Heads(n_folds, X.shape[2], len(folds.types)), seed)
    train, validation = folds.alike(TRAIN), folds.alike(VALIDATION)
    first = X.shape[1] * np.arange(n_folds)[:, None]

    def embedded(rows: np.ndarray) -> Tensor:
        """The embedding of rows, (n_folds, n_rows), of the folds."""
        one_below_another = training.send(torch.from_numpy((first + rows).ravel()))
        return X.flatten(0, 1).index_select(0, one_below_another).unflatten(0, rows.shape)

    held = embedded(validation)
    lowest, waited = X.new_full((n_folds,), torch.inf), X.new_zeros(n_folds)
    best = [weight.detach().clone() for weight in heads.parameters()]

    def validation_loss() -> float:
        nonlocal lowest, waited
        losses, _ = folds.loss(heads(held), validation)
        better = (losses < lowest) & (waited < patience)
        lowest, waited = torch.where(better, losses, lowest), torch.where(better, 0.0, waited + 1)
        for kept, weight in zip(best, heads.parameters(), strict=True):
            kept[better] = weight[better]
        return lowest.sum().item()

    def loss_of(_: training.Forward, cells: np.ndarray, step: int) -> Tensor:
        rows = train[:, cells]

        def judge(logits: Tensor) -> tuple[Tensor, Tensor]:
            losses, gradient = folds.loss(logits, rows)
            return losses.sum(), gradient

        return heads.loss(embedded(rows), judge)

    training.train(heads, loss_of, train.shape[1], recipe, seed=seed, validation_loss=validation_loss)
    with torch.no_grad():
        for kept, weight in zip(best, heads.parameters(), strict=True):
            weight.copy_(kept)
    return heads


def _scaling(train: np.ndarray) -> Callable[[Tensor], Tensor]:
    """What gives the columns of an embedding mean 0 and variance 1 over the training cells; 0 where all are alike."""
    deviation = train.std(axis=0)
    moments = train.mean(axis=0), np.where(deviation > 0, deviation, 1)
    mean, deviation = (torch.from_numpy(row.astype(np.float32)).to(training.device()) for row in moments)
    return lambda X: (X - mean) / deviation


@torch.no_grad()
def _embedded(encode: Callable[[sp.csr_matrix], Tensor], counts: sp.csr_matrix, cells: np.ndarray) -> list[Tensor]:
    """Embedding of cells, a block at a time, so that memory does not grow with the cells."""
    return [encode(counts[cells[first : first + CELLS_AT_ONCE]]) for first in range(0, len(cells), CELLS_AT_ONCE)]

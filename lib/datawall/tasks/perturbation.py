"""Perturbation response: predict the treated expression of a context never seen treated."""

from collections.abc import Callable
from typing import Literal, Self

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.metrics import euclidean_distances

from datawall.models import training
from datawall.tasks import uncertainty
from datawall.tasks.classification import check_embedding
from datawall.tasks.heads import Heads
from datawall.tasks.metrics import Metrics

RECIPE = training.Recipe(steps=100, batch_size=128, learning_rate=8e-3)  # further than 400 steps at 1e-3 came
MATCHED = 2000  # control and treated cells at most, of a context, that are matched one to one
N_TOP = 50  # differential genes
ENERGY_CELLS = 500  # cells at most, of either side, whose distances enter the energy distance


def perturbation_response(
    embedding: np.ndarray,
    expression: np.ndarray,
    treated: np.ndarray,
    context: np.ndarray,
    held_out: str,
    *,
    seed: int,
    recipe: training.Recipe = RECIPE,
    matching: Literal["mean", "nearest", "ot"] = "mean",
    response: "Response | None" = None,
) -> Metrics:
    """Train an MLP head from control embeddings to treated expression on all contexts but one; score it on that.

    The prediction is the head's output for each control cell of the held-out context, judged by `response`: that of
    the same cells, made for another embedding of them, or by default anew. The
    embedding is (n_cells, n_latent), that of treated cells is to match them alone; expression, (n_cells, n_genes), is
    log-normalised; `treated`, (n_cells,) bool, tells treated cells from control; a context is a cell type, cell line or
    patient. The seed is that of the initial weights, the order of cells, dropout, and of the cells that are matched.

    By `matching`, a control cell is to become the "mean" of its context's treated cells; or each treated cell that it
    is "nearest" to in the embedding, which may be several or none; or one treated cell, by the assignment of least
    total squared distance within the context (optimal transport, "ot", between as many of each). The original study
    drew one treated cell of the context at random, whose expectation is their mean: the same optimum on a noisier path.

    Raises ValueError if the embedding is not finite, the held-out context or the others lack control or treated cells,
    or there is no such matching.
    """
    check_embedding(embedding[~treated])
    context = np.asarray(context).astype(str)
    train_contexts = usable_contexts(treated, context)
    if held_out not in train_contexts or len(train_contexts) < 2:
        there = f"contexts with control and treated cells are {train_contexts}, and at least two are needed."
        raise ValueError(f"cannot hold out {held_out!r}: {there}")
    train_contexts.remove(held_out)
    if matching == "mean":
        source = np.flatnonzero(~treated & np.isin(context, train_contexts))
        targets = np.stack([expression[treated & (context == name)].mean(axis=0) for name in train_contexts])
        target = np.searchsorted(train_contexts, context[source])
    elif matching in ("nearest", "ot"):
        check_embedding(embedding[treated & (context != held_out)])
        rng = np.random.default_rng(seed)
        pairs = [_matched(embedding, treated, context == name, matching, rng) for name in train_contexts]
        source, cells = np.concatenate(pairs, axis=1)
        targets, target = expression[cells], np.arange(len(cells))
    else:
        raise ValueError(f"matching {matching!r} is none of 'mean', 'nearest', 'ot'.")
    where = training.device()
    mean, deviation = embedding[source].mean(axis=0), embedding[source].std(axis=0)

    def inputs(cells: np.ndarray) -> torch.Tensor:
        scaled = (embedding[cells] - mean) / np.where(deviation > 0, deviation, 1)
        return torch.from_numpy(scaled.astype(np.float32)).to(where)

    X, y = inputs(source), torch.from_numpy(target).to(where)
    Y = torch.from_numpy(targets.T.astype(np.float32)).to(where)  # (n_genes, n_targets)
    head = training.seeded(lambda: Heads(1, X.shape[1], expression.shape[1]), seed)
    # Starting from the mean response leaves the steps to what tells contexts apart.
    with torch.no_grad():
        head.last_bias[0] = Y[:, y].mean(dim=1, keepdim=True)

    def loss_of(_: training.Forward, cells: np.ndarray, step: int) -> torch.Tensor:
        rows = training.send(torch.from_numpy(cells))

        def judge(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            error = outputs.float().sub_(Y.index_select(1, y[rows]))  # of bfloat16 on a GPU
            return error.square().mean(), error.mul_(2 / error.numel())

        return head.loss(X[None, rows], judge)

    training.train(head, loss_of, len(source), recipe, seed=seed)
    test = ~treated & (context == held_out)
    with torch.no_grad():
        predicted = head(inputs(test)[None])[0].T.cpu().numpy()
    return (response or Response.of(expression, treated, context, held_out)).metrics(predicted)


def usable_contexts(treated: np.ndarray, context: np.ndarray) -> list[str]:
    """Contexts, sorted, that have control and treated cells."""
    return np.intersect1d(context[treated].astype(str), context[~treated].astype(str)).tolist()


def changes(expression: np.ndarray, treated: np.ndarray, context: np.ndarray, contexts: list[str]) -> np.ndarray:
    """Change of mean expression with treatment in each of the contexts, (n_contexts, n_genes)."""
    means = ([expression[(context == name) & side].mean(axis=0) for name in contexts] for side in (treated, ~treated))
    return np.subtract(*map(np.stack, means))


def _matched(
    embedding: np.ndarray, treated: np.ndarray, in_context: np.ndarray, matching: str, rng: np.random.Generator
) -> np.ndarray:
    """Control cells of a context and the treated cell of each, rows of all cells, (2, n_pairs)."""
    before, after = (rng.permutation(np.flatnonzero(in_context & side))[:MATCHED] for side in (~treated, treated))
    distances = cdist(embedding[before], embedding[after], "sqeuclidean")
    if matching == "ot":
        rows, columns = linear_sum_assignment(distances)
    else:
        rows, columns = distances.argmin(axis=0), np.arange(len(after))
    return np.stack([before[rows], after[columns]])


class Response:
    """What a treatment does to the cells of a context, for predictions of their expression to be judged by.

    Log-normalised expression of the context's treated and control cells is (n_cells, n_genes) each. `others` are
    `changes` of other contexts, among which the right one is to be told: without them, there is no
    `context_discrimination`.
    """

    def __init__(self, treated: np.ndarray, control: np.ndarray, others: np.ndarray | None = None) -> None:
        self.treated, self.control = (np.atleast_2d(np.asarray(X, dtype=np.float32)) for X in (treated, control))
        self.others, self.before = others, self.control.mean(axis=0)
        self.top = differential_genes(self.treated, self.control)
        self.genes = response_weights(self.treated, self.control)
        n_cells = len(self.treated)
        self.weights = np.vstack([np.ones(n_cells), uncertainty.resamples(n_cells)]).astype(np.float32)
        self.means = (self.weights / n_cells) @ self.treated
        self.energy_distance = energy_distance(self.treated, self.weights)
        self.chance = {name: float(values[0]) for name, values in self._draws(self.control).items()}

    @classmethod
    def of(cls, expression: np.ndarray, treated: np.ndarray, context: np.ndarray, held_out: str) -> Self:
        """That of a context of a screen, beside its other contexts; arrays as in `perturbation_response`."""
        here, others = context == held_out, usable_contexts(treated, context)
        others.remove(held_out)
        changed = changes(expression, treated, context, others)
        return cls(expression[treated & here], expression[~treated & here], changed)

    def metrics(self, predicted: np.ndarray) -> Metrics:
        """How well predicted expression agrees with that of treated cells, by every metric of the task (`metrics.csv`).

        It is that of predicted cells, (n_cells, n_genes), or their mean. Intervals are over the treated cells, the
        prediction and the control cells being as they are; the top genes, and the weights, are those of all treated
        cells throughout. Chance is what predicting no change reaches. `pearson_r`, which the original study prints as
        R2, is high for any prediction: genes differ in abundance far more than a treatment changes them. A prediction
        that is a mean misses the spread of cells, and is far from them in `energy_distance` by that alone.
        """
        return Metrics.of_draws(self._draws(np.atleast_2d(np.asarray(predicted, dtype=np.float32))), self.chance)

    def _draws(self, prediction: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics' values over all treated cells, and over each resample of them."""
        mean, before, means, top, genes = prediction.mean(axis=0), self.before, self.means, self.top, self.genes
        draws = {name: metric(mean, means, before) for name, metric in METRICS.items()}
        draws |= {name: metric(mean[top], means[:, top], before[top]) for name, metric in TOP_METRICS.items()}
        draws |= {name: metric(mean, means, before, genes) for name, metric in WEIGHTED_METRICS.items()}
        if self.others is not None:
            own = np.square(means - mean) @ genes
            further = np.square(self.others - (mean - before)) @ genes
            draws["context_discrimination"] = (further > own[:, None]).mean(axis=1)
        return draws | {"energy_distance": self.energy_distance(prediction)}


def differential_genes(treated: np.ndarray, control: np.ndarray, n: int = N_TOP) -> np.ndarray:
    """The n genes (all, where there are fewer) with the largest `_welch` score between cells, best first."""
    return np.argsort(-_welch(treated, control), kind="stable")[:n]


def response_weights(treated: np.ndarray, control: np.ndarray) -> np.ndarray:
    """(n_genes,) weights that sum to 1: the squares of `_welch` scores scaled to 0 to 1 (arXiv 2506.22641)."""
    score = _welch(treated, control)
    score = np.minimum(score, score[np.isfinite(score)].max(initial=1))
    weights = np.square((score - score.min()) / (np.ptp(score) or 1))
    return weights / weights.sum() if weights.any() else np.full(len(score), 1 / len(score))


def _welch(treated: np.ndarray, control: np.ndarray) -> np.ndarray:
    """|t| of Welch's test of each gene; where a side has one cell only, the difference."""
    score = np.abs(treated.mean(axis=0) - control.mean(axis=0), dtype=np.float64)
    if min(len(treated), len(control)) > 1:
        squared_error = sum(X.var(axis=0, ddof=1, dtype=np.float64) / len(X) for X in (treated, control))
        with np.errstate(divide="ignore", invalid="ignore"):  # a change without any spread is the clearest
            score = np.where(score > 0, score / np.sqrt(squared_error), 0)
    return score


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last axis; 0 where one side is constant, as it then says nothing of the other."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    scale = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.where(scale > 0, (x * y).sum(axis=-1) / np.where(scale > 0, scale, 1), 0)


def _r2_delta(predicted: np.ndarray, treated: np.ndarray, control: np.ndarray, genes: np.ndarray) -> np.ndarray:
    change = treated - control
    total = np.square(change - (change @ genes)[..., None]) @ genes
    return np.where(total > 0, 1 - np.square(treated - predicted) @ genes / np.where(total > 0, total, 1), 0)


# Of mean expression over genes, (n_genes,) predicted and control, (..., n_genes) treated; a line here, and one in
# metrics.csv, adds a metric, of all genes, of the differential ones, or with weights of genes.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "mse": lambda predicted, treated, control: np.square(treated - predicted).mean(axis=-1),
    "pearson_r": lambda predicted, treated, control: _pearson(predicted, treated),
    "pearson_delta": lambda predicted, treated, control: _pearson(predicted - control, treated - control),
}
TOP_METRICS = {
    "mse_top50": METRICS["mse"],
    "pearson_delta_top50": METRICS["pearson_delta"],
    "direction_accuracy": lambda predicted, treated, control: ((predicted - control) * (treated - control) > 0).mean(
        axis=-1
    ),
}
WEIGHTED_METRICS = {
    "mse_weighted": lambda predicted, treated, control, genes: np.square(treated - predicted) @ genes,
    "r2_delta_weighted": _r2_delta,
}


def energy_distance(y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a sample of cells, x: 2 E|x - y| - E|x - x'| - E|y - y'|, at Euclidean distance over all genes.

    Of Székely and Rizzo (2013), unbiased: x' and y' are other cells than x and y, so that two samples of one
    population are about 0 apart, now and then a little less. Samples are (n_cells, n_genes) expression; of more than
    500 cells, that many evenly spaced ones are taken. The cells of a sample of one are no distance apart. The function
    gives a value for each of the (n_weights, n_cells) weights of the cells of y.
    """

    def some(cells: np.ndarray) -> np.ndarray:
        return cells[np.linspace(0, len(cells) - 1, min(len(cells), ENERGY_CELLS)).astype(int)]

    def apart(X: np.ndarray, weights: np.ndarray) -> np.ndarray:
        others = 1 - np.square(weights).sum(axis=1)  # of all pairs, those of two cells
        return ((weights @ euclidean_distances(X)) * weights).sum(axis=1) / np.where(others > 1e-9, others, 1)

    y, weights = some(y), some(weights.T).T
    weights = weights / weights.sum(axis=1, keepdims=True)
    among_y = apart(y, weights)

    def of(x: np.ndarray) -> np.ndarray:
        x = some(x)
        among_x = apart(x, np.full((1, len(x)), 1 / len(x)))
        return 2 * weights @ euclidean_distances(x, y).mean(axis=0) - among_x - among_y

    return of


def oracle(treated: np.ndarray, control: np.ndarray) -> Metrics:
    """The ceiling of `Response.metrics`: what the true means would reach against the means of so few treated cells.

    A metric compares a prediction with the mean of the treated cells that there are, whose error is known: its variance
    is that of cells over their number. So a prediction that is the truth has that for its mean squared error, and for
    its correlation the root of the reliability, the share of the observed variance over genes that is no such error
    (Spearman 1904): what halves of the cells give once Spearman's and Brown's formula is applied. Control cells are
    taken as they are, the same in prediction and truth. Where genes are chosen or weighted by the same cells, as in all
    metrics of top genes and weights, the ceiling is out of reach if the cells are few: fewer than two are refused.
    """
    if len(treated) < 2:
        raise ValueError(f"{len(treated)} treated cells have no spread; hold out a context with more.")
    error = treated.var(axis=0, ddof=1, dtype=np.float64) / len(treated)
    after, change = treated.mean(axis=0, dtype=np.float64), treated.mean(axis=0) - control.mean(axis=0)
    top, genes = differential_genes(treated, control), response_weights(treated, control)

    def reliable(values: np.ndarray, error: np.ndarray, weights: np.ndarray) -> float:
        """Share of the weighted variance over genes that is not error."""
        weights = weights / weights.sum()
        total = np.square(values - weights @ values) @ weights
        return max(0.0, 1 - error @ (weights * (1 - weights)) / total) if total > 0 else 0.0

    alike = np.ones(len(error))
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = norm.cdf(np.nan_to_num(np.abs(change[top]) / np.sqrt(error[top]), nan=0))
    return Metrics(
        {
            "mse": error.mean(),
            "pearson_r": reliable(after, error, alike) ** 0.5,
            "pearson_delta": reliable(change, error, alike) ** 0.5,
            "mse_top50": error[top].mean(),
            "pearson_delta_top50": reliable(change[top], error[top], alike[top]) ** 0.5,
            "mse_weighted": error @ genes,
            "r2_delta_weighted": reliable(change, error, genes),
            "direction_accuracy": certain.mean(),
            "context_discrimination": 1.0,
            "energy_distance": 0.0,
        }
    )

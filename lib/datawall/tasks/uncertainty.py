"""What a number is worth: its confidence interval over cells, and the level that chance reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

N_RESAMPLES = 200
LEVEL = 0.95


class Metrics(dict[str, float]):
    """Metrics by name; beside them, by the same names, what is known of each.

    Parameters
    ----------
    values
        Of the metrics.
    intervals
        Low and high end of the 95 % bootstrap interval over cells.
    chance
        Value that no knowledge of the cells reaches.
    ceiling
        Value that no prediction or embedding can be expected to exceed.
    predicted
        Of classification, the predicted label of each test cell.
    """

    def __init__(
        self,
        values: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]] | None = None,
        chance: Mapping[str, float] | None = None,
        ceiling: Mapping[str, float] | None = None,
        *,
        predicted: np.ndarray | None = None,
    ) -> None:
        super().__init__((name, float(value)) for name, value in values.items())
        known = (intervals or {}, chance or {}, ceiling or {})
        self.intervals, self.chance, self.ceiling = ({name: of[name] for name in self if name in of} for of in known)
        self.predicted = predicted

    def rows(self) -> list[dict[str, Any]]:
        """A record of each metric: metric, value, low, high, chance and ceiling; None for what is unknown or NaN."""
        rows = []
        for name, value in self.items():
            low, high = self.intervals.get(name, (None, None))
            numbers = (value, low, high, self.chance.get(name), self.ceiling.get(name))
            known = (float(number) if number is not None and np.isfinite(number) else None for number in numbers)
            rows.append(
                {"metric": name, **dict(zip(("value", "low", "high", "chance", "ceiling"), known, strict=True))}
            )
        return rows

    def prefixed(self, prefix: str) -> Metrics:
        """The same metrics under longer names."""
        return Metrics(*({prefix + name: value for name, value in of.items()} for of in self._parts()))

    def merged(self, *others: Metrics) -> Metrics:
        """These metrics, and others under other names."""
        parts = zip(*(metrics._parts() for metrics in (self, *others)), strict=True)
        joined = ({name: value for of in each for name, value in of.items()} for each in parts)
        return Metrics(*joined, predicted=self.predicted)

    def _parts(self) -> tuple[dict[str, Any], ...]:
        return dict(self), self.intervals, self.chance, self.ceiling


def resamples(n_cells: int, n_resamples: int = N_RESAMPLES, *, seed: int = 0) -> np.ndarray:
    """How often each cell is drawn when as many cells as there are are drawn with replacement.

    Returns
    -------
    (n_resamples, n_cells) float64; each row sums to `n_cells`.
    """
    drawn = np.random.default_rng(seed).integers(n_cells, size=(n_resamples, n_cells))
    drawn += n_cells * np.arange(n_resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=n_resamples * n_cells)
    return times.reshape(n_resamples, n_cells).astype(np.float64)


def interval(value: float, draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentiles of a metric over bootstrap resamples, less what the resampling itself adds on average.

    A resample holds cells twice, which makes an error larger or a clustering look better than it is: without the
    correction the interval of a biased metric would not hold its own value (Efron and Tibshirani 1993, chapter 10).
    It goes no further than the draws and the value. Draws that are NaN, where a resample leaves the metric undefined,
    do not count.
    """
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return np.nan, np.nan
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - (draws.mean() - value)
    low, high = np.clip(ends, min(value, draws.min()), max(value, draws.max()))
    return float(low), float(high)


def confusion(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Types, sorted, and how many cells of each true type (row) are predicted to be of each type (column)."""
    types, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true, called = np.split(codes, [len(truth)])
    n = len(types)
    return types, np.bincount(true * n + called, minlength=n * n).reshape(n, n)


def accuracy_of(confusions: np.ndarray) -> np.ndarray:
    """Share of cells on the diagonal; of (..., n_types, n_types) a value each."""
    return np.trace(confusions, axis1=-2, axis2=-1) / confusions.sum(axis=(-2, -1))


def recalls_of(confusions: np.ndarray) -> np.ndarray:
    """Recall of each type, (..., n_types); NaN for a type without true cells."""
    support = confusions.sum(axis=-1)
    return np.diagonal(confusions, axis1=-2, axis2=-1) / np.where(support > 0, support, np.nan)


def f1_of(confusions: np.ndarray) -> np.ndarray:
    """F1 of each type, (..., n_types); NaN for a type without true cells."""
    support, called = confusions.sum(axis=-1), confusions.sum(axis=-2)
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    return 2 * right / np.where(support > 0, support + called, np.nan)


OF_CONFUSION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "micro_f1": accuracy_of,
    "macro_f1": lambda confusions: np.nanmean(f1_of(confusions), axis=-1),
    "balanced_accuracy": lambda confusions: np.nanmean(recalls_of(confusions), axis=-1),
    "error_rate": lambda confusions: 1 - accuracy_of(confusions),
}  # the metrics that follow from a confusion matrix, which is resampled far faster than cells


def classification_intervals(
    truth: np.ndarray, predicted: np.ndarray, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals over test cells, with the predictions as they are.

    To draw cells with replacement is to draw the counts of the confusion matrix from a multinomial distribution.

    Returns
    -------
    low and high end of each metric in `OF_CONFUSION`, and of `f1[type]` of each true type.
    """
    types, observed = confusion(np.asarray(truth), np.asarray(predicted))
    n_cells = observed.sum()
    drawn = np.random.default_rng(seed).multinomial(n_cells, observed.ravel() / n_cells, size=n_resamples)
    drawn = drawn.reshape(n_resamples, *observed.shape)
    intervals = {name: interval(float(metric(observed)), metric(drawn)) for name, metric in OF_CONFUSION.items()}
    for name, value, draws in zip(types, f1_of(observed), f1_of(drawn).T, strict=True):
        if np.isfinite(value):
            intervals[f"f1[{name}]"] = interval(value, draws)
    return intervals


def chance_levels(train_labels: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
    """Expected metrics of test cells whose labels are guessed: drawn from the labels of the training cells.

    Exact. Of a type with n of N test cells and a share q of the training cells, the number m of cells called so is
    binomial; n m / N of them are right on average, so that its F1 is the mean of 2 (n m / N) / (n + m) over m.

    Returns
    -------
    micro_f1, macro_f1, balanced_accuracy, error_rate, and `f1[type]` of each true type.
    """
    from scipy.stats import binom

    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    types, n = np.unique(test_labels, return_counts=True)
    q = np.array([np.mean(train_labels == name) for name in types])
    n_cells = len(test_labels)
    m = np.arange(n_cells + 1)
    f1 = [
        binom.pmf(m, n_cells, share) @ (2 * size * m / n_cells / (size + m)) for size, share in zip(n, q, strict=True)
    ]
    right = float(n @ q / n_cells)
    levels = {"micro_f1": right, "macro_f1": np.mean(f1), "balanced_accuracy": q.mean(), "error_rate": 1 - right}
    return {name: float(level) for name, level in levels.items()} | {
        f"f1[{name}]": float(level) for name, level in zip(types, f1, strict=True)
    }

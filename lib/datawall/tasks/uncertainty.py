"""What a number is worth: its confidence interval over cells, and the level that chance reaches."""

from functools import cache

import numpy as np
from scipy.special import betaincinv

N_RESAMPLES = 200
LEVEL = 0.95
Z = 1.959964  # of a normal distribution, at that level


def resamples(n_cells: int, n_resamples: int = N_RESAMPLES, *, seed: int = 0) -> np.ndarray:
    """How often each cell is drawn when as many as there are are drawn with replacement, (n_resamples, n_cells)."""
    drawn = np.random.default_rng(seed).integers(n_cells, size=(n_resamples, n_cells))
    drawn += n_cells * np.arange(n_resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=n_resamples * n_cells)
    return times.reshape(n_resamples, n_cells).astype(np.float64)


def interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """Percentiles of a metric over bootstrap resamples, (n_resamples,), less what resampling itself adds on average.

    A resample holds cells twice, which makes an error larger or a clustering look better than it is: without the
    correction the interval of a biased metric would not hold its own value (Efron and Tibshirani 1993, chapter 10). It
    goes no further than the draws and the value. Draws that are NaN do not count.
    """
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return np.nan, np.nan
    ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - (draws.mean() - value)
    low, high = np.clip(ends, min(value, draws.min()), max(value, draws.max()))
    return float(low), float(high)


def wilson(right: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Wilson's interval of a share, (2, ...): low and high ends; (0, 1) of nothing."""
    share, z2 = right / np.maximum(n, 1), Z**2
    middle, width = n * share + z2 / 2, Z * np.sqrt(n * share * (1 - share) + z2 / 4)
    return np.clip(np.stack([middle - width, middle + width]) / (n + z2), 0, 1)


def exact(right: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Clopper's and Pearson's interval of a share, (2, ...): never covers less than it says."""
    low, high = betaincinv(right, n - right + 1, (1 - LEVEL) / 2), betaincinv(right + 1, n - right, (1 + LEVEL) / 2)
    return np.stack([np.where(right > 0, low, 0), np.where(right < n, high, 1)])


def classification_intervals(truth: np.ndarray, predicted: np.ndarray) -> dict[str, tuple[float, float]]:
    """Intervals over test cells, with the predictions as they are, that hold with few cells and near a ceiling too.

    A share of cells has Wilson's interval (1927, J Am Stat Assoc 22:209). F1 of a type is 2 J / (1 + J), where J is the
    share that is right of the cells that are of the type or called so: it has that interval, transformed. A mean over
    types has ends made of those of its types by their distances from the value (Zou and Donner 2008, Stat Med 27:1693)
    and by how the types' F1 go together, as the cells' influence on each tells; recalls are of different cells. There
    the types' ends are exact ones, as Wilson's err to the same side in all types of which every cell is right. A
    bootstrap of few cells, most of them right, does not know what it has not seen. Each true type has its `f1[type]`.
    """
    types, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true, called = np.split(codes, [len(truth)])
    observed = np.bincount(true * len(types) + called, minlength=len(types) ** 2).reshape(len(types), -1)
    n_true, n_called, right = observed.sum(axis=1), observed.sum(axis=0), np.diag(observed)
    present, union = n_true > 0, n_true + n_called - right
    micro, f1 = wilson(right.sum(), n_true.sum()), 2 * right[present] / (n_true + n_called)[present]
    shares = (method(right[present], union[present]) for method in (wilson, exact))
    f1_ends, exact_f1_ends = (2 * ends / (1 + ends) for ends in shares)
    recalls, recall_ends = right[present] / n_true[present], exact(right[present], n_true[present])
    is_type = np.eye(len(types))[:, present]
    both = is_type[:, None] * is_type  # (true, called, type)
    influence = (2 * both - f1 * (is_type[:, None] + is_type)).reshape(-1, len(f1))
    covariance = (influence * observed.reshape(-1, 1)).T @ influence
    deviation = np.sqrt(np.diag(covariance))
    alike = covariance / np.where(np.outer(deviation, deviation) > 0, np.outer(deviation, deviation), 1)
    np.fill_diagonal(alike, 1)
    ends = {
        "micro_f1": micro,
        "macro_f1": _mean_interval(f1, exact_f1_ends, alike),
        "balanced_accuracy": _mean_interval(recalls, recall_ends, np.eye(len(f1))),
        "error_rate": 1 - micro[::-1],
    }
    ends |= {f"f1[{name}]": of_type for name, of_type in zip(types[present], f1_ends.T, strict=True)}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _mean_interval(values: np.ndarray, ends: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Interval of the mean of values with intervals, (2, n_values), and correlations."""
    apart = np.abs(ends - values)
    return values.mean() + np.array([-1, 1]) * np.sqrt(np.einsum("ei,ij,ej->e", apart, alike, apart)) / len(values)


def paired_interval(right: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """How much larger a share of the same cells one model has right than another, with its 95 % interval.

    Both say whether a run has each cell right, (n_cells,) or (n_runs, n_cells). Given are the mean over runs, and the
    ends of its interval: over cells, and over runs where there are several. Of a single run each it is that of Agresti
    and Min (2005, Stat Med 24:729), who add two pairs that differ, one each way, and one each of those that do not;
    they keep it from vanishing where no cell differs.
    """
    ours, theirs = (np.atleast_2d(np.asarray(runs, float)) for runs in (right, others))
    gaps = ours.mean(axis=0) - theirs.mean(axis=0)
    n, gap = len(gaps), gaps.mean()
    centre = gaps.sum() / (n + 2)
    variance = ((np.square(gaps).sum() + 1) / (n + 2) - centre**2) / (n + 2)
    variance += sum(runs.mean(axis=1).var(ddof=1) / len(runs) for runs in (ours, theirs) if len(runs) > 1)
    width = Z * np.sqrt(variance)
    return float(gap), float(min(gap, centre - width)), float(max(gap, centre + width))


def chance_levels(train_labels: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
    """Expected metrics of test cells whose labels are guessed: drawn from the labels of the training cells.

    Exact, and of the same metrics as `classification_intervals`. Of a type with n of N test cells and a share q of the
    training cells, the number m of cells called so is binomial; n m / N of them are right on average, so that its F1
    is the mean of 2 (n m / N) / (n + m) over m.
    """
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    types, n = np.unique(test_labels, return_counts=True)
    q = np.array([np.mean(train_labels == name) for name in types])
    n_cells = len(test_labels)
    f1 = [_chance_f1(size, share, n_cells) for size, share in zip(n.tolist(), q.tolist(), strict=True)]
    right = float(n @ q / n_cells)
    levels = {"micro_f1": right, "macro_f1": np.mean(f1), "balanced_accuracy": q.mean(), "error_rate": 1 - right}
    levels |= {f"f1[{name}]": of_type for name, of_type in zip(types, f1, strict=True)}
    return {name: float(level) for name, level in levels.items()}


@cache
def _chance_f1(n: int, share: float, n_cells: int) -> float:
    """Expected F1 of a type with n of the test cells and a share of the training cells."""
    from scipy.stats import binom  # half a second, which a plan need not wait

    m = np.arange(n_cells + 1)
    return binom.pmf(m, n_cells, share) @ (2 * n * m / n_cells / (n + m))

"""Scaling curves: error against number of cells, what the next doubling is worth, what small runs tell of large."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from datawall.analysis.saturation import EXACT, IMPROVING, KEY, PLATEAU, UNDECIDED, Curve, curves_of, errors_of, runs_of

CONSTANT, POWER, EXPONENTIAL = "constant", "power law", "exponential"
CHANGING = (POWER, EXPONENTIAL)
FAMILIES = (CONSTANT, *CHANGING)
SHAPES = {POWER: (0.02, 3.0), EXPONENTIAL: (0.003, 3.0)}  # exponents, and decays in units of the largest size
COARSE, FINE, ROUNDS = 24, 7, 5  # shapes tried at first, and in each of the later rounds
WORTH = 0.01  # share of the error that a doubling must remove to be worth it, by default
NUMBERS = [f"{name}{end}" for name in ("exponent", "irreducible", "gain") for end in ("", "_low", "_high")]
MIN_SIZES = 4  # one more than a curve has parameters


@dataclass(frozen=True)
class Fit:
    """Curves fitted to one or many sets of mean errors; arrays are (...) over the sets.

    With n in units of the largest size, the error is `floor` for the constant, floor + excess · n^(-shape) for the
    power law (Hestness et al. 2017, arXiv 1712.00409) and floor + excess · exp(-n / shape) for the exponential.
    """

    family: str
    floor: np.ndarray  # irreducible error
    excess: np.ndarray
    shape: np.ndarray  # exponent, or cells of a decay; of no meaning for the constant, whose excess is 0
    loss: np.ndarray  # weighted sum of squares

    def predict(self, n: np.ndarray) -> np.ndarray:
        """Errors at sizes in units of the largest, (..., n_sizes)."""
        floor, excess, shape = (part[..., None] for part in (self.floor, self.excess, self.shape))
        return floor + excess * _basis(self.family, n, shape)


def fit(family: str, n: np.ndarray, error: np.ndarray, weight: np.ndarray) -> Fit:
    """Weighted least-squares fit of a curve to sets of mean errors (..., n_sizes); floor and excess are not negative.

    Given the shape, floor and excess are a linear problem with a closed form. The shape is sought on a grid that is
    refined around its best point, so that there is no start value to choose. `n` (n_sizes,) is in units of the largest,
    `weight` (n_sizes,) the number of runs over the variance of a run.
    """
    total = weight.sum()
    mean = (error * weight).sum(-1) / total
    if family == CONSTANT:
        loss = (weight * (error - mean[..., None]) ** 2).sum(-1)
        return Fit(family, mean, np.zeros_like(mean), np.ones_like(mean), loss)
    low, high = SHAPES[family]
    step = (high / low) ** (1 / (COARSE - 1))
    shapes = low * step ** np.arange(COARSE)
    for _ in range(ROUNDS):
        floor, excess, loss = _given_shape(_basis(family, n, shapes[..., None]), error, weight)
        best = loss.argmin(-1)[..., None]
        tried = (np.broadcast_to(part, loss.shape) for part in (floor, excess, loss, shapes))
        floor, excess, loss, shape = (np.take_along_axis(part, best, -1) for part in tried)
        shapes = np.clip(shape * step ** np.linspace(-1, 1, FINE), low, high)  # between the best's neighbours
        step **= 2 / (FINE - 1)
    return Fit(family, *(part[..., 0] for part in (floor, excess, shape, loss)))


def _given_shape(x: np.ndarray, error: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floor, excess and loss, (..., n_shapes) each, of basis functions x, (..., n_shapes, n_sizes)."""
    error = error[..., None, :]
    x_mean, mean = np.average(x, axis=-1, weights=weight), np.average(error, axis=-1, weights=weight)
    centred = x - x_mean[..., None]
    excess = np.maximum((weight * centred * error).sum(-1) / (weight * centred**2).sum(-1), 0)
    floor = mean - excess * x_mean
    through_zero = np.maximum((weight * x * error).sum(-1) / (weight * x**2).sum(-1), 0)
    excess, floor = np.where(floor < 0, through_zero, excess), np.maximum(floor, 0)
    loss = (weight * (error - floor[..., None] - excess[..., None] * x) ** 2).sum(-1)
    return floor, excess, loss


def aicc(fitted: Fit, within: float, n_runs: int) -> np.ndarray:
    """Akaike's criterion of Gaussian errors, corrected for few runs (Hurvich and Tsai 1989, Biometrika 76:297)."""
    # `within` is the weighted sum of squares of the runs around their sizes' means.
    k = (1 if fitted.family == CONSTANT else 3) + 1  # parameters, and the variance
    likelihood = n_runs * np.log(np.maximum(fitted.loss + within, EXACT) / n_runs)
    return likelihood + 2 * k + 2 * k * (k + 1) / (n_runs - k - 1)


def left_out(family: str, n: np.ndarray, error: np.ndarray, weight: np.ndarray) -> float:
    """Root mean weighted squared error of each size's mean, but the smallest's, predicted from the other sizes."""
    squares = []
    for out in range(1, len(n)):
        kept = np.arange(len(n)) != out
        predicted = fit(family, n[kept], error[kept], weight[kept]).predict(n[[out]])[0]
        squares.append(weight[out] * (predicted - error[out]) ** 2)
    return float(np.sqrt(np.mean(squares)))


@dataclass(frozen=True)
class Scaling:
    """All families fitted to a curve's runs, and those that can change to resamples of them."""

    n: np.ndarray  # sizes in units of the largest
    error: np.ndarray  # mean of each
    weight: np.ndarray  # of each
    criteria: dict[str, float]  # AICc by family
    fits: dict[str, Fit]
    drawn: dict[str, Fit]  # of the resamples, by family of `CHANGING`

    @property
    def best(self) -> str:
        """The family of lowest AICc."""
        return min(self.criteria, key=self.criteria.get)

    def predict(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors at sizes in units of the largest, (n_sizes,), and those of the resamples, each by its best family."""
        drawn = np.stack([self.drawn[family].predict(n) for family in CHANGING])
        best = np.argmin([self.drawn[family].loss for family in CHANGING], axis=0)
        return self.fits[self.best].predict(n), drawn[best, np.arange(len(best))]

    def gain(self) -> tuple[float, np.ndarray]:
        """How much less the error is predicted to be at twice the largest size; and of the resamples."""
        point, drawn = self.predict(np.array([1.0, 2.0]))
        return float(point[0] - point[1]), drawn[:, 0] - drawn[:, 1]


def scale(curve: Curve, n_resamples: int) -> Scaling:
    """Fit every family to a curve of errors with at least `MIN_SIZES` sizes of two runs or more.

    A size weighs its number of runs over their variance, which is the mean of its own and of all sizes' average, since
    few runs tell a variance badly. With that variance the means of the resamples are drawn, from a Student distribution
    of twice as many degrees of freedom as the runs of a size have: a parametric bootstrap. Resampling five runs instead
    gives intervals that are too narrow. Each resample chooses the power law or the exponential anew, by the better fit.
    The constant is either of them without an excess, and no candidate: AICc would prefer it wherever runs are few, and
    each resample would repeat the preference, with no width (Leeb and Pötscher 2005, Econometric Theory 21:21).
    """
    n = curve.n_cells / curve.n_cells.max()
    n_runs = np.array([len(runs) for runs in curve.runs])
    own = np.array([runs.var(ddof=1) for runs in curve.runs])
    spread = own.max() > EXACT**2
    variance = (own + own.mean()) / 2 if spread else np.ones_like(own)
    weight = n_runs / variance
    within = float(((n_runs - 1) * own / variance).sum())
    error = np.array([runs.mean() for runs in curve.runs])
    deviations = stats.multivariate_t(shape=np.diag(1 / weight), df=2 * (n_runs.min() - 1)).rvs(n_resamples, 0)
    errors = error + spread * deviations
    fits = {family: fit(family, n, error, weight) for family in FAMILIES}
    drawn = {family: fit(family, n, errors, weight) for family in CHANGING}
    criteria = {family: float(aicc(fits[family], within, n_runs.sum())) for family in FAMILIES}
    return Scaling(n, error, weight, criteria, fits, drawn)


def scaling_curves(
    results: pd.DataFrame, metric: str, *, margin: float | None = None, n_resamples: int = 300
) -> pd.DataFrame:
    """Which curve each model's error follows, and whether twice as many cells would help.

    Three curves are fitted to the error against the number of cells: a constant, a power law with an offset, and an
    exponential. The one with the lowest AICc predicts what the next doubling gains. The intervals are of a bootstrap
    (see `scale`) that chooses anew each time, among the curves that can change: runs that merely show no trend have a
    wide interval, and no plateau. The margin is by default one per cent of the error at the largest size.

    A row per model, strategy, task and data set: `curve` (lowest AICc); `exponent` and `irreducible` (error of
    infinitely many cells) of the power law and `gain` of the next doubling, each with _low and _high; `aicc_…`, less
    the lowest, and `left_out_…` (error of a size predicted from the others, in standard errors) of each curve; margin;
    verdict and reason: `plateau` where the gain's interval lies below the margin, `still improving` where it lies
    above, else `undecided`; also, with numbers NaN, where there are fewer than four sizes or a size has a single run.
    """
    names = {family: family.replace(" ", "_") for family in FAMILIES}
    of_families = [f"{name}_{family}" for family in names.values() for name in ("aicc", "left_out")]
    rows = []
    for curve in errors_of(results, metric):
        row = dict(zip(KEY, curve.key, strict=True))
        row["margin"] = WORTH * curve.runs[-1].mean() if margin is None else margin
        row["verdict"], row["reason"] = UNDECIDED, unfit(curve)
        if not row["reason"]:
            scaling = scale(curve, n_resamples)
            power, powers = scaling.fits[POWER], scaling.drawn[POWER]
            told = {"exponent": (power.shape, powers.shape), "irreducible": (power.floor, powers.floor)}
            for name, (point, drawn) in (told | {"gain": scaling.gain()}).items():
                numbers = map(float, (point, *interval(drawn, point)))
                row |= dict(zip([name, f"{name}_low", f"{name}_high"], numbers, strict=True))
            for family, name in names.items():
                row[f"aicc_{name}"] = scaling.criteria[family] - scaling.criteria[scaling.best]
                row[f"left_out_{name}"] = left_out(family, scaling.n, scaling.error, scaling.weight)
            row["curve"] = scaling.best
            low, high, limit = row["gain_low"], row["gain_high"], row["margin"]
            row["verdict"] = PLATEAU if high <= limit else IMPROVING if low >= limit else UNDECIDED
            row["reason"] = f"the next doubling gains {low:.2g} to {high:.2g}, beside a margin of {limit:.2g}"
        rows.append(row)
    return pd.DataFrame(rows, columns=[*KEY, "curve", *NUMBERS, *of_families, "margin", "verdict", "reason"])


def predictions(results: pd.DataFrame, metric: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """The fitted `scaling_curves` up to four times the largest size: `KEY`, curve, n_cells, error, low, high."""
    tables = []
    for curve in errors_of(results, metric):
        if unfit(curve):
            continue
        scaling = scale(curve, 300)
        n = np.geomspace(scaling.n[0], 4, 60)
        point, drawn = scaling.predict(n)
        low, high = interval(drawn, point, confidence)
        common = dict(zip(KEY, curve.key, strict=True)) | {"curve": scaling.best, "n_cells": n * curve.n_cells.max()}
        tables.append(pd.DataFrame(common | {"error": point, "low": low, "high": high}))
    columns = [*KEY, "curve", "n_cells", "error", "low", "high"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def unfit(curve: Curve) -> str:
    """Why curves cannot be fitted; empty if they can."""
    if (n_sizes := len(np.unique(curve.n_cells))) < MIN_SIZES:
        return f"{n_sizes} sizes, counted in cells; a curve takes at least {MIN_SIZES}"
    return "a size with a single run; the spread takes at least two" if min(map(len, curve.runs)) < 2 else ""


def interval(drawn: np.ndarray, point: float | np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over the first axis of what was drawn, widened to hold the point."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.minimum(low, point), np.maximum(high, point)


def _basis(family: str, n: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return n**-shape if family == POWER else np.exp(-n / shape)


def extrapolated(results: pd.DataFrame, metric: str, up_to: float) -> pd.DataFrame:
    """The error at the full corpus as foretold by curves that are fitted to sizes of at most `up_to` per cent alone.

    The interval is of the bootstrap of `scale`, widened by the noise of the mean at the full corpus. Curves of fewer
    than three such sizes are left out. Columns: model, strategy, task, dataset, error (mean at the full corpus), last
    (at the largest size that was fitted: the forecast of whoever carries it forward), foretold, low, high.
    """
    rows = []
    for curve in errors_of(results, metric):
        few, (*smaller, full) = curve.percentages <= up_to, curve.runs
        if curve.percentages[-1] != 100 or few.all() or few.sum() < 3 or min(map(len, curve.runs)) < 2:
            continue
        small = Curve(curve.key, curve.percentages[few], curve.n_cells[few], smaller[: few.sum()])
        point, drawn = scale(small, 200).predict(np.array([curve.n_cells[-1] / small.n_cells[-1]]))
        noise = np.random.default_rng(0).standard_t(len(full) - 1, 200) * full.std(ddof=1) / len(full) ** 0.5
        low, high = np.quantile(drawn[:, 0] + noise, [(1 - 0.95) / 2, (1 + 0.95) / 2])
        rows.append((*curve.key, full.mean(), small.runs[-1].mean(), float(point[0]), low, high))
    return pd.DataFrame(rows, columns=[*KEY, "error", "last", "foretold", "low", "high"])


def decisions(results: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """How often two models, or two strategies, are ordered at a small size as at the largest that has pairs.

    Pairs are of what `by` says, `model` or `strategy`, with all else equal. The columns are percentage, pairs and same
    (share that is ordered alike, by means over seeds). The last row is of the largest size, by halves of its seeds, if
    it has two. Empty without a pair.
    """
    runs = runs_of(results, metric)
    where = [name for name in ("task", "dataset", "model", "strategy") if name != by]
    means = runs.pivot_table(index=[*where, "percentage"], columns=by, values="value")
    means = means[means.notna().sum(axis=1) > 1]
    if means.empty:
        return pd.DataFrame(columns=["percentage", "pairs", "same"])
    largest = means.index.get_level_values("percentage").max()
    at = {size: rows.droplevel("percentage") for size, rows in means.groupby("percentage")}
    rows = [(size, *_alike(table, at[largest])) for size, table in at.items() if size != largest]
    again = runs[runs["percentage"] == largest].assign(half=lambda table: table.groupby([*where, by]).cumcount())
    if (n := int(again["half"].max()) + 1) > 1:
        halves = []
        for some in combinations(range(n), n // 2):
            half = again["half"].isin(some)
            tables = (part.pivot_table(index=where, columns=by, values="value") for part in (again[half], again[~half]))
            halves.append(_alike(*tables))
        rows.append((largest, halves[0][0], float(np.mean([same for _, same in halves]))))
    return pd.DataFrame(rows, columns=["percentage", "pairs", "same"])


def _alike(some: pd.DataFrame, others: pd.DataFrame) -> tuple[int, float]:
    """Number of pairs of columns that both tables compare, over rows, and the share that they order alike."""
    some, others = some.align(others, join="inner")
    pairs = combinations(some.columns, 2)
    signs = pd.concat(np.sign(some[a] - some[b]) * np.sign(others[a] - others[b]) for a, b in pairs).dropna()
    # 1 where both agree, 0 for a draw
    return len(signs), float((signs > 0).mean() + (signs == 0).mean() / 2)


def signal_to_noise(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much more the means of a curve's sizes differ than seeds do, beside what noise alone gives.

    The columns are model, strategy, task, dataset, ratio (range of the sizes' means over the mean standard deviation
    over seeds) and noise (the ratio's expectation where no size differs, by simulation of normal noise).
    """
    rows = []
    for curve in curves_of(results, metric):
        own, rng = curve.runs[: curve.n_own], np.random.default_rng(0)
        if len(own) > 1 and min(map(len, own)) > 1:
            noise = _ratio([rng.standard_normal((4000, len(runs))) for runs in own]).mean()
            rows.append((*curve.key, _ratio(own), noise))
    return pd.DataFrame(rows, columns=[*KEY, "ratio", "noise"])


def _ratio(runs: list[np.ndarray]) -> np.ndarray:
    """Range of the sizes' means over the mean spread of their runs, the last axis."""
    means, spreads = [size.mean(axis=-1) for size in runs], [size.std(axis=-1, ddof=1) for size in runs]
    return np.ptp(means, axis=0) / np.mean(spreads, axis=0)

"""Learning saturation points: the percentage of the corpus past which a model stops improving."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from datawall import tasks
from datawall.analysis.results import BASELINE, RUN, lower_is_better, mean_over_splits, select

RULES = ("published", "mean", "error", "equivalence")
PUBLISHED_THRESHOLD = 0.95
TOLERANCE = 0.05  # of the lowest mean error, by default
SPREADS = 2.0  # standard deviations over seeds that make up a margin, by default
KEY = ["model", "strategy", "task", "dataset"]
EXACT = 1e-12  # differences below this are rounding
PLATEAU, IMPROVING, UNDECIDED = "plateau", "still improving", "undecided"
LIMITED = "budget-limited"  # twice the steps still change the score by more than the margin (`verdicts`)


@dataclass(frozen=True)
class Curve:
    """The pretrained runs of one model, strategy, task and data set, by size."""

    key: tuple[str, ...]  # model, strategy, task, dataset
    percentages: np.ndarray  # ascending
    n_cells: np.ndarray  # of each size, mean over runs
    runs: list[np.ndarray]  # scores of each size, (..., n_runs); the axes before the runs are resamples
    borrowed: bool = False  # whether the last size is the full corpus, from runs of the strategy `random`

    @property
    def n_own(self) -> int:
        """Number of sizes that the strategy itself has."""
        return len(self.runs) - self.borrowed

    def last_gain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`difference` of the largest size of at most half of the corpus and the full one; NaN without either."""
        half = np.flatnonzero(self.percentages <= 50)
        if self.percentages[-1] != 100 or not len(half):
            return (np.full(self.runs[-1].shape[:-1], np.nan),) * 3
        return difference(self.runs[half[-1]], self.runs[-1])


def saturation_points(
    results: pd.DataFrame,
    metric: str,
    *,
    rule: str = "published",
    margin: float | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
) -> pd.DataFrame:
    """Saturation point of every model, strategy, task and data set: percentage, low, high.

    Splits of one run are averaged first; untrained controls and baselines are left out. The rules:

    - `published`, the original study's: of all runs, take the best score; the point is the smallest percentage at which
      any single run exceeds 0.95 of it. `mean`: the same of the means over seeds.
    - `error`: the smallest percentage whose mean error is within `margin` (a share, 0.05 by default) of the lowest one.
    - `equivalence`: the smallest percentage from which on every size is equivalent to the full corpus, or NaN: two
      one-sided Welch tests (Schuirmann 1987, J Pharmacokinet Biopharm 15:657) place the difference of means within ±
      `margin`, by default twice the standard deviation over seeds at 100 %: a convenience, since a margin should be
      chosen before the runs are seen. A strategy without runs at 100 % borrows those of `random`, unless it is a
      spike-in. The tests of all sizes and curves are one family, corrected by Benjamini and Hochberg (1995, J R Stat
      Soc B 57:289). Two more columns are the margin used, and the verdict `plateau`, `still improving` (the full corpus
      is better than the largest subset of at most half of it, by a corrected one-sided Welch test) or `undecided`.

    The interval is of a bootstrap of runs within each size, with their deviations scaled by √(n / (n - 1)), widened to
    hold the point; a bound is NaN where it is not established, both where a size has a single run or `n_resamples` is
    0. Raises ValueError if the rule needs a score and lower is better, or if a score above 1 is to be made an error.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are: {', '.join(RULES)}.")
    if lower_is_better(metric) and rule in ("published", "mean"):
        raise ValueError(f"lower {metric} is better, and the rule {rule} needs a score; use the rule error, say.")
    if margin is not None and not (margin >= 0 and rule in ("error", "equivalence")):
        raise ValueError(f"margin {margin}: at least 0, and of the rules error and equivalence only.")
    curves = (errors_of if rule in ("error", "equivalence") else curves_of)(results, metric)
    alpha = 1 - confidence
    points = points_of(curves, rule, margin, alpha)
    table = pd.DataFrame([curve.key for curve in curves], columns=KEY)
    table = table.assign(percentage=points, low=np.nan, high=np.nan)
    if n_resamples:
        drawn = points_of([resampled(curve, n_resamples) for curve in curves], rule, margin, alpha)
        for row, curve in enumerate(curves):
            if min(map(len, curve.runs)) > 1:
                low, high = np.quantile(drawn[row], [alpha / 2, 1 - alpha / 2], method="inverted_cdf")
                table.loc[row, ["low", "high"]] = min(low, points[row]), max(high, points[row])
    table = table.replace(np.inf, np.nan)
    if rule == "equivalence":
        table["margin"] = [float(margin_of(curve, margin)) for curve in curves]
        table["verdict"] = verdicts(curves, margin, confidence)[1]
    return table


def points_by_task(results: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """`saturation_points` of every task that is judged by a score, by its headline metric; none if there is no such."""
    tables = []
    for task, metric in tasks.HEADLINE.items():
        if not lower_is_better(metric) and len(rows := pretrained(select(results, task=task, metric=metric))):
            tables.append(saturation_points(rows, metric, **options))
    return pd.concat(tables, ignore_index=True) if tables else saturation_points(results[:0], "", **options)


def points_by_rule(results: pd.DataFrame, metric: str, margin: float) -> pd.DataFrame:
    """`saturation_points` by each rule, named in the column rule; the margin is that of equivalence."""
    margins = dict.fromkeys(RULES) | {"equivalence": margin}
    tables = (saturation_points(results, metric, rule=rule, margin=margins[rule]).assign(rule=rule) for rule in RULES)
    return pd.concat(tables)


def verdicts(curves: list[Curve], margin: float | None, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Saturation points, NaN without one, and verdicts of curves of errors by `equivalence`, both (n_curves, ...)."""
    points = points_of(curves, "equivalence", margin, 1 - confidence)
    p = adjust(np.array([one_sided_p(*curve.last_gain()) for curve in curves]).T).T
    verdict = np.select([np.isfinite(points), p <= 1 - confidence], [PLATEAU, IMPROVING], UNDECIDED)
    return np.where(np.isfinite(points), points, np.nan), verdict


def runs_of(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Pretrained runs of a metric, means over splits; raises as `saturation_points` does."""
    runs = pretrained(select(results, metric=metric))
    if runs.empty and len(results):
        raise ValueError(f"no pretrained run has the metric {metric!r}.")
    if runs["value"].isna().any():
        raise ValueError(f"{int(runs['value'].isna().sum())} values of {metric} are NaN; a saturation point needs all.")
    if len(studies := runs["study"].unique()) > 1:
        raise ValueError(f"the results are of several studies, {sorted(studies)}; select one.")
    return mean_over_splits(runs)


def curves_of(results: pd.DataFrame, metric: str) -> list[Curve]:
    """The curves of a metric, ordered by their keys; raises as `saturation_points` does."""
    runs = runs_of(results, metric).sort_values("value")
    by_key: dict[tuple[str, ...], dict[float, tuple[float, np.ndarray]]] = {}
    for (*key, percentage), group in runs.groupby([*KEY, "percentage"])[["n_cells", "value"]]:
        by_key.setdefault(tuple(key), {})[percentage] = group["n_cells"].mean(), group["value"].to_numpy()
    curves = []
    for key, sizes in by_key.items():
        model, strategy, *where = key
        full = by_key.get((model, "random", *where), {}).get(100.0)
        borrowed = 100.0 not in sizes and full is not None and not strategy.startswith("spikein")
        if borrowed:
            sizes = sizes | {100.0: full}
        n_cells, values = zip(*sizes.values(), strict=True)
        curves.append(Curve(key, np.array(list(sizes), float), np.array(n_cells), list(values), borrowed))
    return curves


def errors_of(results: pd.DataFrame, metric: str) -> list[Curve]:
    """The curves of a metric, as those of an error (`as_error`)."""
    return [as_error(curve, metric) for curve in curves_of(results, metric)]


def mean_over_datasets(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Results in which each pretrained run has one score a task, its mean over the data sets, named `all`."""
    runs = runs_of(results, metric)
    # Runs without a score on each data set that their model and strategy have are left out: means would not compare.
    n_datasets = runs.groupby(["model", "strategy", "task"])["dataset"].transform("nunique")
    run = [column for column in RUN if column != "dataset"]
    complete = runs[runs.groupby(run)["dataset"].transform("size") == n_datasets]
    return complete.groupby(run, as_index=False)["value"].mean().assign(dataset="all", split="")


def pretrained(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of pretrained models: no baselines, no untrained controls."""
    return results[(results["strategy"] != BASELINE) & (results["percentage"] > 0)]


def as_error(curve: Curve, metric: str) -> Curve:
    """A curve of errors: 1 - score, or the metric itself where lower is better."""
    if lower_is_better(metric):
        return curve
    if max(runs.max() for runs in curve.runs) > 1:
        raise ValueError(f"{metric} exceeds 1, so 1 - {metric} is no error; the rules published and mean apply.")
    return replace(curve, runs=[1 - runs for runs in curve.runs])


def margin_of(curve: Curve, margin: float | None) -> np.ndarray:
    """The margin given, or twice the spread of the runs at 100 %; NaN without a spread."""
    if margin is not None:
        return np.asarray(margin)
    if curve.percentages[-1] != 100 or curve.runs[-1].shape[-1] < 2:
        return np.asarray(np.nan)
    return SPREADS * curve.runs[-1].std(axis=-1, ddof=1)


def resampled(curve: Curve, n_resamples: int) -> Curve:
    """Runs of each size drawn with replacement, (n_resamples, n_runs), with deviations scaled by √(n / (n - 1))."""
    rng = np.random.default_rng(0)  # anew for each curve, so that their order does not matter
    drawn = []
    for runs in curve.runs:
        mean, n_runs = runs.mean(), len(runs)
        deviations = (runs - mean)[rng.integers(n_runs, size=(n_resamples, n_runs))]
        drawn.append(mean + deviations * np.sqrt(n_runs / max(1, n_runs - 1)))
    return replace(curve, runs=drawn)


def difference(runs: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of the means over the last axis, its error (NaN with a single run), and Welch's degrees of freedom."""
    n, m = runs.shape[-1], others.shape[-1]
    gap = runs.mean(axis=-1) - others.mean(axis=-1)
    if min(n, m) < 2:
        return gap, np.full_like(gap, np.nan), np.full_like(gap, np.nan)
    a, b = runs.var(axis=-1, ddof=1) / n, others.var(axis=-1, ddof=1) / m
    with np.errstate(invalid="ignore"):  # no spread at all
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    return gap, np.sqrt(a + b), freedom


def one_sided_p(gap: np.ndarray, error: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """P-value of a gap that is not above zero: 1 where it has no standard error; 0 or 1 where that is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = special.stdtr(freedom, -gap / error)  # of Student's t
    exact = np.where(gap > EXACT, 0.0, 1.0)
    return np.nan_to_num(np.where(error <= EXACT, exact, p), nan=1.0)


def adjust(p: np.ndarray) -> np.ndarray:
    """P-values of a family (the last axis), corrected by Benjamini and Hochberg."""
    from scipy.stats import false_discovery_control  # half a second, which a plan need not wait

    return false_discovery_control(p, axis=-1) if p.shape[-1] else p


def points_of(curves: list[Curve], rule: str, margin: float | None, alpha: float) -> np.ndarray:
    """Saturation point of each curve and resample, (n_curves, ...); infinite where there is none."""
    if rule == "equivalence":
        reached = _equivalent(curves, margin, alpha)
    else:
        reached = [_near_best(curve.runs[: curve.n_own], rule, margin) for curve in curves]
    points = []
    for curve, sizes in zip(curves, reached, strict=True):
        first = curve.percentages[sizes.argmax(axis=-1)] if sizes.shape[-1] else np.inf
        points.append(np.where(sizes.any(axis=-1), first, np.inf))
    return np.array(points, float)


def _near_best(runs: list[np.ndarray], rule: str, margin: float | None) -> np.ndarray:
    """Which sizes are near the best: within a share of the lowest error, or above 0.95 of the score, (..., n_sizes)."""
    scores = np.stack([size.max(axis=-1) if rule == "published" else size.mean(axis=-1) for size in runs], axis=-1)
    if rule == "error":
        return scores <= (1 + (TOLERANCE if margin is None else margin)) * scores.min(axis=-1, keepdims=True) + EXACT
    best = scores.max(axis=-1, keepdims=True)
    # The best itself always counts; where it is not positive, nothing else can exceed 0.95 of it.
    return (scores > PUBLISHED_THRESHOLD * best) | (scores >= best - EXACT)


def _equivalent(curves: list[Curve], margin: float | None, alpha: float) -> list[np.ndarray]:
    """Which sizes below 100 % are, with all above them, equivalent to the full corpus, (..., n_sizes - 1)."""
    p_values = []
    for curve in curves:
        *smaller, full = curve.runs
        limit = margin_of(curve, margin)
        p = np.ones((*full.shape[:-1], len(smaller)))
        for size, runs in enumerate(smaller if curve.percentages[-1] == 100 else ()):
            gap, error, freedom = difference(runs, full)
            p[..., size] = one_sided_p(limit - np.abs(gap) + 2 * EXACT, error, freedom)
        p_values.append(p)
    if not curves:
        return []
    adjusted = adjust(np.concatenate(p_values, axis=-1))
    ends = np.cumsum([p.shape[-1] for p in p_values])
    equivalent = np.split(adjusted <= alpha, ends[:-1], axis=-1)
    return [np.flip(np.logical_and.accumulate(np.flip(sizes, -1), axis=-1), -1) for sizes in equivalent]

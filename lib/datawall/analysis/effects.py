"""What a subset's strategy and diversity are worth at equal size, and whether a model overtakes the baselines."""

import numpy as np
import pandas as pd
from scipy import stats

from datawall.analysis.results import BASELINE, ORACLE, contenders, lower_is_better, select, sign_of
from datawall.analysis.saturation import KEY, adjust, curves_of, one_sided_p, runs_of

MEASURES = ["shannon", "inverse_simpson", "vendi"]
RUN = ["strategy", "percentage", "seed"]  # one pretrained model of a family
RANGE = 0.2  # of a metric, from predictions without an embedding to its ceiling; on less, it tells little


def strategy_effects(results: pd.DataFrame, metric: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """What each strategy, spike-ins too, is worth over `random`, over all data sets and the sizes that both have.

    The inference is to other runs and other data sets, for which a strategy may be worth more or less (see `_slope`).
    Columns model, task, strategy, datasets (their number), difference (in the metric's units), low, high, p (two-sided)
    and p_adjusted (Benjamini and Hochberg, over the table), NaN where nothing varies. ValueError if no size has both.
    """
    rows = []
    for (model, task), group in runs_of(results, metric).groupby(["model", "task"]):
        for strategy in sorted(set(group["strategy"]) - {"random"}):
            both = group[group["strategy"].isin([strategy, "random"])]
            shared = both.groupby("percentage")["strategy"].nunique().eq(2)
            runs = _by_dataset(both[both["percentage"].isin(shared[shared].index)])
            if len(runs):
                chosen = runs.index.get_level_values("strategy") == strategy
                rows.append((model, task, strategy, runs.shape[1], *_slope(runs, chosen.astype(float))))
    if not rows:
        raise ValueError("no size has runs of 'random' and of another strategy.")
    return _with_tests(rows, ["model", "task", "strategy"], confidence)


def diversity_effects(
    results: pd.DataFrame, diversity: pd.DataFrame, metric: str, *, confidence: float = 0.95
) -> pd.DataFrame:
    """How the score goes with the diversity of the subset, at equal size and over all data sets (see `_slope`).

    Subsets differ in diversity mostly by their strategy, so that this tells runs apart, not the few strategies.
    `diversity` has a row per subset: strategy, percentage, seed and `MEASURES`. Columns as `strategy_effects`, measure
    for strategy; the difference is for one standard deviation over subsets of equal size. ValueError without such runs.
    """
    runs = runs_of(results, metric).merge(diversity[[*RUN, *MEASURES]], on=RUN)
    if runs.empty:
        raise ValueError("no run's strategy, percentage and seed are in the diversity table.")
    rows = []
    for (model, task), group in runs.groupby(["model", "task"]):
        for measure in MEASURES:
            # A size with one strategy says nothing of diversity.
            by_size = group.dropna(subset=measure).groupby("percentage")
            data = by_size.filter(lambda runs: len(runs["strategy"].unique()) > 1)
            z = data.drop_duplicates(RUN).set_index(RUN)[measure]
            within = z - z.groupby("percentage").transform("mean")
            if within.abs().max() > 1e-9:  # nor do strategies that are equally diverse
                table = _by_dataset(data)
                slope = _slope(table, (z / within.std()).reindex(table.index).to_numpy())
                rows.append((model, task, measure, table.shape[1], *slope))
    return _with_tests(rows, ["model", "task", "measure"], confidence)


def _by_dataset(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores of runs, by data set; only runs that have been judged on all of them."""
    return runs.pivot_table(index=RUN, columns="dataset", values="value").dropna()


def _slope(runs: pd.DataFrame, x: np.ndarray) -> tuple[float, float, float]:
    """Slope of scores (runs by data sets) on x at equal size, mean over data sets; its error and degrees of freedom.

    Runs vary, and so does what x is worth between data sets; the two are crossed, and the variance of the mean slope is
    the sum of both. Each is estimated with what is left besides, which is taken off once; degrees of freedom are
    Satterthwaite's (1946, Biometrics 2:110). With a single data set the slope is that data set's alone.
    """
    sizes = runs.index.get_level_values("percentage")
    X = np.column_stack([x, sizes.to_numpy()[:, None] == sizes.unique().to_numpy()])
    Y = runs.to_numpy()
    inverse, n_datasets, left = np.linalg.pinv(X.T @ X), Y.shape[1], len(X) - X.shape[1]
    slopes = (inverse @ X.T @ Y)[0]
    residuals = Y - X @ inverse @ X.T @ Y
    if left < 1:
        return slopes.mean(), np.nan, np.nan
    common = residuals.mean(axis=1)
    parts = [(common @ common / left * inverse[0, 0], left)]
    if n_datasets > 1:
        own = np.square(residuals - common[:, None]).sum() / (left * (n_datasets - 1))
        parts.append((slopes.var(ddof=1) / n_datasets, n_datasets - 1))
        parts.append((-own / n_datasets * inverse[0, 0], left * (n_datasets - 1)))
    largest = max(parts[:2])
    variance = sum(part for part, _ in parts)
    if variance <= largest[0]:  # by chance
        return slopes.mean(), np.sqrt(largest[0]), largest[1]
    return slopes.mean(), np.sqrt(variance), variance**2 / sum(part**2 / freedom for part, freedom in parts)


def overtaking(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The smallest percentage, if any, at which a model is better than the best baseline.

    By one-sided t tests of the runs of a size against the baseline, at 5 %, corrected over the table (Benjamini and
    Hochberg). Columns model, strategy, task, dataset, baseline (the best one), score (the baseline's), lead (of the
    best size's mean over it, in the metric's units, positive if the model is better) and percentage, NaN where no size
    is better for certain. Data sets without a baseline are left out. Raises ValueError if there is none at all.
    """
    sign = sign_of(metric)
    baselines = contenders(select(results, metric=metric))
    if baselines.empty:
        raise ValueError(f"no baseline has the metric {metric!r}.")
    means = sign * baselines.groupby(["task", "dataset", "model"])["value"].mean()
    best = means.groupby(["task", "dataset"]).idxmax()
    curves = [curve for curve in curves_of(results, metric) if curve.key[2:] in best.index]
    rows, p_values = [], []
    for curve in curves:
        own, baseline = [sign * runs for runs in curve.runs[: curve.n_own]], best[curve.key[2:]]
        leads = [runs.mean() - means[baseline] for runs in own]
        for runs, lead in zip(own, leads, strict=True):
            error = runs.std(ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else np.nan
            p_values.append(float(one_sided_p(lead, np.float64(error), np.float64(len(runs) - 1))))
        rows.append((*curve.key, baseline[2], sign * means[baseline], max(leads)))
    ends = np.cumsum([curve.n_own for curve in curves], dtype=int)
    better = np.split(adjust(np.array(p_values)) <= 0.05, ends)[: len(curves)]
    table = pd.DataFrame(rows, columns=[*KEY, "baseline", "score", "lead"])
    first = zip(curves, better, strict=True)
    return table.assign(percentage=[curve.percentages[b.argmax()] if b.any() else np.nan for curve, b in first])


def dynamic_range(results: pd.DataFrame) -> pd.DataFrame:
    """How much room a metric of perturbation response has between predictions without an embedding and its ceiling.

    Columns dataset, metric, floor (the better of no change and mean shift, mean over splits), ceiling
    (`tasks.perturbation.oracle`), range (of a score ceiling - floor, of an error the share of the floor's that the
    ceiling does not have) and tells: whether the range is at least `RANGE`, by which embeddings can be told apart.
    """
    rows = select(results, task="perturbation_response", strategy=BASELINE)
    means = rows.pivot_table("value", ["dataset", "metric"], "model")
    lower = np.array([lower_is_better(metric) for metric in means.index.get_level_values("metric")], bool)
    without = means[["NoChange", "MeanShift"]]
    floor, ceiling = without.max(axis=1).mask(lower, without.min(axis=1)), means[ORACLE]
    width = (ceiling - floor).mask(lower, 1 - ceiling / floor)
    return pd.DataFrame({"floor": floor, "ceiling": ceiling, "range": width, "tells": width >= RANGE}).reset_index()


def _with_tests(rows: list[tuple], keys: list[str], confidence: float) -> pd.DataFrame:
    """A table of keys, data sets, difference, error and degrees of freedom, with an interval and a two-sided test."""
    table = pd.DataFrame(rows, columns=[*keys, "datasets", "difference", "error", "freedom"])
    gap, error, freedom = (table[name].to_numpy(float) for name in ("difference", "error", "freedom"))
    width = stats.t.ppf((1 + confidence) / 2, freedom) * error
    p = np.where(np.isnan(error), np.nan, np.minimum(2 * one_sided_p(np.abs(gap), error, freedom), 1))
    adjusted = np.full(len(table), np.nan)
    adjusted[~np.isnan(p)] = adjust(p[~np.isnan(p)])
    return table[[*keys, "datasets", "difference"]].assign(low=gap - width, high=gap + width, p=p, p_adjusted=adjusted)

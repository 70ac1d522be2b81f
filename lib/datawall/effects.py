"""What a subset's strategy and diversity are worth at equal size, and whether a model overtakes the baselines."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from datawall.results import BASELINE, lower_is_better, mean_over_splits, select
from datawall.saturation import KEY, adjust, curves_of, difference, one_sided_p, pretrained

MEASURES = ["shannon", "inverse_simpson", "vendi"]
RUN = ["strategy", "percentage", "seed"]  # one pretrained model of a family


def strategy_effects(
    results: pd.DataFrame,
    metric: str,
    *,
    reference: str = "random",
    paired: bool = False,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """What each strategy, spike-ins too, is worth over the reference at equal size, on each data set.

    Parameters
    ----------
    results
        Tidy results (`read_results`) of one study.
    metric
        Any metric.
    reference
        The strategy that the others are compared with.
    paired
        Whether runs of one seed belong together, as where a study gives each seed its own initial weights; a paired t
        test then, otherwise Welch's.
    confidence
        Of the intervals.

    Returns
    -------
    table with the columns model, task, dataset, strategy, percentage, difference (of means, in the metric's units),
    low, high, p (two-sided) and p_adjusted (Benjamini and Hochberg, over the table). NaN for single runs.

    Raises
    ------
    ValueError
        If no size has the reference and another strategy; if `paired` and the two have other seeds; and as
        `saturation_points`.
    """
    runs = _pretrained(results, metric)
    rows = []
    for key, group in runs.groupby(["model", "task", "dataset", "percentage"]):
        by_strategy = {name: of.set_index("seed")["value"] for name, of in group.groupby("strategy")}
        if reference not in by_strategy:
            continue
        base = by_strategy.pop(reference)
        for strategy, values in by_strategy.items():
            if not paired:
                gap, error, freedom = difference(values.to_numpy(), base.to_numpy())
            elif set(values.index) == set(base.index):
                gaps = (values - base).to_numpy()
                gap, freedom = gaps.mean(), len(gaps) - 1
                error = gaps.std(ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else np.nan
            else:
                raise ValueError(
                    f"{', '.join(map(str, key))}: seeds of {strategy} and {reference} differ, so they are no pairs; "
                    "compare with paired=False."
                )
            rows.append((*key[:3], strategy, key[3], *map(float, (gap, error, freedom))))
    if not rows:
        raise ValueError(f"no size has runs of {reference!r} and of another strategy.")
    table = pd.DataFrame(rows, columns=["model", "task", "dataset", "strategy", "percentage", "difference", "e", "df"])
    return _with_tests(table, table.pop("e"), table.pop("df"), confidence)


def mixed_effects(
    results: pd.DataFrame, metric: str, *, reference: str = "random", confidence: float = 0.95
) -> pd.DataFrame:
    """What each strategy is worth over the reference, over all data sets and the sizes that both have.

    A linear mixed model for each model, task and strategy (statsmodels `MixedLM`, restricted likelihood): strategy and
    size are fixed effects, data set and pretrained run random ones, crossed, since a run is judged on every data set.

    Parameters
    ----------
    results
        Tidy results (`read_results`) of one study.
    metric
        Any metric.
    reference
        The strategy that the others are compared with.
    confidence
        Of the intervals.

    Returns
    -------
    table with the columns model, task, strategy, difference (in the metric's units), low, high, p and p_adjusted
    (Benjamini and Hochberg, over the table); a normal approximation.

    Raises
    ------
    ValueError
        As `strategy_effects`.
    """
    import statsmodels.formula.api as smf

    runs = _pretrained(results, metric)
    rows = []
    for (model, task), group in runs.groupby(["model", "task"]):
        for strategy in sorted(set(group["strategy"]) - {reference}):
            both = group[group["strategy"].isin([strategy, reference])]
            shared = both.groupby("percentage")["strategy"].nunique().eq(2)
            both = both[both["percentage"].isin(shared[shared].index)]
            if both.empty:
                continue
            spread = both["value"].std() or 1.0
            data = both.assign(
                y=both["value"] / spread,
                other=(both["strategy"] == strategy).astype(float),
                run=both[RUN].astype(str).agg("-".join, axis=1),
            )
            with warnings.catch_warnings():  # a variance of zero lies on the boundary, and is an answer
                warnings.simplefilter("ignore")
                fitted = smf.mixedlm(
                    "y ~ other + C(percentage)",
                    data,
                    groups=np.ones(len(data)),
                    vc_formula={"dataset": "0 + C(dataset)", "run": "0 + C(run)"},
                ).fit()
            rows.append((model, task, strategy, fitted.params["other"] * spread, fitted.bse["other"] * spread))
    if not rows:
        raise ValueError(f"no size has runs of {reference!r} and of another strategy.")
    table = pd.DataFrame(rows, columns=["model", "task", "strategy", "difference", "e"])
    return _with_tests(table, table.pop("e"), np.inf, confidence)


def diversity_effects(
    results: pd.DataFrame, diversity: pd.DataFrame, metric: str, *, confidence: float = 0.95
) -> pd.DataFrame:
    """How the score goes with the diversity of the subset, at equal size and on the same data set.

    Least squares for each model, task and measure (statsmodels `OLS`), with an intercept for each data set and size;
    standard errors are clustered by pretrained run. Subsets differ in diversity mostly by their strategy, so that this
    tells runs apart, not strategies: there are only as many ways of choosing as there are strategies.

    Parameters
    ----------
    results
        Tidy results (`read_results`) of one study.
    diversity
        Diversity of each subset: strategy, percentage, seed, shannon, inverse_simpson, vendi.
    metric
        Any metric.
    confidence
        Of the intervals.

    Returns
    -------
    table with the columns model, task, measure, difference (in the metric's units, for one standard deviation of the
    measure over subsets of equal size), low, high, p, p_adjusted (Benjamini and Hochberg, over the table).

    Raises
    ------
    ValueError
        If no run has a subset in `diversity`; and as `saturation_points`.
    """
    import statsmodels.formula.api as smf

    runs = _pretrained(results, metric).merge(diversity[[*RUN, *MEASURES]], on=RUN)
    if runs.empty:
        raise ValueError("no run's strategy, percentage and seed are in the diversity table.")
    rows = []
    for (model, task), group in runs.groupby(["model", "task"]):
        for measure in MEASURES:
            # A size with one strategy says nothing of diversity.
            data = (
                group.dropna(subset=measure).groupby("percentage").filter(lambda of: len(of["strategy"].unique()) > 1)
            )
            if data.empty:
                continue
            subsets = data.drop_duplicates(RUN)
            within = subsets[measure] - subsets.groupby("percentage")[measure].transform("mean")
            data = data.assign(
                z=data[measure] / within.std(),
                cell=data["dataset"] + " " + data["percentage"].astype(str),
                run=data[RUN].astype(str).agg("-".join, axis=1),
            )
            fitted = smf.ols("value ~ z + C(cell)", data).fit(
                cov_type="cluster", cov_kwds={"groups": data["run"].astype("category").cat.codes}
            )
            rows.append((model, task, measure, fitted.params["z"], fitted.bse["z"]))
    table = pd.DataFrame(rows, columns=["model", "task", "measure", "difference", "e"])
    return _with_tests(table, table.pop("e"), np.inf, confidence)


def overtaking(results: pd.DataFrame, metric: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """The smallest percentage, if any, at which a model is better than the best baseline.

    Parameters
    ----------
    results
        Tidy results (`read_results`) of one study, with baselines.
    metric
        Any metric.
    confidence
        Of the one-sided t tests of the runs of a size against the baseline, which are corrected over the table
        (Benjamini and Hochberg).

    Returns
    -------
    table with the columns model, strategy, task, dataset, baseline (the best one), score (the baseline's), lead (of the
    best size's mean over it, in the metric's units, positive if the model is better) and percentage, NaN where no size
    is better for certain. Data sets without a baseline are left out.

    Raises
    ------
    ValueError
        If there is no baseline; and as `saturation_points`.
    """
    sign = -1 if lower_is_better(metric) else 1
    baselines = select(results, metric=metric, strategy=BASELINE)
    if baselines.empty:
        raise ValueError(f"no baseline has the metric {metric!r}.")
    means = sign * baselines.groupby(["task", "dataset", "model"])["value"].mean()
    best = means.groupby(["task", "dataset"]).idxmax()
    curves = [curve for curve in curves_of(results, metric) if curve.key[2:] in best.index]
    rows, p_values = [], []
    for curve in curves:
        own = [sign * runs for runs in curve.runs[: curve.n_own]]
        score = means[best[curve.key[2:]]]
        for runs in own:
            n_runs = len(runs)
            error = runs.std(ddof=1) / np.sqrt(n_runs) if n_runs > 1 else np.nan
            p_values.append(float(one_sided_p(runs.mean() - score, np.float64(error), np.float64(n_runs - 1))))
        lead = max(runs.mean() for runs in own) - score
        rows.append((*curve.key, best[curve.key[2:]][2], sign * score, lead))
    table = pd.DataFrame(rows, columns=[*KEY, "baseline", "score", "lead"])
    better = np.split(adjust(np.array(p_values)) <= 1 - confidence, np.cumsum([c.n_own for c in curves])[:-1])
    table["percentage"] = [
        c.percentages[b.argmax()] if b.any() else np.nan for c, b in zip(curves, better, strict=True)
    ]
    return table


def _pretrained(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Pretrained runs of a metric, means over splits."""
    curves_of(results, metric)  # refuses what cannot be compared
    return pretrained(mean_over_splits(select(results, metric=metric)))


def _with_tests(table: pd.DataFrame, error: pd.Series, freedom: pd.Series | float, confidence: float) -> pd.DataFrame:
    """The table with an interval around `difference`, and a two-sided test of it."""
    gap = table["difference"].abs()
    width = stats.t.ppf((1 + confidence) / 2, freedom) * error
    p = 2 * one_sided_p(gap.to_numpy(), error.to_numpy(), np.broadcast_to(freedom, len(table)))
    p = np.where(error.isna(), np.nan, np.minimum(p, 1))
    adjusted = np.full(len(table), np.nan)
    adjusted[~np.isnan(p)] = adjust(p[~np.isnan(p)])
    return table.assign(low=table["difference"] - width, high=table["difference"] + width, p=p, p_adjusted=adjusted)

"""Learning saturation points: the percentage of the corpus past which a model stops improving."""

from __future__ import annotations

import numpy as np
import pandas as pd

from datawall.results import BASELINE, mean_over_splits, select

LOWER_IS_BETTER = {"mse"}
PUBLISHED_THRESHOLD = 0.95


def saturation_points(results: pd.DataFrame, metric: str, *, rule: str = "published") -> pd.DataFrame:
    """Saturation point of every model, strategy, task and data set.

    The rule `published` is the original study's: among the pretrained runs (0 % left out) of all sizes and seeds,
    take the best score; the saturation point is the smallest percentage at which any single run exceeds 0.95 of it.
    Splits of one run are averaged first.

    Parameters
    ----------
    results
        Tidy results (`read_results`).
    metric
        The score; higher must be better.
    rule
        `published`.

    Returns
    -------
    table with the columns model, strategy, task, dataset, percentage, low, high. The published rule has no
    interval: low and high are NaN.

    Raises
    ------
    ValueError
        If the rule is unknown, lower values of the metric are better, a value is NaN or the metric has no rows.
    """
    if rule != "published":
        raise ValueError(f"unknown rule {rule!r}; the rules are: published.")
    if metric in LOWER_IS_BETTER:
        raise ValueError(f"lower {metric} is better, and the published rule needs a score; use pearson_r, say.")
    runs = select(results, metric=metric)
    runs = runs[(runs["strategy"] != BASELINE) & (runs["percentage"] > 0)]
    if runs.empty:
        raise ValueError(f"no pretrained run has the metric {metric!r}.")
    if runs["value"].isna().any():
        raise ValueError(f"{int(runs['value'].isna().sum())} values of {metric} are NaN; a saturation point needs all.")
    points = []
    for key, group in mean_over_splits(runs).groupby(["model", "strategy", "task", "dataset"]):
        best = group["value"].max()
        # The best run itself always counts; where the best is not positive, nothing else can exceed 0.95 of it.
        reached = (group["value"] > PUBLISHED_THRESHOLD * best) | (group["value"] == best)
        points.append((*key, group.loc[reached, "percentage"].min(), np.nan, np.nan))
    return pd.DataFrame(points, columns=["model", "strategy", "task", "dataset", "percentage", "low", "high"])

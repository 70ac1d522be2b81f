"""What the results of a study say, model by model, in words."""

from __future__ import annotations

import pandas as pd

from datawall import results, saturation, tasks
from datawall.results import BASELINE, select

NO_CONTENDERS = ("Chance", "Oracle")  # baselines that no model is compared with


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """What results on random subsets say of every model, task and data set.

    Parameters
    ----------
    table
        Tidy results (`results.read_results`).

    Returns
    -------
    table with the columns model, task, dataset, percentage, low, high (the saturation point, by the published rule;
    by the rule `error` where lower is better), plateau (percentage) and verdict (by the rule `equivalence`), metric,
    value (the best of the sizes' means), size (its percentage), baseline (the best one), baseline_value and above
    (whether the model is better).
    """
    rows = []
    for task, metric in tasks.HEADLINE.items():
        of_task = select(table, task=task, metric=metric)
        random = select(of_task, strategy="random")
        if random.empty:
            continue
        sign = -1 if metric in saturation.LOWER_IS_BETTER else 1
        points = saturation.saturation_points(random, metric, rule="error" if sign < 0 else "published")
        try:
            plateaus = saturation.saturation_points(random, metric, rule="equivalence", n_resamples=0)
        except (TypeError, ValueError):  # TODO: until the rule is there
            plateaus = points.assign(percentage=float("nan"), verdict="undecided")
        means = results.mean_over_splits(of_task[~of_task["model"].isin(NO_CONTENDERS)])
        means = means.groupby(["dataset", "strategy", "model", "percentage"])["value"].mean() * sign
        for point, plateau in zip(points.to_dict("records"), plateaus.to_dict("records"), strict=True):
            sizes = means[point["dataset"], "random", point["model"]]
            others = means.xs((point["dataset"], BASELINE), drop_level=False).droplevel([0, 1, 3])
            rows.append(
                point
                | {"plateau": plateau["percentage"], "verdict": plateau["verdict"], "metric": metric}
                | {"value": sign * sizes.max(), "size": sizes.idxmax()}
                | {"baseline": others.idxmax(), "baseline_value": sign * others.max()}
                | {"above": sizes.max() > others.max()}
            )
    return pd.DataFrame(rows)


def sentences(found: pd.DataFrame) -> list[str]:
    """The verdicts (`verdicts`) in three sentences."""
    if found.empty:
        return ["No task has been evaluated on random subsets yet."]
    n, early = len(found), int((found["percentage"] <= 10).sum())
    words = found["verdict"].value_counts()
    plateau, improving, undecided = (words.get(word, 0) for word in ("plateau", "still improving", "undecided"))
    return [
        f"Of {n} curves, a model on a data set each, {early} reach the published saturation point at 10\u00a0% of the "
        "corpus or less.",
        f"Held against the spread over seeds, {plateau} are on a plateau, equivalent to the full corpus; {improving} "
        f"still improve; {undecided} are undecided.",
        f"{int(found['above'].sum())} of {n} are above the best baseline at the best of their sizes.",
    ]

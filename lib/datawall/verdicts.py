"""What the results of a study say, model by model, in words."""

from __future__ import annotations

import pandas as pd

from datawall import results, saturation, tasks
from datawall.results import BASELINE, select

AGAINST = {"win": "above", "tie": "level with", "loss": "below", "unknown": "not told from"}
NOTHING = {"baseline": None, "baseline_value": float("nan"), "difference": float("nan"), "against": None}


def table(intervals: pd.DataFrame) -> pd.DataFrame:
    """What results on random subsets say of every model, task and data set.

    Parameters
    ----------
    intervals
        The table `intervals` of a study (`results.read_results`).

    Returns
    -------
    table with the columns model, task, dataset, percentage, low, high (the saturation point, by the published rule;
    by the rule `error` where lower is better), plateau (percentage) and verdict (by the rule `equivalence`), metric,
    value (the best of the sizes' means), size (its percentage), baseline (the best one), baseline_value, difference
    from it at that size, and against (`AGAINST`, by `results.against_baselines`); the last four are empty without one.
    """
    rows = []
    for task, metric in tasks.HEADLINE.items():
        of_task = select(intervals, task=task, metric=metric)
        random = select(of_task, strategy="random")
        if random.empty:
            continue
        lower = results.lower_is_better(metric)
        points = saturation.saturation_points(random, metric, rule="error" if lower else "published")
        plateaus = saturation.saturation_points(random, metric, rule="equivalence", n_resamples=0)
        means = results.mean_over_splits(random).groupby(["dataset", "model", "percentage"])["value"].mean()
        compared = results.against_baselines(of_task[of_task["strategy"].isin(["random", BASELINE])], metric)
        compared = compared.assign(against=compared["verdict"].map(AGAINST)).set_index(
            ["dataset", "model", "percentage"]
        )
        for point, plateau in zip(points.to_dict("records"), plateaus.to_dict("records"), strict=True):
            sizes = means[point["dataset"], point["model"]]
            size = sizes.idxmin() if lower else sizes.idxmax()
            place = point["dataset"], point["model"], size
            rows.append(
                point
                | {"plateau": plateau["percentage"], "verdict": plateau["verdict"]}
                | {"metric": metric, "value": sizes[size], "size": size}
                | (compared.loc[place, list(NOTHING)].to_dict() if place in compared.index else NOTHING)
            )
    return pd.DataFrame(rows)


def sentences(found: pd.DataFrame) -> list[str]:
    """The verdicts (`table`) in three sentences."""
    if found.empty:
        return ["No task has been evaluated on random subsets yet."]
    n, early = len(found), int((found["percentage"] <= 10).sum())
    words = found["verdict"].value_counts()
    plateau, improving, undecided = (words.get(word, 0) for word in ("plateau", "still improving", "undecided"))
    compared = found["against"].dropna()
    above, level, below = (int((compared == AGAINST[word]).sum()) for word in ("win", "tie", "loss"))
    return [
        f"{early} of {n} curves, one for each model and data set, reach the published saturation point at 10\u00a0% of "
        "the corpus or less.",
        f"Held against the spread over seeds, {plateau} are on a plateau, equivalent to the full corpus; {improving} "
        f"still improve; {undecided} are undecided.",
        f"At the best of their sizes, {above} of {len(compared)} are above the best baseline, {level} level with it "
        f"and {below} below.",
    ]

"""What the results of a study say, model by model, in words."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from datawall import tasks
from datawall.analysis import power, results, saturation
from datawall.analysis.results import BASELINE, CURVE, select
from datawall.analysis.saturation import IMPROVING, LIMITED, PLATEAU, UNDECIDED, Curve

VERDICTS = (PLATEAU, IMPROVING, LIMITED, UNDECIDED)
AGAINST = {"win": "above", "tie": "level with", "loss": "below"}
AGAINST |= dict.fromkeys(["unknown", results.ONE_SEED], "not told from")
NOTHING = {"baseline": None, "baseline_value": np.nan, "difference": np.nan, "against": None}  # without a baseline
COLUMNS = ["model", "strategy", "task", "dataset", "percentage", "low", "high", "plateau", "verdict", "decides"]
COLUMNS += ["spread", "gain", "gain_low", "gain_high", "metric", "value", "size", *NOTHING]


def budgets(intervals: pd.DataFrame, checked: pd.DataFrame) -> pd.DataFrame:
    """What half and twice the steps change in the headline metrics: means over the seeds that were checked.

    From the tables `intervals` and `budgets` of a study. Columns task, dataset, model, percentage, half, once, twice
    (the score after so many of the model's steps; half is NaN where it was not made), seeds (that were checked) and
    change (twice less once, as a score).
    """
    heads = pd.Series(tasks.HEADLINE, name="metric").rename_axis("task").reset_index()
    own = results.mean_over_splits(select(intervals, strategy="random")).assign(budget=1.0)
    rows = pd.concat([own, results.mean_over_splits(checked)]).merge(heads)
    wide = rows.pivot_table(index=[*CURVE, "metric", "percentage", "seed"], columns="budget", values="value")
    wide = wide.reindex(columns=[0.5, 1.0, 2.0]).dropna(subset=[1.0, 2.0]).set_axis(["half", "once", "twice"], axis=1)
    by_size = wide.groupby(level=[*CURVE, "metric", "percentage"])
    table = by_size.mean().assign(seeds=by_size.size()).reset_index()
    sign = table["metric"].map(results.sign_of).astype(float)
    return table.assign(change=sign * (table["twice"] - table["once"])).drop(columns="metric")


def table(
    intervals: pd.DataFrame,
    checked: pd.DataFrame | None = None,
    margin: float | None = None,
    right: pd.Series | None = None,
) -> pd.DataFrame:
    """What results on random subsets say of every model, task and data set.

    From the tables `intervals` and `budgets` of a study, and `questions.right_cells`, by which models and baselines
    are compared cell by cell. The verdict is that of the rule `equivalence`, the curves of a task being one family of
    tests. But a curve is budget-limited where twice the steps gain more than the margin at a size that was checked: it
    may tell of the budget, and is not read as a limit of the data. Without `checked`, or a margin, none is.

    Columns percentage, low, high (the saturation point, by the published rule; by the rule `error` where lower is
    better), plateau (percentage; NaN without that verdict), verdict, gain (of the full corpus over the largest subset
    of at most half of it), gain_low and gain_high (95 %, Welch), spread (standard deviation over seeds, pooled over the
    sizes), decides (what would decide it, empty where it is decided), value (the best of the sizes' means), size (its
    percentage), and, empty without a baseline, that (the best), baseline_value, difference and against (`AGAINST`).
    """
    limited = pd.DataFrame(columns=[*CURVE, "percentage", "seeds", "change"])
    if checked is not None and len(checked) and margin is not None:
        limited = budgets(intervals, checked)
        limited = limited[limited["change"] > margin]
    rows = []
    for task, metric in tasks.HEADLINE.items():
        of_task = select(intervals, task=task, metric=metric)
        random = select(of_task, strategy="random")
        if random.empty:
            continue
        lower = results.lower_is_better(metric)
        points = saturation.saturation_points(random, metric, rule="error" if lower else "published")
        plateaus = saturation.saturation_points(random, metric, rule="equivalence", margin=margin, n_resamples=0)
        means = results.mean_over_splits(random).groupby([*CURVE, "percentage"])["value"].mean()
        best = means.groupby(CURVE).agg("idxmin" if lower else "idxmax")
        at_best = pd.MultiIndex.from_frame(of_task[[*CURVE, "percentage"]]).isin(best)
        beside = of_task[(of_task["strategy"] == BASELINE) | ((of_task["strategy"] == "random") & at_best)]
        compared = results.against_baselines(beside, metric, right=right).set_index(CURVE)
        compared["against"] = compared["verdict"].map(AGAINST)
        records = (found.to_dict("records") for found in (points, plateaus))
        for curve, point, plateau in zip(saturation.errors_of(random, metric), *records, strict=True):
            key, gain = tuple(point[name] for name in CURVE), _gain(curve)
            more = limited[(limited[CURVE] == list(key)).all(axis=1)]
            row = point | gain | _verdict(plateau, more, gain["spread"], curve, margin)
            row |= {"metric": metric, "value": means[best[key]], "size": best[key][-1]}
            rows.append(row | (compared.loc[key, list(NOTHING)].to_dict() if key in compared.index else NOTHING))
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdict(
    plateau: dict[str, Any], more: pd.DataFrame, spread: float, curve: Curve, margin: float | None
) -> dict[str, Any]:
    """Plateau, verdict, and what would decide it; `more` are the sizes at which twice the steps gain."""
    if len(more):
        best = more.loc[more["change"].idxmax()]
        by_chance = stats.norm.ppf(0.95) * spread * np.sqrt(2 / best["seeds"])  # runs that differ in their seeds alone
        decides = f"more steps: +{best['change']:.3f} at {best['percentage']:g} %"
        decides += f"; seeds alone: {by_chance:.3f}" if by_chance > best["change"] else ""
        return {"plateau": np.nan, "verdict": LIMITED, "decides": decides}
    decides = ""
    if plateau["verdict"] == UNDECIDED:
        decides = _what_decides(curve, plateau["margin"] if margin is None else margin)
    return {"plateau": plateau["percentage"], "verdict": plateau["verdict"], "decides": decides}


def _what_decides(curve: Curve, margin: float) -> str:
    """What an undecided curve lacks, in words."""
    if curve.percentages[-1] != 100:
        return "the full corpus (100 %)"
    if max(map(len, curve.runs)) < 2:
        return "two seeds or more"
    needed = power.seeds_to_decide(curve, margin)
    return f"about {needed} seeds" if needed else f"more test cells; {power.MOST_SEEDS} seeds would not do"


def _gain(curve: Curve) -> dict[str, float]:
    """What the full corpus gains over the largest subset of at most half of it, and the spread over seeds."""
    spread = float(np.sqrt(np.mean([runs.var(ddof=1) for runs in curve.runs if len(runs) > 1] or [np.nan])))
    gap, error, freedom = curve.last_gain()
    reach = stats.t.ppf(0.975, freedom) * error if error > 0 else error
    return {"gain": float(gap), "gain_low": float(gap - reach), "gain_high": float(gap + reach), "spread": spread}


def design_power(found: pd.DataFrame, percentages: list[float], n_seeds: int, margin: float) -> pd.DataFrame:
    """How often the design would find the truth at the spread that was measured (`power.of_design`, 400 draws).

    A row per task and data set: the median spread of its curves, one family, and right verdicts by truth (`RISES`).
    None where a verdict cannot be reached: without the full corpus, or with one size.
    """
    if len(percentages) < 2 or max(percentages) < 100:
        found = found[:0]
    tables = {}
    for key, curves in found.groupby(["task", "dataset"]):
        spread = curves["spread"].median()
        design = {"percentages": sorted(percentages), "n_curves": len(curves), "n_draws": 400}
        right = power.of_design(spread, n_seeds, margin, **design).set_index("truth")["right"]
        tables[key] = {"spread": spread, **right}
    index = pd.MultiIndex.from_tuples(tables, names=["task", "dataset"]) if tables else None
    return pd.DataFrame(tables.values(), index, columns=["spread", *power.RISES])


def tally(found: pd.DataFrame) -> str:
    """How many curves have which verdict: `verdicts: 12 plateau, 9 still improving, …, of 35`."""
    counts = found["verdict"].value_counts() if len(found) else {}
    return "verdicts: " + ", ".join(f"{counts.get(name, 0)} {name}" for name in VERDICTS) + f", of {len(found)}"


def sentences(found: pd.DataFrame) -> list[str]:
    """The verdicts (`table`) in some sentences."""
    if found.empty:
        return ["No task has been evaluated on random subsets."]
    n, early = len(found), int((found["percentage"] <= 10).sum())
    compared = found["against"].dropna()
    above, level, below = (int((compared == AGAINST[word]).sum()) for word in ("win", "tie", "loss"))
    said, plateaus = [tally(found)], found["plateau"].dropna()
    if len(plateaus):
        said.append(
            f"For {len(plateaus)} of {n} curves a part of the corpus is enough: from some size on, most often "
            f"{plateaus.mode()[0]:g}\u00a0% of it, scores are shown to lie within the margin of the full corpus's."
        )
    said += [
        f"By the published rule, {early} of {n} curves, one for each model and data set, are saturated at 10\u00a0% of "
        "the corpus or less.",
    ]
    if len(compared):
        untold = len(compared) - above - level - below
        said.append(
            f"At the best of their sizes, {above} of {len(compared)} are above the best baseline, {level} level with "
            f"it and {below} below" + (f"; {untold} cannot be told from it." if untold else ".")
        )
    improving = found[found["verdict"] == IMPROVING]
    if len(improving):
        most = improving.loc[improving["gain"].idxmax()]
        said.append(
            f"Of those that still improve, {most['model']} gains most from the last step in size: "
            f"{1000 * most['gain']:.0f} in 1,000 ({most['task']}, {most['dataset']})."
        )
    return said

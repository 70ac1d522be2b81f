"""How often a rule is right: before a study is run, and on learning curves with the published results' spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from datawall import published, saturation
from datawall.adaptive import Plan, settle
from datawall.results import select
from datawall.saturation import IMPROVING, KEY, PLATEAU, UNDECIDED, Curve, curves_of, saturation_points
from datawall.scaling import scaling_curves

SIZES = np.array([1.0, 10, 25, 50, 75, 100])  # per cent, as published
ERROR = 0.25  # at 1 %; plateaus lie at half of it, and the error that still falls is there at 100 %
EXPONENT = np.log(2) / np.log(100)
TRUTHS = {"plateau at 1 %": 1.0, "plateau at 10 %": 10.0, "plateau at 25 %": 25.0, "still improving": np.inf}
MARGIN = 0.01  # the error that still falls loses 0.012 to 0.015 with every doubling from 25 % on

RISES = {"flat": 0, "rises by the margin": 1, "rises by twice the margin": 2}  # margins gained with every doubling

MOST_SEEDS = 50  # that are tried


def of_design(
    spread: float | Sequence[float],
    n_seeds: int | Sequence[int],
    margin: float,
    *,
    percentages: Sequence[float] = (1, 10, 25, 50, 75, 100),
    n_curves: int = 1,
    confidence: float = 0.95,
    n_draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the rule `equivalence` would give each verdict, by simulation through its own code.

    Parameters
    ----------
    spread
        Standard deviation over seeds, in the metric's units: of all sizes, or one for each.
    n_seeds
        Runs of each size; several numbers are tried in turn.
    margin
        Difference in score that does not matter.
    percentages
        Sizes of the design, ascending; the last is the full corpus, 100.
    n_curves
        Curves of one kind that are judged together, as one family of tests.
    confidence
        Of the tests.
    n_draws
        Simulated studies; noise is normal.
    seed
        Of the draws.

    Returns
    -------
    table with the columns truth (`RISES`: the score is flat, or rises by one or two margins with every doubling of the
    corpus), seeds, plateau, still improving, undecided (share of the curves with each verdict), right (share with the
    true one: the power) and error (Monte-Carlo standard error of it).
    """
    sizes = np.array(percentages, float)
    if sizes[-1] != 100 or (np.diff(sizes) <= 0).any() or len(sizes) < 2:
        raise ValueError(f"percentages {percentages}: two or more, ascending, up to 100, to which the rule compares.")
    curve = Curve(("",) * 4, sizes, sizes, [np.zeros(1)] * len(sizes), borrowed=False)
    spreads = np.broadcast_to(np.asarray(spread, float), sizes.shape)
    rng, rows = np.random.default_rng(seed), []
    for number in np.atleast_1d(n_seeds):
        for truth, rise in RISES.items():
            errors = rise * margin * np.log2(100 / sizes)
            noise = rng.standard_normal((n_curves, len(sizes), n_draws, number))
            found = _verdicts(list(errors[:, None, None] + spreads[:, None, None] * noise), curve, margin, confidence)
            shares = {verdict: (found == verdict).mean() for verdict in (PLATEAU, IMPROVING, UNDECIDED)}
            right = found == (IMPROVING if rise else PLATEAU)
            error = right.mean(axis=0).std(ddof=1) / np.sqrt(n_draws)  # curves of one family depend on each other
            rows.append({"truth": truth, "seeds": int(number), **shares, "right": right.mean(), "error": error})
    return pd.DataFrame(rows)


def seeds_needed(
    spread: float | Sequence[float], margin: float, *, power: float = 0.8, most: int = 50, **design: Any
) -> int | None:
    """The fewest seeds at which a flat curve is shown flat with the given power, up to `most`; None if none are enough.

    `design` holds the further arguments of `of_design`.
    """
    enough = (
        number for number in range(2, most + 1) if of_design(spread, number, margin, **design)["right"].iloc[0] >= power
    )
    return next(enough, None)


def seeds_to_decide(curve: Curve, margin: float, *, power: float = 0.8, n_draws: int = 500) -> int | None:
    """How many seeds would give a curve of errors any verdict but undecided, were its means and spreads the truth.

    The curve is judged on its own. None where the most that is tried, `MOST_SEEDS`, would not reach the power.
    """
    means = np.array([runs.mean() for runs in curve.runs])
    spreads = np.array([runs.std(ddof=1) if len(runs) > 1 else np.nan for runs in curve.runs])
    if curve.percentages[-1] != 100 or np.isnan(spreads).all():
        return None
    spreads, rng = np.nan_to_num(spreads, nan=np.nanmean(spreads)), np.random.default_rng(0)
    for number in (*range(2, 11), 12, 15, 20, 30, MOST_SEEDS):
        noise = rng.standard_normal((len(means), n_draws, number))
        runs = means[:, None, None] + spreads[:, None, None] * noise
        if (_verdicts([runs], curve, margin, 0.95) != UNDECIDED).mean() >= power:
            return number
    return None


def _verdicts(runs: list[np.ndarray], curve: Curve, margin: float, confidence: float) -> np.ndarray:
    """Verdicts on the simulated errors of each curve, (n_sizes, n_draws, n_seeds), as `saturation.verdicts` gives."""
    alpha, family = 1 - confidence, [list(of) for of in runs]
    points = np.array(saturation._points(family, [curve] * len(runs), "equivalence", margin, alpha))
    half = np.flatnonzero(curve.percentages <= 50)
    p = np.ones(points.shape)
    if len(half):
        p = np.array([saturation.one_sided_p(*saturation.difference(of[half[-1]], of[-1])) for of in family])
    open_ = np.where(alpha >= saturation.adjust(p.T).T, IMPROVING, UNDECIDED)
    return np.where(np.isinf(points), open_, PLATEAU)


def simulated_curves(n_curves: int, n_seeds: int, *, seed: int = 0) -> pd.DataFrame:
    """Results of made-up pretraining runs, `n_curves` of each of `TRUTHS`, named in the column `task`.

    The error follows a power law without an end, or a steeper one that ends in a plateau. The noise of each size is
    normal, with the standard deviation over seeds of that size in one of the 20 published curves of zero-shot
    classification (random subsets, micro-F1), drawn for each simulated curve.
    """
    rng = np.random.default_rng(seed)
    shown = select(published.results(), task="zeroshot_classification", strategy="random")
    spreads = np.array([[runs.std(ddof=1) for runs in curve.runs] for curve in curves_of(shown, "micro_f1")])
    tables = []
    for truth, end in TRUTHS.items():
        exponent = np.log(2) / np.log(end) if 1 < end < np.inf else EXPONENT
        error = ERROR * np.minimum(SIZES, end) ** -exponent
        spread = spreads[rng.integers(len(spreads), size=n_curves)]
        values = 1 - error[:, None] + spread[:, :, None] * rng.standard_normal((n_curves, len(SIZES), n_seeds))
        curve, size, run = np.indices(values.shape).reshape(3, -1)
        names = np.array([f"curve {number}" for number in range(n_curves)])
        of = {"dataset": names[curve], "percentage": SIZES[size], "seed": run, "value": np.minimum(values.ravel(), 1)}
        tables.append(pd.DataFrame(of).assign(task=truth))
    of_all = {"study": "simulated", "model": "model", "strategy": "random", "metric": "score", "split": ""}
    results = pd.concat(tables, ignore_index=True).assign(**of_all)
    return results.assign(n_cells=results["percentage"] * published.CELLS_PER_PERCENT)


def rates(n_curves: int = 250, n_seeds: Sequence[int] = (3, 5, 10), *, seed: int = 0) -> pd.DataFrame:
    """How often each rule sees a plateau at half of the corpus or less, by truth and number of seeds.

    Returns
    -------
    table with a row per rule and number of seeds, and the columns: `false plateau` (share of the curves that still
    improve on which the rule sees a plateau), `missed plateau` (share of the curves with a plateau on which it sees
    none), `too early` (share of the plateaus at 10 and 25 % that it sees at a smaller size), `in place` (share of all
    plateaus that it sees at their true beginning) and `runs` (share of the grid that it takes). The curve's predicted
    gain has no place to give.
    """
    rows = []
    for number in n_seeds:
        for rule, found in answers(simulated_curves(n_curves, number, seed=seed), "score", MARGIN, seed=seed).items():
            rows.append({"rule": rule, "seeds": number, **summary(found, found["task"].map(TRUTHS))})
    return pd.DataFrame(rows)


def answers(results: pd.DataFrame, metric: str, margin: float, *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """What each rule says of each curve, by rule: tables with the curves' keys and a percentage or a verdict."""

    def points(rule: str, **more: float) -> pd.DataFrame:
        return saturation_points(results, metric, rule=rule, n_resamples=0, **more)

    return {
        "published": points("published"),
        "mean": points("mean"),
        "error": points("error"),
        "equivalence, margin 2 SD": points("equivalence"),
        f"equivalence, margin {margin:g}": points("equivalence", margin=margin),
        "predicted gain": scaling_curves(results, metric, margin=margin, n_resamples=100),
        "adaptive": _adaptive(results, metric, margin, seed),
    }


def _adaptive(results: pd.DataFrame, metric: str, margin: float, seed: int) -> pd.DataFrame:
    """What `adaptive.settle` makes of each curve."""
    rows = []
    for curve in curves_of(results, metric):
        rng = np.random.default_rng(seed)
        scores = {size: rng.permutation(runs) for size, runs in zip(curve.percentages, curve.runs, strict=True)}
        plan = Plan(margin=margin, percentages=tuple(scores), seeds=tuple(range(len(curve.runs[0]))))
        found = settle(lambda percentage, seed, scores=scores: scores[percentage][seed], plan)
        rows.append((*curve.key, found.percentage, found.share))
    return pd.DataFrame(rows, columns=[*KEY, "percentage", "runs"])


def summary(found: pd.DataFrame, end: pd.Series) -> dict[str, float]:
    """Rates of one rule (see `rates`), given where the plateau of each of its rows begins in truth."""
    real = np.isfinite(end)
    shares = {"runs": found["runs"].mean() if "runs" in found else 1.0}
    if "percentage" not in found:
        seen = found["verdict"] == PLATEAU
        return {"false plateau": seen[~real].mean(), "missed plateau": 1 - seen[real].mean(), **shares}
    seen = found["percentage"] <= 50
    return {
        "false plateau": seen[~real].mean(),
        "missed plateau": 1 - seen[real].mean(),
        "too early": (found["percentage"] < end)[real & (end > 1)].mean(),
        "in place": (found["percentage"] == end)[real].mean(),
        **shares,
    }

"""How often the rule `equivalence` would be right of a study, before it is run, and how many seeds that takes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from datawall.analysis import saturation
from datawall.analysis.saturation import IMPROVING, PLATEAU, UNDECIDED, Curve
from datawall.engine import paths

TABLE = paths.PACKAGE_DATA / "power.csv"  # how often each rule sees a plateau; made by tests/benchmarks/power.py
RISES = {"flat": 0, "rises by the margin": 1, "rises by twice the margin": 2}  # margins gained with every doubling
MOST_SEEDS, POWER = 50, 0.8  # seeds that are tried, and the chance of the right answer that is enough


def of_design(
    spread: float | Sequence[float],
    n_seeds: int | Sequence[int],
    margin: float,
    *,
    percentages: Sequence[float] = (1, 10, 25, 50, 75, 100),
    n_curves: int = 1,
    n_draws: int = 2000,
) -> pd.DataFrame:
    """How often the rule `equivalence` would give each verdict, by simulation of studies through its own code.

    `spread` is the standard deviation over seeds, of all sizes or one for each; noise is normal. Several numbers of
    seeds are tried in turn. `percentages` are ascending, up to the full corpus, 100; `n_curves` are one family of
    tests. Columns truth (`RISES`: the score is flat, or rises by one or two margins with every doubling of the corpus),
    seeds; plateau, still improving, undecided (shares of the curves); right (the power); error (its standard error).
    """
    sizes = np.array(percentages, float)
    if sizes[-1] != 100 or (np.diff(sizes) <= 0).any() or len(sizes) < 2:
        raise ValueError(f"percentages {percentages}: two or more, ascending, up to 100, to which the rule compares.")
    spreads = np.broadcast_to(np.asarray(spread, float), sizes.shape)
    rng, rows = np.random.default_rng(0), []
    for number in np.atleast_1d(n_seeds):
        for truth, rise in RISES.items():
            errors = rise * margin * np.log2(100 / sizes)
            noise = rng.standard_normal((n_curves, len(sizes), n_draws, number))
            runs = errors[:, None, None] + spreads[:, None, None] * noise
            curves = [Curve(("",) * 4, sizes, sizes, list(of_curve)) for of_curve in runs]
            _, found = saturation.verdicts(curves, margin, 0.95)
            shares = {verdict: (found == verdict).mean() for verdict in (PLATEAU, IMPROVING, UNDECIDED)}
            right = found == (IMPROVING if rise else PLATEAU)
            error = right.mean(axis=0).std(ddof=1) / np.sqrt(n_draws)  # curves of one family depend on each other
            rows.append({"truth": truth, "seeds": int(number), **shares, "right": right.mean(), "error": error})
    return pd.DataFrame(rows)


def seeds_needed(spread: float | Sequence[float], margin: float, **design: Any) -> int | None:
    """The fewest seeds, `MOST_SEEDS` at most, that show a flat curve flat with `POWER`, or None; see `of_design`."""
    numbers = range(2, MOST_SEEDS + 1)
    return next((n for n in numbers if of_design(spread, n, margin, **design)["right"].iloc[0] >= POWER), None)


def seeds_to_decide(curve: Curve, margin: float) -> int | None:
    """How many seeds, more than it has, would decide a curve of errors, alone, with `POWER`.

    Its means and spreads are taken for true. None if more than `MOST_SEEDS`, without the full corpus, or if no size has
    two seeds.
    """
    means = np.array([runs.mean() for runs in curve.runs])
    spreads = np.array([runs.std(ddof=1) if len(runs) > 1 else np.nan for runs in curve.runs])
    if curve.percentages[-1] != 100 or np.isnan(spreads).all():
        return None
    spreads, rng = np.nan_to_num(spreads, nan=np.nanmean(spreads)), np.random.default_rng(0)
    n_seeds = min(map(len, curve.runs))
    for number in (number for number in (*range(2, 11), 12, 15, 20, 30, MOST_SEEDS) if number > n_seeds):
        runs = means[:, None, None] + spreads[:, None, None] * rng.standard_normal((len(means), 500, number))
        if (saturation.verdicts([replace(curve, runs=list(runs))], margin, 0.95)[1] != UNDECIDED).mean() >= POWER:
            return number
    return None

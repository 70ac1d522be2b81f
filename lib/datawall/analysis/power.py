"""How often a rule is right: before a study is run, and on learning curves with the published results' spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from datawall.analysis import published, saturation
from datawall.analysis.adaptive import Plan, settle
from datawall.analysis.results import select
from datawall.analysis.saturation import IMPROVING, PLATEAU, UNDECIDED, Curve, curves_of
from datawall.analysis.scaling import interval, scale
from datawall.engine import paths

TABLE = paths.PACKAGE_DATA / "power.csv"  # what `rates` finds, made by its benchmark
SIZES = np.array([1.0, 10, 25, 50, 75, 100])  # per cent, as published
MARGIN = 0.01
NOISES = {"published": None, "SD .003": 0.003, "SD .01": 0.01}  # of runs; None draws that of a published curve
DESIGNS = (("published", 3), ("published", 5), ("published", 10), ("SD .003", 5), ("SD .01", 5))


def _halves(error: float, begin: float, end: float) -> Callable[[np.ndarray], np.ndarray]:
    """An error that is flat, halves between two sizes by a power law, and is flat again."""
    return lambda size: error * (np.clip(size, begin, end) / begin) ** -(np.log(2) / np.log(end / begin))


# Error by size, also beyond the corpus, and where its plateau begins.
TRUTHS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "plateau at 1 %": (lambda size: np.full(np.shape(size), 0.25), 1.0),
    "plateau at 10 %": (_halves(0.25, 1, 10), 10.0),
    "plateau at 25 %": (_halves(0.25, 1, 25), 25.0),
    "improves, .25 to .125": (lambda size: 0.25 * size ** -(np.log(2) / np.log(100)), np.inf),
    "improves, .7 to .35": (lambda size: 0.7 * size ** -(np.log(2) / np.log(100)), np.inf),
    "improves, .8 to .4": (lambda size: 0.8 * size ** -(np.log(2) / np.log(100)), np.inf),
    "late, from 25 %": (lambda size: 0.25 * np.maximum(size / 25, 1) ** -0.5, np.inf),
    "late, from 50 %": (lambda size: 0.25 * np.maximum(size / 50, 1) ** -1.0, np.inf),
    "broken line": (
        lambda size: np.where(size < 10, 0.4 - 0.15 * np.log10(size), 0.25 - 0.05 * np.log10(size / 10)),
        np.inf,
    ),
}
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
    seeds, plateau, still improving, undecided (share of the curves with each verdict), right (share with the true one:
    the power) and error (Monte-Carlo standard error of it).
    """
    sizes = np.array(percentages, float)
    if sizes[-1] != 100 or (np.diff(sizes) <= 0).any() or len(sizes) < 2:
        raise ValueError(f"percentages {percentages}: two or more, ascending, up to 100, to which the rule compares.")
    curve = Curve(("",) * 4, sizes, sizes, [np.zeros(1)] * len(sizes), borrowed=False)
    spreads = np.broadcast_to(np.asarray(spread, float), sizes.shape)
    rng, rows = np.random.default_rng(0), []
    for number in np.atleast_1d(n_seeds):
        for truth, rise in RISES.items():
            errors = rise * margin * np.log2(100 / sizes)
            noise = rng.standard_normal((n_curves, len(sizes), n_draws, number))
            runs = list(errors[:, None, None] + spreads[:, None, None] * noise)
            _, found = saturation.verdicts([curve] * n_curves, margin, 0.95, runs)
            shares = {verdict: (found == verdict).mean() for verdict in (PLATEAU, IMPROVING, UNDECIDED)}
            right = found == (IMPROVING if rise else PLATEAU)
            error = right.mean(axis=0).std(ddof=1) / np.sqrt(n_draws)  # curves of one family depend on each other
            rows.append({"truth": truth, "seeds": int(number), **shares, "right": right.mean(), "error": error})
    return pd.DataFrame(rows)


def seeds_needed(spread: float | Sequence[float], margin: float, **design: Any) -> int | None:
    """The fewest seeds, up to `MOST_SEEDS`, at which a flat curve is shown flat with `POWER`; None if none are enough.

    `design` holds the further arguments of `of_design`.
    """
    for number in range(2, MOST_SEEDS + 1):
        if of_design(spread, number, margin, **design)["right"].iloc[0] >= POWER:
            return number
    return None


def seeds_to_decide(curve: Curve, margin: float) -> int | None:
    """How many seeds would give a curve of errors any verdict but undecided, were its means and spreads the truth.

    The curve is judged on its own. None where the most that is tried, `MOST_SEEDS`, would not reach `POWER`.
    """
    means = np.array([runs.mean() for runs in curve.runs])
    spreads = np.array([runs.std(ddof=1) if len(runs) > 1 else np.nan for runs in curve.runs])
    if curve.percentages[-1] != 100 or np.isnan(spreads).all():
        return None
    spreads, rng = np.nan_to_num(spreads, nan=np.nanmean(spreads)), np.random.default_rng(0)
    for number in (*range(2, 11), 12, 15, 20, 30, MOST_SEEDS):
        runs = means[:, None, None] + spreads[:, None, None] * rng.standard_normal((len(means), 500, number))
        if (saturation.verdicts([curve], margin, 0.95, [runs])[1] != UNDECIDED).mean() >= POWER:
            return number
    return None


def simulated(truth: str, n_curves: int, n_seeds: int, *, noise: float | None = None, seed: int = 0) -> np.ndarray:
    """Made-up scores of a truth, (n_curves, n_sizes, n_seeds), with the given noise or that of published curves."""
    rng = np.random.default_rng(seed)
    shown = select(published.results(), task="zeroshot_classification", strategy="random")
    spreads = np.array([[runs.std(ddof=1) for runs in curve.runs] for curve in curves_of(shown, "micro_f1")])
    spread = spreads[rng.integers(len(spreads), size=n_curves)] if noise is None else np.full((1, len(SIZES)), noise)
    error = TRUTHS[truth][0](SIZES)
    return np.minimum(1 - error[:, None] + spread[..., None] * rng.standard_normal((n_curves, len(SIZES), n_seeds)), 1)


def rates(n_curves: int = 100, designs: Iterable[tuple[str, int]] = DESIGNS) -> pd.DataFrame:
    """`judged` of every truth, noise and number of seeds of `designs`."""
    tables = {}
    for noise, number in designs:
        for truth, (error, begins) in TRUTHS.items():
            gain = float(error(np.array(100.0)) - error(np.array(200.0)))
            scores = simulated(truth, n_curves, number, noise=NOISES[noise])
            tables[truth, noise, number] = judged(scores, SIZES, begins, MARGIN, gain=gain)
    return pd.concat(tables, names=["truth", "noise", "seeds", None]).droplevel(3).reset_index()


def judged(
    scores: np.ndarray, sizes: np.ndarray, begins: float, margin: float, *, gain: float | None = None
) -> pd.DataFrame:
    """What each rule says of curves with one truth, each judged alone.

    `scores` are (n_curves, n_sizes, n_seeds) at the percentages `sizes`, ascending. In truth, the plateau begins at
    `begins`, infinite if there is none, and the next doubling would gain `gain`. Columns rule, plateau (share of the
    curves on which it sees one at half of the corpus or less, rightly or not), error (Monte-Carlo standard error of
    it), too early (share on which it begins before it does in truth), in place, runs (share of the grid that it takes)
    and covered (share of the intervals of the predicted gain that hold `gain`); NaN where there is nothing to say.
    """
    plan = Plan(margin=margin, percentages=tuple(sizes.tolist()), seeds=tuple(range(scores.shape[2])))
    by_size = list(np.moveaxis(scores, 1, 0))
    curve = Curve(("",) * 4, sizes, sizes, [np.zeros(1)] * len(sizes), borrowed=False)
    errors = [1 - runs for runs in by_size]
    settled = [settle(lambda size, seed, runs=runs: runs[list(sizes).index(size), seed], plan) for runs in scores]
    points = partial(saturation._points, curves=[curve], alpha=1 - plan.confidence)
    answers = {
        "published": points([by_size], rule="published", margin=None)[0],
        "mean": points([by_size], rule="mean", margin=None)[0],
        "error": points([errors], rule="error", margin=None)[0],
        "equivalence, margin 2 SD": points([errors], rule="equivalence", margin=None)[0],
        f"equivalence, margin {margin:g}": points([errors], rule="equivalence", margin=margin)[0],
        "adaptive": np.array([end.percentage for end in settled]),
    }
    rows = []
    for rule, at in answers.items():
        place = {"too early": (at < begins).mean(), "in place": (at == begins).mean()} if np.isfinite(begins) else {}
        runs = np.mean([end.share for end in settled]) if rule == "adaptive" else 1.0
        rows.append({"rule": rule, "plateau": (at <= 50).mean(), **place, "runs": runs})
    gains = [scale(replace(curve, runs=list(1 - runs)), 100).gain() for runs in scores]
    low, high = np.transpose([interval(drawn, point) for point, drawn in gains])
    seen = {"rule": "predicted gain", "plateau": (high <= margin).mean(), "runs": 1.0}
    if gain is not None:
        seen["covered"] = ((low <= gain) & (gain <= high)).mean()
    columns = ["rule", "plateau", "error", "too early", "in place", "runs", "covered"]
    table = pd.DataFrame([*rows, seen], columns=columns)
    return table.assign(error=np.sqrt(table["plateau"] * (1 - table["plateau"]) / len(scores)))

"""How often each saturation rule sees a plateau, on learning curves with a known truth, with its Monte-Carlo error.

python tests/benchmarks/power.py [curves of each truth, 100]    five minutes; with 100, it writes the packaged table
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from datawall.analysis import power, published, saturation
from datawall.analysis.adaptive import Plan, settle
from datawall.analysis.results import select
from datawall.analysis.saturation import Curve, curves_of
from datawall.analysis.scaling import interval, scale

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
    curve = Curve(("",) * 4, sizes, sizes, list(np.moveaxis(scores, 1, 0)))
    errors = replace(curve, runs=[1 - runs for runs in curve.runs])
    settled = [settle(lambda size, seed, runs=runs: runs[list(sizes).index(size), seed], plan) for runs in scores]

    def points(curve: Curve, rule: str, margin: float | None = None) -> np.ndarray:
        return saturation.points_of([curve], rule, margin, 1 - plan.confidence)[0]

    answers = {
        "published": points(curve, "published"),
        "mean": points(curve, "mean"),
        "error": points(errors, "error"),
        "equivalence, margin 2 SD": points(errors, "equivalence"),
        f"equivalence, margin {margin:g}": points(errors, "equivalence", margin),
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


if __name__ == "__main__":
    n_curves = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    table = rates(n_curves)
    if n_curves == 100:
        table.to_csv(power.TABLE, index=False, float_format="%.3f")
    print(table.round(2).to_string(index=False, na_rep=""))

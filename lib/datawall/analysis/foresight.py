"""What small runs tell of large ones: values foretold, and choices made, from the smaller sizes of a study."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from datawall.analysis.results import mean_over_splits, select
from datawall.analysis.saturation import KEY, Curve, as_error, curves_of, pretrained
from datawall.analysis.scaling import ENDS, scale


def extrapolated(results: pd.DataFrame, metric: str, up_to: float) -> pd.DataFrame:
    """The error at the full corpus as foretold by curves that are fitted to sizes of at most `up_to` per cent alone.

    The interval is of the bootstrap of `scaling.scale`, with as much noise added to each draw as the mean at the full
    corpus has. Curves of fewer than three such sizes are left out. The columns are model, strategy, task, dataset,
    error (mean at the full corpus), last (at the largest size that was fitted: the forecast of whoever carries it
    forward), foretold, low, high.
    """
    rows = []
    for curve in (as_error(curve, metric) for curve in curves_of(results, metric)):
        few = curve.percentages <= up_to
        if curve.percentages[-1] != 100 or few.all() or few.sum() < 3 or min(map(len, curve.runs)) < 2:
            continue
        small = Curve(curve.key, curve.percentages[few], curve.n_cells[few], curve.runs[: few.sum()], borrowed=False)
        point, drawn = scale(small, 200).predict(np.array([curve.n_cells[-1] / small.n_cells[-1]]))
        full = curve.runs[-1]
        noise = np.random.default_rng(0).standard_t(len(full) - 1, 200) * full.std(ddof=1) / len(full) ** 0.5
        low, high = np.quantile(drawn[:, 0] + noise, ENDS)
        rows.append((*curve.key, full.mean(), small.runs[-1].mean(), float(point[0]), low, high))
    return pd.DataFrame(rows, columns=[*KEY, "error", "last", "foretold", "low", "high"])


def decisions(results: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """How often two models, or two strategies, are ordered at a small size as at the largest that has pairs.

    Pairs are of what `by` says, `model` or `strategy`, with all else equal. The columns are percentage, pairs and same
    (share that is ordered alike, by means over seeds). The last row is of the largest size against itself, by halves of
    its seeds: what it would say if it were run again.
    """
    runs = pretrained(mean_over_splits(select(results, metric=metric)))
    where = [name for name in ("task", "dataset", "model", "strategy") if name != by]
    means = runs.pivot_table(index=[*where, "percentage"], columns=by, values="value")
    means = means[means.notna().sum(axis=1) > 1]
    largest = means.index.get_level_values("percentage").max()
    at = {size: rows.droplevel("percentage") for size, rows in means.groupby("percentage")}
    rows = [(size, *_alike(table, at[largest])) for size, table in at.items() if size != largest]
    again = runs[runs["percentage"] == largest].assign(half=lambda table: table.groupby([*where, by]).cumcount())
    halves = []
    for some in combinations(range(n := int(again["half"].max()) + 1), n // 2):
        half = again["half"].isin(some)
        tables = (part.pivot_table(index=where, columns=by, values="value") for part in (again[half], again[~half]))
        halves.append(_alike(*tables))
    rows.append((largest, halves[0][0], float(np.mean([same for _, same in halves]))))
    return pd.DataFrame(rows, columns=["percentage", "pairs", "same"])


def _alike(some: pd.DataFrame, others: pd.DataFrame) -> tuple[int, float]:
    """Number of pairs of columns that both tables compare, over rows, and the share that they order alike."""
    some, others = some.align(others, join="inner")
    pairs = combinations(some.columns, 2)
    signs = pd.concat(np.sign(some[a] - some[b]) * np.sign(others[a] - others[b]) for a, b in pairs).dropna()
    # 1 where both agree, 0 for a draw
    return len(signs), float((signs > 0).mean() + (signs == 0).mean() / 2)


def signal_to_noise(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much more the means of a curve's sizes differ than seeds do, beside what noise alone gives.

    The columns are model, strategy, task, dataset, ratio (range of the sizes' means over the mean standard deviation
    over seeds) and noise (the ratio's expectation where no size differs, by simulation of normal noise).
    """
    rows, known = [], {}
    for curve in curves_of(results, metric):
        shape = tuple(map(len, curve.runs[: curve.n_own]))
        if len(shape) > 1 and min(shape) > 1:
            if shape not in known:
                rng = np.random.default_rng(0)
                known[shape] = _ratio([rng.standard_normal((4000, n)) for n in shape]).mean()
            rows.append((*curve.key, _ratio(curve.runs[: curve.n_own]), known[shape]))
    return pd.DataFrame(rows, columns=[*KEY, "ratio", "noise"])


def _ratio(runs: list[np.ndarray]) -> np.ndarray:
    """Range of the sizes' means over the mean spread of their runs, the last axis."""
    means, spreads = [size.mean(axis=-1) for size in runs], [size.std(axis=-1, ddof=1) for size in runs]
    return np.ptp(means, axis=0) / np.mean(spreads, axis=0)

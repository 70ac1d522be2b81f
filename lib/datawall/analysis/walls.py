"""Which wall a model meets: what twice the cells, depth, steps or width, other cells or another loss would gain."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from datawall.analysis import scaling
from datawall.analysis.results import CURVE, lower_is_better, select
from datawall.analysis.saturation import EXACT
from datawall.engine import paths
from datawall.models import hyperparameters

TABLES = paths.PACKAGE_DATA / "which_wall"  # of the studies that notebook 9 reads; by tests/benchmarks/which_wall.py
LEVERS = ("cells", "depth", "steps", "width")  # multiples of the reference: all cells, at a model's own settings
# Terms of a surface, and the levers in each. Depth acts as cells do: half of it costs as much as some of them.
TERMS = {"of cells": ("cells", "depth"), "of steps": ("steps",), "of width": ("width",)}
DOUBLED = {"data": "cells", "budget": "steps", "width": "width", "depth": "depth"}
# What is swapped, not doubled: random subsets for others of their size. So are weight decay and the loss.
SWAPPED = {"diversity": ("celltype_reweighted", "geometric_sketching"), "quality": ("richest",)}
SUSPECTS = (*DOUBLED, "weight decay", "objective", *SWAPPED)
LABELS, OPEN = "labels or metric", "not told"
FEWEST = 3  # levers with three values or more, without which no wall is told from another
STARTS, EXPONENTS, AMPLITUDES = 16, (0.01, 4.0), (-14.0, 1.0)  # of fits; bounds; bounds of logarithms
REPEATS = np.geomspace(0.3, 3000, 81)  # R* that are tried


@dataclass(frozen=True)
class Surface:
    """Error over levers: floor + a · cells^-α · depth^-αγ + b · steps^-β + c · width^-δ.

    The parameters are exponents, by the name of their lever, and logarithms of floor, a, b and c; a lever that was not
    varied has none. `draws` (n_draws, n_parameters) are the bootstrap's.
    """

    names: tuple[str, ...]
    best: np.ndarray
    draws: np.ndarray

    def drawn(self, name: str) -> np.ndarray:
        """A parameter: the estimate, then the draws; 0 where its lever was not varied."""
        i = self.names.index(name) if name in self.names else None
        return np.zeros(1 + len(self.draws)) if i is None else np.append(self.best[i], self.draws[:, i])

    def doubling(self, lever: str) -> np.ndarray:
        """By how much twice of a lever lowers the error of the reference: estimate, then draws; 0 if not varied."""
        of_lever = next(name for name, levers in TERMS.items() if lever in levers)
        return np.exp(self.drawn(of_lever)) * (1 - 2.0 ** -self.drawn(lever))

    def cells_as_half_the_depth(self) -> np.ndarray:
        """Share of the cells whose loss costs as much as that of half the depth: estimate, then draws."""
        return 1 - 2.0 ** -(self.drawn("depth") / self.drawn("cells"))

    def predict(self, points: pd.DataFrame) -> np.ndarray:
        """Errors at levers, (n_points,)."""
        return np.exp(_terms(points, self.names) @ self.best).sum(axis=0)


def means(levers: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean errors over seeds of the runs of `questions.levers`, a row for each way that a model was trained.

    Columns: task, dataset, model, family, label, strategy, varied, the levers, unique (cells), samples, error and `se`,
    the standard error of its logarithm, from the spread over seeds, pooled over all rows of a task, data set and model.
    """
    rows = select(levers, metric=metric)
    errors = rows["value"] if lower_is_better(metric) else 1 - rows["value"]
    rows = rows.assign(log=np.log(errors.astype(float).clip(lower=EXACT)), unique=rows["n_cells"])
    keys = [*CURVE, "family", "label", "strategy", "varied", *LEVERS]
    by_key = rows.groupby(keys, sort=False)
    table = by_key[["unique", "samples", "log"]].mean().assign(n=by_key.size(), squares=by_key["log"].var().fillna(0))
    table["squares"] *= table["n"] - 1
    pooled = table.groupby(CURVE)[["squares", "n"]].transform("sum")
    freedom = (pooled["n"] - table.groupby(CURVE)["n"].transform("size")).clip(lower=1)
    se = np.sqrt(pooled["squares"] / freedom).clip(lower=1e-4) / np.sqrt(table["n"])
    return table.assign(error=np.exp(table["log"]), se=se).drop(columns=["log", "n", "squares"]).reset_index()


def points(means: pd.DataFrame) -> pd.DataFrame:
    """Rows of `means`, of one model, task and data set, that a surface is fitted to.

    Of several learning rates for a width, the one with the lowest error counts. Steps beyond a size's best stop are
    left out: few cells are learned by heart, errors rise again, and whoever sees that stops.
    """
    found = means[means["varied"].isin(["", "width", "depth"])].sort_values("error").drop_duplicates([*LEVERS])
    best_stop = found.groupby(["cells", "depth", "width"])["steps"].transform("first")
    return found[found["steps"] <= best_stop].sort_values([*LEVERS], ignore_index=True)


def surface(points: pd.DataFrame, *, n_draws: int = 200) -> Surface:
    """Fit a surface to mean errors (`points`): least squares of logarithms, robust by Huber's loss, from many starts.

    Draws are fitted to means with normal noise, of their standard error or of how far the surface mostly misses them.
    """
    varied = [lever for lever in LEVERS if points[lever].nunique() > 2]
    names = ["floor"]
    for term, levers in TERMS.items():
        names += [term, *(lever for lever in levers if lever in varied)] if set(levers) & set(varied) else []
    terms, rng = _terms(points, tuple(names)), np.random.default_rng(0)
    bounds = np.array([EXPONENTS if name in LEVERS else AMPLITUDES for name in names]).T
    observed, error = np.log(points["error"].to_numpy()), points["se"].to_numpy()
    options = {"bounds": bounds, "loss": "huber", "f_scale": 1.345, "ftol": 1e-5, "max_nfev": 60}

    def fit(observed: np.ndarray, start: np.ndarray) -> optimize.OptimizeResult:
        def residuals(theta: np.ndarray) -> np.ndarray:
            return (np.log(np.exp(terms @ theta).sum(axis=0)) - observed) / error

        def jacobian(theta: np.ndarray) -> np.ndarray:
            parts = np.exp(terms @ theta)
            return np.einsum("tp,tpk->pk", parts / (parts.sum(axis=0) * error), terms)

        return optimize.least_squares(residuals, start, jacobian, **options)

    starts = rng.uniform(*np.clip(bounds, -6, 1.5), (STARTS, len(names)))
    best = min((fit(observed, start) for start in starts), key=lambda fitted: fitted.cost)
    missed = 1.4826 * np.median(np.abs(best.fun * error)) * np.sqrt(len(error) / max(1, len(error) - len(names)))
    noise = np.maximum(error, missed) * rng.standard_normal((n_draws, len(error)))
    return Surface(tuple(names), best.x, np.array([fit(observed + of_draw, best.x).x for of_draw in noise]))


def _terms(points: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """A term's logarithm is linear in the parameters: what these are multiplied by, (n_terms, n_points, n_params)."""
    of_term = np.cumsum([name not in LEVERS for name in names]) - 1
    terms = np.zeros((of_term[-1] + 1, len(points), len(names)))
    for i, name in enumerate(names):
        terms[of_term[i], :, i] = -np.log(points[name]) if name in LEVERS else 1
    return terms


def repeats_worth(points: pd.DataFrame, *, n_draws: int = 200) -> np.ndarray:
    """R*: after how many passes seeing the same cells again is worth little; the estimate, then draws.

    Seen `samples` times in all, `unique` cells are worth U + U R* (1 - exp(-R / R*)) fresh ones, R the repeats of each
    (Muennighoff et al. 2023, arXiv 2305.16264). The error is a power law with a floor in what they are worth. Width and
    depth are the reference's. At the ends of `REPEATS` it cannot be told.
    """
    points = points[(points["width"] == 1) & (points["depth"] == 1)]
    error, se = points["error"].to_numpy(), (points["error"] * points["se"]).to_numpy()
    errors = np.vstack([error, error + se * np.random.default_rng(0).standard_normal((n_draws, len(error)))])
    fresh = np.minimum(points["unique"], points["samples"]).to_numpy()
    repeats = points["samples"].to_numpy() / fresh - 1
    losses = []
    for r in REPEATS:
        worth = fresh * (1 - r * np.expm1(-repeats / r))
        losses.append(scaling.fit(scaling.POWER, worth / worth.max(), errors, se**-2.0).loss)
    return REPEATS[np.argmin(losses, axis=0)]


def held_out(points: pd.DataFrame) -> pd.DataFrame:
    """The points with most cells, and what a surface that is fitted to the others alone foretells: `foretold`."""
    largest = points["cells"] == points["cells"].max()
    return points[largest].assign(foretold=surface(points[~largest], n_draws=0).predict(points[largest]))


def gains(levers: pd.DataFrame, metric: str, *, n_draws: int = 200) -> pd.DataFrame:
    """By how much a doubling, or a swap, of each suspect lowers the error of the reference; draw 0 is the estimate.

    `levers` is of `questions.levers`. Doublings of steps and width are measured where they were run; those of cells
    and depth are the surface's. A swap is the difference of two means over seeds, at the largest size that both have:
    of the better of two strategies, of the best weight decay, of the other loss in the same family. That loss lowers
    errors of its own, so that it counts in scores alone. A part of the corpus that is chosen better is worth more
    cells: what it gains there fades up to the whole corpus as what cells gain does.

    Columns task, dataset, model, suspect, draw, gain, error (of the reference). Less than `FEWEST` levers give no rows.
    """
    tables, rng, all_means = [], np.random.default_rng(0), means(levers, metric)
    for (task, dataset, model), own in all_means.groupby(CURVE, sort=False):
        found = points(own)
        if sum(found[lever].nunique() > 2 for lever in LEVERS) < FEWEST:
            continue
        fitted = surface(found, n_draws=n_draws)
        drawn = {suspect: fitted.doubling(lever) for suspect, lever in DOUBLED.items() if lever in fitted.names}
        others = {name: own[own["strategy"].isin(strategies)] for name, strategies in SWAPPED.items()}
        others["weight decay"] = own[own["varied"] == "weight_decay"]
        others["budget"] = select(own, varied="", steps=2.0)
        others["width"] = select(own, varied="width", width=2.0)
        if metric != "explained":
            twins = select(all_means, task=task, dataset=dataset, family=own["family"].iloc[0], varied="", steps=1.0)
            others["objective"] = twins.loc[[_differing(model, twin) == {"loss"} for twin in twins["model"]]]
        random = select(own, varied="", steps=1.0).drop_duplicates("cells").set_index("cells")
        for suspect, table in others.items():
            table = table[table["cells"].isin(random.index)]
            if len(table):
                swap = table[table["cells"] == table["cells"].max()].nsmallest(1, "error").iloc[0]
                kept = random.loc[swap["cells"]]
                noise = np.hypot(kept["error"] * kept["se"], swap["error"] * swap["se"]) * rng.standard_normal(n_draws)
                fades = swap["cells"] ** fitted.drawn("cells")
                drawn[suspect] = fades * (kept["error"] - swap["error"] + np.concatenate([[0], noise]))
        told = {suspect: drawn[suspect] for suspect in SUSPECTS if suspect in drawn}
        table = pd.DataFrame(told).rename_axis("draw").melt(var_name="suspect", value_name="gain", ignore_index=False)
        of_all = {"task": task, "dataset": dataset, "model": model, "error": random.loc[random.index.max(), "error"]}
        tables.append(table.reset_index().assign(**of_all))
    columns = dict.fromkeys([*CURVE, "suspect"], str) | {"draw": int, "gain": float, "error": float}
    return pd.concat([pd.DataFrame(columns=columns).astype(columns), *tables], ignore_index=True)[[*columns]]


def _differing(one: str, other: str) -> set[str]:
    """In which settings two models differ, by what their names mean."""
    values = [hyperparameters.resolve(name).hyperparameters.model_dump() for name in (one, other)]
    return {name for name in values[0] if values[0][name] != values[1].get(name)}


def worth(gains: pd.DataFrame) -> pd.DataFrame:
    """What each doubling or swap gains, in errors in 1,000 cells: task, dataset, model, suspect, gain, low, high."""
    drawn = gains[gains["draw"] > 0].groupby([*CURVE, "suspect"], sort=False)["gain"]
    point = select(gains, draw=0).set_index([*CURVE, "suspect"])["gain"]
    table = pd.DataFrame({"gain": point, "low": drawn.quantile(0.025), "high": drawn.quantile(0.975)})
    return (1000 * table).reindex(point.index).reset_index()


def verdicts(gains: pd.DataFrame, margin: float = 0.005, label_error: float | None = None) -> pd.DataFrame:
    """Which wall each model meets: a row per task, data set and model, with its wall, why, and the error that is left.

    The wall is the suspect whose doubling or swap gains most, where it gains `margin` or more, its interval (corrected
    for the number of suspects) excludes zero, and it is the largest in 95 % of the draws. It is `labels or metric`
    where less than the margin is left beyond `label_error`, the share of cells that two labellings name differently, or
    where no suspect may gain as much as the margin. Otherwise it is not told.
    """
    rows = []
    for key, found in gains.groupby(CURVE, sort=False):
        drawn, error = found.pivot_table("gain", "draw", "suspect"), found["error"].iloc[0]
        point, drawn = drawn.loc[0], drawn.loc[1:]
        ends = drawn.quantile([0.025 / len(point), 1 - 0.025 / len(point)])
        low, high, best = ends.iloc[0], ends.iloc[1], point.idxmax()
        largest = drawn.idxmax(axis=1).value_counts(normalize=True)
        told = f"{best} gains {1000 * point[best]:.1f} ({1000 * low[best]:.1f} to {1000 * high[best]:.1f}) in 1,000"
        if label_error is not None and error - label_error <= margin:
            wall, why = LABELS, f"{1000 * error:.0f} of 1,000 wrong, labels differ in {1000 * label_error:.0f}; {told}"
        elif point[best] >= margin and low[best] > 0 and largest.get(best, 0) >= 0.95:
            wall, why = best, told
        elif (high < margin).all():
            wall, why = LABELS, f"nothing varied gains {1000 * margin:g} in 1,000; at most, {told}"
        else:
            often = [f"{name} {share:.0%}" for name, share in largest[largest >= 0.05].items()]
            wall, why = OPEN, f"{told}; the largest gain, by draws: {', '.join(often)}"
        rows.append((*key, wall, why, error))
    return pd.DataFrame(rows, columns=[*CURVE, "wall", "why", "error"])


def sentences(levers: pd.DataFrame, metric: str = "micro_f1") -> list[str]:
    """The verdicts of a study in words, a line each; none if it does not vary enough."""
    found = verdicts(gains(levers, metric, n_draws=100)).to_dict("records")
    return ["{model} ({task}, {dataset}): the wall is {wall}. {why}.".format(**row) for row in found]


def packaged() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of the studies which_wall, which_wall_simulated and spike_in (`questions.levers`), and what bounds scores.

    The second has task, dataset, metric, what and value: the `reliability` of a metric, and the share of the held-out
    `cells with both labels` (our own and the authors') where these two `labels agree`.
    """
    return pd.read_csv(TABLES / "runs.csv.gz", keep_default_na=False), pd.read_csv(TABLES / "ceiling.csv")


def reliability(intervals: pd.DataFrame, metric: str) -> pd.Series:
    """How much of the variance between pretrained runs is theirs, and not that of the split, by task and data set.

    Split-half reliability: the correlation over runs of the means of odd and of even splits, stepped up to all splits
    (Spearman and Brown 1910). `intervals` is the table of that name; NaN where there is a single split.
    """
    runs = select(intervals, metric=metric)
    runs = runs[runs["percentage"] > 0]
    found = {}
    for key, rows in runs.groupby(["task", "dataset"]):
        by_split = rows.pivot_table("value", ["model", "strategy", "percentage", "seed"], "split")
        halves = by_split.iloc[:, ::2].mean(axis=1), by_split.iloc[:, 1::2].mean(axis=1)
        r = halves[0].corr(halves[1])
        found[key] = 2 * r / (1 + r)
    return pd.Series(found, dtype=float)

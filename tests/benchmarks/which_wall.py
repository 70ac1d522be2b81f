"""Which wall a model meets (`analysis.walls`): how often a planted one is named, and the packaged table of runs.

PYTHONPATH=tests python tests/benchmarks/which_wall.py [draws, 50]
PYTHONPATH=tests python tests/benchmarks/which_wall.py runs/which_wall ...

The first simulates runs in which one suspect is the wall, four minutes for fifty draws. The second writes the packaged
table from the run folders of `params/which_wall.yaml`, some minutes after they have been run.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from datawall.analysis import walls
from datawall.analysis.walls import LABELS, OPEN, SUSPECTS, Surface

SPREAD = 0.04  # standard deviation of the logarithm of an error over seeds, about as measured
SEEDS = 3


def design() -> pd.DataFrame:
    """The runs of params/which_wall.yaml, for one model and its twin: the columns of `questions.levers`, no value."""
    random = [("SSL", "random", "", n, 1, 1, 1) for n in (0.01, 0.03, 0.1, 0.3, 1)]
    steps = [("SSL", "random", "", n, 1, s, 1) for n, s in product((0.1, 1), (0.25, 0.5, 2, 4, 16))]
    width = [(f"SSL@{w}x", "random", "width", n, 1, 1, w) for n, w in product((0.01, 0.1, 1), (0.5, 2, 4))]
    decay = [(f"SSL@d{d}", "random", "weight_decay", n, 1, 1, 1) for n, d in product((0.01, 0.1, 1), (0, 30))]
    depth = [("SSL", f"depth_{d:g}", "depth", n, d / 100, 1, 1) for n, d in product((0.1, 1), (30, 10, 3))]
    chosen = ("celltype_reweighted", "geometric_sketching", "richest", "poorest")
    other = [("SSL", name, "strategy", n, 1, 1, 1) for n, name in product((0.01, 0.1), chosen)]
    twin = [("ssl_contrastive", *row[1:]) for row in random]
    columns = ["label", "strategy", "varied", *walls.LEVERS]
    table = pd.DataFrame(random + steps + width + decay + depth + other + twin, columns=columns)
    table = table.loc[table.index.repeat(SEEDS)].assign(family="SSL", task="zeroshot_classification", dataset="planted")
    table = table.assign(model=table["label"].str.partition("@")[0], metric="micro_f1", n_cells=1e4 * table["cells"])
    return table.assign(samples=76_800 * table["steps"]).astype(dict.fromkeys(walls.LEVERS, float))


def planted(wall: str, rng: np.random.Generator, spread: float = SPREAD) -> tuple[pd.DataFrame, Surface]:
    """Runs of `design` in which a suspect gains 8 to 16 in 1,000 at the reference, and the true surface.

    The doublings of cells, steps, width and depth gain at most 1 else. The floor of the surface is the labels' errors.
    """
    table, gain = design(), rng.uniform(0.008, 0.016)
    gains = {"data": 0.001, "budget": 0.0005, "width": 0.0005, "depth": 0.0005}
    gains |= dict.fromkeys(gains, 0.0002) if wall == LABELS else {wall: gain} if wall in gains else {}
    deep = wall == "depth"  # depth acts through the term of cells
    exponent = {"cells": 0.05 if deep else 0.4, "steps": 0.5, "width": 0.5}
    amplitude = {lever: gains[name] / (1 - 2 ** -exponent[lever]) for name, lever in list(walls.DOUBLED.items())[:3]}
    amplitude |= {"cells": 0.03} if deep else {}
    exponent["depth"] = -np.log2(1 - gains["depth"] / amplitude["cells"])
    names = ("floor", "of cells", "cells", "depth", "of steps", "steps", "of width", "width")
    logs = {"floor": np.log(rng.uniform(0.02, 0.06)), **{f"of {name}": np.log(amplitude[name]) for name in amplitude}}
    true = Surface(names, np.array([(logs | exponent)[name] for name in names]), np.empty((0, len(names))))
    lacks = {
        "objective": table["model"] != "ssl_contrastive",
        "diversity": table["strategy"] != "geometric_sketching",
        "quality": table["strategy"] != "richest",
        "weight decay": table["label"] != "SSL@d30",
    }.get(wall, pd.Series(False, table.index))
    fades = table["cells"] ** -exponent["cells"] if wall in walls.SWAPPED else 1.0
    error = (true.predict(table) + gain * fades * lacks) * np.exp(spread * rng.standard_normal(len(table)))
    return table.assign(value=1 - error), true


def named(wall: str, seed: int, *, n_draws: int = 100) -> str:
    """The wall that is named where one is planted."""
    runs, true = planted(wall, np.random.default_rng([(*SUSPECTS, LABELS).index(wall), seed]))
    runs = runs[(runs["model"] == "SSL") | (runs["varied"] == "")]
    found = walls.gains(runs, "micro_f1", n_draws=n_draws)
    found = walls.verdicts(found[found["model"] == "SSL"], label_error=np.exp(true.best[0]))
    return found["wall"].iloc[0]


def rates(n_draws: int) -> pd.DataFrame:
    """Shares of draws in which the planted wall is named, another is, and none is."""
    rows = []
    for wall in (*SUSPECTS, LABELS):
        told = pd.Series([named(wall, seed) for seed in range(n_draws)])
        right, not_told = (told == wall).mean(), (told == OPEN).mean()
        rows.append({"planted": wall, "named": right, "not told": not_told, "wrong": 1 - right - not_told})
        print(rows[-1], told[(told != wall) & (told != OPEN)].value_counts().to_dict(), flush=True)
    return pd.DataFrame(rows)


def coverage(n_draws: int) -> dict[str, float]:
    """How often the 95 % intervals of the depth law and of R* hold what was planted."""
    held = {"half the depth": [], "R*": []}
    for seed in range(n_draws):
        rng = np.random.default_rng([7, seed])
        runs, true = planted("depth", rng)
        fitted = walls.surface(walls.points(walls.means(runs[runs["model"] == "SSL"], "micro_f1")))
        _hold(held["half the depth"], fitted.cells_as_half_the_depth(), true.cells_as_half_the_depth()[0])
        points, r = repeated(rng)
        _hold(held["R*"], walls.repeats_worth(points), r)
    return {name: float(np.mean(inside)) for name, inside in held.items()}


def _hold(inside: list[bool], drawn: np.ndarray, truth: float) -> None:
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    inside.append(bool(low <= truth <= high))


def repeated(rng: np.random.Generator, spread: float = SPREAD) -> tuple[pd.DataFrame, float]:
    """Points whose error is a power law in what repeated cells are worth, and the R* that was planted."""
    table, r = design(), rng.uniform(5, 50)
    table = table[(table["varied"] == "") & (table["model"] == "SSL")].drop_duplicates(["cells", "steps"])
    fresh = np.minimum(table["n_cells"], table["samples"])
    worth = fresh * (1 + r * (1 - np.exp(-(table["samples"] / fresh - 1) / r)))
    error = 0.03 + 0.3 * (worth / 100) ** -0.5
    se = spread / np.sqrt(SEEDS)
    noisy = error * np.exp(se * rng.standard_normal(len(table)))
    return table.assign(unique=table["n_cells"], error=noisy, se=se), r


def package(folders: list[str]) -> None:
    """Write the packaged tables from run folders."""
    import datawall as dw

    runs, ceiling = [], []
    for study in map(dw.open_study, folders):
        table, intervals = dw.questions.levers(study), dw.read_results(study.folder, "intervals")
        runs.append(table[table["metric"].isin(["micro_f1", "macro_f1", "explained"])])
        for metric in ("micro_f1", "macro_f1"):
            for (task, dataset), value in walls.reliability(intervals, metric).items():
                ceiling.append((task, dataset, metric, "reliability", value))
        ours = study.dataset(study.params.held_out_name).obs["cell_type"].astype(str)
        theirs = dw.curation.authors_labels(study, ours.index)
        if len(theirs):
            of = "zeroshot_classification", study.params.held_out_name, "micro_f1"
            ceiling.append((*of, "labels agree", (ours[theirs.index] == theirs).mean()))
            ceiling.append((*of, "cells with both labels", len(theirs)))
    walls.TABLES.mkdir(exist_ok=True)
    compression = {"method": "gzip", "mtime": 0}
    pd.concat(runs).round({"value": 5}).to_csv(walls.TABLES / "runs.csv.gz", index=False, compression=compression)
    columns = ["task", "dataset", "metric", "what", "value"]
    pd.DataFrame(ceiling, columns=columns).round(4).to_csv(walls.TABLES / "ceiling.csv", index=False)


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["50"]
    if Path(arguments[0]).is_dir():
        package(arguments)
    else:
        print(rates(int(arguments[0])).round(2).to_string(index=False))
        print("95 % intervals hold what was planted:", coverage(2 * int(arguments[0])))

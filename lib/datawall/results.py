"""The tidy results table: one number a row."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from datawall import store

COLUMNS = [
    *("study", "model", "strategy", "percentage", "seed", "n_cells"),
    *("task", "dataset", "metric", "value", "split", "run_id"),
]
RUN = ["study", "model", "strategy", "percentage", "seed", "n_cells", "task", "dataset", "metric"]
CHECKSUMS = "results.sha256"  # of the tables' files
BASELINE = "baseline"  # the strategy of rows that no pretrained model made; their percentage is 0, their seed -1


def write_results(results: pd.DataFrame, folder: Path) -> None:
    """Write `results.parquet` and `results.csv` into a run folder, each atomically, rows in a fixed order."""
    results = results[COLUMNS].sort_values(COLUMNS[:-1], ignore_index=True)
    store.write_atomically(folder / "results.parquet", lambda path: results.to_parquet(path, index=False))
    store.write_atomically(folder / "results.csv", lambda path: results.to_csv(path, index=False))
    store.write_checksums(folder / CHECKSUMS, ["results.parquet", "results.csv"])


def damage(folder: Path) -> list[str]:
    """What is wrong with the tables of a run folder, a line each; nothing if there are none yet."""
    if not (folder / CHECKSUMS).is_file():
        return [f"{CHECKSUMS} is missing"] * (folder / "results.parquet").is_file()
    return [f"{name} is missing, or not as it was written" for name in store.changed(folder / CHECKSUMS)]


def read_results(run_dir: str | Path) -> pd.DataFrame:
    """The results of a run, one number a row.

    Parameters
    ----------
    run_dir
        Folder of the run, such as `runs/quick`.

    Returns
    -------
    table with the columns study, model, strategy, percentage (0 to 100), seed, n_cells (pretraining cells), task,
    dataset, metric, value, split (how test cells were told from training cells), run_id (the artifact it is from).

    Raises
    ------
    FileNotFoundError
        If the run has no results.
    ValueError
        If they are not as they were written.
    """
    path = Path(run_dir) / "results.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the study first: python run_all.py params/<study>.yaml")
    if wrong := [line for line in damage(path.parent) if line.startswith(path.name)]:
        raise ValueError(f"{path.parent}: {wrong[0]}; run the study again, which makes it from the store in no time.")
    return pd.read_parquet(path)


def mean_over_splits(results: pd.DataFrame) -> pd.DataFrame:
    """One value per run and metric: the mean over its splits."""
    return results.groupby(RUN, as_index=False, sort=True)["value"].mean()


def select(results: pd.DataFrame, **values: str | float) -> pd.DataFrame:
    """Rows whose columns have the values given, say `select(results, task="reconstruction", metric="mse")`."""
    for name, value in values.items():
        results = results[results[name] == value]
    return results


def headline(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The claim in numbers: each model untrained and at every size of the random strategy, beside the baselines.

    Means over splits and seeds; a row per data set and model, a column per size and per baseline.
    """
    means = mean_over_splits(select(results, metric=metric))
    means = means.groupby(["dataset", "model", "strategy", "percentage"], as_index=False)["value"].mean()
    table = {}
    for dataset, rows in means.groupby("dataset"):
        of_baselines = select(rows, strategy=BASELINE).set_index("model")["value"].to_dict()
        for model, runs in rows[rows["strategy"].isin(["random", "untrained"])].groupby("model"):
            sizes = {
                "untrained" if p == 0 else f"{p:g} %": v for p, v in zip(runs["percentage"], runs["value"], strict=True)
            }
            table[dataset, model] = sizes | of_baselines
    return pd.DataFrame(table).T.rename_axis(["dataset", "model"])


def verdicts(results: pd.DataFrame, metric: str, *, margin: float) -> pd.DataFrame:
    """In words, how each model at the best of its sizes compares with its untrained control and the baselines.

    `above` or `below` by more than `margin`, in the metric's units, or else `within`. Rows and sizes are those of
    `headline`.
    """
    table = headline(results, metric)
    best = table.filter(like="%").max(axis=1)
    others = table[[name for name in table if not name.endswith("%")]]
    gap = -others.sub(best, axis=0)
    return gap.map(lambda value: "above" if value > margin else "below" if value < -margin else "within")


def gains(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What more cells and what more diverse cells are worth, in the metric's units, means over splits and seeds.

    A row per data set and model. `more cells` is the largest size over the smallest, of random subsets; a strategy's
    column is its gain over random subsets of equal size, at the largest size that both have.
    """
    means = mean_over_splits(select(results, metric=metric))
    means = means.pivot_table(index=["dataset", "model", "strategy"], columns="percentage", values="value")
    table = {}
    for (dataset, model), of_model in means.groupby(["dataset", "model"]):
        by_strategy = of_model.droplevel(["dataset", "model"])
        if "random" not in by_strategy.index:
            continue
        random = by_strategy.loc["random"].dropna()
        table[dataset, model] = {"more cells": random.iloc[-1] - random.iloc[0]}
        for strategy in by_strategy.index.difference(["random", "untrained"]):
            shared = (by_strategy.loc[strategy] - random).dropna()
            table[dataset, model][strategy] = shared.iloc[-1] if len(shared) else float("nan")
    return pd.DataFrame(table).T.rename_axis(["dataset", "model"])

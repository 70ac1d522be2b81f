"""The tidy results table: one number a row."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from datawall import store

COLUMNS = [
    "study", "model", "strategy", "percentage", "seed", "n_cells", "task", "dataset", "metric", "value", "split", "run_id"
]  # fmt: skip
RUN = ["model", "strategy", "percentage", "seed", "n_cells", "task", "dataset", "metric"]
BASELINE = "baseline"  # the strategy of rows that no pretrained model made; their percentage is 0, their seed -1


def write_results(results: pd.DataFrame, folder: Path) -> None:
    """Write `results.parquet` and `results.csv` into a run folder, each atomically, rows in a fixed order."""
    results = results[COLUMNS].sort_values(COLUMNS[:-1], ignore_index=True)
    store.write_atomically(folder / "results.parquet", lambda path: results.to_parquet(path, index=False))
    store.write_atomically(folder / "results.csv", lambda path: results.to_csv(path, index=False))


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
    """
    path = Path(run_dir) / "results.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the study first: python run_all.py params/<study>.yaml")
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
            sizes = {"untrained" if p == 0 else f"{p:g} %": v for p, v in zip(runs["percentage"], runs["value"], strict=True)}
            table[dataset, model] = sizes | of_baselines
    return pd.DataFrame(table).T.rename_axis(["dataset", "model"])

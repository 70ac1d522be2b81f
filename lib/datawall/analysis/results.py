"""The tidy tables of a study: one number a row, what each is worth, and the scores of each cell type."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datawall import tasks
from datawall.engine import disk
from datawall.tasks import uncertainty

RUN = ["study", "model", "strategy", "percentage", "seed", "n_cells", "task", "dataset", "metric"]
COLUMNS = [*RUN, "value", "split", "run_id"]
CURVE = ["task", "dataset", "model"]  # what a verdict is of
JUDGED = ["task", "dataset", "metric", "split"]
KNOWN = ["low", "high", "chance", "ceiling"]  # beside a value, where they are known
ALL_COLUMNS = [*COLUMNS, *KNOWN, "budget"]  # the share of a model's steps
OF_A_TYPE = r"(?s)^(?P<metric>f1|support)\[(?P<cell_type>.*)\]\Z"  # metrics of one cell type
PER_CLASS = [*RUN[:-1], "split", "cell_type", "f1", "low", "high", "chance", "support"]
CHECKSUMS = "results.sha256"  # of the tables' files
PARAMETERS = "results.json"  # of the study that the tables are of
BASELINE = "baseline"  # the strategy of rows that no pretrained model made; their percentage is 0, their seed -1
CHECKPOINT = "checkpoint"  # the strategy of models from elsewhere, pretrained on other cells; the rest as above
REFERENCES = (BASELINE, CHECKPOINT)  # strategies of rows that are drawn beside the curves
ONE_SEED = "undecided (one seed)"  # the verdict of `against_baselines` where there is no win and no loss
CHANCE, ORACLE = "Chance", "Oracle"  # baselines that are no contenders: the floor and the ceiling
DONORS = "donors "  # how the names of splits by donor begin


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of `read_results` from rows with `ALL_COLUMNS`; levels of chance make a baseline `Chance` as well."""
    of_type, checked = rows["metric"].str.match(OF_A_TYPE), rows["budget"].fillna(1.0) != 1
    budgets = rows.loc[checked & ~of_type, [*RUN, "budget", "split", "value"]]
    rows, of_type = rows[~checked], of_type[~checked]
    scores = rows[~of_type]
    scores = pd.concat([scores, _chance_rows(scores)], ignore_index=True) if len(scores) else scores
    oracle = scores[scores["model"] == ORACLE].drop_duplicates(JUDGED).set_index(JUDGED)["value"]
    scores = scores.assign(ceiling=scores["ceiling"].fillna(scores.join(oracle.rename("oracle"), on=JUDGED)["oracle"]))
    return {
        "results": _sorted(scores[COLUMNS]),
        "intervals": _sorted(scores[[*RUN, "split", "value", *KNOWN]]),
        "per_class": _per_class(rows[of_type]),
        "budgets": _sorted(budgets),
    }


def _chance_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of the baseline `Chance`: one per task, data set, metric and split, the mean over baselines that know it."""
    known = scores[(scores["strategy"] == BASELINE) & scores["chance"].notna()]
    known = known[known["task"] != "perturbation_response"]  # whose level of chance is a baseline itself, NoChange
    level = known.groupby(JUDGED)["chance"].transform("mean")
    return known.assign(model=CHANCE, value=level, **dict.fromkeys(KNOWN, np.nan)).drop_duplicates(JUDGED)


def _per_class(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per run, split and cell type, from rows of the metrics `f1[type]` and `support[type]`."""
    parts = rows["metric"].str.extract(OF_A_TYPE)
    rows = rows.assign(metric=parts["metric"], cell_type=parts["cell_type"])
    keys = [*RUN[:-1], "split", "cell_type"]
    support = select(rows, metric="support").set_index(keys)["value"].rename("support")
    return _sorted(select(rows, metric="f1").rename(columns={"value": "f1"}).join(support, on=keys)[PER_CLASS])


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(list(table)[:-1], ignore_index=True)


def write_tables(tables: dict[str, pd.DataFrame], folder: Path, parameters: dict[str, Any]) -> None:
    """Write tables as `<name>.parquet` and `.csv`, and the parameters of their study: a later run may have others."""
    for name, table in tables.items():
        disk.write_atomically(folder / f"{name}.parquet", lambda path, table=table: table.to_parquet(path, index=False))
        disk.write_atomically(folder / f"{name}.csv", lambda path, table=table: table.to_csv(path, index=False))
    disk.write_json(folder / PARAMETERS, parameters)
    files = [f"{name}.{suffix}" for name in tables for suffix in ("parquet", "csv")]
    disk.write_checksums(folder / CHECKSUMS, [*files, PARAMETERS])


def parameters(folder: Path) -> dict[str, Any]:
    """Parameters of the study that the tables of a run folder are of; nothing if there are no tables."""
    path = folder / PARAMETERS
    if not path.is_file():
        return {}
    _refuse_damaged(path)
    return json.loads(path.read_text(encoding="utf-8"))


def damage(folder: Path) -> list[str]:
    """What is wrong with the tables of a run folder, a line each; nothing if there are none yet."""
    if not (folder / CHECKSUMS).is_file():
        return [f"{CHECKSUMS} is missing"] * (folder / "results.parquet").is_file()
    return [f"{name} is missing, or not as it was written" for name in disk.changed_files(folder / CHECKSUMS)]


def _refuse_damaged(path: Path) -> None:
    """Refuse a file of the tables that is not as it was written, or cannot be known to be."""
    if wrong := [line for line in damage(path.parent) if line.startswith((path.name, CHECKSUMS))]:
        raise ValueError(f"{path.parent}: {wrong[0]}; run the study again, which makes it from the store in no time.")


def read_results(run_dir: str | Path, table: str = "results") -> pd.DataFrame:
    """A table of a run, from its folder, such as `runs/quick`.

    All have the columns study, model, strategy, percentage (0 to 100), seed, n_cells (pretraining cells), task, dataset
    and split (how test cells were told from training cells). Beside them,

    - `results` has one number a row: metric, value, run_id (the artifact it is from);
    - `intervals` the same numbers: metric, value, low and high (95 %, over cells), chance and ceiling (NaN: unknown);
    - `per_class` cell_type, its f1 with low, high and chance, and support (test cells of that type), of classification;
    - `budgets` metric, value and budget (a share of the model's steps), of the runs of `budget_check` alone.

    Raises FileNotFoundError if the run has no such table, ValueError if it is not as it was written.
    """
    path = Path(run_dir) / f"{table}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the study first: python run_all.py params/<study>.yaml")
    _refuse_damaged(path)
    return pd.read_parquet(path)


def splits_by_cell(splits: Iterable[str]) -> list[str]:
    """Names of those splits that are not by donor; all if there are no others."""
    splits = list(splits)
    return [name for name in splits if not name.startswith(DONORS)] or splits


def _by_cell(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["split"].isin(splits_by_cell(table["split"].unique()))]


def mean_over_splits(table: pd.DataFrame) -> pd.DataFrame:
    """One value per run (and budget, of `budgets`) and metric: the mean over its splits, of low and high too if there.

    Splits by donor count only where there are no others. Means of intervals are as wide as each: splits share cells.
    """
    table = _by_cell(table)
    columns = [name for name in ("value", "low", "high") if name in table]
    keys = [*RUN, "budget"] if "budget" in table else RUN
    return table.groupby(keys, as_index=False, sort=True)[columns].mean()


def select(results: pd.DataFrame, **values: str | float) -> pd.DataFrame:
    """Rows whose columns have the values given, say `select(results, task="reconstruction", metric="mse")`."""
    for name, value in values.items():
        results = results[results[name] == value]
    return results


def contenders(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of the baselines that a model can be better than: all but `Chance` and `Oracle`, the floor and ceiling."""
    return results[(results["strategy"] == BASELINE) & ~results["model"].isin([CHANCE, ORACLE])]


def headline(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each model untrained and at every size of the random strategy, beside the baselines: means over splits and seeds.

    A row per data set and pretrained model, a column per size and per baseline. Empty where there are no such results.
    """
    means = _mean_over_seeds(results, metric)
    own = means[~means["strategy"].isin(REFERENCES)]
    sizes = own[own["strategy"].isin(["random", "untrained"])].pivot_table("value", ["dataset", "model"], "percentage")
    sizes = sizes[sorted(sizes, key=lambda size: (size == 0, size))]
    sizes = sizes.rename(columns=lambda size: f"{size:g} %" if size else "untrained").rename_axis(columns=None)
    baselines = select(means, strategy=BASELINE).pivot_table("value", "dataset", "model")
    models = own.set_index(["dataset", "model"]).index.unique()
    beside = baselines.reindex(models.get_level_values("dataset")).set_axis(models).rename_axis(columns=None)
    return pd.concat([sizes.reindex(models), beside], axis=1)


def _mean_over_seeds(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Value by data set, model, strategy and percentage: mean over splits, then over seeds."""
    runs = mean_over_splits(select(results, metric=metric))
    return runs.groupby(["dataset", "model", "strategy", "percentage"], as_index=False)["value"].mean()


def beside_controls(results: pd.DataFrame, metric: str, *, margin: float) -> pd.DataFrame:
    """In words, how each model at the best of its sizes compares with its untrained control and the baselines.

    `above` (better) or `below` by more than `margin`, else `within`; `unknown` without random subsets, or a control to
    compare.
    """
    table = sign_of(metric) * headline(results, metric)
    best = table.filter(like="%").max(axis=1)
    names = dict.fromkeys(["untrained", *(name for name in table if not name.endswith("%"))])
    gap = -table.reindex(columns=list(names)).sub(best, axis=0)
    words = gap.map(lambda value: "above" if value > margin else "below" if value < -margin else "within")
    return words.where(gap.notna(), "unknown")


def gains(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What more cells and what more diverse cells are worth, in the metric's units, means over splits and seeds.

    A row per data set and model. `more cells` is the largest size over the smallest, of random subsets; a strategy's
    column is its gain over random subsets of equal size, at the largest size that both have. NaN without such
    subsets, or with one size.
    """
    means = _mean_over_seeds(results, metric)
    means = means[~means["strategy"].isin(REFERENCES)]
    wide = means.pivot_table("value", ["dataset", "model", "percentage"], "strategy")
    wide = wide.reindex(columns=["random", *wide.columns.difference(["random", "untrained"])])
    # Of a group, the first and the last that is not NaN.
    table, random = (part.groupby(["dataset", "model"]) for part in (wide.sub(wide["random"], axis=0), wide["random"]))
    table = table.last().assign(random=(random.last() - random.first()).where(random.count() > 1))
    return table.rename(columns={"random": "more cells"}).rename_axis(columns=None)


def loss_and_score(results: pd.DataFrame, task: str, metric: str, dataset: str) -> pd.DataFrame:
    """How much of its loss is gone on held-out cells (explained), and a downstream score, by pretrained run."""
    keys = ["model", "strategy", "percentage", "seed"]
    runs = results[results["percentage"] > 0]
    losses = mean_over_splits(select(runs, task="reconstruction", metric="explained")).set_index(keys)["value"]
    scores = mean_over_splits(select(runs, task=task, metric=metric, dataset=dataset)).set_index(keys)["value"]
    return pd.concat({"explained": losses, "score": scores}, axis=1).dropna().reset_index()


def rank_correlations(both: pd.DataFrame) -> pd.Series:
    """Spearman's correlation over runs of the two columns of `loss_and_score`, by model."""
    rho = {model: runs["explained"].corr(runs["score"], method="spearman") for model, runs in both.groupby("model")}
    return pd.Series(rho, dtype=float)


def against_baselines(
    intervals: pd.DataFrame, metric: str, *, right: pd.Series | None = None, n_resamples: int = 2000
) -> pd.DataFrame:
    """Who wins against the best baseline: differences with 95 % intervals, paired over the same splits.

    From the table `intervals` of a study. The best baseline is that with the best mean over splits, `Chance` and
    `Oracle` left out. An interval is of a bootstrap over seeds and splits, with normal noise of the variance over cells
    (of model and baseline, from their own intervals) added to each draw: as if the two did not err on the same cells,
    so that it is too wide rather than too narrow, and a tie may be a small win. Micro-F1 of the tasks that `right` has
    (`questions.right_cells`) is paired by cell (`tasks.uncertainty.paired_interval`), as exactly as can be.

    A row per task, data set and pretrained model, strategy and percentage: value, baseline (its name), baseline_value,
    difference (value - baseline_value), low, high, verdict: `win` or `loss` if the interval excludes zero, else `tie`;
    `ONE_SEED` where a single seed cannot tell how much the next one would differ, `unknown` without any interval.
    """
    rows, sign = _by_cell(select(intervals, metric=metric)), sign_of(metric)
    table = []
    for (task, dataset), of_data in rows.groupby(["task", "dataset"]):
        baselines = contenders(of_data)
        if baselines.empty:
            continue
        best = (sign * baselines.groupby("model")["value"].mean()).idxmax()
        baseline = baselines[baselines["model"] == best].set_index("split")
        models = of_data[of_data["strategy"] != BASELINE].groupby(["model", "strategy", "percentage"], sort=True)
        for (model, strategy, percentage), runs in models:
            gap = runs.assign(value=runs["value"] - baseline["value"].reindex(runs["split"]).to_numpy())
            gap = gap.pivot_table(index="seed", columns="split", values="value").to_numpy()
            ours, theirs = (task, dataset, model, strategy, percentage), (task, dataset, best, BASELINE, 0.0, -1)
            if right is not None and metric == "micro_f1" and ours in right.index and theirs in right.index:
                _, low, high = uncertainty.paired_interval(np.stack(right[ours].to_list()), right[theirs])
            else:
                low, high = _interval(gap, np.hypot(_deviation(runs), _deviation(baseline)), n_resamples)
            means = runs["value"].mean(), best, baseline["value"].mean(), np.nanmean(gap)
            verdict = _verdict(sign * low, sign * high, one_seed=len(gap) == 1 and strategy != CHECKPOINT)
            table.append((task, dataset, model, strategy, percentage, *means, low, high, verdict))
    columns = ["task", "dataset", "model", "strategy", "percentage", "value", "baseline", "baseline_value"]
    return pd.DataFrame(table, columns=[*columns, "difference", "low", "high", "verdict"])


@cache
def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error, as `tasks.metrics_table` says; metrics that it does not have are scores."""
    known = tasks.metrics_table().set_index("metric")["direction"]
    return (known.get([tasks.registered(metric)], pd.Series(dtype=object)) == "lower").any()


def sign_of(metric: str) -> int:
    """1 of a score, -1 of an error."""
    return -1 if lower_is_better(metric) else 1


def _verdict(end: float, other_end: float, *, one_seed: bool) -> str:
    """In a word, what an interval of an advantage says."""
    if np.isnan(end):
        return "unknown"
    if one_seed:
        return ONE_SEED
    if min(end, other_end) > 0:
        return "win"
    return "loss" if max(end, other_end) < 0 else "tie"


def _deviation(rows: pd.DataFrame) -> float:
    """Standard deviation over cells, from 95 % intervals; 0 where there are none."""
    deviation = ((rows["high"] - rows["low"]) / (2 * uncertainty.Z)).mean()
    return 0.0 if np.isnan(deviation) else float(deviation)


def _interval(gap: np.ndarray, noise: float, n_resamples: int) -> tuple[float, float]:
    """Bootstrap interval of the mean of a table of differences, seeds by splits; NaN where nothing varies."""
    if gap.size == 1 and noise == 0:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    n_seeds, n_splits = gap.shape
    rows = rng.integers(n_seeds, size=(n_resamples, n_seeds, 1))
    columns = rng.integers(n_splits, size=(n_resamples, 1, n_splits))
    means = np.nanmean(gap[rows, columns], axis=(1, 2)) + noise * rng.standard_normal(n_resamples)
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())

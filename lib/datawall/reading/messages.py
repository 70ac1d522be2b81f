"""What figures say: a title for each, computed from the table that it is drawn from, so that it holds in any study."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from datawall.analysis.results import CHANCE, ORACLE, headline, lower_is_better, rank_correlations, select
from datawall.analysis.saturation import IMPROVING, LIMITED, PLATEAU, UNDECIDED
from datawall.reading.labels import label

MARGIN = 0.02  # points of score below which two scores are called level
LAST_STEPS = 50  # optimiser steps over which the loss at the end of training is the mean


def markers(table: pd.DataFrame) -> str:
    """How many cell types are highest in some marker gene."""
    highest = table.idxmax().value_counts()
    return f"{_of(len(highest), len(table))} cell types stand out, each highest in some of {table.shape[1]} markers"


def composition(share: pd.DataFrame) -> str:
    """What each strategy makes of the commonest type of the smallest subsets; types by strategy and percentage."""
    smallest = share.columns.get_level_values("percentage").min()
    common = share.index[0]
    shares = {group: f"{share.loc[common, (group, smallest)]:.0f} %" for group in share.columns.unique("strategy")}
    return f"Share of {common} in subsets of {smallest:g} % of the corpus: {_listed(shares)}"


def diversity(table: pd.DataFrame) -> str:
    """How many types the smallest subsets are worth, by strategy."""
    smallest = select(table, percentage=table["percentage"].min())
    types = smallest.groupby("strategy", sort=False)["inverse_simpson"].mean().dropna().map("{:.0f}".format)
    return f"Effective number of cell types at {table['percentage'].min():g} % of the corpus: {_listed(types)}"


def realism(genes: pd.DataFrame, cells: pd.DataFrame) -> str:
    """How many genes vary by more than chance, and how many genes a cell has, by data set."""
    noisy = (genes["variance"] > genes["mean"]).groupby(genes["dataset"], sort=False).mean()
    size = cells.groupby("dataset", sort=False)["n_genes"].median()
    return (
        f"Share of genes that vary more than Poisson: {_listed((100 * noisy).map('{:.0f} %'.format))};\n"
        f"median number of genes in a cell: {_listed(size.map('{:.0f}'.format))}"
    )


def loss_curves(histories: pd.DataFrame) -> str:
    """Which size ends training with the lowest loss on the cells that it was trained on."""
    ends = histories.sort_values("step").groupby(["model", "percentage"]).tail(LAST_STEPS)
    last = ends.pivot_table("loss", "model", "percentage")
    lowest = last.idxmin(axis=1).value_counts()
    if last.shape[1] == 1:
        return f"Loss on the cells that were trained on, {last.columns[0]:g} % of the corpus"
    return (
        f"On its own training cells, the subset of {lowest.index[0]:g} % of the corpus ends with the lowest loss "
        f"in {_of(lowest.iloc[0], len(last))} models"
    )


def learning_curves(results: pd.DataFrame, metric: str) -> str:
    """How many curves of random subsets rise with size (an error: fall), and how many reach the best baseline."""
    table, name = headline(results, metric), label(metric)
    sizes = table.filter(regex=r" %$").dropna(how="all")
    if sizes.empty:
        return f"The study has no random subsets, of which curves of {name} would be told"
    first, last = sizes.bfill(axis=1).iloc[:, 0], sizes.ffill(axis=1).iloc[:, -1]
    begin, end = sizes.columns[0].removesuffix(" %"), sizes.columns[-1]
    says = f"Models pretrained on {end} of the corpus: {name}"
    if begin != end.removesuffix(" %"):
        says = f"From {begin} to {end} of the corpus, drawn at random, {name} "
        if lower_is_better(metric):
            says += f"falls in {_of((last < first).sum(), len(sizes))} curves"
        else:
            up, down = ((sign * (last - first) > MARGIN).sum() for sign in (1, -1))
            says += f"rises by over {MARGIN:g} in {_of(up, len(sizes))} curves, falls in {down or 'none'}"
    baselines = table.loc[sizes.index].drop(columns=[*sizes, "untrained", CHANCE, ORACLE], errors="ignore")
    if baselines.empty or lower_is_better(metric):
        return says
    gap = (sizes.max(axis=1) - baselines.max(axis=1)).dropna()
    groups = {"above": gap > MARGIN, "level": gap.abs() <= MARGIN, "below": gap < -MARGIN}
    places = ", ".join(_counted(gap[rows], place) for place, rows in groups.items())
    return f"{says};\nbeside the best baseline, at the best of their sizes: {places}"


def budgets(table: pd.DataFrame) -> str:
    """How far twice the steps move the scores, by model."""
    change = table.groupby("model", sort=False)["change"].max()
    return f"What twice the steps gain at most, over tasks and sizes: {_listed(change.map('{:+.3f}'.format))}"


def loss_and_score(table: pd.DataFrame, metric: str) -> str:
    """The rank correlation of both, by model."""
    rho = rank_correlations(table).map("{:+.2f}".format)
    return f"Rank correlation over runs of {label('explained')} and {label(metric)}: {_listed(rho)}"


def beside_published(table: pd.DataFrame) -> str:
    """How many cells this study and the published one see."""
    cells = table.groupby("study", sort=False)["n_cells"].agg(["min", "max"])
    spans = cells.apply(lambda of: f"{of['min']:,.0f} to {of['max']:,.0f} cells", axis=1)
    return f"Errors against cells, log axes: {_listed(spans)}"


def per_class_curves(means: pd.DataFrame, ends: dict[str, dict[str, list[str]]]) -> str:
    """What cell types gain from the smallest to the largest size, mean over models.

    Parameters
    ----------
    means
        F1 by dataset, metric (the type), model, seed and percentage, in the column value.
    ends
        By data set, and by the word for them, some types.
    """
    table = means[means["percentage"] > 0].pivot_table("value", ["dataset", "metric"], "percentage")
    grown, end = table.shape[1] > 1, f"{table.columns[-1]:g} % of the corpus"
    value = table.iloc[:, -1] - table.iloc[:, 0] if grown else table.iloc[:, -1]
    parts = [
        f"{label(dataset)}, {word}: {format(value.loc[dataset].reindex(names).mean(), '+.2f' if grown else '.2f')}"
        for dataset, types in ends.items()
        for word, names in types.items()
        if len(names)
    ]
    what = f"Mean change of F1 from {table.columns[0]:g} to {end}" if grown else f"Mean F1 at {end}"
    return f"{what}\n{'; '.join(parts)}"


def variants(runs: pd.DataFrame, metric: str) -> str:
    """Which model is best at the largest size, by data set."""
    end, sign = runs["percentage"].max(), -1 if lower_is_better(metric) else 1
    means = sign * select(runs, percentage=end).groupby(["dataset", "model"])["value"].mean()
    best = (f"{label(of_data.idxmax()[1])} ({label(dataset)})" for dataset, of_data in means.groupby("dataset"))
    return f"Best {label(metric)} at {end:g} % of the corpus: {', '.join(best)}"


def embeddings(scores: pd.Series, metric: str) -> str:
    """Which embedding has the highest score and which the lowest; scores by model."""
    if scores.empty:
        return f"no {label(metric)}"
    high, low = label(scores.idxmax()), label(scores.idxmin())
    return f"{label(metric)} is highest in {high} ({scores.max():.2f}) and lowest in {low} ({scores.min():.2f})"


def saturation(points: pd.DataFrame, rule: str) -> str:
    """How many curves are saturated at the smallest size."""
    sizes, smallest = points["percentage"], points["percentage"].min()
    never = f", {sizes.isna().sum()} at none that is shown" if sizes.isna().any() else ""
    return (
        f"By {rule}, {_of((sizes == smallest).sum(), len(sizes))} curves are saturated at {smallest:g} % of the corpus"
        f"{never}"
    )


def verdict_map(verdicts: pd.DataFrame, question: str) -> str:
    """How many curves have which verdict, after the question."""
    counts = verdicts["verdict"].value_counts()
    found = [f"{counts.get(name, 0)} {name}" for name in (PLATEAU, UNDECIDED, IMPROVING)]
    if LIMITED in counts:
        found.insert(2, f"{counts[LIMITED]} {LIMITED}")
    return f"{question}\nOf {len(verdicts)} curves, {_and(found)}"


def rules(points: pd.DataFrame, what: str) -> str:
    """How many curves are saturated at the smallest size, by rule."""
    smallest = points["percentage"].min()
    early = points["percentage"].eq(smallest).groupby(points["rule"], sort=False).agg(["sum", "size"])
    found = early.apply(lambda of: _of(of["sum"], of["size"]), axis=1)
    return f"{what}: curves saturated at {smallest:g} % of the corpus, by rule\n{_listed(found)}"


def spike_ins(runs: pd.DataFrame, metric: str) -> str:
    """By how much subsets with perturbed cells differ from random ones of the same size, on average."""
    means = runs.pivot_table("value", ["dataset", "model", "percentage"], "strategy")
    changes = means.drop(columns="random").sub(means["random"], axis=0).mean().map("{:+.3f}".format)
    return f"Mean change of {label(metric)} where other cells give way: {_listed(changes)}"


def untrained(results: pd.DataFrame, metrics: dict[str, str]) -> str:
    """The median gain of the full corpus over random weights, by task."""
    gains = {}
    for task, metric in metrics.items():
        table = headline(select(results, task=task), metric)
        gain = table.filter(regex=r" %$").ffill(axis=1).iloc[:, -1] - table["untrained"]
        gains[task] = f"{gain.median():.2f}"
    return f"Median gain of the full corpus over random weights:\n{_listed(gains)}"


def embedding_seconds(table: pd.DataFrame) -> str:
    """How many times as long the slowest takes as the fastest."""
    by_model = table.set_index("model")["seconds"]
    slow, fast = by_model.idxmax(), by_model.idxmin()
    return f"{by_model[slow] / by_model[fast]:.0f} times as long as {fast}: {slow}"


def scaling(predictions: pd.DataFrame) -> str:
    """Which curve describes how many."""
    chosen = predictions.groupby(["dataset", "model"])["curve"].first().value_counts()
    return f"The best curve of the error, of {chosen.sum()}: {_listed(chosen)}"


def cells_saved(points: pd.DataFrame) -> str:
    """The mean share of the cells that is saved, by rule; `points` have the column saved, per cent."""
    saved = points.groupby("rule", sort=False)["saved"].mean().map("{:.0f} %".format)
    return f"Cells saved by stopping at the saturation point, mean: {_listed(saved)}"


def effects(table: pd.DataFrame, what: str) -> str:
    """How many effects are certain, in either direction."""
    certain = table[table["p_adjusted"] < 0.05]
    up, down = (certain["difference"] > 0).sum(), (certain["difference"] < 0).sum()
    return f"{what}\nCertain (adjusted p < 0.05) in {_of(up + down, len(table))} comparisons: {up} better, {down} worse"


def _of(count: int, total: int) -> str:
    """A share in words."""
    return f"{count or 'none'} of {total}"


def _listed(values: pd.Series | dict[str, object]) -> str:
    """Names and what belongs to them."""
    return ", ".join(f"{label(name)} {value}" for name, value in values.items())


def _counted(rows: pd.Series, place: str) -> str:
    """How many curves are in a place, and of which models if they are at most two."""
    models = [label(name) for name in rows.index.unique("model")]
    return f"{len(rows) or 'none'} {place}" + (f" ({_and(models)})" if 0 < len(models) <= 2 else "")


def _and(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last

"""Dots beside the names of models: one number each, by rule, strategy or size."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datawall.analysis.results import BASELINE, headline, mean_over_splits, select
from datawall.models.hyperparameters import FAMILIES
from datawall.reading import titles
from datawall.reading.plots import style
from datawall.reading.plots.style import PALETTE, SPIKED, STRATEGIES, WIDTH, finish, panels
from datawall.reading.titles import drawn

# Colour and mark of each rule by which a curve is saturated.
RULES = {
    "published": ("black", "o"),
    "mean": (PALETTE[0], "s"),
    "error": (PALETTE[1], "D"),
    "equivalence": (PALETTE[2], "^"),
}
NEVER = 300.0  # where on an axis of percentages that stands which is not established


def rules(points: pd.DataFrame, title: str) -> Figure:
    """Saturation point by rule: a dot for each rule (column `rule`), a row for each model, a panel for each data set.

    Lines are the intervals. What is not established stands at the right.
    """
    if points.empty:
        return style.nothing("the study has no such runs")
    shown = points.fillna({"low": NEVER, "high": NEVER, "percentage": NEVER})
    figure, axes = _panels_of_dots(shown, "dataset", "rule", "percentage", RULES, 0.62)
    sizes = pd.DataFrame({"percentage": points[["percentage", "high"]].to_numpy().ravel()}).dropna()
    for axis in axes:
        axis.axvspan(170, 530, color="0.93", linewidth=0)
        style.size_axis(axis, sizes)
        ticks = [tick.get_text() for tick in axis.get_xticklabels()]
        axis.set_xticks([*axis.get_xticks(), NEVER], [*ticks, "none"])
        axis.set(xlim=(0.6, 530), xlabel="% of the corpus")
    smallest = points["percentage"].min()
    early = points["percentage"].eq(smallest).groupby(points["rule"], sort=False).agg(["sum", "size"])
    shares = titles.listed(early.apply(lambda counts: titles.share(counts["sum"], counts["size"]), axis=1))
    says = f"{title}: curves saturated at {smallest:g} % of the corpus, by rule\n{shares}"
    return finish(figure, says, axes[0], left=False)


def cells_saved(points: pd.DataFrame) -> Figure:
    """Share of the cells saved by stopping at the saturation point, by rule, model and task.

    Means over strategies and data sets; where no point is established nothing is saved.
    """
    points = points.assign(saved=100 - points["percentage"].fillna(100))
    means = points.groupby(["task", "rule", "model"], sort=False, as_index=False)["saved"].mean()
    figure, axes = _panels_of_dots(means.assign(low=0, high=means["saved"]), "task", "rule", "saved", RULES, 0.5)
    for axis in axes:
        axis.set(xlim=(-3, 103), xlabel="cells saved (%)")
    saved = titles.listed(points.groupby("rule", sort=False)["saved"].mean(), "{:.0f} %")
    return finish(figure, f"Cells saved by stopping at the saturation point, mean: {saved}", axes[0], left=False)


def effects(table: pd.DataFrame, title: str) -> Figure:
    """Effects of strategies over random subsets (`effects.strategy_effects`): a panel per task, a row per model.

    Lines are the intervals.
    """
    columns = ["difference", "low", "high"]
    marks = {name: mark for name, mark in (STRATEGIES | SPIKED).items() if name in set(table["strategy"])}
    points = table.assign(**100 * table[columns])
    figure, axes = _panels_of_dots(points, "task", "strategy", "difference", marks, 0.5)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1, zorder=1)
        axis.set_xlabel("points of score")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    certain = table.loc[table["p_adjusted"] < 0.05, "difference"]
    share = titles.share(len(certain), len(table))
    says = f"{(certain > 0).sum()} better, {(certain < 0).sum()} worse"
    return finish(figure, f"{title}\nCertain (adjusted p < 0.05) in {share} comparisons: {says}", axes[0])


def untrained(results: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """What pretraining changes: each model untrained, at the smallest and at the largest size, beside the baselines.

    Random subsets, means over seeds; rows are tasks (with the metric of each), columns their data sets.
    """
    figure, axes = panels(len(metrics), 4, 1.75 * len(metrics) + 0.9, sharey=True)
    gains = {}
    for row, (task, metric) in zip(axes, metrics.items(), strict=True):
        runs = mean_over_splits(select(results, task=task, metric=metric))
        for axis, dataset in zip(row, sorted(runs["dataset"].unique())[:4], strict=True):
            shown = select(runs, dataset=dataset)
            means = shown.groupby(["strategy", "model", "percentage"])["value"].mean()
            sizes = sorted(select(shown, strategy="random")["percentage"].unique())
            series = (
                ("untrained", 0.0, "x", "0.35", "untrained"),
                ("random", sizes[0], "o", "#e69f00", f"{sizes[0]:g} % of the corpus"),
                ("random", sizes[-1], "o", "#0072b2", "the full corpus"),
            )
            for strategy, size, marker, colour, name in series:
                values = means.get(strategy, means.iloc[:0]).xs(size, level="percentage").reindex(list(FAMILIES))
                axis.plot(values, range(len(values)), marker, color=colour, label=name, markersize=6, alpha=0.85)
            for (baseline, _), value in means.loc[BASELINE].items():
                line = {"HVG": "--"}.get(baseline, ":")
                name = "baseline: HVG" if baseline == "HVG" else "baseline: PCA, logistic regression, no change"
                axis.axvline(value, color="black", linestyle=line, linewidth=1, label=name)
            _model_axis(axis, list(FAMILIES), first=axis is row[0])
            axis.set_title(drawn(dataset).replace("-\n", ""))
            axis.set_xlabel(drawn(metric) if len(drawn(metric)) < 12 else drawn(metric).replace(" of", "\nof"))
        row[0].set_ylabel(drawn(task).replace(" ", "\n"))
        table = headline(select(results, task=task), metric)
        gains[task] = (table.filter(regex=r" %$").ffill(axis=1).iloc[:, -1] - table["untrained"]).median()
    says = f"Median gain of the full corpus over random weights:\n{titles.listed(gains, '{:.2f}')}"
    return finish(figure, says, axes[0, 0])


def embedding_seconds(table: pd.DataFrame) -> Figure:
    """Seconds to embed 10,000 cells (`published.embedding_seconds`)."""
    shown = table.sort_values("seconds")
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.9), layout="constrained")
    axis.plot(shown["seconds"], shown["model"], "o", color="#0072b2", markersize=7)
    for seconds, model in zip(shown["seconds"], shown["model"], strict=True):
        axis.annotate(f"{seconds:.3g}", (seconds, model), xytext=(8, 0), textcoords="offset points", va="center")
    axis.set(xscale="log", xlim=(0.3, 400), ylim=(-0.5, len(shown) - 0.5))
    axis.set(xlabel="seconds for 10,000 cells, one measurement")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="y", color="0.9")
    fast, slow = shown.iloc[0], shown.iloc[-1]
    says = f"{slow['seconds'] / fast['seconds']:.0f} times as long as {fast['model']}: {slow['model']}"
    return finish(figure, says, left=False)


def _panels_of_dots(
    table: pd.DataFrame, panel: str, by: str, value: str, marks: dict[str, Any], row_height: float
) -> tuple[Figure, np.ndarray]:
    """A panel for each task or data set, with a row per model: dots by a column, and lines from `low` to `high`.

    `marks` has colour and mark of each value of the column; the height of a row is in inches.
    """
    table = style.in_order(table)
    models, names = list(table["model"].unique()), table[panel].unique()
    figure, axes = panels(1, len(names), row_height * len(models) + 1.8, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        _model_axis(axis, models, first=axis is axes[0, 0])
        axis.set_title(drawn(name).replace(" ", "\n") if panel == "task" else drawn(name).replace("-\n", ""))
        for offset, (kind, (colour, marker)) in zip(np.linspace(-0.25, 0.25, len(marks)), marks.items(), strict=True):
            shown = select(table, **{panel: name, by: kind}).set_index("model").reindex(models)
            places = np.arange(len(models)) + offset
            axis.hlines(places, shown["low"], shown["high"], color=colour, linewidth=1.5, alpha=0.6)
            axis.plot(shown[value], places, marker, color=colour, markersize=5, label=drawn(kind))
    return figure, axes[0]


def _model_axis(axis: plt.Axes, models: list[str], *, first: bool) -> None:
    """Models from top to bottom, with a line between them."""
    axis.set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
    axis.tick_params(axis="y", length=0, labelleft=first)
    for edge in np.arange(len(models) - 1) + 0.5:
        axis.axhline(edge, color="0.9", linewidth=1, zorder=0)

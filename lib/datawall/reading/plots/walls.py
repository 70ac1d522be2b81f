"""Figures of `analysis.walls`: errors over one lever at a time, and what a doubling or a swap of each is worth."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datawall.analysis.results import select
from datawall.analysis.walls import SUSPECTS
from datawall.reading import titles
from datawall.reading.plots import maps, style
from datawall.reading.plots.style import PALETTE, finish, panels
from datawall.reading.titles import drawn

AXES = {"cells": "cells (% of the corpus)", "depth": "counts kept of a cell", "steps": "steps", "width": "width"}
OF = {"cells": "of the cells", "depth": "of the counts", "steps": "the steps", "width": "the width"}


def over_lever(means: pd.DataFrame, lever: str, by: str) -> Figure:
    """Errors in 1,000 cells (`walls.means`) over a lever, a line for each value of `by`, both axes logarithmic.

    A panel per model or, where lines are models, per data set. Bars are 95 % intervals over seeds.
    """
    panel, values = "dataset" if by == "model" else "model", sorted(means[by].unique())
    names, ticks, ends = list(means[panel].unique()), sorted(means[lever].unique()), {}
    figure, axes = panels(1, len(names), 3.0, sharey=True)
    colours = dict(zip(values, PALETTE, strict=False)) if by == "model" else style.by_size(values)
    for axis, name in zip(axes[0], names, strict=True):
        for value in values:
            rows = select(means, **{panel: name, by: value}).sort_values(lever)
            errors = 1000 * rows["error"]
            line = {"color": colours[value], "marker": "o", "markersize": 4, "capsize": 2}
            line["label"] = drawn(value) if by == "model" else f"{_multiple(by, value)} {OF[by]}"
            axis.errorbar(rows[lever], errors, 1.96 * rows["se"] * errors, **line)
            if len(rows):
                ends[value if by == "model" else name] = f"{errors.iloc[0]:.0f} to {errors.iloc[-1]:.0f}"
        axis.set(title=drawn(name), xscale="log", yscale="log", xlabel=AXES[lever])
        axis.set_xticks(ticks, [_multiple(lever, tick) for tick in ticks], fontsize=7)
        axis.minorticks_off()
    shown = np.unique(np.geomspace(*(1000 * means["error"].agg(["min", "max"])), 5).round())
    axes[0, 0].set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes[0, 0].set_ylabel("errors in 1,000 cells")
    says = f"Errors in 1,000 cells from {_multiple(lever, ticks[0])} to {_multiple(lever, ticks[-1])} {OF[lever]}"
    return finish(figure, f"{says}: {titles.listed(ends)}", axes[0, 0])


def _multiple(lever: str, value: float) -> str:
    """A multiple as it is read: of cells and depth as a share, else as a factor."""
    return f"{100 * value:g} %" if lever in ("cells", "depth") else f"{value:g}x"


def suspects(worth: pd.DataFrame, margin: float) -> Figure:
    """What a doubling or a swap of each suspect gains (`walls.worth`), with 95 % intervals; a panel per data set."""
    if worth.empty:
        return style.nothing("the study varies too little to tell one wall from another")
    order = [name for name in SUSPECTS if name in set(worth["suspect"])]
    table = worth.rename(columns={"model": "kind", "suspect": "model"})  # whose rows the panels have
    table = table.sort_values("model", key=lambda names: names.map(order.index), kind="stable")
    marks = dict(zip(table["kind"].unique(), zip(PALETTE, "os^D", strict=False), strict=False))
    figure, axes = maps.panels_of_dots(table, "dataset", "kind", "gain", marks, 0.5)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1, zorder=1)
        axis.axvline(1000 * margin, color="0.6", linestyle="--", linewidth=1, zorder=1)
        axis.set_xlabel("errors fewer in 1,000 cells")
    largest = worth.loc[worth.groupby("model", sort=False)["gain"].idxmax()].set_index("model")["suspect"]
    return finish(figure, f"Gains most, if one thing is doubled or swapped: {titles.listed(largest)}", axes[0])

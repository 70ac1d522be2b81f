"""Figures of `analysis.walls`: errors over one lever at a time, and what a doubling or a swap of each is worth."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datawall.analysis.results import select
from datawall.analysis.walls import SUSPECTS
from datawall.reading import titles
from datawall.reading.plots import style
from datawall.reading.plots.style import PALETTE, finish, panels
from datawall.reading.titles import drawn

AXES = {"cells": "cells (% of the corpus)", "depth": "counts kept of a cell", "steps": "steps", "width": "width"}
OF = {"cells": "of the cells", "depth": "of the counts", "steps": "the steps", "width": "the width"}


def over_lever(means: pd.DataFrame, lever: str, by: str, *, per: float = 1000) -> Figure:
    """Errors (`walls.means`) over multiples of a lever, a line for each value of another column, a panel per model.

    Both axes are logarithmic; bars are 95 % intervals over seeds. `per` is what errors are counted in: 1,000 cells.
    """
    models, values = list(means["model"].unique()), sorted(means[by].unique())
    figure, axes = panels(1, len(models), 3.0, sharey=True)
    colours = style.by_size(values) if by != "model" else dict(zip(values, PALETTE, strict=False))
    first, last = {}, {}
    for axis, model in zip(axes[0], models, strict=True):
        for value in values:
            rows = select(means, model=model, **{by: value}).sort_values(lever)
            if len(rows) < 2:
                continue
            error = per * rows["error"]
            name = drawn(value) if by == "model" else f"{_multiple(by, value)} {OF[by]}"
            line = {"color": colours[value], "marker": "o", "markersize": 4, "capsize": 2, "label": name}
            axis.errorbar(rows[lever], error, 1.96 * rows["se"] * error, **line)
            first[model], last[model] = error.iloc[0], error.iloc[-1]
        ticks = sorted(means[lever].unique())
        axis.set(title=drawn(model), xscale="log", yscale="log", xlabel=AXES[lever])
        axis.set_xticks(ticks, [_multiple(lever, tick) for tick in ticks], fontsize=7)
        axis.minorticks_off()
    shown = np.unique(np.round(np.geomspace(*(per * means["error"].agg(["min", "max"])), 5), -int(per > 10)))
    axes[0, 0].set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes[0, 0].set_ylabel(f"errors in {per:,g} cells" if per > 1 else "share of the chance loss left")
    says = ", ".join(f"{titles.label(model)} {first[model]:.3g} to {last[model]:.3g}" for model in first)
    ends = [_multiple(lever, means[lever].agg(end)) for end in ("min", "max")]
    return finish(figure, f"From {ends[0]} to {ends[1]} {OF[lever]}: {says}", axes[0, 0])


def _multiple(lever: str, value: float) -> str:
    """A multiple as it is read: of cells and depth as a share, else as a factor."""
    return f"{100 * value:g} %" if lever in ("cells", "depth") else f"{value:g}x"


def suspects(worth: pd.DataFrame, margin: float) -> Figure:
    """What a doubling or a swap of each suspect gains (`walls.worth`), errors in 1,000 cells with 95 % intervals."""
    from datawall.reading.plots.maps import _panels_of_dots

    order = [name for name in SUSPECTS if name in set(worth["suspect"])]
    table = worth.rename(columns={"model": "kind", "suspect": "model"})
    table = table.sort_values("model", key=lambda names: names.map(order.index), kind="stable")
    marks = dict(zip(table["kind"].unique(), zip(PALETTE, "os^D", strict=False), strict=False))
    figure, axes = _panels_of_dots(table, "dataset", "kind", "gain", marks, 0.5)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1, zorder=1)
        axis.axvline(1000 * margin, color="0.6", linestyle="--", linewidth=1, zorder=1)
        axis.set_xlabel("errors fewer in 1,000 cells")
    largest = worth.loc[worth.groupby("model", sort=False)["gain"].idxmax()].set_index("model")["suspect"]
    return finish(figure, f"Gains most, if one thing is doubled or swapped: {titles.listed(largest)}", axes[0])

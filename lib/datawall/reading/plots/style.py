"""What all figures share: colours and marks, panels, axes, titles and legends, and how they are saved."""

import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure, SubFigure

from datawall.analysis.results import select
from datawall.engine import disk
from datawall.models.hyperparameters import FAMILIES
from datawall.reading.titles import drawn, plain

WIDTH = 9.0  # inches: a page of text
TITLE = 120  # letters in a line of it
ROOM = 5  # sizes of which an axis has room for all labels; of more, only powers of ten have one
PALETTE = sns.color_palette("colorblind")
# Colour and mark of each strategy; the others are drawn beside random subsets alone.
STRATEGIES = {
    "random": (PALETTE[0], "o"),
    "celltype_reweighted": (PALETTE[1], "s"),
    "geometric_sketching": (PALETTE[2], "^"),
}
SPIKED = {"spikein_10": (PALETTE[3], "v"), "spikein_50": (PALETTE[4], "D")}

mpl.rcParams.update({"svg.hashsalt": "datawall", "svg.fonttype": "none", "figure.dpi": 100, "savefig.dpi": 150})
sns.set_theme(context="notebook", style="ticks", font_scale=0.8)


def save(figure: Figure, name: str, table: pd.DataFrame, folder: Path) -> None:
    """Write a figure as svg and png, and the table that it was drawn from as csv; byte for byte the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out, and would be again for each file
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        disk.write_atomically(folder / f"{name}.{suffix}", partial(figure.savefig, format=suffix, metadata=metadata))
    disk.write_atomically(folder / f"{name}.csv", lambda path: table.to_csv(path, index=False))


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with the original's families first, in their order; else as they were."""
    order = {name: place for place, name in enumerate(FAMILIES)}
    return table.sort_values("model", key=lambda names: names.map(order).fillna(len(order)), kind="stable")


def by_size(sizes: Iterable[float]) -> dict[float, Any]:
    """A colour for each size, darker for smaller ones; none so light that a line of it is lost."""
    sizes = sorted(set(sizes))
    return dict(zip(sizes, sns.color_palette("viridis", len(sizes) + 1), strict=False))


def panels(n_rows: int, n_columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure as wide as the page, and its axes (n_rows, n_columns); height in inches."""
    return plt.subplots(n_rows, n_columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options)


def name_panels(axes: np.ndarray, columns: Iterable[str], rows: Iterable[str] = ()) -> None:
    """Titles above the columns of panels, labels beside the rows, and labels of the x-axes below the last row alone."""
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name)
    for axis, name in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(name)
    for axis in axes[:-1].flat:
        axis.set_xlabel("")


def finish(figure: Figure, title: str, *legend_of: plt.Axes, left: bool = True) -> Figure:
    """Give a figure its title, a legend of some panels below them, and no frames; a line at the left if `left`."""
    sns.despine(figure, left=not left)
    write_title(figure, title)
    if legend_of:
        legend(figure, *legend_of)
    return figure


def nothing(why: str) -> Figure:
    """A figure that says why there is nothing to see."""
    return write_title(plt.figure(figsize=(WIDTH, 0.6)), f"Nothing to show: {why}")


def write_title(figure: Figure, title: str) -> Figure:
    """The title of a figure, in lines that fit the page and are of about equal length."""
    lines = []
    for line in plain(title).split("\n"):
        n_lines = max(1, -(-len(line) // TITLE))
        lines += textwrap.wrap(line, min(TITLE, len(line) // n_lines + 15), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), fontsize="medium")
    return figure


def legend(figure: Figure | SubFigure, *axes: plt.Axes) -> None:
    """One legend for the figure, below it."""
    unique = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        unique |= dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False)


def curves(axis: plt.Axes, rows: pd.DataFrame, value: str = "value", strategies: dict = STRATEGIES | SPIKED) -> None:
    """The curve of each strategy that there are rows of."""
    for strategy, (colour, marker) in strategies.items():
        shown = select(rows, strategy=strategy)
        if len(shown):
            curve(axis, shown, value, strategy, colour, marker)


def curve(axis: plt.Axes, rows: pd.DataFrame, value: str, name: str, colour: Any, marker: str = "o") -> None:
    """Seeds as marks and their mean as a line."""
    mean = rows.groupby("percentage")[value].mean()
    axis.plot(rows["percentage"], rows[value], marker, color=colour, markersize=3.5, alpha=0.6)
    axis.plot(mean.index, mean, "-", marker=marker, color=colour, markersize=5, label=drawn(name))


def untrained_place(percentages: pd.Series) -> float:
    """Where 0 % stands on the logarithmic axis: well left of the smallest subset."""
    return percentages[percentages > 0].min() / 4


def size_axis(axis: plt.Axes, rows: pd.DataFrame, *, untrained: bool = False) -> None:
    """Logarithmic axis with a tick for each percentage of `rows` and, where they have `n_cells`, the cells below it."""
    percentages = rows["percentage"]
    names = {size: f"{size:g}" for size in sorted(percentages[percentages > 0].unique())}
    if "n_cells" in rows:
        cells = rows.groupby("percentage")["n_cells"].max()
        names = {size: f"{name}\n{cells_in_short(cells[size])}" for size, name in names.items()}
    if len(names) > ROOM:
        names = {size: name if np.log10(size).is_integer() else "" for size, name in names.items()}
    if untrained:
        names = {untrained_place(percentages): "0"} | names
    axis.set_xscale("log")
    axis.set_xticks(list(names), names.values())
    axis.tick_params(axis="x", labelsize=7)
    axis.minorticks_off()
    axis.set(xlabel="% of corpus, cells" if "n_cells" in rows else "subset (% of corpus)")


def cells_in_short(n_cells: float) -> str:
    """A number of cells in at most four letters: 980, 2.9k, 17.8M."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if n_cells >= factor:
            return f"{n_cells / factor:.{1 if n_cells < 100 * factor else 0}f}{letter}".replace(".0", "")
    return f"{n_cells:.0f}"

"""Tables as coloured cells, cells as points of a plane, and simulated cells over real ones."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from datawall.analysis.results import select
from datawall.analysis.saturation import IMPROVING, LIMITED, PLATEAU, UNDECIDED
from datawall.reading import titles
from datawall.reading.plots import style
from datawall.reading.plots.style import WIDTH, finish, panels, write_title
from datawall.reading.titles import drawn, plain

# Colour and sign of each verdict.
VERDICTS = {
    PLATEAU: ("#fde9a9", "="),
    UNDECIDED: ("#d9d9d9", "?"),
    LIMITED: ("#e8a46b", "b"),
    IMPROVING: ("#3b5b92", "↑"),
}


def composition(table: pd.DataFrame) -> Figure:
    """Share of each cell type in subsets (`curation.composition`), first seed: types by subsets, per cent."""
    first = select(table, seed=table["seed"].min())
    share = first.pivot_table(index="cell_type", columns=["strategy", "percentage"], values="share", sort=False) * 100
    share = share.fillna(0).sort_values(share.columns[0], ascending=False)
    groups = share.columns.unique("strategy")
    widths = [share[group].shape[1] for group in groups]
    figure, axes = panels(1, len(groups), 0.35 * len(share) + 1.5, sharey=True, width_ratios=widths)
    for axis, group in zip(axes[0], groups, strict=True):
        block = share[group].rename(columns=lambda percentage: f"{percentage:g}", index=plain)
        sns.heatmap(block, ax=axis, cmap="cividis", vmin=0, vmax=share.max().max(), annot=True, fmt=".0f", cbar=False)
        axis.set(title=drawn(group), xlabel="subset (% of corpus)", ylabel="")
        axis.tick_params(axis="y", rotation=0)
    smallest, common = share.columns.get_level_values("percentage").min(), share.index[0]
    shares = titles.listed({group: share.loc[common, (group, smallest)] for group in groups}, "{:.0f} %")
    says = f"Share of {common} in subsets of {smallest:g} % of the corpus: {shares}"
    return write_title(figure, f"Cells of each type, per cent of a subset\n{says}")


def markers(table: pd.DataFrame) -> Figure:
    """Mean marker expression of each cell type: rows are types, columns genes, values z-scores over types."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.32 * len(table) + 1.6), layout="constrained")
    bar = {"label": "mean expression (z-score over types)"}
    sns.heatmap(table.rename(index=plain), ax=axis, cmap="cividis", xticklabels=True, cbar_kws=bar)
    axis.set(xlabel="", ylabel="")
    highest = titles.share(table.idxmax().nunique(), len(table))
    return write_title(figure, f"{highest} cell types stand out, each highest in some of {table.shape[1]} markers")


def realism(genes: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Simulated cells over real ones (`curation.realism`): variance and zeros against the mean, and two histograms."""
    figure, axes = panels(2, 2, 6.5)
    names = genes["dataset"].unique()
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    means = np.geomspace(genes["mean"].min(), genes["mean"].max(), 200)
    shuffled = genes.sample(frac=1, random_state=0)  # so that neither hides the other
    gene_colours = shuffled["dataset"].map(colours).tolist()
    for axis, value, poisson in ((axes[0, 0], "variance", means), (axes[0, 1], "zeros", np.exp(-means))):
        axis.scatter(shuffled["mean"], shuffled[value], s=3, alpha=0.5, c=gene_colours, rasterized=True)
        axis.plot(means, poisson, color="black", linewidth=1, label="Poisson")
        axis.set(xscale="log", xlabel="mean count of a gene")
    axes[0, 0].set(yscale="log", ylabel="variance")
    axes[0, 1].set(ylabel="share of cells without the gene")
    histograms = {"n_genes": "genes per cell", "library_size": "library size (molecules)"}
    for axis, (value, text) in zip(axes[1], histograms.items(), strict=True):
        edges = np.geomspace(cells[value].min(), cells[value].max() + 1, 60)
        for name, rows in cells.groupby("dataset", sort=False):
            weights = np.full(len(rows), 100 / len(rows))
            axis.hist(rows[value], bins=edges, weights=weights, histtype="step", color=colours[name], label=plain(name))
        axis.set(xscale="log", xlabel=text, ylabel="share of cells (%)")
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    noisy = 100 * (genes["variance"] > genes["mean"]).groupby(genes["dataset"], sort=False).mean()
    size = cells.groupby("dataset", sort=False)["n_genes"].median()
    says = f"Share of genes that vary more than Poisson: {titles.listed(noisy, '{:.0f} %')};\n"
    says += f"median number of genes in a cell: {titles.listed(size, '{:.0f}')}"
    return finish(figure, says, axes[0, 0], axes[1, 0])


def embeddings(layouts: dict[str, pd.DataFrame], colour_by: list[str], title: str) -> Figure:
    """UMAPs (`Study.layouts`), a panel per embedding, three in a row; the whole once for each label to colour by.

    Nothing is measured on them, so the title is given.
    """
    if not layouts:
        return style.nothing("the study pretrains no model")
    n_columns = min(3, len(layouts))
    n_rows = -(-len(layouts) // n_columns)
    figure = plt.figure(figsize=(WIDTH, 2.3 * n_rows * len(colour_by) + 0.3), layout="constrained")
    for part, key in zip(figure.subfigures(len(colour_by), 1, squeeze=False)[:, 0], colour_by, strict=True):
        axes = part.subplots(n_rows, n_columns, squeeze=False)
        categories = sorted(next(iter(layouts.values()))[key].astype(str).unique())
        colours = dict(zip(categories, sns.color_palette("colorblind", len(categories)), strict=True))
        for axis, (name, layout) in zip(axes.flat, layouts.items(), strict=False):
            for category, cells in layout.groupby(layout[key].astype(str)):
                dots = {"s": 3, "color": colours[category], "rasterized": True}
                axis.scatter(cells["x"], cells["y"], label=plain(category), **dots)
            axis.set(title=plain(name), xticks=[], yticks=[])
        for axis in axes.flat[len(layouts) :]:
            axis.set_axis_off()
        axes[-1, 0].set(xlabel="UMAP 1", ylabel="UMAP 2")
        handles, names = axes[0, 0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside right center", frameon=False, markerscale=4, title=drawn(key))
    return finish(figure, title)


def saturation_map(points: pd.DataFrame, rule: str) -> Figure:
    """Saturation points (`saturation.saturation_points`), a panel per task: models and strategies by data sets.

    A dash stands where none is established; `rule` is the rule in words.
    """
    if points.empty:
        return style.nothing("the study has no scores of pretrained models")
    sizes, smallest = points["percentage"], points["percentage"].min()
    norm = mpl.colors.LogNorm(vmin=min(1, smallest), vmax=100)
    figure = _table_map(points, "percentage", "{:g}".format, cmap="cividis_r", norm=norm)
    never = f", {sizes.isna().sum()} at none that is shown" if sizes.isna().any() else ""
    early = titles.share((sizes == smallest).sum(), len(sizes))
    says = f"By {rule}, {early} curves are saturated at {smallest:g} % of the corpus{never}"
    return write_title(figure, f"Saturation points (% of the corpus). {says}")


def verdict_map(verdicts: pd.DataFrame, question: str) -> Figure:
    """Verdicts (of `saturation_points` by equivalence, or of `scaling_curves`) on a question, a panel per task."""
    if verdicts.empty:
        return style.nothing("the study has no random subsets, of which a verdict would be")
    colours, signs = zip(*VERDICTS.values(), strict=True)
    numbered = verdicts.assign(number=verdicts["verdict"].map({name: i for i, name in enumerate(VERDICTS)}))
    scale = {"cmap": mpl.colors.ListedColormap(colours), "vmin": -0.5, "vmax": len(VERDICTS) - 0.5}
    figure = _table_map(numbered, "number", lambda number: signs[int(number)], **scale)
    counts = verdicts["verdict"].value_counts()
    handles = [
        mpl.patches.Patch(color=colour, label=f"{sign}  {name}")
        for name, (colour, sign) in VERDICTS.items()
        if name in counts
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    told = [f"{counts.get(name, 0)} {name}" for name in VERDICTS if name != LIMITED or name in counts]
    return write_title(figure, f"{question}\nOf {len(verdicts)} curves, {titles.joined(told)}")


def _table_map(table: pd.DataFrame, value: str, text: object, **scale: object) -> Figure:
    """A panel per task: models and strategies by data sets, coloured by a value, with its text or else a dash."""
    table = style.in_order(table)
    table = table.assign(run=table["model"] + ", " + table["strategy"].map(drawn))
    tasks, height = table["task"].unique(), 0.27 * table["run"].nunique() + 2.6
    widths = [select(table, task=task)["dataset"].nunique() for task in tasks]
    figure, axes = panels(1, len(tasks), height, sharey=True, width_ratios=widths)
    for axis, task in zip(axes[0], tasks, strict=True):
        rows = select(table, task=task)
        grid = rows.pivot_table(index="run", columns="dataset", values=value, sort=False, dropna=False)
        grid = grid[sorted(grid)].rename(columns=drawn).astype(float)
        texts = grid.map(text, na_action="ignore")
        sns.heatmap(grid, ax=axis, annot=texts, fmt="", cbar=False, linewidths=1, **scale)
        axis.set_facecolor("0.9")
        for row, column in zip(*np.nonzero(grid.isna().to_numpy()), strict=True):  # which seaborn leaves without text
            axis.text(column + 0.5, row + 0.5, "–", ha="center", va="center")
        axis.set(title=drawn(task).replace(" ", "\n"), xlabel="", ylabel="")
        axis.tick_params(axis="x", rotation=90, length=0)
        axis.tick_params(axis="y", rotation=0, left=task == tasks[0], length=0)
    return figure

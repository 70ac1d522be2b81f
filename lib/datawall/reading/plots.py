"""Every figure, a function each: takes a table, returns a matplotlib figure. Colour-blind safe, units on axes.

The title says what the table shows (`messages`).
"""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure, SubFigure

from datawall.analysis.results import BASELINE, CHANCE, CHECKPOINT, ORACLE, mean_over_splits, select
from datawall.engine import disk
from datawall.models.hyperparameters import FAMILIES, VARIANTS, family
from datawall.reading import messages
from datawall.reading.labels import drawn as label
from datawall.reading.labels import plain

WIDTH = 9.0  # inches: a page of text
TITLE = 120  # letters in a line of it
STRATEGY_COLOURS = dict(
    zip(("random", "celltype_reweighted", "geometric_sketching"), sns.color_palette("colorblind", 3), strict=True)
)
STRATEGY_MARKERS = {"random": "o", "celltype_reweighted": "s", "geometric_sketching": "^"}
# The unit of each family's training loss.
LOSSES = {
    "scVI": "negative ELBO (nats per cell)",
    "SSL": "squared error of hidden genes\n(log counts², mean over all genes)",
    "Geneformer": "cross-entropy\n(nats per masked gene)",
    "SCimilarity": "squared error and triplet loss\n(weighted sum)",
}

mpl.rcParams.update({"svg.hashsalt": "datawall", "svg.fonttype": "none", "figure.dpi": 100, "savefig.dpi": 150})
sns.set_theme(context="notebook", style="ticks", font_scale=0.8)


def save(figure: Figure, name: str, table: pd.DataFrame, folder: Path) -> None:
    """Write a figure as svg and png, and the table that it was drawn from as csv; byte for byte the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out, and would be again for each file
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        disk.write_atomically(
            folder / f"{name}.{suffix}",
            lambda path, suffix=suffix, metadata=metadata: figure.savefig(path, format=suffix, metadata=metadata),
        )
    disk.write_atomically(folder / f"{name}.csv", lambda path: table.to_csv(path, index=False))


def composition(table: pd.DataFrame) -> Figure:
    """Share of each cell type in subsets (`curation.composition`), first seed: types by subsets, per cent."""
    first = select(table, seed=table["seed"].min())
    share = first.pivot_table(index="cell_type", columns=["strategy", "percentage"], values="share", sort=False) * 100
    share = share.fillna(0).sort_values(share.columns[0], ascending=False)
    groups = share.columns.get_level_values("strategy").unique()
    widths = [share[group].shape[1] for group in groups]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(WIDTH, 0.35 * len(share) + 1.5), sharey=True, width_ratios=widths, layout="constrained"
    )
    for axis, group in zip(np.atleast_1d(axes), groups, strict=True):
        block = share[group].rename(columns=lambda percentage: f"{percentage:g}", index=plain)
        sns.heatmap(block, ax=axis, cmap="cividis", vmin=0, vmax=share.max().max(), annot=True, fmt=".0f", cbar=False)
        axis.set(title=label(group), xlabel="subset (% of corpus)", ylabel="")
        axis.tick_params(axis="y", rotation=0)
    _say(figure, f"Cells of each type, per cent of a subset\n{messages.composition(share)}")
    return figure


def diversity(table: pd.DataFrame) -> Figure:
    """Diversity of subsets against size (`curation.subset_diversity`): a panel per measure, a line per strategy."""
    measures = ["shannon", "inverse_simpson", "vendi"]
    figure, axes = plt.subplots(1, len(measures), figsize=(WIDTH, 3.2), layout="constrained")
    for axis, measure in zip(axes, measures, strict=True):
        for strategy, rows in table.dropna(subset=measure).groupby("strategy", sort=False):
            _curve(axis, rows, measure, strategy)
        _percentage_axis(axis, table)
        axis.set(ylabel=label(measure))
    _say(figure, messages.diversity(table))
    _legend(figure, axes[0])
    return figure


def realism(genes: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Simulated cells over real ones (`curation.realism`): variance and zeros against the mean, and two histograms."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.5), layout="constrained")
    names = genes["dataset"].unique()
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    means = np.geomspace(genes["mean"].min(), genes["mean"].max(), 200)
    shuffled = genes.sample(frac=1, random_state=0)  # so that neither hides the other
    of_genes = shuffled["dataset"].map(colours).tolist()
    for axis, value, poisson in ((axes[0, 0], "variance", means), (axes[0, 1], "zeros", np.exp(-means))):
        axis.scatter(shuffled["mean"], shuffled[value], s=3, alpha=0.5, c=of_genes, rasterized=True)
        axis.plot(means, poisson, color="black", linewidth=1, label="Poisson")
        axis.set(xscale="log", xlabel="mean count of a gene")
    axes[0, 0].set(yscale="log", ylabel="variance")
    axes[0, 1].set(ylabel="share of cells without the gene")
    for axis, value, text in (
        (axes[1, 0], "n_genes", "genes per cell"),
        (axes[1, 1], "library_size", "library size (molecules)"),
    ):
        edges = np.geomspace(cells[value].min(), cells[value].max() + 1, 60)
        for name, rows in cells.groupby("dataset", sort=False):
            weights = np.full(len(rows), 100 / len(rows))
            axis.hist(rows[value], bins=edges, weights=weights, histtype="step", color=colours[name], label=plain(name))
        axis.set(xscale="log", xlabel=text, ylabel="share of cells (%)")
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    sns.despine(figure)
    _say(figure, messages.realism(genes, cells))
    _legend(figure, axes[0, 0], axes[1, 0])
    return figure


def markers(table: pd.DataFrame) -> Figure:
    """Mean marker expression of each cell type: rows are types, columns genes, values z-scores over types."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.32 * len(table) + 1.6), layout="constrained")
    sns.heatmap(
        table.rename(index=plain),
        ax=axis,
        cmap="cividis",
        xticklabels=True,
        cbar_kws={"label": "mean expression (z-score over types)"},
    )
    axis.set(xlabel="", ylabel="")
    _say(figure, messages.markers(table))
    return figure


def loss_curves(histories: pd.DataFrame, *, smooth: int = 25) -> Figure:
    """Training loss against optimiser steps, a panel per model, a line per subset size; random subsets, first seed.

    `smooth` steps are averaged for the line.
    """
    shown = select(histories, strategy="random", seed=histories["seed"].min())
    models, percentages = shown["model"].unique(), sorted(shown["percentage"].unique())
    if not len(models):
        return _nothing("no model of this study takes steps")
    colours = dict(zip(percentages, sns.color_palette("cividis", len(percentages)), strict=True))
    n_rows = -(-len(models) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(WIDTH, 2.6 * n_rows + 0.5), squeeze=False, layout="constrained")
    for axis, model in zip(axes.flat, models, strict=False):
        for percentage, run in select(shown, model=model).groupby("percentage"):
            loss = run["loss"].rolling(smooth, min_periods=1).mean()
            axis.plot(run["step"], loss, color=colours[percentage], label=f"{percentage:g} % of the corpus")
        axis.set(title=label(model), xlabel="optimiser step", ylabel=LOSSES.get(family(model), "training loss"))
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    sns.despine(figure)
    _say(figure, messages.loss_curves(shown))
    _legend(figure, axes[0, 0])
    return figure


def learning_curves(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size: columns are models, rows data sets, colours strategies.

    Small marks are seeds, lines their means, dashed lines the baselines and models from elsewhere, the grey line the
    ceiling, the cross at 0 % the untrained control. Chance is written beside the metric: a line would flatten the
    curves.
    """
    runs = mean_over_splits(select(results, metric=metric))
    chance = runs[runs["model"] == CHANCE].set_index("dataset")["value"]
    runs = runs[runs["model"] != CHANCE]
    reference = runs["strategy"].isin([BASELINE, CHECKPOINT])
    models = [name for name in results["model"].unique() if name in set(runs.loc[~reference, "model"])]
    names = runs["dataset"].unique()
    if not models:
        return _nothing("the study has no such results")
    figure, axes = plt.subplots(
        len(names), len(models), figsize=(WIDTH, 2.4 * len(names) + 0.9), squeeze=False, layout="constrained",
        sharey="none" if metric == "loss" else "row",  # a family's pretraining loss has units of its own
    )  # fmt: skip
    contenders = sorted(set(runs.loc[reference, "model"]) - {ORACLE})
    styles = dict(zip(contenders, itertools.cycle(("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))))))
    lines = {name: {"color": "black", "linestyle": style} for name, style in styles.items()}
    lines |= {ORACLE: {"color": "0.6", "linestyle": "-"}}
    for row, dataset in enumerate(names):
        for column, model in enumerate(models):
            axis, shown = axes[row, column], select(runs, dataset=dataset, model=model)
            for strategy in STRATEGY_COLOURS:
                _curve(axis, select(shown, strategy=strategy), "value", strategy)
            untrained = select(shown, strategy="untrained")
            place = np.full(len(untrained), _untrained_place(runs["percentage"]))
            axis.plot(place, untrained["value"], "x", color="0.35", label="untrained")
            of_reference = runs[reference & (runs["dataset"] == dataset)].set_index("model")["value"]
            band = of_reference[of_reference.index.map(_is_pca)]
            band = band if len(band) > 1 else band[:0]
            if len(band):
                axis.axhspan(band.min(), band.max() + 1e-3, color="0.8", label="PCA of the evaluated cells")
            for name, value in of_reference.drop(band.index).items():
                axis.axhline(value, linewidth=1, label=label(name), **lines[name])
            _percentage_axis(axis, select(runs, dataset=dataset), untrained=len(untrained) > 0)
            by_chance = f" (chance {chance[dataset]:.2f})" if dataset in chance else ""
            axis.set(
                title=label(model) if row == 0 else "",
                ylabel=f"{label(dataset)}\n{label(metric)}{by_chance}" if column == 0 else "",
            )
            if row < len(names) - 1:
                axis.set(xlabel="")
    _say(figure, messages.learning_curves(results, metric))
    _legend(figure, *axes[:, 0])
    return figure


def _is_pca(model: str) -> bool:
    """Whether a baseline is a principal component analysis, whose number of components makes a band of them."""
    return model == "PCA" or model.startswith("PCA-")


def budgets(table: pd.DataFrame) -> Figure:
    """Scores after half, once and twice the steps (`verdicts.budgets`), by task and data set (rows) and model."""
    if table.empty:
        return _nothing("the study checks no budget")
    rows = list(dict.fromkeys(zip(table["task"], table["dataset"], strict=True)))
    models = list(table["model"].unique())
    figure, axes = plt.subplots(
        len(rows), len(models), figsize=(WIDTH, 1.7 * len(rows) + 1.6), squeeze=False, sharey="row", sharex=True,
        layout="constrained",
    )  # fmt: skip
    sizes = sorted(table["percentage"].unique())
    colours = dict(zip(sizes, sns.color_palette("cividis", len(sizes) + 1), strict=False))
    for (task, dataset), of_row in zip(rows, axes, strict=True):
        for model, axis in zip(models, of_row, strict=True):
            for one in select(table, task=task, dataset=dataset, model=model).to_dict("records"):
                values = [one["half"], one["once"], one["twice"]]
                name = f"{one['percentage']:g} % of the corpus"
                axis.plot([0.5, 1, 2], values, "-o", markersize=4, color=colours[one["percentage"]], label=name)
            axis.set_xscale("log")
            axis.set_xticks([0.5, 1, 2], ["half", "once", "twice"])
            axis.minorticks_off()
            axis.set(title=label(model) if axis in axes[0] else "", xlabel="steps" if axis in axes[-1] else "")
        of_row[0].set_ylabel(f"{label(task)}\n{label(dataset)}", fontsize=7)
    sns.despine(figure)
    _say(figure, messages.budgets(table))
    _legend(figure, axes[0, 0])
    return figure


def loss_and_score(table: pd.DataFrame, metric: str) -> Figure:
    """A downstream score against the pretraining loss that is gone (`results.loss_and_score`), a panel per model."""
    models = list(table["model"].unique())
    if not models:
        return _nothing("the study has no runs with both a pretraining loss and this score")
    figure, axes = plt.subplots(1, len(models), figsize=(WIDTH, 2.6), squeeze=False, sharey=True, layout="constrained")
    sizes = sorted(table["percentage"].unique())
    colours = dict(zip(sizes, sns.color_palette("cividis", len(sizes)), strict=True))
    for axis, model in zip(axes[0], models, strict=True):
        for size, runs in select(table, model=model).groupby("percentage"):
            axis.plot(runs["explained"], runs["score"], "o", color=colours[size], markersize=4, label=f"{size:g} %")
        axis.set(title=label(model), xlabel=label("explained"))
    axes[0, 0].set(ylabel=label(metric))
    sns.despine(figure)
    _say(figure, messages.loss_and_score(table, metric))
    _legend(figure, axes[0, 0])
    return figure


def per_class_curves(per_class: pd.DataFrame, *, n_types: int = 3) -> Figure:
    """F1 of the commonest and the rarest cell types against the subset's size: columns are models, rows data sets.

    Random subsets, means over splits and seeds; dark lines are common types, light ones rare. The number after a type
    is of its test cells.

    Parameters
    ----------
    per_class
        The table `per_class` of a study (`results.read_results`), of one task.
    n_types
        Types from either end to draw.
    """
    shown = mean_over_splits(per_class.assign(metric=per_class["cell_type"], value=per_class["f1"]))
    shown = shown[shown["strategy"].isin(["random", "untrained"])]
    names, models = shown["dataset"].unique(), shown["model"].unique()
    if not (shown["percentage"] > 0).any():
        return _nothing("the study has no random subsets")
    figure = plt.figure(figsize=(WIDTH, 3.2 * len(names) + 0.4), layout="constrained")
    ends = {}
    for part, dataset in zip(figure.subfigures(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        axes = part.subplots(1, len(models), sharey=True, squeeze=False)[0]
        support = select(per_class, dataset=dataset).groupby("cell_type")["support"].mean().sort_values(ascending=False)
        common, rare = support.index[:n_types], support.index[n_types:][-n_types:]
        ends[dataset] = {"commonest types": list(common), "rarest types": list(rare)}
        colours = sns.color_palette("viridis", len(common) + len(rare))
        for axis, model in zip(axes, models, strict=True):
            of_model = select(shown, dataset=dataset, model=model)
            for name, colour in zip([*common, *rare], colours, strict=True):
                mean = select(of_model, metric=name).groupby("percentage")["value"].mean()
                places = [_untrained_place(shown["percentage"]) if p == 0 else p for p in mean.index]
                style = {"marker": "o" if name in common else "^", "markersize": 4, "color": colour}
                axis.plot(places, mean, label=plain(f"{name} ({support[name]:.0f})"), **style)
            _percentage_axis(axis, shown, untrained=(shown["percentage"] == 0).any())
            axis.set(title=label(model), ylim=(-0.03, 1.03))
        axes[0].set(ylabel=f"{label(dataset)}\nF1 of a cell type")
        _legend(part, axes[0])
    _say(figure, messages.per_class_curves(shown, ends))
    return figure


def variants(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size, a line per model and a panel per data set: models that differ in one thing.

    Random subsets; small marks are seeds, lines their means. A family has one colour, darker from variant to variant.
    """
    runs = mean_over_splits(select(results, metric=metric, strategy="random"))
    names, order = runs["dataset"].unique(), [*FAMILIES, *VARIANTS, *runs["model"].unique()]
    models = sorted(runs["model"].unique(), key=order.index)
    colours = {}
    for of_family, hue in zip(dict.fromkeys(map(family, models)), itertools.cycle(["Blues", "Oranges", "Greys"])):
        variants = [name for name in models if family(name) == of_family]
        colours |= dict(zip(variants, sns.color_palette(hue, len(variants) + 2)[2:], strict=True))
    figure, axes = plt.subplots(1, len(names), figsize=(WIDTH, 3.4), squeeze=False, layout="constrained")
    for axis, dataset in zip(axes[0], names, strict=True):
        for model in models:
            shown = select(runs, dataset=dataset, model=model)
            mean = shown.groupby("percentage")["value"].mean()
            axis.plot(shown["percentage"], shown["value"], "o", color=colours[model], markersize=3.5, alpha=0.6)
            axis.plot(mean.index, mean, "-o", color=colours[model], markersize=5, label=plain(model))
        _percentage_axis(axis, runs)
        axis.set(title=label(dataset), ylabel=label(metric))
    _say(figure, messages.variants(runs, metric))
    _legend(figure, axes[0, 0])
    return figure


def embeddings(layouts: dict[str, pd.DataFrame], colour_by: list[str], title: str) -> Figure:
    """UMAPs (`Study.layouts`), a panel per embedding, three in a row; the whole once for each label to colour by.

    Nothing is measured on them, so the title is given.
    """
    if not layouts:
        return _nothing("the study pretrains no model")
    n_columns = min(3, len(layouts))
    n_rows = -(-len(layouts) // n_columns)
    figure = plt.figure(figsize=(WIDTH, 2.3 * n_rows * len(colour_by) + 0.3), layout="constrained")
    for part, key in zip(figure.subfigures(len(colour_by), 1, squeeze=False)[:, 0], colour_by, strict=True):
        axes = part.subplots(n_rows, n_columns, squeeze=False)
        categories = sorted(next(iter(layouts.values()))[key].astype(str).unique())
        colours = dict(zip(categories, sns.color_palette("colorblind", len(categories)), strict=True))
        for axis, (name, layout) in zip(axes.flat, layouts.items(), strict=False):
            for category, cells in layout.groupby(layout[key].astype(str)):
                axis.scatter(
                    cells["x"], cells["y"], s=3, color=colours[category], label=plain(category), rasterized=True
                )
            axis.set(title=plain(name), xticks=[], yticks=[])
        for axis in axes.flat[len(layouts) :]:
            axis.set_axis_off()
        axes[-1, 0].set(xlabel="UMAP 1", ylabel="UMAP 2")
        handles, names = axes[0, 0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside right center", frameon=False, markerscale=4, title=label(key))
    sns.despine(figure)
    _say(figure, title)
    return figure


def _nothing(why: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = plt.figure(figsize=(WIDTH, 0.6))
    _say(figure, f"Nothing to show: {why}")
    return figure


def _say(figure: Figure, message: str) -> None:
    """The message of a figure as its title, in lines that fit the page."""
    figure.suptitle(
        "\n".join(textwrap.fill(line, TITLE, break_on_hyphens=False) for line in plain(message).split("\n")),
        fontsize="medium",
    )


def _curve(axis: plt.Axes, rows: pd.DataFrame, value: str, strategy: str) -> None:
    """Seeds as marks and their mean as a line, for one strategy."""
    if rows.empty:
        return
    colour = STRATEGY_COLOURS[strategy]
    mean = rows.groupby("percentage")[value].mean()
    axis.plot(rows["percentage"], rows[value], STRATEGY_MARKERS[strategy], color=colour, markersize=3.5, alpha=0.6)
    axis.plot(
        mean.index, mean, "-", marker=STRATEGY_MARKERS[strategy], color=colour, markersize=5, label=label(strategy)
    )


def _untrained_place(percentages: pd.Series) -> float:
    """Where 0 % stands on the logarithmic axis: well left of the smallest subset."""
    return percentages[percentages > 0].min() / 4


def _percentage_axis(axis: plt.Axes, rows: pd.DataFrame, *, untrained: bool = False) -> None:
    """Logarithmic axis with the study's own percentages as ticks and, where `rows` have `n_cells`, the cells below."""
    percentages = rows["percentage"]
    names = {tick: f"{tick:g}" for tick in sorted(percentages[percentages > 0].unique())}
    if "n_cells" in rows:
        cells = rows.groupby("percentage")["n_cells"].max()
        names = {tick: f"{name}\n{cells_in_short(cells[tick])}" for tick, name in names.items()}
    if untrained:
        names = {_untrained_place(percentages): "0"} | names
    axis.set_xscale("log")
    axis.set_xticks(list(names), names.values())
    axis.tick_params(axis="x", labelsize=7)
    axis.minorticks_off()
    axis.set(xlabel="% of corpus, cells" if "n_cells" in rows else "subset (% of corpus)")
    sns.despine(ax=axis)


def cells_in_short(n_cells: float) -> str:
    """A number of cells in at most four letters: 980, 2.9k, 17.8M."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if n_cells >= factor:
            return f"{n_cells / factor:.{1 if n_cells < 100 * factor else 0}f}{letter}".replace(".0", "")
    return f"{n_cells:.0f}"


def _legend(figure: Figure | SubFigure, *axes: plt.Axes) -> None:
    """One legend for the figure, below it."""
    unique = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        unique |= dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False)

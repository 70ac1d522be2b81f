"""Tables as coloured cells, numbers as dots beside the names of models, and cells as points of a plane."""

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from datawall.analysis.results import BASELINE, headline, mean_over_splits, select
from datawall.analysis.saturation import IMPROVING, LIMITED, PLATEAU, UNDECIDED
from datawall.analysis.walls import SUSPECTS
from datawall.models.hyperparameters import FAMILIES
from datawall.reading import titles
from datawall.reading.plots import style
from datawall.reading.plots.style import PALETTE, SPIKED, STRATEGIES, WIDTH, finish, panels, write_title
from datawall.reading.titles import drawn, plain

# Colour and sign of each verdict.
VERDICTS = {
    PLATEAU: ("#fde9a9", "="),
    UNDECIDED: ("#d9d9d9", "?"),
    LIMITED: ("#e8a46b", "b"),
    IMPROVING: ("#3b5b92", "↑"),
}
# Colour and mark of each rule by which a curve is saturated.
RULES = {
    "published": ("black", "o"),
    "mean": (PALETTE[0], "s"),
    "error": (PALETTE[1], "D"),
    "equivalence": (PALETTE[2], "^"),
}
NEVER = 300.0  # where on an axis of percentages that stands which is not established


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
    shares = titles.listed(share.loc[common].xs(smallest, level="percentage"), "{:.0f} %")
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
    colours = dict(zip(genes["dataset"].unique(), PALETTE, strict=False))
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
    """UMAPs (`Study.layouts`), a panel per embedding, three in a row; the whole once for each label to colour by."""
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
    """Saturation points (`saturation.saturation_points`) by `rule`, in words; a dash where none is established."""
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
    legend = {name: f"{sign}  {name}" for name, (_, sign) in VERDICTS.items() if name in counts}
    handles = [mpl.patches.Patch(color=VERDICTS[name][0], label=text) for name, text in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    numbers = (f"{counts.get(name, 0)} {name}" for name in VERDICTS if name != LIMITED or name in counts)
    return write_title(figure, f"{question}\nOf {len(verdicts)} curves, {titles.joined(numbers)}")


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


def rules(points: pd.DataFrame, title: str) -> Figure:
    """Saturation points by rule (column `rule`), with intervals; what is not established stands at the right."""
    if points.empty:
        return style.nothing("the study has no such runs")
    shown = points.fillna({"low": NEVER, "high": NEVER, "percentage": NEVER})
    figure, axes = panels_of_dots(shown, "dataset", "rule", "percentage", RULES, 0.62)
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
    """Share of the cells saved by stopping at the saturation point, if there is one: means by rule, model and task."""
    points = points.assign(saved=100 - points["percentage"].fillna(100))
    means = points.groupby(["task", "rule", "model"], sort=False, as_index=False)["saved"].mean()
    figure, axes = panels_of_dots(means.assign(low=0, high=means["saved"]), "task", "rule", "saved", RULES, 0.5)
    for axis in axes:
        axis.set(xlim=(-3, 103), xlabel="cells saved (%)")
    saved = titles.listed(points.groupby("rule", sort=False)["saved"].mean(), "{:.0f} %")
    return finish(figure, f"Cells saved by stopping at the saturation point, mean: {saved}", axes[0], left=False)


def effects(table: pd.DataFrame, title: str) -> Figure:
    """Effects of strategies over random subsets, with intervals (`effects.strategy_effects`): a panel per task."""
    columns = ["difference", "low", "high"]
    marks = {name: mark for name, mark in (STRATEGIES | SPIKED).items() if name in set(table["strategy"])}
    points = table.assign(**100 * table[columns])
    figure, axes = panels_of_dots(points, "task", "strategy", "difference", marks, 0.5)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1, zorder=1)
        axis.set_xlabel("points of score")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    certain = table.loc[table["p_adjusted"] < 0.05, "difference"]
    share = titles.share(len(certain), len(table))
    says = f"{(certain > 0).sum()} better, {(certain < 0).sum()} worse"
    return finish(figure, f"{title}\nCertain (adjusted p < 0.05) in {share} comparisons: {says}", axes[0])


def suspects(worth: pd.DataFrame, margin: float) -> Figure:
    """What a doubling or a swap of each suspect gains (`walls.worth`), with 95 % intervals; a panel per data set."""
    if worth.empty:
        return style.nothing("the study varies too little to tell one wall from another")
    order = [name for name in SUSPECTS if name in set(worth["suspect"])]
    table = worth.rename(columns={"model": "kind", "suspect": "model"})  # whose rows the panels have
    table = table.sort_values("model", key=lambda names: names.map(order.index), kind="stable")
    marks = dict(zip(table["kind"].unique(), zip(PALETTE, "os^D", strict=False), strict=False))
    figure, axes = panels_of_dots(table, "dataset", "kind", "gain", marks, 0.5)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=1, zorder=1)
        axis.axvline(1000 * margin, color="0.6", linestyle="--", linewidth=1, zorder=1)
        axis.set_xlabel("errors fewer in 1,000 cells")
    largest = worth.loc[worth.groupby("model", sort=False)["gain"].idxmax()].set_index("model")["suspect"]
    return finish(figure, f"Gains most, if one thing is doubled or swapped: {titles.listed(largest)}", axes[0])


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


def panels_of_dots(
    table: pd.DataFrame, panel: str, by: str, value: str, marks: dict[str, Any], row_height: float
) -> tuple[Figure, np.ndarray]:
    """A panel for each task or data set, a row per model: dots, each kind with its mark, and lines from low to high."""
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

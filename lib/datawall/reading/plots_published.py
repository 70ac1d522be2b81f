"""Figures of saturation, scaling and effects, drawn for studies of the published one's size; see `plots`."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from datawall.analysis.results import BASELINE, mean_over_splits, select
from datawall.analysis.saturation import IMPROVING, LIMITED, PLATEAU, UNDECIDED, as_error, curves_of
from datawall.reading import messages, plots
from datawall.reading.plots import WIDTH, label

MODELS = ["PretrainedPCA", "scVI", "SSL", "Geneformer", "SCimilarity"]
TICKS = (0, 1, 10, 100)  # sizes that are labelled; between them there is no room
RULES = {"published": "o", "mean": "s", "error": "D", "equivalence": "^"}
COLOURS = plots.STRATEGY_COLOURS | dict(
    zip(("spikein_10", "spikein_50"), sns.color_palette("colorblind", 5)[3:], strict=True)
)
MARKERS = plots.STRATEGY_MARKERS | {"spikein_10": "v", "spikein_50": "D"}
VERDICTS = {PLATEAU: "#fde9a9", UNDECIDED: "#d9d9d9", LIMITED: "#e8a46b", IMPROVING: "#3b5b92"}
UNTRAINED = "0.35"


def learning_curves(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size, as `plots.learning_curves`, with room for many sizes."""
    figure = plots.learning_curves(_in_order(results), metric)
    for axis in figure.axes:
        _thin(axis)
    return figure


def beside_published(table: pd.DataFrame) -> Figure:
    """Errors of a study's models and of the published ones against cells, both axes logarithmic, a panel per model.

    `table` has the columns study, dataset, model, n_cells and error, means over seeds.
    """
    table = _in_order(table)
    models = list(table["model"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(WIDTH, 3.2), squeeze=False, sharey=True, layout="constrained")
    studies = list(table["study"].unique())
    for axis, model in zip(axes[0], models, strict=True):
        for (study, _), rows in select(table, model=model).groupby(["study", "dataset"], sort=False):
            number = studies.index(study)
            style = {"color": sns.color_palette("colorblind")[number], "marker": "o^s"[number], "label": study}
            axis.plot(rows["n_cells"], rows["error"], markersize=4, linewidth=1, **style)
        axis.set(xscale="log", yscale="log", title=model, xlabel="pretraining cells")
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(numticks=4))
        axis.yaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="both", which="both", labelsize=7)
    axes[0, 0].set(ylabel="share of cells named wrong")
    sns.despine(figure)
    plots._say(figure, messages.beside_published(table))
    plots._legend(figure, axes[0, 0])
    return figure


def saturation_map(points: pd.DataFrame, rule: str) -> Figure:
    """Saturation points (`saturation.saturation_points`), a panel per task: models and strategies by data sets.

    A dash stands where none is established; `rule` is the rule in words.
    """
    if points.empty:
        return plots._nothing("the study has no scores of pretrained models")
    points = _in_order(points)
    tasks = points["task"].unique()
    widths = [select(points, task=task)["dataset"].nunique() for task in tasks]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(WIDTH, 0.27 * len(points[["model", "strategy"]].drop_duplicates()) + 2.4),
        sharey=True, squeeze=False, width_ratios=widths, layout="constrained",
    )  # fmt: skip
    norm = mpl.colors.LogNorm(vmin=min(1, points["percentage"].min()), vmax=100)
    for axis, task in zip(axes[0], tasks, strict=True):
        grid = _grid(select(points, task=task), "percentage")
        names = grid.map(lambda size: "–" if np.isnan(size) else f"{size:g}")
        sns.heatmap(grid, ax=axis, cmap="cividis_r", norm=norm, annot=names, fmt="", cbar=False, linewidths=1)
        _dashes(axis, grid)
        _map_axis(axis, task, first=task == tasks[0])
    plots._say(figure, f"Saturation points (% of the corpus). {messages.saturation(points, rule)}")
    return figure


def verdict_map(verdicts: pd.DataFrame, question: str) -> Figure:
    """Verdicts (of `saturation_points` by equivalence, or of `scaling_curves`) on a question, a panel per task."""
    if verdicts.empty:
        return plots._nothing("the study has no random subsets, of which a verdict would be")
    verdicts = _in_order(verdicts).assign(
        code=lambda of: of["verdict"].map({name: i for i, name in enumerate(VERDICTS)})
    )
    tasks = verdicts["task"].unique()
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(WIDTH, 0.27 * len(verdicts[["model", "strategy"]].drop_duplicates()) + 2.7),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    colours = mpl.colors.ListedColormap(list(VERDICTS.values()))
    signs = dict(enumerate(("=", "?", "b", "↑")))
    for axis, task in zip(axes[0], tasks, strict=True):
        grid = _grid(select(verdicts, task=task), "code")
        sns.heatmap(
            grid,
            ax=axis,
            cmap=colours,
            vmin=-0.5,
            vmax=3.5,
            annot=grid.map(signs.get),
            fmt="",
            cbar=False,
            linewidths=1,
        )
        _map_axis(axis, task, first=task == tasks[0])
    handles = [
        mpl.patches.Patch(color=colour, label=f"{sign}  {name}")
        for (name, colour), sign in zip(VERDICTS.items(), signs.values(), strict=True)
        if name in set(verdicts["verdict"])
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    plots._say(figure, messages.verdict_map(verdicts, question))
    return figure


def spike_ins(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size with and without perturbed cells: rows are data sets, columns models."""
    strategies = ["random", "spikein_10", "spikein_50"]
    runs = _in_order(mean_over_splits(select(results, metric=metric)))
    runs = runs[runs["strategy"].isin(strategies)]
    spiked = runs[runs["strategy"] != "random"]
    models, names = spiked["model"].unique(), spiked["dataset"].unique()
    figure, axes = plt.subplots(
        len(names), len(models), figsize=(WIDTH, 1.9 * len(names) + 0.8), sharey="row", sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, dataset in enumerate(names):
        for column, model in enumerate(models):
            axis, shown = axes[row, column], select(runs, dataset=dataset, model=model)
            for strategy in strategies:
                _line(axis, select(shown, strategy=strategy), "value", strategy)
            _size_axis(axis, runs["percentage"], last=row == len(names) - 1)
            axis.set(title=model if row == 0 else "", ylabel=_two_lines(dataset, metric) if column == 0 else "")
    plots._say(figure, messages.spike_ins(runs, metric))
    plots._legend(figure, axes[0, 0])
    return figure


def diversity(table: pd.DataFrame) -> Figure:
    """Diversity of subsets against size (`published.diversity`): a panel per measure, a line per strategy."""
    measures = ["shannon", "inverse_simpson", "vendi"]
    figure, axes = plt.subplots(1, len(measures), figsize=(WIDTH, 3.4), layout="constrained")
    for axis, measure in zip(axes, measures, strict=True):
        for strategy in COLOURS:
            _line(axis, select(table, strategy=strategy).dropna(subset=measure), measure, strategy)
        _size_axis(axis, table["percentage"])
        axis.set(ylabel=label(measure))
    plots._say(figure, messages.diversity(table))
    plots._legend(figure, axes[-1])
    return figure


def untrained(results: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """What pretraining changes: each model untrained, at the smallest and at the largest size, beside the baselines.

    Random subsets, means over seeds; rows are tasks (with the metric of each), columns their data sets.
    """
    figure, axes = plt.subplots(
        len(metrics), 4, figsize=(WIDTH, 1.75 * len(metrics) + 0.9), sharey=True, squeeze=False, layout="constrained"
    )
    for row, (task, metric) in enumerate(metrics.items()):
        runs = mean_over_splits(select(results, task=task, metric=metric))
        for axis, dataset in zip(axes[row], sorted(runs["dataset"].unique())[:4], strict=True):
            shown = select(runs, dataset=dataset)
            means = shown.groupby(["strategy", "model", "percentage"])["value"].mean()
            sizes = sorted(select(shown, strategy="random")["percentage"].unique())
            series = (
                ("untrained", 0.0, "x", UNTRAINED, "untrained"),
                ("random", sizes[0], "o", "#e69f00", f"{sizes[0]:g} % of the corpus"),
                ("random", sizes[-1], "o", "#0072b2", "the full corpus"),
            )
            for strategy, size, marker, colour, name in series:
                values = means.get(strategy, means.iloc[:0]).xs(size, level="percentage").reindex(MODELS)
                axis.plot(values, range(len(MODELS)), marker, color=colour, label=name, markersize=6, alpha=0.85)
            for (baseline, _), value in means.loc[BASELINE].items():
                style = {"HVG": "--"}.get(baseline, ":")
                name = "baseline: HVG" if baseline == "HVG" else "baseline: PCA, logistic regression, no change"
                axis.axvline(value, color="black", linestyle=style, linewidth=1, label=name)
            _model_axis(axis, MODELS, first=axis is axes[row, 0])
            axis.set_title(label(dataset).replace("-\n", ""))
            axis.set_xlabel(label(metric) if len(label(metric)) < 12 else label(metric).replace(" of", "\nof"))
        axes[row, 0].set_ylabel(label(task).replace(" ", "\n"))
    sns.despine(figure)
    plots._say(figure, messages.untrained(results, metrics))
    plots._legend(figure, axes[0, 0])
    return figure


def embedding_seconds(table: pd.DataFrame) -> Figure:
    """Seconds to embed 10,000 cells (`published.embedding_seconds`)."""
    shown = table.sort_values("seconds")
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.9), layout="constrained")
    axis.plot(shown["seconds"], shown["model"], "o", color="#0072b2", markersize=7)
    for seconds, model in zip(shown["seconds"], shown["model"], strict=True):
        axis.annotate(f"{seconds:.3g}", (seconds, model), xytext=(8, 0), textcoords="offset points", va="center")
    axis.set(
        xscale="log", xlim=(0.3, 400), ylim=(-0.5, len(shown) - 0.5), xlabel="seconds for 10,000 cells, one measurement"
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="y", color="0.9")
    sns.despine(figure, left=True)
    plots._say(figure, messages.embedding_seconds(table))
    return figure


def scaling(results: pd.DataFrame, predictions: pd.DataFrame, metric: str) -> Figure:
    """Error against cells on logarithmic axes, with the curve of lowest AICc (`scaling.predictions`) and its interval.

    Random subsets. Marks are runs; past the corpus the curve is dashed. Columns are models, rows data sets.
    """
    curves = [as_error(curve, metric) for curve in curves_of(select(results, strategy="random"), metric)]
    by_key = {(curve.key[3], curve.key[0]): curve for curve in curves}
    names = sorted({dataset for dataset, _ in by_key})
    models = [model for model in MODELS if any(model == of for _, of in by_key)]
    figure, axes = plt.subplots(
        len(names), len(models), figsize=(WIDTH, 2.0 * len(names) + 0.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, dataset in enumerate(names):
        for column, model in enumerate(models):
            axis, curve = axes[row, column], by_key[dataset, model]
            for n_cells, runs in zip(curve.n_cells, curve.runs, strict=True):
                marks = np.full(len(runs), n_cells)
                axis.plot(marks, runs, "o", color=COLOURS["random"], markersize=3.5, alpha=0.6, label="a run")
            of = select(predictions, strategy="random", dataset=dataset, model=model)
            inside, beyond = of[of["n_cells"] <= curve.n_cells[-1]], of[of["n_cells"] >= curve.n_cells[-1]]
            axis.fill_between(
                of["n_cells"], of["low"], of["high"], color="0.75", alpha=0.7, linewidth=0, label="interval"
            )
            axis.plot(inside["n_cells"], inside["error"], color="black", linewidth=1.3, label="fitted curve")
            axis.plot(beyond["n_cells"], beyond["error"], "--", color="black", linewidth=1.3, label="beyond the corpus")
            axis.set(xscale="log", yscale="log", title=model if row == 0 else "")
            axis.text(0.97, 0.95, of["curve"].iloc[0], transform=axis.transAxes, ha="right", va="top", fontsize=7.5)
        axes[row, 0].set_ylabel(f"{label(dataset)}\n1 - {label(metric)}")
        axes[row, 0].yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes[row, 0].yaxis.set_major_formatter("{x:g}")
        axes[row, 0].yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    for axis in axes[-1]:
        axis.set_xlabel("pretraining cells")
    sns.despine(figure)
    plots._say(figure, messages.scaling(select(predictions, strategy="random")))
    plots._legend(figure, axes[0, 0])
    return figure


def rules(points: pd.DataFrame, title: str) -> Figure:
    """Saturation point by rule: a dot for each rule (column `rule`), a row for each model, a panel for each data set.

    Lines are the intervals. What is not established stands at the right.
    """
    if points.empty:
        return plots._nothing("the study has no such runs")
    points = _in_order(points)
    models, names = list(points["model"].unique()), points["dataset"].unique()
    figure, axes = plt.subplots(
        1, len(names), figsize=(WIDTH, 0.62 * len(models) + 1.5), sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(RULES, ("black", *sns.color_palette("colorblind", 3)), strict=True))
    sizes, never = sorted(points["percentage"].dropna().unique()), 300.0
    for axis, dataset in zip(axes[0], names, strict=True):
        axis.axvspan(170, 530, color="0.93", linewidth=0)
        for offset, (rule, marker) in zip(np.linspace(-0.27, 0.27, len(RULES)), RULES.items(), strict=True):
            shown = select(points, dataset=dataset, rule=rule).set_index("model").reindex(models)
            y = np.arange(len(models)) + offset
            low, high = (shown[bound].fillna(never).to_numpy() for bound in ("low", "high"))
            axis.hlines(y, low, high, color=colours[rule], linewidth=1, alpha=0.6)
            axis.plot(shown["percentage"].fillna(never), y, marker, color=colours[rule], markersize=5, label=rule)
        axis.set(xscale="log", xlim=(0.6, 530), title=label(dataset).replace("-\n", ""), xlabel="% of the corpus")
        axis.set_xticks([*sizes, never], [f"{size:g}" if size in TICKS else "" for size in sizes] + ["none"])
        axis.minorticks_off()
        _model_axis(axis, models, first=axis is axes[0, 0])
    sns.despine(figure, left=True)
    plots._say(figure, messages.rules(points, title))
    plots._legend(figure, axes[0, 0])
    return figure


def cells_saved(points: pd.DataFrame) -> Figure:
    """Share of the cells saved by stopping at the saturation point, by rule, model and task.

    Means over strategies and data sets; where no point is established nothing is saved.
    """
    points = _in_order(points).assign(saved=lambda of: 100 - of["percentage"].fillna(100))
    tasks, models = points["task"].unique(), list(points["model"].unique())
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(WIDTH, 0.5 * len(models) + 1.8), sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(RULES, ("black", *sns.color_palette("colorblind", 3)), strict=True))
    for axis, task in zip(axes[0], tasks, strict=True):
        for offset, (rule, marker) in zip(np.linspace(-0.24, 0.24, len(RULES)), RULES.items(), strict=True):
            saved = select(points, task=task, rule=rule).groupby("model")["saved"].mean().reindex(models)
            y = np.arange(len(models)) + offset
            axis.hlines(y, 0, saved, color=colours[rule], linewidth=1, alpha=0.4)
            axis.plot(saved, y, marker, color=colours[rule], markersize=5, label=rule)
        axis.set(xlim=(-3, 103), title=label(task).replace(" ", "\n"), xlabel="cells saved (%)")
        _model_axis(axis, models, first=axis is axes[0, 0])
    sns.despine(figure, left=True)
    plots._say(figure, messages.cells_saved(points))
    plots._legend(figure, axes[0, 0])
    return figure


def known_answer(results: pd.DataFrame, begins: pd.Series, planted: pd.Series, title: str) -> Figure:
    """Learning curves of the pairs of `known_answer`: means over seeds, and where nine in ten seeds lie.

    A ring is where a plateau begins in truth (`known_answer.plateaus`), a triangle the size that is planted as needed.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 3.6), layout="constrained")
    colours = dict(zip(planted.sort_values().index, sns.color_palette("colorblind"), strict=False))
    bottom = results["value"].min()
    for pair, colour in colours.items():
        seeds = select(results, dataset=pair).pivot_table(index="percentage", columns="seed", values="value")
        mean = seeds.mean(axis=1)
        axis.fill_between(mean.index, *seeds.quantile([0.05, 0.95], axis=1).to_numpy(), color=colour, alpha=0.2, lw=0)
        axis.plot(mean, "o-", color=colour, markersize=4)
        axis.plot(planted[pair], bottom, "^", color=colour, markersize=7, clip_on=False)
        axis.annotate(pair, (100, mean[100]), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
        if np.isfinite(begins[pair]):
            axis.plot(begins[pair], mean[begins[pair]], "o", color=colour, markersize=13, fillstyle="none")
    axis.plot([], [], "ko", markersize=13, fillstyle="none", label="plateau begins")
    axis.plot([], [], "k^", markersize=7, label="cells needed, as planted")
    _size_axis(axis, results["percentage"])
    axis.set(ylabel=label("micro_f1"))
    plots._say(figure, title)
    plots._legend(figure, axis)
    return figure


def effects(table: pd.DataFrame, title: str) -> Figure:
    """Effects of strategies over random subsets (`effects.strategy_effects`): a panel per task, a row per model.

    Lines are the intervals.
    """
    table = _in_order(table)
    tasks, models = table["task"].unique(), list(table["model"].unique())
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(WIDTH, 0.5 * len(models) + 1.9), sharey=True, squeeze=False, layout="constrained"
    )
    strategies = [name for name in COLOURS if name in set(table["strategy"])]
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.axvline(0, color="black", linewidth=1)
        for offset, strategy in zip(np.linspace(-0.15, 0.15, len(strategies)), strategies, strict=True):
            shown = select(table, task=task, strategy=strategy).set_index("model").reindex(models)
            y = np.arange(len(models)) + offset
            axis.hlines(y, 100 * shown["low"], 100 * shown["high"], color=COLOURS[strategy], linewidth=2)
            axis.plot(100 * shown["difference"], y, MARKERS[strategy], color=COLOURS[strategy], label=label(strategy))
        axis.set(title=label(task).replace(" ", "\n"), xlabel="points of score")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        _model_axis(axis, models, first=axis is axes[0, 0])
    sns.despine(figure)
    plots._say(figure, messages.effects(table, title))
    plots._legend(figure, axes[0, 0])
    return figure


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with the published models first, in the study's order; within a model as they were."""
    order = {name: place for place, name in enumerate(MODELS)}
    return table.sort_values("model", key=lambda names: names.map(order).fillna(len(order)), kind="stable")


def _grid(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Models and strategies by data sets."""
    rows = rows.assign(run=rows["model"] + ", " + rows["strategy"].map(label))
    grid = rows.pivot_table(index="run", columns="dataset", values=value, sort=False, dropna=False)
    return grid[sorted(grid)].rename(columns=label).astype(float)


def _dashes(axis: plt.Axes, grid: pd.DataFrame) -> None:
    """A dash in the cells that are empty, which seaborn leaves without a mark."""
    axis.set_facecolor("0.9")
    for row, column in zip(*np.nonzero(grid.isna().to_numpy()), strict=True):
        axis.text(column + 0.5, row + 0.5, "–", ha="center", va="center")


def _model_axis(axis: plt.Axes, models: list[str], *, first: bool) -> None:
    """Models from top to bottom, with a line between them."""
    axis.set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
    axis.tick_params(axis="y", length=0, labelleft=first)
    for edge in np.arange(len(models) - 1) + 0.5:
        axis.axhline(edge, color="0.9", linewidth=1, zorder=0)


def _map_axis(axis: plt.Axes, task: str, *, first: bool) -> None:
    axis.set(title=label(task).replace(" ", "\n"), xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=90, length=0)
    axis.tick_params(axis="y", rotation=0, left=first, length=0)


def _line(axis: plt.Axes, rows: pd.DataFrame, value: str, strategy: str) -> None:
    """Seeds as marks and their mean as a line, for one strategy."""
    mean = rows.groupby("percentage")[value].mean()
    style = {"color": COLOURS[strategy], "marker": MARKERS[strategy]}
    axis.plot(rows["percentage"], rows[value], linestyle="", markersize=3, alpha=0.5, **style)
    axis.plot(mean.index, mean, markersize=4.5, label=label(strategy), **style)


def _size_axis(axis: plt.Axes, percentages: pd.Series, *, last: bool = True) -> None:
    """Logarithmic axis with a tick for every size, and labels where there is room."""
    sizes = sorted(percentages[percentages > 0].unique())
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:g}" if size in TICKS else "" for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("subset (% of corpus)" if last else "")
    sns.despine(ax=axis)


def _thin(axis: plt.Axes) -> None:
    """Keep the labels of the sizes that there is room for."""
    names = [tick.get_text() for tick in axis.get_xticklabels()]
    axis.set_xticks(axis.get_xticks(), [name if name.split("\n")[0] in map(str, TICKS) else "" for name in names])


def _two_lines(dataset: str, metric: str) -> str:
    return f"{label(dataset)}\n{label(metric)}"

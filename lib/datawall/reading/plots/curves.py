"""Scores, losses and diversity against the size of a subset, steps, or another lever."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from datawall.analysis.results import CHANCE, ORACLE, REFERENCES, mean_over_splits, rank_correlations, select, sign_of
from datawall.analysis.saturation import errors_of
from datawall.models.hyperparameters import FAMILIES, VARIANTS, is_model, resolve, without_label
from datawall.reading import titles
from datawall.reading.plots import style
from datawall.reading.plots.style import SPIKED, STRATEGIES, WIDTH, by_size, finish, panels, size_axis
from datawall.reading.titles import drawn, label, plain
from datawall.tasks import HEADLINE

LAST_STEPS = 50  # optimiser steps over which the loss at the end of training is the mean
SMOOTH = 25  # steps that a line of the training loss averages
LEVERS = {"cells": "cells (% of the corpus)", "depth": "counts kept of a cell", "steps": "steps", "width": "width"}
OF = {"cells": "of the cells", "depth": "of the counts", "steps": "the steps", "width": "the width"}


def diversity(table: pd.DataFrame) -> Figure:
    """Diversity of subsets against size (`curation.subset_diversity`): a panel per measure, a line per strategy."""
    measures = ["shannon", "inverse_simpson", "vendi"]
    figure, axes = panels(1, len(measures), 3.3)
    for axis, measure in zip(axes[0], measures, strict=True):
        style.curves(axis, table.dropna(subset=measure), measure)
        size_axis(axis, table)
        axis.set(ylabel=drawn(measure))
    smallest = table["percentage"].min()
    types = select(table, percentage=smallest).groupby("strategy", sort=False)["inverse_simpson"].mean().dropna()
    says = titles.listed(types, "{:.0f}")
    return finish(figure, f"Effective number of cell types at {smallest:g} % of the corpus: {says}", *axes[0])


def loss_curves(histories: pd.DataFrame) -> Figure:
    """Training loss against optimiser steps, a panel per model, a line per subset size; random subsets, first seed."""
    shown = select(histories, strategy="random", seed=histories["seed"].min())
    models = shown["model"].unique()
    if not len(models):
        return style.nothing("no model of this study takes steps")
    colours, n_rows = by_size(shown["percentage"]), -(-len(models) // 2)
    figure, axes = panels(n_rows, 2, 2.6 * n_rows + 0.5)
    for axis, model in zip(axes.flat, models, strict=False):
        for percentage, run in select(shown, model=model).groupby("percentage"):
            loss = run["loss"].rolling(SMOOTH, min_periods=1).mean()
            axis.plot(run["step"], loss, color=colours[percentage], label=f"{percentage:g} % of the corpus")
        unit = titles.LABELS.get(f"loss of {resolve(model).family}", "training loss")
        axis.set(title=drawn(model), xlabel="optimiser step", ylabel=unit)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    ends = shown.sort_values("step").groupby(["model", "percentage"]).tail(LAST_STEPS)
    last = ends.pivot_table("loss", "model", "percentage")
    lowest = last.idxmin(axis=1).value_counts()
    says = f"Loss on the cells that were trained on, {last.columns[0]:g} % of the corpus"
    if last.shape[1] > 1:
        says = f"On its own training cells, the subset of {lowest.index[0]:g} % of the corpus ends with the lowest loss"
        says += f" in {titles.share(lowest.iloc[0], len(last))} models"
    return finish(figure, says, axes[0, 0])


def learning_curves(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size: columns are models, rows data sets, colours strategies.

    Small marks are seeds, lines their means, dashed lines the baselines and models from elsewhere, the grey line the
    ceiling, the cross at 0 % the untrained control. Chance is written beside the metric. A model with a label, such as
    `SSL@wide`, is left to `variants` where SSL is shown.
    """
    base = results["model"].map(without_label)
    shown = (base == results["model"]) | ~base.isin(results["model"])
    results = style.in_order(results[shown])
    runs = mean_over_splits(select(results, metric=metric))
    chance = runs[runs["model"] == CHANCE].set_index("dataset")["value"]
    runs = runs[runs["model"] != CHANCE]
    reference = runs["strategy"].isin(REFERENCES)
    models = [name for name in results["model"].unique() if name in set(runs.loc[~reference, "model"])]
    datasets = runs["dataset"].unique()
    if not models:
        return style.nothing("the study has no such results")
    shared = "none" if metric == "loss" else "row"  # a family's pretraining loss has units of its own
    figure, axes = panels(len(datasets), len(models), 2.4 * len(datasets) + 0.9, sharey=shared)
    contenders = sorted(set(runs.loc[reference, "model"]) - {ORACLE})
    dashes = zip(contenders, itertools.cycle(("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))))
    lines = {name: ("black", dash) for name, dash in dashes} | {ORACLE: ("0.6", "-")}
    for axis, (dataset, model) in zip(axes.flat, itertools.product(datasets, models), strict=True):
        shown = select(runs, dataset=dataset, model=model)
        style.curves(axis, shown, strategies=STRATEGIES)
        untrained = select(shown, strategy="untrained")["value"]
        place = [style.untrained_place(runs["percentage"])] * len(untrained)
        axis.plot(place, untrained, "x", color="0.35", label="untrained")
        references = runs[reference & (runs["dataset"] == dataset)].set_index("model")["value"]
        # The number of components makes a band of principal component analyses.
        band = references.filter(regex="^PCA(-|$)")
        if len(band) > 1:
            axis.axhspan(band.min(), band.max() + 1e-3, color="0.8", label="PCA of the evaluated cells")
            references = references.drop(band.index)
        for name, value in references.items():
            colour, dash = lines[name]
            axis.axhline(value, linewidth=1, label=drawn(name), color=colour, linestyle=dash)
        size_axis(axis, select(runs, dataset=dataset), untrained=len(untrained) > 0)
    by_chance = {dataset: f" (chance {value:.2f})" for dataset, value in chance.items()}
    rows = [f"{drawn(dataset)}\n{drawn(metric)}{by_chance.get(dataset, '')}" for dataset in datasets]
    style.name_panels(axes, map(drawn, models), rows)
    return finish(figure, titles.learning_curves(results, metric), *axes[:, 0])


def spike_ins(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the subset's size with and without perturbed cells: rows are data sets, columns models."""
    runs = style.in_order(mean_over_splits(select(results, metric=metric)))
    runs = runs[runs["strategy"].isin(["random", *SPIKED])]
    spiked = runs[runs["strategy"] != "random"]
    models, datasets = spiked["model"].unique(), spiked["dataset"].unique()
    figure, axes = panels(len(datasets), len(models), 1.9 * len(datasets) + 0.8, sharey="row", sharex=True)
    for axis, (dataset, model) in zip(axes.flat, itertools.product(datasets, models), strict=True):
        style.curves(axis, select(runs, dataset=dataset, model=model))
        size_axis(axis, runs[["percentage"]])
    style.name_panels(axes, models, [f"{drawn(dataset)}\n{drawn(metric)}" for dataset in datasets])
    means = runs.pivot_table("value", ["dataset", "model", "percentage"], "strategy")
    changes = means.drop(columns="random").sub(means["random"], axis=0).mean()
    says = f"Mean change of {label(metric)} where other cells give way: {titles.listed(changes, '{:+.3f}')}"
    return finish(figure, says, axes[0, 0])


def per_class_curves(per_class: pd.DataFrame, *, n_types: int = 3) -> Figure:
    """F1 of the commonest and the rarest cell types against the subset's size: columns are models, rows data sets.

    From the table `per_class` of a study, of one task. Random subsets, means over splits and seeds; dark lines are
    `n_types` common types, light ones as many rare. The number after a type is of its test cells.
    """
    shown = mean_over_splits(per_class.assign(metric=per_class["cell_type"], value=per_class["f1"]))
    shown = shown[shown["strategy"].isin(["random", "untrained"])]
    datasets, models = shown["dataset"].unique(), shown["model"].unique()
    if not (shown["percentage"] > 0).any():
        return style.nothing("the study has no random subsets")
    figure = plt.figure(figsize=(WIDTH, 3.2 * len(datasets) + 0.4), layout="constrained")
    ends = {}
    for part, dataset in zip(figure.subfigures(len(datasets), 1, squeeze=False)[:, 0], datasets, strict=True):
        axes = part.subplots(1, len(models), sharey=True, squeeze=False)
        support = select(per_class, dataset=dataset).groupby("cell_type")["support"].mean().sort_values(ascending=False)
        common, rare = support.index[:n_types], support.index[n_types:][-n_types:]
        ends[dataset] = {"commonest types": list(common), "rarest types": list(rare)}
        colours = sns.color_palette("viridis", len(common) + len(rare))
        for axis, model in zip(axes[0], models, strict=True):
            runs = select(shown, dataset=dataset, model=model)
            for name, colour in zip([*common, *rare], colours, strict=True):
                mean = select(runs, metric=name).groupby("percentage")["value"].mean()
                places = [style.untrained_place(shown["percentage"]) if size == 0 else size for size in mean.index]
                marks = {"marker": "o" if name in common else "^", "markersize": 4, "color": colour}
                axis.plot(places, mean, label=plain(f"{name} ({support[name]:.0f})"), **marks)
            size_axis(axis, shown, untrained=(shown["percentage"] == 0).any())
            axis.set(title=drawn(model), ylim=(-0.03, 1.03))
        axes[0, 0].set_ylabel(f"{drawn(dataset)}\nF1 of a cell type")
        style.legend(part, axes[0, 0])
    return finish(figure, titles.per_class_curves(shown, ends))


def variants(results: pd.DataFrame, metric: str) -> Figure:
    """A metric against the size of random subsets, a line per model: families by colour, variants by its shade.

    Embeddings that were given, not made, are left out.
    """
    runs = mean_over_splits(select(results, metric=metric, strategy="random"))
    runs = runs[[is_model(name) for name in runs["model"]]]
    if runs.empty:
        return style.nothing("the study has no random subsets")
    datasets, order = runs["dataset"].unique(), [*FAMILIES, *VARIANTS, *runs["model"].unique()]
    models = sorted(runs["model"].unique(), key=order.index)
    families, colours = {name: resolve(name).family for name in models}, {}
    for family, hue in zip(dict.fromkeys(families.values()), itertools.cycle(["Blues", "Oranges", "Greys"])):
        members = [name for name in models if families[name] == family]
        colours |= dict(zip(members, sns.color_palette(hue, len(members) + 2)[2:], strict=True))
    figure, axes = panels(1, len(datasets), 3.4)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for model in models:
            style.curve(axis, select(runs, dataset=dataset, model=model), "value", model, colours[model])
        size_axis(axis, runs)
        axis.set(title=drawn(dataset), ylabel=drawn(metric))
    end = runs["percentage"].max()
    means = sign_of(metric) * select(runs, percentage=end).groupby(["dataset", "model"])["value"].mean()
    best = (f"{label(scores.idxmax()[1])} ({label(dataset)})" for dataset, scores in means.groupby("dataset"))
    return finish(figure, f"Best {label(metric)} at {end:g} % of the corpus: {', '.join(best)}", axes[0, 0])


def budgets(table: pd.DataFrame) -> Figure:
    """Scores after half, once and twice the steps (`verdicts.budgets`), by task and data set (rows) and model."""
    if table.empty:
        return style.nothing("the study checks no budget")
    rows = list(dict.fromkeys(zip(table["task"], table["dataset"], strict=True)))
    models, colours = list(table["model"].unique()), by_size(table["percentage"])
    figure, axes = panels(len(rows), len(models), 1.7 * len(rows) + 1.6, sharey="row", sharex=True)
    for axis, ((task, dataset), model) in zip(axes.flat, itertools.product(rows, models), strict=True):
        for check in select(table, task=task, dataset=dataset, model=model).to_dict("records"):
            scores, size = [check["half"], check["once"], check["twice"]], check["percentage"]
            line = {"color": colours[size], "label": f"{size:g} % of the corpus"}
            axis.plot([0.5, 1, 2], scores, "-o", markersize=4, **line)
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2], ["half", "once", "twice"])
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.yaxis.label.set_size(7)
    names = ["\n".join(map(drawn, (HEADLINE[task], task, dataset))) for task, dataset in rows]
    style.name_panels(axes, map(drawn, models), names)
    changes = titles.listed(table.groupby("model", sort=False)["change"].max(), "{:+.3f}")
    return finish(figure, f"What twice the steps gain at most, over tasks and sizes: {changes}", axes[0, 0])


def loss_and_score(table: pd.DataFrame, metric: str) -> Figure:
    """A downstream score against the pretraining loss that is gone (`results.loss_and_score`), a panel per model."""
    table = style.in_order(table)
    models, colours = list(table["model"].unique()), by_size(table["percentage"])
    if not models:
        return style.nothing("the study has no runs with both a pretraining loss and this score")
    figure, axes = panels(1, len(models), 2.9, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for size, runs in select(table, model=model).groupby("percentage"):
            marks = {"color": colours[size], "markersize": 4, "label": f"{size:g} % of the corpus"}
            axis.plot(runs["explained"], runs["score"], "o", **marks)
        axis.set(title=drawn(model), xlabel=drawn("explained").replace(" loss", "\nloss"))
    axes[0, 0].set_ylabel(drawn(metric))
    correlations = titles.listed(rank_correlations(table), "{:+.2f}")
    says = f"Rank correlation over runs of {label('explained')} and {label(metric)}: {correlations}"
    return finish(figure, says, axes[0, 0])


def beside_published(table: pd.DataFrame) -> Figure:
    """Errors of models here and of the published ones against cells: columns study, dataset, model, n_cells, error."""
    table = style.in_order(table)
    models, studies = list(table["model"].unique()), list(table["study"].unique())
    figure, axes = panels(1, len(models), 3.2, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for (study, _), rows in select(table, model=model).groupby(["study", "dataset"], sort=False):
            number = studies.index(study)
            marks = {"color": style.PALETTE[number], "marker": "o^s"[number], "label": study}
            axis.plot(rows["n_cells"], rows["error"], markersize=4, linewidth=1, **marks)
        axis.set(xscale="log", yscale="log", title=drawn(model), xlabel="pretraining cells")
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(numticks=4))
        axis.yaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="both", which="both", labelsize=7)
    axes[0, 0].set_ylabel("share of cells named wrong")
    cells = table.groupby("study", sort=False)["n_cells"].agg(["min", "max"])
    spans = cells.apply(lambda ends: f"{ends['min']:,.0f} to {ends['max']:,.0f} cells", axis=1)
    return finish(figure, f"Errors against cells, log axes: {titles.listed(spans)}", axes[0, 0])


def scaling(results: pd.DataFrame, predictions: pd.DataFrame, metric: str) -> Figure:
    """Error of random subsets against cells, with the curve of lowest AICc (`scaling.predictions`) and its interval."""
    by_key = {(c.key[3], c.key[0]): c for c in errors_of(select(results, strategy="random"), metric)}
    datasets = sorted({dataset for dataset, _ in by_key})
    models = [name for name in FAMILIES if any(name == model for _, model in by_key)]
    figure, axes = panels(len(datasets), len(models), 2.0 * len(datasets) + 0.6, sharex=True, sharey="row")
    for axis, (dataset, model) in zip(axes.flat, itertools.product(datasets, models), strict=True):
        curve = by_key[dataset, model]
        for n_cells, runs in zip(curve.n_cells, curve.runs, strict=True):
            marks = {"color": STRATEGIES["random"][0], "markersize": 3.5, "alpha": 0.6, "label": "a run"}
            axis.plot([n_cells] * len(runs), runs, "o", **marks)
        fitted = select(predictions, strategy="random", dataset=dataset, model=model).set_index("n_cells")
        error, corpus = fitted["error"], curve.n_cells[-1]
        band = {"color": "0.75", "alpha": 0.7, "linewidth": 0, "label": "interval"}
        axis.fill_between(fitted.index, fitted["low"], fitted["high"], **band)
        axis.plot(error[error.index <= corpus], color="black", linewidth=1.3, label="fitted curve")
        axis.plot(error[error.index >= corpus], "--", color="black", linewidth=1.3, label="beyond the corpus")
        axis.set(xscale="log", yscale="log", xlabel="pretraining cells")
        axis.text(0.97, 0.95, fitted["curve"].iloc[0], transform=axis.transAxes, ha="right", va="top", fontsize=7.5)
        axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    style.name_panels(axes, models, [f"{drawn(dataset)}\n1 - {drawn(metric)}" for dataset in datasets])
    chosen = select(predictions, strategy="random").groupby(["dataset", "model"])["curve"].first().value_counts()
    return finish(figure, f"The best curve of the error, of {chosen.sum()}: {titles.listed(chosen)}", axes[0, 0])


def known_answer(results: pd.DataFrame, begins: pd.Series, planted: pd.Series, title: str) -> Figure:
    """Learning curves of the pairs of `known_answer`, and where nine in ten seeds lie; a plateau `begins` in truth."""
    figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 3.6), layout="constrained")
    bottom = results["value"].min()
    for pair, colour in zip(planted.sort_values().index, style.PALETTE, strict=False):
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
    size_axis(axis, results[["percentage"]])
    axis.set(ylabel=drawn("micro_f1"))
    return finish(figure, title, axis)


def over_lever(means: pd.DataFrame, lever: str, by: str) -> Figure:
    """Errors in 1,000 cells (`walls.means`) over a lever, with 95 % intervals: a line for each value of `by`."""
    panel, values = "dataset" if by == "model" else "model", sorted(means[by].unique())
    names, ticks, ends = list(means[panel].unique()), sorted(means[lever].unique()), {}
    figure, axes = panels(1, len(names), 3.0, sharey=True)
    colours = dict(zip(values, style.PALETTE, strict=False)) if by == "model" else style.by_size(values)
    for axis, name in zip(axes[0], names, strict=True):
        for value in values:
            rows = select(means, **{panel: name, by: value}).sort_values(lever)
            errors = 1000 * rows["error"]
            line = {"color": colours[value], "marker": "o", "markersize": 4, "capsize": 2}
            line["label"] = drawn(value) if by == "model" else f"{_multiple(by, value)} {OF[by]}"
            axis.errorbar(rows[lever], errors, 1.96 * rows["se"] * errors, **line)
            if len(rows):
                ends[value if by == "model" else name] = f"{errors.iloc[0]:.0f} to {errors.iloc[-1]:.0f}"
        axis.set(title=drawn(name), xscale="log", yscale="log", xlabel=LEVERS[lever])
        axis.set_xticks(ticks, [_multiple(lever, tick) for tick in ticks], fontsize=7)
        axis.minorticks_off()
    axes[0, 0].yaxis.set_major_locator(mpl.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("errors in 1,000 cells\n(log scale)")
    says = f"Errors in 1,000 cells from {_multiple(lever, ticks[0])} to {_multiple(lever, ticks[-1])} {OF[lever]}"
    return finish(figure, f"{says}: {titles.listed(ends)}", axes[0, 0])


def _multiple(lever: str, value: float) -> str:
    """A multiple as it is read: of cells and depth as a share, else as a factor."""
    return f"{100 * value:g} %" if lever in ("cells", "depth") else f"{value:g}x"

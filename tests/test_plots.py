"""Every figure says in its title what it shows, by the numbers that it is drawn from."""

import inspect

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from datawall.analysis import results
from datawall.reading import labels, messages, plots, plots_published

STRATEGIES = ("random", "celltype_reweighted", "geometric_sketching")
SAME = {"study": "s", "n_cells": 1, "task": "zeroshot_classification", "metric": "micro_f1", "split": "cells 0"}
COLUMNS = ["model", "dataset", "strategy", "percentage", "seed", "value"]


@pytest.fixture(autouse=True)
def _close():
    with mpl.rc_context({"figure.max_open_warning": 0}):
        yield
    plots.plt.close("all")


@pytest.fixture
def runs():
    """A model that rises to the baseline, one that stays below it and falls, on one data set."""
    rows = [("PCA", "lung", "baseline", 0, -1, 0.9), ("Chance", "lung", "baseline", 0, -1, 0.95)]
    for model, values in {"SSL": (0.7, 0.8, 0.91), "scVI": (0.8, 0.79, 0.71)}.items():
        rows += [(model, "lung", "random", size, 0, value) for size, value in zip((1, 10, 100), values, strict=True)]
        rows += [(model, "lung", "untrained", 0, 0, 0.5), (model, "lung", "spikein_10", 10, 0, values[1] - 0.25)]
    return pd.DataFrame(rows, columns=COLUMNS).assign(**SAME)


@pytest.fixture
def points():
    """Saturation points of three curves by two rules."""
    sizes = {"published": [1, 1, 10], "equivalence": [10, np.nan, np.nan]}
    rows = [
        (model, rule, size, 1, 100)
        for rule, of_rule in sizes.items()
        for model, size in zip(["SSL", "scVI", "Geneformer"], of_rule, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["model", "rule", "percentage", "low", "high"])
    return table.assign(strategy="random", task="zeroshot_classification", dataset="lung", verdict="undecided")


@pytest.fixture
def figures(runs, points):
    """A figure by each public function of both modules, and what its title must say."""
    published = results.select(points, rule="published")
    markers = pd.DataFrame([[1.0, -1, 0], [-1, 1, 0.5]], ["T", "B"], ["x", "y", "z"])
    shares = [(s, 1.0, 0, t, share) for s in STRATEGIES for t, share in (("T", 0.7), ("B", 0.3))]
    shares = pd.DataFrame(shares, columns=["strategy", "percentage", "seed", "cell_type", "share"])
    diverse = pd.DataFrame(
        [(s, p, v * p, 1.5, 9.0) for v, s in enumerate(STRATEGIES, 2) for p in (1, 10)],
        columns=["strategy", "percentage", "inverse_simpson", "shannon", "vendi"],
    )
    genes = pd.DataFrame({"dataset": ["real"] * 4, "mean": [0.1, 1, 2, 4], "variance": [0.2, 2, 3, 3], "zeros": 0.5})
    cells = pd.DataFrame({"dataset": "real", "n_genes": [300, 400, 700], "library_size": [500, 900, 999]})
    losses = [("SSL", p, "random", 0, step, loss) for p, loss in ((1, 0.1), (100, 0.2)) for step in (1, 2)]
    losses = pd.DataFrame(losses, columns=["model", "percentage", "strategy", "seed", "step", "loss"])
    f1 = [("T", 90, 1, 0.9), ("T", 90, 100, 0.95), ("B", 5, 1, 0.2), ("B", 5, 100, 0.6)]
    f1 = pd.DataFrame(f1, columns=["cell_type", "support", "percentage", "f1"])
    f1 = f1.assign(model="SSL", dataset="lung", strategy="random", seed=0, **SAME)
    layout = pd.DataFrame({"x": [0, 1], "y": [0, 1], "cell_type": ["T", "B"]})
    predictions = pd.DataFrame({"model": "SSL", "dataset": "lung", "strategy": "random", "n_cells": [1, 2]})
    predictions = predictions.assign(error=0.3, low=0.2, high=0.4, curve="power law")
    effects = pd.DataFrame({"model": ["SSL", "scVI"], "difference": [0.1, -0.1], "p_adjusted": [0.01, 0.2]})
    effects = effects.assign(task="t", strategy="geometric_sketching", low=-0.1, high=0.2)
    seconds = pd.DataFrame({"model": ["SSL", "scVI"], "seconds": [2.0, 30.0]})
    checked = pd.DataFrame({"model": ["SSL", "scVI"], "change": [0.03, -0.01], "half": 0.7, "once": 0.8, "twice": 0.83})
    checked = checked.assign(task="reconstruction", dataset="lung", percentage=10.0)
    both = pd.DataFrame({"model": ["SSL"] * 3 + ["scVI"] * 3, "percentage": [1.0, 10, 100] * 2})
    both = both.assign(explained=[0.1, 0.2, 0.3] * 2, score=[0.7, 0.8, 0.9, 0.9, 0.8, 0.7])
    sized = pd.DataFrame({"study": ["this corpus"] * 2 + ["published"], "n_cells": [98, 9799, 177525]})
    sized = sized.assign(dataset="lung", model="SSL", error=[0.2, 0.1, 0.05])
    curves = "rises by over 0.02 in 1 of 2 curves, falls in 1;\nbeside the best baseline, at the best of their sizes: "
    curves += "none above, 1 level (SSL), 1 below (scVI)"
    types = "Effective number of cell types at 1 % of the corpus: random 2, cell-type reweighted 3, geometric sketch 4"
    return {
        "plots.composition": (plots.composition(shares), "Share of T in subsets of 1 % of the corpus: random 70 %"),
        "plots.diversity": (plots.diversity(diverse), types),
        "plots.realism": (plots.realism(genes, cells), "more than Poisson: real 75 %;\n"),
        "plots.markers": (plots.markers(markers), "2 of 2 cell types stand out, each highest in some of 3 markers"),
        "plots.loss_curves": (plots.loss_curves(losses), "the subset of 1 % of the corpus ends with the lowest loss"),
        "plots.learning_curves": (plots.learning_curves(runs, "micro_f1"), curves),
        "plots.per_class_curves": (
            plots.per_class_curves(f1, n_types=1),
            "lung, commonest types: +0.05; lung, rarest types: +0.40",
        ),
        "plots.budgets": (
            plots.budgets(checked),
            "What twice the steps gain at most, over tasks and sizes: SSL +0.030, scVI -0.010",
        ),
        "plots.loss_and_score": (
            plots.loss_and_score(both, "micro_f1"),
            "Rank correlation over runs of share of chance loss gone and micro-F1: SSL +1.00, scVI -1.00",
        ),
        "plots_published.beside_published": (
            plots_published.beside_published(sized),
            "Errors against cells, log axes: this corpus 98 to 9,799 cells, published 177,525 to 177,525 cells",
        ),
        "plots.variants": (plots.variants(runs, "micro_f1"), "Best micro-F1 at 100 % of the corpus: SSL (lung)"),
        "plots.embeddings": (plots.embeddings({"a": layout}, ["cell_type"], "Types lie apart"), "Types lie apart"),
        "plots_published.learning_curves": (plots_published.learning_curves(runs, "micro_f1"), curves),
        "plots_published.saturation_map": (
            plots_published.saturation_map(results.select(points, rule="equivalence"), "equivalence"),
            "By equivalence, 1 of 3 curves are saturated at 10 % of the corpus, 2 at none that is shown",
        ),
        "plots_published.verdict_map": (
            plots_published.verdict_map(published, "Is it shown?"),
            "Is it shown?\nOf 3 curves, 0 plateau, 3 undecided and 0 still improving",
        ),
        "plots_published.spike_ins": (plots_published.spike_ins(runs, "micro_f1"), "10 % perturbed cells -0.250"),
        "plots_published.diversity": (plots_published.diversity(diverse), types),
        "plots_published.untrained": (
            plots_published.untrained(
                pd.concat(runs.assign(dataset=name) for name in "abcd"), {"zeroshot_classification": "micro_f1"}
            ),
            "zero-shot classification 0.31",
        ),
        "plots_published.embedding_seconds": (
            plots_published.embedding_seconds(seconds),
            "15 times as long as SSL: scVI",
        ),
        "plots_published.scaling": (
            plots_published.scaling(results.select(runs, model="SSL"), predictions, "micro_f1"),
            "The best curve of the error, of 1: power law 1",
        ),
        "plots_published.rules": (plots_published.rules(points, "Here"), "published 2 of 3, equivalence none of 3"),
        "plots_published.cells_saved": (plots_published.cells_saved(points), "published 96 %, equivalence 30 %"),
        "plots_published.known_answer": (
            plots_published.known_answer(
                results.select(runs, strategy="random", model="SSL"),
                pd.Series({"lung": 1.0}),
                pd.Series({"lung": 3.0}),
                "A plateau is planted",
            ),
            "A plateau is planted",
        ),
        "plots_published.effects": (
            plots_published.effects(effects, "Worth?"),
            "in 1 of 2 comparisons: 1 better, 0 worse",
        ),
    }


def test_every_figure_has_a_title_that_says_what_it_shows(figures):
    public = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (plots, plots_published)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and function.__module__ == module.__name__
        and inspect.signature(function).return_annotation == "Figure"
    }
    assert set(figures) == public
    for name, (figure, says) in figures.items():
        title = figure.get_suptitle()
        assert says.replace("\n", " ") in title.replace("\n", " "), (name, title)
        assert name == "plots.embeddings" or len(title.split()) > 3


def test_titles_stay_within_the_page_and_off_the_panels(figures):
    for name, (figure, _) in figures.items():
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert title.x0 >= 0, name
        assert title.x1 <= figure.bbox.x1, name
        assert title.y1 <= figure.bbox.y1, name
        for axis in figure.axes:
            panel = axis.get_tightbbox() if axis.get_visible() else None
            assert panel is None or not title.overlaps(panel), name


@pytest.mark.parametrize("sizes", [(1,), (1, 100)])
def test_titles_hold_for_one_model_and_one_size(runs, sizes):
    few = runs[(runs["model"] != "scVI") & runs["percentage"].isin([0, *sizes])]
    title = plots.learning_curves(few, "micro_f1").get_suptitle()
    grown = "in 1 of 1 curves" in title
    assert grown == (len(sizes) > 1)
    place = "none above, 1 level (SSL), none below" if grown else "none above, none level, 1 below (SSL)"
    assert place in title


def test_an_error_falls_and_is_beside_no_baseline(runs):
    losses = runs.assign(metric="loss", value=1 - runs["value"])
    assert messages.learning_curves(losses, "loss").endswith("falls in 1 of 2 curves")


def test_embeddings_are_named_with_their_scores():
    scores = pd.Series([0.5, 0.7, 0.2], ["SSL", "mine:Model", "SSL"])
    assert messages.embeddings(scores, "avg_bio") == "AvgBIO is highest in Model (0.70) and lowest in SSL (0.20)"


def test_only_known_diversity_is_told():
    table = pd.DataFrame({"strategy": ["random", "spikein_10"], "percentage": 1, "inverse_simpson": [31.2, np.nan]})
    assert messages.diversity(table) == "Effective number of cell types at 1 % of the corpus: random 31"


def test_a_study_without_random_subsets_says_so(runs):
    few = runs[runs["strategy"] != "random"]
    assert messages.learning_curves(few, "micro_f1").startswith("The study has no random subsets")


def test_models_of_ones_own_go_by_their_class():
    assert labels.label("mymodel:SVD") == "SVD"
    assert labels.label("scvi_2x") == "scvi_2x"

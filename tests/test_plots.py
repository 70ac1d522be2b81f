"""Every figure says in its title what it shows, by the numbers that it is drawn from."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from datawall import tasks
from datawall.analysis import effects, known_answer, published, saturation, scaling
from datawall.analysis.results import select
from datawall.models.hyperparameters import FAMILIES
from datawall.reading import plots, titles
from datawall.reading.plots import maps, style

STRATEGIES = ("random", "celltype_reweighted", "geometric_sketching")
SAME = {"study": "s", "n_cells": 1, "task": "zeroshot_classification", "metric": "micro_f1", "split": "cells 0"}
COLUMNS = ["model", "dataset", "strategy", "percentage", "seed", "value"]


@pytest.fixture(scope="module", autouse=True)
def _close():
    with mpl.rc_context({"figure.max_open_warning": 0}):
        yield
    plots.plt.close("all")


@pytest.fixture(scope="module")
def runs():
    """A model that rises to the baseline, one that stays below it and falls, on one data set."""
    rows = [("PCA", "lung", "baseline", 0, -1, 0.9), ("Chance", "lung", "baseline", 0, -1, 0.95)]
    for model, values in {"SSL": (0.7, 0.8, 0.91), "scVI": (0.8, 0.79, 0.71)}.items():
        rows += [(model, "lung", "random", size, 0, value) for size, value in zip((1, 10, 100), values, strict=True)]
        rows += [(model, "lung", "untrained", 0, 0, 0.5), (model, "lung", "spikein_10", 10, 0, values[1] - 0.25)]
    return pd.DataFrame(rows, columns=COLUMNS).assign(**SAME)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def figures(runs, points):
    """A figure by each public function of both modules, and what its title must say."""
    published = select(points, rule="published")
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
    given = pd.concat([runs, runs.assign(model="UCE")])
    both = pd.DataFrame({"model": ["SSL"] * 3 + ["scVI"] * 3, "percentage": [1.0, 10, 100] * 2})
    both = both.assign(explained=[0.1, 0.2, 0.3] * 2, score=[0.7, 0.8, 0.9, 0.9, 0.8, 0.7])
    sized = pd.DataFrame({"study": ["this corpus"] * 2 + ["published"], "n_cells": [98, 9799, 177525]})
    sized = sized.assign(dataset="lung", model="SSL", error=[0.2, 0.1, 0.05])
    curves = "rises by over 0.02 in 1 of 2 curves, falls in 1;\nbeside the best baseline, at the best of their sizes: "
    curves += "none above, 1 level (SSL), 1 below (scVI)"
    four = pd.concat(runs.assign(dataset=name) for name in "abcd")
    rising = select(runs, strategy="random", model="SSL")
    begins, needed = pd.Series({"lung": 1.0}), pd.Series({"lung": 3.0})
    types = "Effective number of cell types at 1 % of the corpus: random 2, cell-type reweighted 3, geometric sketch 4"
    tried = pd.DataFrame({"model": "SSL", "cells": 1.0, "steps": [0.25, 1, 4], "error": [0.02, 0.012, 0.01], "se": 0.1})
    levers = "Errors in 1,000 cells from 0.25x to 4x the steps: SSL 20 to 10"
    sizes = "Errors against cells, log axes: this corpus 98 to 9,799 cells, published 177,525 to 177,525 cells"
    saturated = "By equivalence, 1 of 3 curves are saturated at 10 % of the corpus, 2 at none that is shown"
    undecided = "Is it shown?\nOf 3 curves, 0 plateau, 3 undecided and 0 still improving"
    worth = pd.DataFrame({"model": "SSL", "suspect": ["data", "width"], "gain": [1.0, 2], "low": 0, "high": 3})
    worth = worth.assign(dataset="kang2018")
    return {
        "composition": (plots.composition(shares), "Share of T in subsets of 1 % of the corpus: random 70 %"),
        "diversity": (plots.diversity(diverse), types),
        "realism": (plots.realism(genes, cells), "more than Poisson: real 75 %;\n"),
        "markers": (plots.markers(markers), "2 of 2 cell types stand out, each highest in some of 3 markers"),
        "loss_curves": (plots.loss_curves(losses), "the subset of 1 % of the corpus ends with the lowest loss"),
        "learning_curves": (plots.learning_curves(runs, "micro_f1"), curves),
        "per_class_curves": (plots.per_class_curves(f1, n_types=1), "types: +0.05; lung, rarest types: +0.40"),
        "budgets": (plots.budgets(checked), "at most, over tasks and sizes: SSL +0.030, scVI -0.010"),
        "loss_and_score": (plots.loss_and_score(both, "micro_f1"), "gone and micro-F1: SSL +1.00, scVI -1.00"),
        "beside_published": (plots.beside_published(sized), sizes),
        "variants": (plots.variants(given, "micro_f1"), "Best micro-F1 at 100 % of the corpus: SSL (lung)"),
        "embeddings": (plots.embeddings({"a": layout}, ["cell_type"], "Types lie apart"), "Types lie apart"),
        "saturation_map": (plots.saturation_map(select(points, rule="equivalence"), "equivalence"), saturated),
        "verdict_map": (plots.verdict_map(published, "Is it shown?"), undecided),
        "spike_ins": (plots.spike_ins(runs, "micro_f1"), "10 % perturbed cells -0.250"),
        "untrained": (plots.untrained(four, {"zeroshot_classification": "micro_f1"}), "zero-shot classification 0.31"),
        "embedding_seconds": (plots.embedding_seconds(seconds), "15 times as long as SSL: scVI"),
        "scaling": (plots.scaling(rising, predictions, "micro_f1"), "The best curve of the error, of 1: power law 1"),
        "rules": (plots.rules(points, "Here"), "published 2 of 3, equivalence none of 3"),
        "cells_saved": (plots.cells_saved(points), "published 96 %, equivalence 30 %"),
        "known_answer": (plots.known_answer(rising, begins, needed, "A plateau is planted"), "A plateau is planted"),
        "effects": (plots.effects(effects, "Worth?"), "in 1 of 2 comparisons: 1 better, 0 worse"),
        "over_lever": (plots.over_lever(tried, "steps", "cells"), levers),
        "suspects": (plots.suspects(worth, 0.005), "Gains most, if one thing is doubled or swapped: SSL width"),
    }


def test_every_figure_has_a_title_that_says_what_it_shows(figures):
    public = {name for name in dir(plots) if name not in dir(style)}
    assert set(figures) == public
    for name, (figure, says) in figures.items():
        title = figure.get_suptitle()
        assert says.replace("\n", " ") in title.replace("\n", " "), (name, title)
        assert name == "embeddings" or len(title.split()) > 3


def test_titles_stay_within_the_page_and_off_the_panels(figures):
    for name, (figure, _) in figures.items():
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert 0 <= title.x0 < title.x1 <= figure.bbox.x1, name
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
    assert titles.learning_curves(losses, "loss").endswith("falls in 1 of 2 curves")


def test_embeddings_are_named_with_their_scores():
    scores = pd.Series([0.5, 0.7, 0.2], ["SSL", "mine:Model", "SSL"])
    assert titles.embeddings(scores, "avg_bio") == "AvgBIO is highest in Model (0.70) and lowest in SSL (0.20)"


def test_only_known_diversity_is_told():
    table = pd.DataFrame({"strategy": ["random", "spikein_10"], "percentage": 1, "inverse_simpson": [31.2, np.nan]})
    title = plots.diversity(table.assign(shannon=1.0, vendi=1.0)).get_suptitle()
    assert title == "Effective number of cell types at 1 % of the corpus: random 31"


def test_a_study_without_random_subsets_says_so(runs):
    few = runs[runs["strategy"] != "random"]
    assert titles.learning_curves(few, "micro_f1").startswith("The study has no random subsets")
    plots.learning_curves(runs[:0], "micro_f1")  # of a task that is left out


# Figures of a study of the published one's size


@pytest.fixture(scope="module")
def published_results():
    return published.results()


@pytest.fixture(scope="module")
def classification(published_results):
    spiked = published_results["strategy"].str.startswith("spikein")
    return select(published_results[~spiked], task="zeroshot_classification")


@pytest.fixture(scope="module")
def equivalence(classification):
    return saturation.saturation_points(classification, "micro_f1", rule="equivalence", margin=0.01, n_resamples=0)


def written(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def panels(figure):
    figure.draw_without_rendering()
    return [axis for axis in figure.axes if axis.get_visible()]


def legend(figure):
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def drawn(figure):
    """Horizontal places of the first panel's lines, by label."""
    return {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}


def test_learning_curves_have_a_panel_for_each_model_and_data_set(classification):
    figure = plots.learning_curves(classification, "micro_f1")
    assert len(panels(figure)) == 20
    assert [axis.get_title() for axis in figure.axes[:5]] == list(FAMILIES)
    ticks = {tick.get_text() for axis in figure.axes for tick in axis.get_xticklabels()}
    assert ticks == {"", "0", "1\n178k", "10\n1.8M", "100\n17.8M"}
    assert "PCA" in legend(figure)


def test_a_map_shows_every_point_and_a_dash_where_there_is_none(equivalence):
    shown = written(plots.saturation_map(equivalence, "a rule"))
    assert len(shown) == 60
    assert shown.count("–") == equivalence["percentage"].isna().sum() > 0
    assert shown.count("10") == (equivalence["percentage"] == 10).sum() > 0


def test_a_map_of_verdicts_has_a_sign_for_each(equivalence):
    figure = plots.verdict_map(equivalence, "verdicts")
    counts, shown = equivalence["verdict"].value_counts(), written(figure)
    signs = {"plateau": "=", "undecided": "?", "budget-limited": "b", "still improving": "↑"}
    expected = {name: counts.get(name, 0) for name in maps.VERDICTS}
    assert {name: shown.count(sign) for name, sign in signs.items()} == expected
    assert len(legend(figure)) == 3


def test_spike_ins_are_beside_random_subsets(published_results):
    figure = plots.spike_ins(select(published_results, task="zeroshot_integration"), "avg_bio")
    assert [axis.get_title() for axis in panels(figure)[:3]] == ["scVI", "SSL", "Geneformer"]
    assert len(panels(figure)) == 6
    assert legend(figure) == ["random", "10 % perturbed cells", "50 % perturbed cells"]


def test_diversity_of_subsets_and_seconds_to_embed():
    figure = plots.diversity(published.diversity())
    assert len(legend(figure)) == 5
    labels = [axis.get_ylabel() for axis in panels(figure)]
    assert labels == ["Shannon (bits)", "inverse Simpson (types)", "Vendi (cells)"]
    figure = plots.embedding_seconds(published.embedding_seconds())
    assert sorted(written(figure), key=float) == ["0.522", "1.23", "1.66", "3.88", "116", "174"]


def test_untrained_models_stand_at_their_means(published_results):
    headline = {task: of for task, of in tasks.HEADLINE.items() if task in set(published_results["task"])}
    figure = plots.untrained(published_results, headline)
    assert len(panels(figure)) == 16
    shown = select(published_results, task="zeroshot_classification", dataset="hematopoiesis", metric="micro_f1")
    means = select(shown, strategy="untrained").groupby("model")["value"].mean()
    np.testing.assert_allclose(drawn(figure)["untrained"], means[list(FAMILIES)])


def test_fitted_curves_are_solid_within_the_corpus_and_dashed_beyond(classification):
    shown = select(classification, strategy="random", model="SCimilarity")
    figure = plots.scaling(shown, scaling.predictions(shown, "micro_f1"), "micro_f1")
    assert len(panels(figure)) == 4
    assert drawn(figure)["fitted curve"].max() <= 100 * published.CELLS_PER_PERCENT
    assert drawn(figure)["beyond the corpus"].min() >= 100 * published.CELLS_PER_PERCENT
    assert written(figure) == ["power law"] * 4


def test_pairs_of_the_known_answer_are_named_and_their_plateaus_ringed():
    known = known_answer.results()
    begins = known_answer.plateaus(known)
    figure = plots.known_answer(known, begins, known_answer.percentage_needed(), "a title")
    assert sorted(written(figure)) == ["B cells", "T cells", "monocytes"]
    hollow = [line.get_xdata() for line in figure.axes[0].lines if line.get_fillstyle() == "none"]
    assert sorted(x[0] for x in hollow if len(x)) == sorted(begins[np.isfinite(begins)])
    assert legend(figure) == ["plateau begins", "cells needed, as planted"]


def test_rules_and_costs_have_a_dot_for_each_rule(classification):
    points = pd.concat(
        saturation.saturation_points(classification, "micro_f1", rule=rule, n_resamples=20).assign(rule=rule)
        for rule in maps.RULES
    )
    figure = plots.rules(select(points, strategy="random"), "rules")
    assert len(panels(figure)) == 4
    assert legend(figure) == list(maps.RULES)
    expected = select(points, strategy="random", dataset="hematopoiesis", rule="error").set_index("model")["percentage"]
    np.testing.assert_array_equal(drawn(figure)["error"], expected[list(FAMILIES)])
    assert (drawn(figure)["equivalence"] > 100).all()  # none established, at the right
    assert all(np.isfinite(line.get_xdata()).all() for axis in figure.axes for line in axis.lines)

    figure = plots.cells_saved(points)
    saved = 100 - select(points, rule="published").groupby("model")["percentage"].mean()
    np.testing.assert_allclose(drawn(figure)["published"], saved[list(FAMILIES)])
    assert (drawn(figure)["equivalence"] == 0).all()


def test_effects_are_in_points_of_score(classification):
    table = effects.strategy_effects(select(classification, model="scVI"), "micro_f1")
    expected = table.set_index("strategy")["difference"]["celltype_reweighted"]
    assert drawn(plots.effects(table, "effects"))["cell-type reweighted"] == pytest.approx([100 * expected])

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from datawall import tasks
from datawall.analysis import effects, known_answer, published, saturation, scaling
from datawall.analysis.results import select
from datawall.reading import plots_published as figures
from datawall.reading.plots import plt


@pytest.fixture(autouse=True)
def _close():
    with mpl.rc_context():
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    return published.results()


@pytest.fixture(scope="module")
def classification(results):
    return select(results[~results["strategy"].str.startswith("spikein")], task="zeroshot_classification")


def written(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def panels(figure):
    figure.draw_without_rendering()
    return [axis for axis in figure.axes if axis.get_visible()]


def legend(figure):
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def test_learning_curves_have_a_panel_for_each_model_and_data_set(classification):
    figure = figures.learning_curves(classification, "micro_f1")
    assert len(panels(figure)) == 20
    assert [axis.get_title() for axis in figure.axes[:5]] == figures.MODELS
    ticks = {tick.get_text() for axis in figure.axes for tick in axis.get_xticklabels()}
    assert ticks == {"", "0", "1\n178k", "10\n1.8M", "100\n17.8M"}
    assert "PCA" in legend(figure)


def test_a_map_shows_every_point_and_a_dash_where_there_is_none(classification):
    points = saturation.saturation_points(classification, "micro_f1", rule="equivalence", margin=0.01, n_resamples=0)
    shown = written(figures.saturation_map(points, "a rule"))
    assert len(shown) == 60
    assert shown.count("–") == points["percentage"].isna().sum() > 0
    assert shown.count("10") == (points["percentage"] == 10).sum() > 0


def test_a_map_of_verdicts_has_a_sign_for_each(classification):
    verdicts = saturation.saturation_points(classification, "micro_f1", rule="equivalence", margin=0.01, n_resamples=0)
    figure = figures.verdict_map(verdicts, "verdicts")
    counts = verdicts["verdict"].value_counts()
    shown = written(figure)
    assert {
        name: shown.count(sign)
        for name, sign in zip(("plateau", "undecided", "budget-limited", "still improving"), "=?b↑", strict=True)
    } == {name: counts.get(name, 0) for name in figures.VERDICTS}
    assert len(legend(figure)) == 3


def test_spike_ins_are_beside_random_subsets(results):
    figure = figures.spike_ins(select(results, task="zeroshot_integration"), "avg_bio")
    assert [axis.get_title() for axis in panels(figure)[:3]] == ["scVI", "SSL", "Geneformer"]
    assert len(panels(figure)) == 6
    assert legend(figure) == ["random", "10 % perturbed cells", "50 % perturbed cells"]


def test_diversity_of_subsets_and_seconds_to_embed():
    figure = figures.diversity(published.diversity())
    assert len(legend(figure)) == 5
    assert [axis.get_ylabel() for axis in panels(figure)] == [
        "Shannon (bits)",
        "inverse Simpson (types)",
        "Vendi (cells)",
    ]
    figure = figures.embedding_seconds(published.embedding_seconds())
    assert sorted(written(figure), key=float) == ["0.522", "1.23", "1.66", "3.88", "116", "174"]


def test_untrained_models_stand_at_their_means(results):
    figure = figures.untrained(
        results, {task: of for task, of in tasks.HEADLINE.items() if task in set(results["task"])}
    )
    assert len(panels(figure)) == 16
    (untrained,) = [line for line in figure.axes[0].lines if line.get_label() == "untrained"]
    shown = select(results, task="zeroshot_classification", dataset="hematopoiesis", metric="micro_f1")
    means = select(shown, strategy="untrained").groupby("model")["value"].mean()
    np.testing.assert_allclose(untrained.get_xdata(), means[figures.MODELS])


def test_fitted_curves_are_solid_within_the_corpus_and_dashed_beyond(classification):
    shown = select(classification, strategy="random", model="SCimilarity")
    figure = figures.scaling(shown, scaling.predictions(shown, "micro_f1", n_resamples=20), "micro_f1")
    assert len(panels(figure)) == 4
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["fitted curve"].get_xdata().max() <= 100 * published.CELLS_PER_PERCENT
    assert lines["beyond the corpus"].get_xdata().min() >= 100 * published.CELLS_PER_PERCENT
    assert written(figure) == ["power law"] * 4


def test_pairs_of_the_known_answer_are_named_and_their_plateaus_ringed():
    known = known_answer.results()
    begins = known_answer.plateaus(known)
    figure = figures.known_answer(known, begins, known_answer.percentage_needed(), "a title")
    assert sorted(written(figure)) == ["B cells", "T cells", "monocytes"]
    rings = [
        line.get_xdata()[0] for line in figure.axes[0].lines if line.get_fillstyle() == "none" and len(line.get_xdata())
    ]
    assert sorted(rings) == sorted(begins[np.isfinite(begins)])
    assert legend(figure) == ["plateau begins", "cells needed, as planted"]


def test_rules_and_costs_have_a_dot_for_each_rule(classification):
    points = pd.concat(
        saturation.saturation_points(classification, "micro_f1", rule=rule, n_resamples=20).assign(rule=rule)
        for rule in figures.RULES
    )
    figure = figures.rules(select(points, strategy="random"), "rules")
    assert len(panels(figure)) == 4
    assert legend(figure) == list(figures.RULES)
    dots = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    expected = select(points, strategy="random", dataset="hematopoiesis", rule="error").set_index("model")["percentage"]
    np.testing.assert_array_equal(dots["error"], expected[figures.MODELS])
    assert (dots["equivalence"] > 100).all()  # none established, at the right

    figure = figures.cells_saved(points)
    dots = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    saved = 100 - select(points, rule="published").groupby("model")["percentage"].mean()
    np.testing.assert_allclose(dots["published"], saved[figures.MODELS])
    assert (dots["equivalence"] == 0).all()


def test_effects_are_in_points_of_score(classification):
    table = effects.strategy_effects(select(classification, model="scVI"), "micro_f1")
    figure = figures.effects(table, "effects")
    dots = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    expected = table.set_index("strategy")["difference"]["celltype_reweighted"]
    assert dots["cell-type reweighted"] == pytest.approx([100 * expected])

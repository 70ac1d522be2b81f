from itertools import product

import numpy as np
import pandas as pd
import pytest
from benchmarks import power
from hypothesis import given, settings
from hypothesis import strategies as st
from result_tables import curve, table
from scipy import stats
from small import small_study

from datawall.analysis import adaptive
from datawall.analysis.adaptive import Plan, settle
from datawall.analysis.results import mean_over_splits, read_results, select
from datawall.analysis.saturation import saturation_points
from datawall.study import evaluation, model, questions

GRID = (1, 10, 25, 50, 75, 100)


def oracle(score, *, noise=0.002, seed=0):
    """A made-up model; counts how often it is asked."""

    def run(percentage, number):
        asked.append((percentage, number))
        rng = np.random.default_rng([seed, int(percentage), number])
        return score(percentage) + noise * rng.standard_normal()

    asked = run.asked = []
    return run


@pytest.mark.parametrize(
    ("score", "verdict", "begins"),
    [
        (lambda p: 0.6 + 0.1 * np.log10(min(p, 10)), "plateau", 10),
        (lambda p: 0.4 + 0.2 * np.log10(p), "still improving", np.nan),
    ],
)
def test_a_curve_is_followed_to_where_its_plateau_begins_or_to_the_end(score, verdict, begins):
    found = settle(oracle(score), Plan(margin=0.02, percentages=GRID))
    assert found.verdict == verdict
    np.testing.assert_equal(found.percentage, begins)
    assert found.share < 0.4 if verdict == "plateau" else {50, 100} <= set(found.runs["percentage"])


def test_a_flat_curve_settles_on_two_runs_of_three_sizes():
    run = oracle(lambda percentage: 0.8, noise=0.0005)
    found = settle(run, Plan(margin=0.02, percentages=GRID))
    assert (found.verdict, found.percentage) == ("plateau", 1)
    assert run.asked == [(1, 0), (1, 1), (10, 0), (10, 1), (100, 0), (100, 1)]
    assert found.share == pytest.approx(6 / 30)
    assert found.runs[["percentage", "seed"]].to_numpy().tolist() == [list(each) for each in run.asked]
    assert "beyond 1 %" in found.reason


def test_noise_leaves_it_undecided_at_the_end_of_the_budget():
    for budget in (0.4, 1.0):
        run = oracle(lambda percentage: 0.8, noise=0.2)
        found = settle(run, Plan(margin=0.02, percentages=GRID, budget=budget))
        assert found.verdict == "undecided"
        assert 0.3 < found.share <= budget
        assert len(set(run.asked)) == len(run.asked)  # nothing is run twice
    assert len(run.asked) == 30  # all of the grid, in the end


@pytest.mark.parametrize("grid", [GRID, (1, 2, 5, 10, 25, 50, 100)])
def test_what_comes_late_is_not_called_a_plateau(grid):
    """Two points in every doubling from there on, or none; 72 draws of each start: an error of 2.6 % at 5 %."""
    rng, found = np.random.default_rng(0), []
    spreads = (0.002, 0.005, 0.01, 0.02)
    for begins, draw in product((10, 25, 50), range(72)):
        noise = spreads[draw % 4] * rng.standard_normal((len(grid), 5))
        levels = 0.7 + 0.02 * np.log2(np.maximum(np.array(grid) / begins, 1))
        scores = dict(zip(grid, levels[:, None] + noise, strict=True))
        found.append(settle(lambda p, seed, of=scores: of[p][seed], Plan(margin=0.01, percentages=grid)))
    verdicts = np.array([of.verdict for of in found]).reshape(3, 72)
    assert (np.mean(verdicts == "plateau", axis=1) <= 0.05).all()  # wherever it begins
    assert (np.mean(verdicts == "still improving", axis=1) > 0.6).all()
    assert all((of.runs["percentage"] == 100).sum() >= 2 for of in found)


def test_what_is_still_to_come_is_the_larger_of_a_line_and_a_difference():
    scores = {1: [0.70, 0.71], 10: [0.76, 0.77], 100: [0.77, 0.79]}
    plan = Plan(margin=0.02, percentages=GRID)
    of_all, of_two = adaptive.still_to_come(scores, plan)
    x, y = np.log2([1, 1, 10, 10, 100, 100]), np.concatenate(list(scores.values()))
    slope, intercept = np.polyfit(x, y, 1)
    error = np.sqrt(((y - slope * x - intercept) ** 2).sum() / 4 / ((x - x.mean()) ** 2).sum())
    assert plan.test_confidence() == pytest.approx(0.99)  # five sizes where a plateau may begin share the doubt of 5 %
    upper = slope + stats.t.ppf(0.99, 4) * error
    assert of_all == pytest.approx((1, slope * np.log2(100), upper * np.log2(100)))
    late = {1: [0.70, 0.71], 10: [0.70, 0.71], 25: [0.70, 0.71], 100: [0.73, 0.74]}
    _, expected, at_most = adaptive.still_to_come(late, plan)[0]
    assert expected == pytest.approx(0.03)  # which a line takes for less
    interval = stats.ttest_ind([0.73, 0.74], [0.70, 0.71] * 3).confidence_interval(0.98)
    assert at_most >= interval.high - 0.002
    assert of_two[0] == 10


def test_on_all_runs_of_a_curve_that_is_no_line_the_equivalence_rule_decides():
    noise = np.array([-0.001, 0, 0.001])
    scores = {1: 0.5 + noise, 10: 0.6 + noise, 25: 0.7 + noise, 50: 0.7 + noise, 75: 0.65 + noise, 100: 0.8 + noise}
    verdict, percentage, reason = adaptive.decide(scores, Plan(margin=0.02, percentages=GRID))
    assert reason == "by the rule equivalence"
    point = saturation_points(table(*curve(scores)), "micro_f1", rule="equivalence", margin=0.02).iloc[0]
    assert verdict == point["verdict"] == "still improving"
    assert np.isnan(percentage)
    assert np.isnan(point["percentage"])


def test_ladder():
    ladders = {(1, 2, 5, 10, 25, 50, 100): [1, 5, 25, 100], (1, 10, 25, 50, 75, 100): [1, 10, 100]}
    ladders |= {(50, 100): [50, 100], (0.1, 1, 10): [0.1, 1, 10]}
    assert {sizes: Plan(margin=0.1, percentages=sizes).ladder() for sizes in ladders} == ladders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentages": (100,)}, "two or more"),
        ({"percentages": (10, 1)}, "ascending"),
        ({"percentages": (0, 100)}, "above 0"),
        ({"first_seeds": 1}, "at least 2"),
        ({"first_seeds": 6}, "at most the 5 seeds"),
        ({"margin": 0}, "above 0"),
        ({"budget": 0.1}, "first sizes"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"margin": 0.1} | settings)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    noise=st.floats(0, 0.1),
    margin=st.floats(0.001, 0.5),
    budget=st.floats(0.2, 1),
    seed=st.integers(0, 9),
)
def test_budget_and_grid_are_kept_whatever_comes(levels, noise, margin, budget, seed):
    run = oracle(lambda percentage: levels[GRID.index(percentage)], noise=noise, seed=seed)
    found = settle(run, Plan(margin=margin, percentages=GRID, budget=budget))
    assert len(set(run.asked)) == len(run.asked) == len(found.runs) <= budget * 30
    assert found.verdict in ("plateau", "still improving", "undecided")
    assert np.isnan(found.percentage) == (found.verdict != "plateau")


def test_replay_turns_a_metric_that_is_better_when_lower():
    """Of made-up runs, a task for each truth; data sets are its curves."""
    rows = []
    for truth in ("plateau at 1 %", "plateau at 25 %", "improves, .25 to .125"):
        for number, scores in enumerate(power.simulated(truth, 12, 5)):
            by_size = dict(zip(power.SIZES, scores, strict=True))
            rows += curve(by_size, task=truth, dataset=f"curve {number}", metric="score")
    results = table(*rows)
    lower = results.assign(metric="mse", value=1 - results["value"])
    scored, turned = (adaptive.replay(of, of["metric"][0], Plan(margin=power.MARGIN)) for of in (results, lower))
    assert scored["full"].equals(turned["full"])
    assert scored.set_index("task")["full"].to_dict() == {
        "plateau at 1 %": "plateau", "plateau at 25 %": "plateau", "improves, .25 to .125": "still improving",
    }  # fmt: skip


# A study


GROWN = {
    "corpus": "simulated", "held_out": 0.5, "strategies": ["random", "celltype_reweighted", "untrained"],
    "percentages": [5, 25, 50, 100], "seeds": [0, 1, 2], "splits": 1,
    "simulation": {"n_cells": 400, "n_genes": 300, "composition": {"classical monocyte": 2, "naive B cell": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    study = small_study(tmp_path_factory.mktemp("full"), **GROWN)
    return evaluation.evaluate(study, "zeroshot_classification")


def test_an_adaptive_study_keeps_all_runs_besides_those_of_its_grid(tmp_path):
    besides = {"name": "wide", "models": ["PretrainedPCA", "SSL@wide"], "strategies": ["random"], "percentages": [5]}
    study = small_study(tmp_path, **GROWN, adaptive=True, also=[besides])
    (tmp_path / model.CHOSEN).write_text('{"PretrainedPCA": [[25, 1]]}')
    made = [run.model for run in study.pretraining_runs() if not run.subset.untrained]
    assert made == ["PretrainedPCA"] * (3 + 2) + ["SSL@wide"] * 3


@pytest.mark.parametrize("margin", [0.001, 0.3])
def test_an_adaptive_study_makes_what_its_verdict_takes_and_no_more(margin, full, tmp_path):
    study = small_study(tmp_path, **GROWN, adaptive=True, margin=margin)
    assert len(study.pretraining_runs()) == 3 * 4 + 3 * 3 + 3  # at most
    grown = questions.pretrain_adaptively(study)
    runs = mean_over_splits(select(full, metric="micro_f1", strategy="random")).set_index(["percentage", "seed"])
    found = settle(
        lambda percentage, seed: runs["value"][percentage, seed],
        Plan(margin=margin, percentages=(5, 25, 50, 100), seeds=(0, 1, 2), budget=1.0),
    )
    assert grown[["verdict", "reason", "runs"]].to_numpy().tolist() == [[found.verdict, found.reason, len(found.runs)]]
    made = read_results(tmp_path).drop_duplicates("run_id")
    chosen = {tuple(run) for run in found.runs[["percentage", "seed"]].to_numpy()}
    for strategy, expected in {
        "random": chosen,
        "celltype_reweighted": {run for run in chosen if run[0] < 100},
        "untrained": {(0, seed) for seed in range(3)},
    }.items():
        rows = select(made, strategy=strategy)
        assert set(zip(rows["percentage"], rows["seed"], strict=True)) == expected
    assert len(study.pretraining_runs()) == len(study.pretrain()) < 24 or margin < 0.1
    artifacts = sorted(tmp_path.glob("store/*/*"))
    pd.testing.assert_frame_equal(questions.pretrain_adaptively(study), grown)
    assert sorted(tmp_path.glob("store/*/*")) == artifacts

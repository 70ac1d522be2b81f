"""Verdicts on curves whose truth is planted, and on the budgets that hold some of them down."""

import numpy as np
import pandas as pd
import pytest

from datawall.analysis import power, results, saturation, verdicts
from datawall.analysis.results import COLUMNS, KNOWN, select

SIZES = (1.0, 10.0, 30.0, 100.0)


def runs(means, *, spread=0.002, n_seeds=5, model="SSL", **columns):
    """Results of random subsets with the given mean at each size and normal noise over seeds."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "percentage": size, "seed": seed, "value": mean + spread * rng.standard_normal()}
        for size, mean in zip(SIZES, means, strict=True)
        for seed in range(n_seeds)
    ]
    of = {"study": "s", "strategy": "random", "task": "zeroshot_classification", "dataset": "d", "metric": "micro_f1"}
    table = pd.DataFrame(rows).assign(**{**of, "split": "cells 0", "run_id": "k", **columns})
    return table.assign(n_cells=(98 * table["percentage"]).astype(int))[COLUMNS].assign(**dict.fromkeys(KNOWN, np.nan))


def budgets(changes, *, model="SSL", half=0.0, **columns):
    """The runs of a budget check: what twice and half the steps change at 10 and 100 %, for seed 0."""
    base = runs((0.9,) * 4, spread=0, model=model, **columns)
    base = base[base["percentage"].isin(changes) & (base["seed"] == 0)]
    twice = base.assign(budget=2.0, value=base["value"] + base["percentage"].map(changes))
    return pd.concat([twice, base.assign(budget=0.5, value=base["value"] + half)])


def verdict(intervals, checked=None, margin=0.02):
    (found,) = verdicts.table(intervals, checked, margin).to_dict("records")
    return found


def test_planted_plateaus_and_rises_are_found():
    flat = verdict(runs((0.80, 0.90, 0.90, 0.90)))
    assert (flat["verdict"], flat["plateau"], flat["decides"]) == ("plateau", 10.0, "")
    rising = verdict(runs((0.80, 0.84, 0.88, 0.92)))
    assert (rising["verdict"], rising["decides"]) == ("still improving", "")
    assert rising["gain"] == pytest.approx(0.04, abs=0.005)
    assert rising["gain_low"] < 0.04 < rising["gain_high"]
    assert rising["spread"] == pytest.approx(0.002, rel=0.5)


def test_what_would_decide_an_undecided_curve_is_a_number_of_seeds_that_does():
    few = runs((0.8, 0.9, 0.9, 0.9), spread=0.02)
    found = verdict(few)
    assert found["verdict"] == "undecided"
    n_seeds = int(found["decides"].removeprefix("about ").removesuffix(" seeds"))
    assert n_seeds > 5  # as many as there are
    assert verdict(runs((0.8, 0.9, 0.9, 0.9), n_seeds=1))["decides"] == "two seeds or more"
    assert verdict(few[few["percentage"] < 100])["decides"] == "the full corpus (100 %)"
    (curve,) = (saturation.as_error(each, "micro_f1") for each in saturation.curves_of(few, "micro_f1"))
    spread = float(np.sqrt(np.mean([of.var(ddof=1) for of in curve.runs])))
    decided = power.of_design(spread, [5, n_seeds], 0.02, percentages=SIZES, n_draws=400).set_index(["truth", "seeds"])
    undecided = decided.loc["flat", "undecided"]
    assert undecided[n_seeds] < 0.4 < undecided[5]


def test_a_flat_curve_with_a_spread_of_many_margins_takes_more_seeds_than_are_tried():
    of_size = 0.5 + 0.3 * np.array([-1.0, 1.0])
    curve = saturation.Curve(("",) * 4, np.array(SIZES), np.array(SIZES), [of_size] * 4, borrowed=False)
    assert power.seeds_to_decide(curve, 0.02) is None


@pytest.mark.parametrize(
    ("change", "spread", "limited", "by_chance"),
    [
        ({10.0: 0.03, 100.0: 0.0}, 0.002, True, False),
        ({10.0: 0.015, 100.0: -0.5}, 0.002, False, False),
        ({10.0: 0.03}, 0.02, True, True),  # two runs alike lie √2 standard deviations apart
    ],
)
def test_twice_the_steps_that_gain_more_than_the_margin_limit_a_curve(change, spread, limited, by_chance):
    found = verdict(runs((0.8, 0.9, 0.9, 0.9), spread=spread), budgets(change))
    assert (found["verdict"] == saturation.LIMITED) == limited
    if limited:
        assert np.isnan(found["plateau"])
        assert found["decides"].startswith("more steps: +0.0")
    assert ("; seeds alone: 0.0" in found["decides"]) == by_chance


def test_a_budget_limits_its_own_model_and_task_alone():
    intervals = pd.concat([runs((0.8, 0.9, 0.9, 0.9)), runs((0.8, 0.9, 0.9, 0.9), model="scVI")])
    found = verdicts.table(intervals, budgets({100.0: 0.1}, model="scVI"), 0.02).set_index("model")["verdict"]
    assert found.to_dict() == {"SSL": "plateau", "scVI": saturation.LIMITED}
    assert verdicts.tally(verdicts.table(intervals, budgets({100.0: 0.1}, model="scVI"), 0.02)) == (
        "verdicts: 1 plateau, 0 still improving, 1 budget-limited, 0 undecided, of 2"
    )


def test_the_table_of_budgets_has_the_score_of_each_and_their_difference():
    base = runs((0.9,) * 4, spread=0)
    (row,) = verdicts.budgets(base, budgets({10.0: 0.03}, half=-0.1)).to_dict("records")
    assert (row["percentage"], row["seeds"]) == (10.0, 1)
    assert [row[name] for name in ("half", "once", "twice", "change")] == pytest.approx([0.8, 0.9, 0.93, 0.03])


def test_a_budget_is_judged_by_the_splits_that_verdicts_look_at_and_without_half_of_the_steps():
    twice = select(budgets({10.0: 0.03}), budget=2.0)
    by_donor = twice.assign(split="donors 0", value=0.2)
    (row,) = verdicts.budgets(runs((0.9,) * 4, spread=0), pd.concat([twice, by_donor])).to_dict("records")
    assert row["change"] == pytest.approx(0.03)
    assert np.isnan(row["half"])


def test_results_of_other_budgets_are_in_a_table_of_their_own():
    rows = pd.concat([runs((0.9,) * 4).assign(budget=1.0), budgets({10.0: 0.03})])
    made = results.tables(rows)
    assert set(made["results"]["percentage"]) == set(SIZES)
    assert len(made["results"]) == 20
    assert sorted(made["budgets"]["budget"]) == [0.5, 2.0]


def test_no_random_subsets_have_no_verdicts():
    none = verdicts.table(runs((0.9,) * 4).iloc[:0], None, 0.02)
    assert none.empty
    assert verdicts.tally(none).endswith(", of 0")
    assert verdicts.design_power(none, [1, 100], 5, 0.02).empty
    assert verdicts.design_power(verdicts.table(runs((0.9,) * 4), None, 0.02), [1, 50], 5, 0.02).empty

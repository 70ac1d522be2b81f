import numpy as np
import pandas as pd
import pytest
from benchmarks import power as simulation
from result_tables import curve, table
from scipy import stats
from test_saturation import point

from datawall.analysis import power, saturation, scaling
from datawall.analysis.saturation import Curve


def test_simulated_curves_have_their_truth_and_the_published_spread():
    for truth, (error, begins) in simulation.TRUTHS.items():
        scores = simulation.simulated(truth, 400, 5)
        expected = error(simulation.SIZES)
        assert 1 - scores.mean(axis=(0, 2)) == pytest.approx(expected, abs=0.005), truth
        later = expected[begins <= simulation.SIZES]
        assert np.ptp(later) == 0 if len(later) else expected[3] - expected[5] > simulation.MARGIN, truth
    for truth in ("improves, .25 to .125", "improves, .7 to .35", "late, from 50 %"):
        first, last = simulation.TRUTHS[truth][0](simulation.SIZES)[[0, -1]]
        assert last == pytest.approx(first / 2)
    spread = scores.std(axis=2)
    assert spread.min() < 0.002  # PretrainedPCA's
    assert spread.max() > 0.05  # SSL's
    fixed = simulation.simulated("plateau at 1 %", 400, 5, noise=0.01)
    assert fixed.std(axis=2, ddof=1).mean() == pytest.approx(0.01, rel=0.1)


def test_what_rules_say_is_what_they_say_of_one_curve():
    for truth in ("plateau at 10 %", "late, from 50 %", "improves, .25 to .125"):
        scores = simulation.simulated(truth, 5, 4, noise=0.006)
        found = simulation.judged(scores, simulation.SIZES, 10.0, 0.01, gain=0.0).set_index("rule")
        curves = [curve(dict(zip(simulation.SIZES, of, strict=True)), dataset=str(n)) for n, of in enumerate(scores)]
        shown = table(*(row | {"n_cells": row["percentage"] * 100} for rows in curves for row in rows))
        for rule, margin in (("published", None), ("mean", None), ("error", None), ("equivalence", 0.01)):
            points = np.array([point(of, rule=rule, margin=margin) for _, of in shown.groupby("dataset")])
            row = found.loc[rule if margin is None else "equivalence, margin 0.01"]
            assert row["plateau"] == np.mean(points <= 50), (truth, rule)
            assert row["in place"] == np.mean(points == 10), (truth, rule)
        gains = scaling.scaling_curves(shown, "micro_f1", margin=0.01, n_resamples=100)
        assert found.loc["predicted gain", "plateau"] == np.mean(gains["verdict"] == "plateau")
        covered = (gains["gain_low"] <= 0) & (gains["gain_high"] >= 0)
        assert found.loc["predicted gain", "covered"] == np.mean(covered)
        share = found.loc["published", "plateau"]
        assert found.loc["published", "error"] == pytest.approx(np.sqrt(share * (1 - share) / 5))


def test_the_packaged_table_is_what_the_simulation_finds():
    packaged = pd.read_csv(power.TABLE)
    keys = ["truth", "noise", "seeds", "rule"]
    assert not packaged.duplicated(keys).any()
    assert len(packaged) == len(simulation.TRUTHS) * len(simulation.DESIGNS) * 7
    again = simulation.rates(12, [("published", 5)]).merge(packaged, on=keys, suffixes=("", "_packaged"))
    assert len(again) == len(simulation.TRUTHS) * 7
    apart = (again["plateau"] - again["plateau_packaged"]).abs()
    share = again["plateau_packaged"].clip(0.05, 0.95)
    assert (apart < 4.5 * np.sqrt(share * (1 - share) / 12)).all()


def test_verdicts_of_designs_are_those_of_saturation_draw_by_draw():
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 10, 50, 100])
    errors = np.array([[0.0] * 4, [0.06, 0.03, 0.01, 0]])[:, :, None, None]
    runs = errors + 0.004 * rng.standard_normal((2, 4, 60, 3))

    def verdicts(runs):
        return saturation.verdicts([Curve(("",) * 4, sizes, sizes, list(of)) for of in runs], 0.01, 0.95)[1]

    found, one_by_one = verdicts(runs), [verdicts(runs[:, :, draw]) for draw in range(60)]
    assert (np.array(one_by_one) == found.T).all()
    assert set(np.unique(found)) == {"plateau", "still improving", "undecided"}


def test_power_of_a_design_is_that_of_two_one_sided_t_tests():
    """Integrated over the variance: the difference of two means is within the margin less its t quantile."""
    n, spread, margin = 20, 0.01, 0.009
    error, freedom = spread * np.sqrt(2 / n), 2 * n - 2
    ratio = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)  # estimated spread over true
    room = margin - stats.t.ppf(0.95, freedom) * error * ratio
    flat = np.maximum(2 * stats.norm.cdf(room / error) - 1, 0).mean()
    # A gap is shown where it exceeds its own t quantile, but not where it is small enough to be a plateau.
    rise = stats.nct.sf(stats.t.ppf(0.95, freedom), freedom, 2 * margin / error)
    table = power.of_design(spread, n, margin, percentages=(50, 100), n_draws=20_000).set_index("truth")
    assert table.loc["flat", "right"] == pytest.approx(flat, abs=4 * table.loc["flat", "error"])
    assert table.loc["rises by twice the margin", "right"] == pytest.approx(rise, abs=0.005)
    false = table.loc["rises by the margin", "plateau"]
    assert false == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 20_000))
    assert 0.6 < flat < 0.9


def test_seeds_needed_are_the_fewest_with_the_power():
    needed = power.seeds_needed(0.01, 0.015, n_draws=1000)
    table = power.of_design(0.01, (needed - 1, needed), 0.015, n_draws=4000)
    flat = table[table["truth"] == "flat"].set_index("seeds")["right"]
    assert flat[needed - 1] < 0.85
    assert flat[needed] > 0.75
    assert power.seeds_needed(0.01, 0.001, n_draws=20) is None
    one = power.of_design(0.01, 1, 0.02)
    assert (one["undecided"] == 1).all()
    with pytest.raises(ValueError, match="up to 100"):
        power.of_design(0.01, 3, 0.02, percentages=(1, 10))

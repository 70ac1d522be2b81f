import numpy as np
import pytest
from scipy import stats

from datawall import power, saturation
from datawall.saturation import Curve


def test_simulated_curves_have_their_truth_and_the_published_spread():
    results = power.simulated_curves(400, 5)
    cells = results.groupby(["task", "dataset", "percentage"])["value"]
    means = 1 - cells.mean().groupby(["task", "percentage"]).mean().unstack()
    assert means.loc["plateau at 1 %"].tolist() == pytest.approx([0.25] * 6, abs=0.005)
    assert means.loc["plateau at 10 %"].tolist() == pytest.approx([0.25] + [0.125] * 5, abs=0.005)
    assert means.loc["plateau at 25 %"].iloc[[0, 2, 5]].tolist() == pytest.approx([0.25, 0.125, 0.125], abs=0.005)
    improving = means.loc["still improving"]
    assert improving.iloc[[0, -1]].tolist() == pytest.approx([0.25, 0.125], abs=0.005)
    doublings = -np.diff(improving) / np.diff(np.log2(improving.index))
    assert (doublings > power.MARGIN).all()
    spread = cells.std()
    assert spread.min() < 0.002  # PretrainedPCA's
    assert spread.max() > 0.05  # SSL's


def test_the_table_shows_what_each_rule_is_worth():
    table = power.rates(12, (5,), seed=1).set_index("rule")
    assert table.loc["published", "false plateau"] == 1
    assert table.loc["published", "missed plateau"] == 0
    assert table.loc[f"equivalence, margin {power.MARGIN:g}", "false plateau"] <= 0.1
    assert table.loc["adaptive", "runs"] < 0.6
    assert table.drop(columns=["seeds"]).drop("predicted gain").notna().all(axis=None)
    assert table.drop(columns="seeds").fillna(0).ge(0).all(axis=None)
    assert table.drop(columns="seeds").fillna(0).le(1).all(axis=None)


def test_verdicts_of_designs_are_those_of_saturation_draw_by_draw():
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 10, 50, 100])
    errors = np.array([[0.0] * 4, [0.06, 0.03, 0.01, 0]])[:, :, None, None]
    runs = errors + 0.004 * rng.standard_normal((2, 4, 60, 3))
    curve = Curve(("",) * 4, sizes, sizes, [np.zeros(1)] * 4, borrowed=False)
    found = power._verdicts(list(runs), curve, 0.01, 0.95)
    one_by_one = [
        saturation.verdicts([Curve(("",) * 4, sizes, sizes, list(of[:, draw]), False) for of in runs], 0.01, 0.95)[1]
        for draw in range(60)
    ]
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
    assert power.seeds_needed(0.01, 0.001, most=5, n_draws=200) is None
    one = power.of_design(0.01, 1, 0.02)
    assert (one["undecided"] == 1).all()
    with pytest.raises(ValueError, match="up to 100"):
        power.of_design(0.01, 3, 0.02, percentages=(1, 10))

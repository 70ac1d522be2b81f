import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from result_tables import curve, table
from scipy.optimize import curve_fit

from datawall.analysis import scaling
from datawall.analysis.saturation import curves_of

SIZES = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
POWER_LAW = lambda n: 0.1 + 0.05 * n**-0.4  # noqa: E731
GAIN = 0.05 * (1 - 2**-0.4)  # of twice the cells
SCORES = (1.0, 10.0, 25.0, 50.0, 75.0, 100.0)
FORMS = {
    scaling.POWER: lambda n, floor, excess, shape: floor + excess * n**-shape,
    scaling.EXPONENTIAL: lambda n, floor, excess, shape: floor + excess * np.exp(-n / shape),
}


def results(error, *, noise=0.002, n_seeds=5, seed=0, sizes=SCORES, **common):
    """Runs with a known error at each size, in units of the largest."""
    rng = np.random.default_rng(seed)
    scores = {p: 1 - error(p / 100) + noise * rng.standard_normal(n_seeds) for p in sizes}
    return table(*(row | {"n_cells": int(1000 * row["percentage"])} for row in curve(scores, **common)))


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("truth", [(0.1, 0.05, 0.3), (0.02, 0.2, 0.12)])
def test_fits_are_those_of_scipy(family, truth):
    rng = np.random.default_rng(1)
    weight = rng.uniform(0.5, 2, 6)
    errors = FORMS[family](SIZES, *truth) + 0.003 * rng.standard_normal((3, 6))
    fitted = scaling.fit(family, SIZES, errors, weight)
    for position, error in enumerate(errors):
        found, _ = curve_fit(
            FORMS[family], SIZES, error, truth, sigma=weight**-0.5, bounds=([0, 0, 0.003], [1, np.inf, 3]), xtol=1e-12
        )
        loss = (weight * (FORMS[family](SIZES, *found) - error) ** 2).sum()
        assert fitted.loss[position] == pytest.approx(loss, rel=1e-2)
        np.testing.assert_allclose(fitted.predict(SIZES)[position], FORMS[family](SIZES, *found), atol=1e-4)
        assert fitted.shape[position] == pytest.approx(found[2], rel=1e-2)


def test_the_bounds_hold():
    rising = scaling.fit(scaling.POWER, SIZES, np.linspace(0.1, 0.3, 6), np.ones(6))
    assert rising.excess == 0
    assert rising.floor == pytest.approx(0.2)
    steep = scaling.fit(scaling.POWER, SIZES, 0.05 * SIZES**-0.5 - 0.04, np.ones(6))
    assert steep.floor == 0
    x = SIZES**-steep.shape
    assert steep.excess == pytest.approx((x * (0.05 * SIZES**-0.5 - 0.04)).sum() / (x**2).sum())


def test_criterion_is_that_of_a_gaussian_model():
    rng = np.random.default_rng(0)
    values = rng.normal(0.2, 0.01, (6, 5))
    fitted = scaling.fit(scaling.CONSTANT, SIZES, values.mean(axis=1), np.full(6, 5.0))
    within = ((values - values.mean(axis=1, keepdims=True)) ** 2).sum()
    least_squares = sm.OLS(values.ravel(), np.ones(30)).fit()
    # statsmodels counts no parameter for the variance, and keeps the constants of the likelihood.
    k = 2
    expected = -2 * least_squares.llf + 2 * k + 2 * k * (k + 1) / (30 - k - 1) - 30 * (1 + np.log(2 * np.pi))
    assert scaling.aicc(fitted, within, 30) == pytest.approx(expected)


def test_left_out_sizes_are_predicted_from_the_others():
    error, weight = np.array([0.5, 0.1, 0.12, 0.1, 0.14, 0.1]), np.array([1.0, 4, 4, 4, 1, 1])
    squares = []
    for out in range(1, 6):
        kept = np.arange(6) != out
        mean = np.average(error[kept], weights=weight[kept])
        squares.append(weight[out] * (error[out] - mean) ** 2)
    assert scaling.left_out(scaling.CONSTANT, SIZES, error, weight) == pytest.approx(np.sqrt(np.mean(squares)))
    power_law = 0.1 + 0.02 * SIZES**-0.3
    assert scaling.left_out(scaling.POWER, SIZES, power_law, np.ones(6)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("error", "family", "verdict"),
    [
        (lambda n: 0.2, scaling.CONSTANT, "plateau"),
        (POWER_LAW, scaling.POWER, "still improving"),
        (lambda n: 0.1 + 0.3 * np.exp(-n / 0.1), scaling.EXPONENTIAL, "plateau"),
        (lambda n: 0.2 + 0.1 * n, scaling.CONSTANT, "plateau"),  # more cells do harm
    ],
)
def test_a_planted_curve_is_found(error, family, verdict):
    row = scaling.scaling_curves(results(error), "micro_f1").iloc[0]
    assert row["curve"] == family
    assert row["verdict"] == verdict
    assert row["margin"] == pytest.approx(0.01 * error(1.0), rel=0.02)


def test_intervals_of_the_gain_cover_the_truth():
    shown = pd.concat([results(POWER_LAW, seed=seed, dataset=f"{seed}") for seed in range(60)])
    found = scaling.scaling_curves(shown, "micro_f1", n_resamples=100)
    covered = (found["gain_low"] <= GAIN) & (found["gain_high"] >= GAIN)
    assert 54 <= covered.sum() <= 60  # 57 are expected


@pytest.mark.parametrize(
    ("error", "gain"),
    [
        (lambda n: 0.2, 0),
        (lambda n: 0.2 + 0.03 * n**-0.15, 0.03 * (1 - 2**-0.15)),
        (lambda n: 0.2 + 0.05 * np.exp(-n), 0.05 * (np.exp(-1) - np.exp(-2))),
    ],
)
def test_intervals_cover_the_truth_where_few_runs_look_constant(error, gain):
    few = {"noise": 0.02, "n_seeds": 2, "sizes": (1.0, 10.0, 25.0, 100.0)}
    shown = pd.concat([results(error, seed=seed, dataset=f"{seed}", **few) for seed in range(100)])
    table = scaling.scaling_curves(shown, "micro_f1", margin=0.01, n_resamples=100)
    assert (table["curve"] == scaling.CONSTANT).mean() > 0.7  # AICc of eight runs
    assert (table["gain_high"] - table["gain_low"]).median() > 0.01
    covered = (table["gain_low"] <= gain) & (gain <= table["gain_high"])
    assert 90 <= covered.sum() <= 100  # 95 are expected
    if gain > 0.01:
        assert (table["verdict"] == "plateau").sum() <= 8  # at most 5 are expected


def test_noise_leaves_it_undecided_and_the_margin_decides():
    noisy = results(lambda n: 0.1 + 0.02 * n**-0.3, noise=0.02, seed=2)
    undecided = scaling.scaling_curves(noisy, "micro_f1").iloc[0]
    assert undecided["verdict"] == "undecided"
    assert undecided["gain_low"] < undecided["margin"] < undecided["gain_high"]
    assert scaling.scaling_curves(noisy, "micro_f1", margin=0.1)["verdict"].item() == "plateau"
    assert scaling.scaling_curves(results(lambda n: 0.3, noise=0), "micro_f1")["verdict"].item() == "plateau"
    exact, row = (scaling.scaling_curves(results(POWER_LAW, noise=noise), "micro_f1").iloc[0] for noise in (0, 0.002))
    assert exact["verdict"] == "still improving"
    assert exact["exponent"] == pytest.approx(0.4, rel=1e-3)
    for name, truth in (("exponent", 0.4), ("irreducible", 0.1), ("gain", GAIN)):
        assert row[f"{name}_low"] <= truth <= row[f"{name}_high"]
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert row["gain_high"] - row["gain_low"] < 0.01


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (curve({1: [0.5, 0.6], 10: [0.5, 0.6], 100: [0.6, 0.7]}), "3 sizes"),
        (curve({1: [0.5, 0.6], 10: [0.5, 0.6], 50: 0.6, 100: [0.6, 0.7]}), "single run"),
        ([row | {"percentage": 100} for row in curve({1: [0.5, 0.6]})], "1 sizes"),
    ],
)
def test_too_few_runs_are_undecided_and_say_why(rows, reason):
    few = table(*(row | {"n_cells": row["percentage"]} for row in rows))
    both = pd.concat([few, results(lambda n: 0.2, dataset="other")])
    row, other = (of for _, of in scaling.scaling_curves(both, "micro_f1").iterrows())
    assert row["verdict"] == "undecided"
    assert reason in row["reason"]
    assert np.isnan(row["gain"])
    assert other["verdict"] == "plateau"
    assert scaling.predictions(few, "micro_f1").empty
    assert set(scaling.predictions(both, "micro_f1")["dataset"]) == {"other"}


def test_a_metric_that_is_better_when_lower_is_the_error_itself():
    score = scaling.scaling_curves(results(POWER_LAW), "micro_f1").iloc[0]
    turned = results(POWER_LAW).assign(metric="mse", value=lambda rows: 1 - rows["value"])
    error = scaling.scaling_curves(turned, "mse").iloc[0]
    for name in ("exponent", "exponent_low", "irreducible", "gain", "gain_low", "gain_high", "margin", "aicc_constant"):
        assert error[name] == pytest.approx(score[name], rel=1e-9)


def test_predictions_follow_the_chosen_curve():
    shown = scaling.predictions(results(POWER_LAW), "micro_f1")
    assert shown["n_cells"].iloc[0] == 1000
    assert shown["n_cells"].iloc[-1] == 400_000
    assert (shown["low"] <= shown["high"]).all()
    np.testing.assert_allclose(shown["error"], POWER_LAW(shown["n_cells"] / 100_000), atol=0.01)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 100))
def test_units_of_cells_and_of_error_do_not_matter(scale, seed):
    rng = np.random.default_rng(seed)
    error, weight = rng.uniform(0.01, 0.1, 6), rng.uniform(1, 2, 6)
    for family in scaling.FAMILIES:
        fitted, scaled = scaling.fit(family, SIZES, error, weight), scaling.fit(family, SIZES, scale * error, weight)
        np.testing.assert_allclose(scaled.predict(SIZES), scale * fitted.predict(SIZES), rtol=1e-6)
    rows = results(POWER_LAW)
    more = rows.assign(n_cells=rows["n_cells"] * 7)
    gains = [scaling.scale(curves_of(each, "micro_f1")[0], 3).gain()[0] for each in (more, rows)]
    assert gains[0] == pytest.approx(gains[1])


PER_CENT = np.array([1.0, 10, 25, 50, 100])


def runs(error, spread, *, n_seeds=4, seed=0, **common):
    rng = np.random.default_rng(seed)
    scores = {size: 1 - error(size) + spread * rng.standard_normal(n_seeds) for size in PER_CENT}
    return [row | {"n_cells": round(100 * row["percentage"])} for row in curve(scores, **common)]


def test_a_power_law_is_foretold_and_what_comes_late_is_not():
    smooth, late = lambda size: 0.3 * size**-0.2, lambda size: 0.3 if size <= 50 else 0.2
    results = table(*runs(smooth, 0.001, model="smooth", seed=1), *runs(late, 0.001, model="late"))
    found = scaling.extrapolated(results, "micro_f1", 50).set_index("model")
    row = found.loc["smooth"]
    assert row["error"] == pytest.approx(0.3 * 100**-0.2, abs=0.002)
    assert row["last"] == pytest.approx(0.3 * 50**-0.2, abs=0.002)
    assert abs(row["foretold"] - row["error"]) < 0.3 * abs(row["last"] - row["error"])
    assert row["low"] < row["error"] < row["high"]
    assert not found.loc["late", "low"] < 0.2 < found.loc["late", "high"]
    assert len(scaling.extrapolated(results, "micro_f1", 25)) == 2
    assert scaling.extrapolated(results, "micro_f1", 10).empty  # two sizes


def test_intervals_of_what_is_foretold_hold_it_as_often_as_they_say():
    every = [runs(lambda size: 0.3 * size**-0.2, 0.005, seed=number, model=str(number)) for number in range(120)]
    rows = [row for some in every for row in some]
    found = scaling.extrapolated(table(*rows), "micro_f1", 50)
    held = ((found["low"] <= found["error"]) & (found["error"] <= found["high"])).mean()
    assert held > 0.85  # of 0.95; 0.85 to 0.90 were measured for the next doubling's gain


def test_decisions_are_the_share_of_pairs_that_are_ordered_alike():
    at = {"a": {1: [0.3, 0.3], 10: [0.1, 0.1], 100: [0.3, 0.4]}, "b": {1: [0.2, 0.2], 10: [0.2, 0.2], 100: [0.5, 0.2]}}
    at["c"] = {1: [0.1, 0.1], 10: [0.1, 0.1], 100: [0.1, 0.1]}
    results = table(*(row for model, scores in at.items() for row in curve(scores, model=model)))
    found = scaling.decisions(results, "micro_f1", "model").set_index("percentage")
    assert found["pairs"].tolist() == [3, 3, 3]
    # At 100 %, a and b have 0.35: a draw counts half. Then a > c and b > c.
    assert found.loc[1, "same"] == pytest.approx((0.5 + 2) / 3)
    assert found.loc[10, "same"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found.loc[100, "same"] == pytest.approx(2 / 3)  # one seed has b before a, the other a before b
    assert scaling.decisions(results[results["model"] == "a"], "micro_f1", "model").empty
    one = scaling.decisions(results[results["seed"] == 0], "micro_f1", "model")
    assert one["percentage"].tolist() == [1, 10]  # of one seed there are no halves


def test_signal_of_nothing_is_that_of_noise():
    rows = [row for number in range(150) for row in runs(lambda size: 0.3, 0.01, seed=number, model=str(number))]
    found = scaling.signal_to_noise(table(*rows), "micro_f1")
    assert found["ratio"].mean() == pytest.approx(found["noise"].mean(), rel=0.05)
    # Range of five normal means of four, over a mean spread that is a little low: c4 is 0.921.
    assert found["noise"].iloc[0] == pytest.approx(2.326 / np.sqrt(4) / 0.921, rel=0.06)
    rising = scaling.signal_to_noise(table(*runs(lambda size: 0.3 * size**-0.2, 0.001)), "micro_f1")
    assert rising["ratio"].item() > 50

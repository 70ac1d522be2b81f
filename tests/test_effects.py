import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from result_tables import curve, table
from scipy import stats
from statsmodels.stats.multitest import multipletests

from datawall.analysis import effects


def two_strategies(shift, *, n_seeds=6, datasets=("a", "b", "c"), sizes=(1, 10), seed=0):
    """Scores of a subset strategy that is worth `shift` more than random subsets, with effects of data set and run."""
    rng = np.random.default_rng(seed)
    rows = []
    for strategy, worth in (("random", 0), ("celltype_reweighted", shift)):
        for size in sizes:
            run = 0.02 * rng.standard_normal(n_seeds)
            for number, dataset in enumerate(datasets):
                noise = 0.01 * rng.standard_normal(n_seeds)
                values = 0.5 + 0.1 * number + 0.05 * np.log10(size) + worth + run + noise
                rows += curve({size: values}, strategy=strategy, dataset=dataset)
    return table(*rows)


def test_effect_on_one_data_set_is_that_of_least_squares():
    results = two_strategies(0.03, datasets=("a",))
    found = effects.strategy_effects(results, "micro_f1", confidence=0.9).iloc[0]
    fitted = smf.ols("value ~ C(strategy, Treatment('random')) + C(percentage)", results).fit()
    name = "C(strategy, Treatment('random'))[T.celltype_reweighted]"
    expected = [fitted.params[name], *fitted.conf_int(0.1).loc[name], fitted.pvalues[name], fitted.pvalues[name]]
    assert found[["difference", "low", "high", "p", "p_adjusted"]].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")  # runs are nested in strategies and sizes
def test_error_is_that_of_runs_and_data_sets_crossed():
    """By the mean squares of an analysis of variance: runs + strategy by data set - what is left."""
    results = two_strategies(0.03).assign(other=lambda of: (of["strategy"] != "random").astype(int))
    results["run"] = results[effects.RUN].astype(str).agg("-".join, axis=1)
    results["value"] += 0.02 * results["other"] * results["dataset"].map({"a": -1, "b": 0, "c": 2})
    formulas = ["value ~ C(dataset) * C(percentage) + other", " + C(run)", " + other:C(dataset)"]
    squares = [smf.ols("".join(formulas[:n]), results).fit().ssr for n in (1, 2, 3)]
    freedom = np.array([24 - 3, 2, 2 * (24 - 3)])  # 24 runs of two strategies and two sizes, on three data sets
    terms = np.array([squares[0] - squares[1], squares[1] - squares[2], -squares[2]]) / freedom
    error = np.sqrt(terms.sum() / 3 * 4 / 24)
    freedom = terms.sum() ** 2 / (terms**2 / freedom).sum()
    found = effects.strategy_effects(results, "micro_f1").iloc[0]
    gap = results.groupby("other")["value"].mean().diff()[1]
    assert found["difference"] == pytest.approx(gap, abs=1e-9)
    assert found["high"] - gap == pytest.approx(stats.t.ppf(0.975, freedom) * error, abs=1e-9)
    assert found["p"] == pytest.approx(2 * stats.t.sf(gap / error, freedom), abs=1e-9)


def test_effects_are_corrected_over_the_table():
    shifts = enumerate((0, 0.02, 0.05))
    results = pd.concat([two_strategies(shift, seed=seed).assign(model=f"m{seed}") for seed, shift in shifts])
    found = effects.strategy_effects(results, "micro_f1")
    np.testing.assert_allclose(found["p_adjusted"], multipletests(found["p"], method="fdr_bh")[1])


@pytest.mark.parametrize("spreads", [(0.011, 0.005, 0.005), (0.011, 0.02, 0.01), (0, 0.02, 0.002), (0, 0, 0.01)])
def test_a_strategy_that_is_worth_more_here_and_less_there_is_called_better_in_one_case_of_twenty(spreads):
    """The spread of what it is worth over data sets, of runs, and of both; four data sets, six sizes, five seeds."""
    of_datasets, of_runs, rest = spreads
    rng, p = np.random.default_rng(0), []
    runs = pd.MultiIndex.from_product([["a", "random"], [1.0, 10, 25, 50, 75, 100], range(5)], names=effects.RUN)
    x = (runs.get_level_values("strategy") == "a").astype(float)
    for _ in range(800):
        noise = rng.normal(0, of_runs, (60, 1)) + rng.normal(0, rest, (60, 4))
        scores = pd.DataFrame(noise + np.outer(x, rng.normal(0, of_datasets, 4)), runs)
        slope, error, freedom = effects._slope(scores, x)
        p.append(2 * stats.t.sf(abs(slope) / error, freedom))
    assert 0.005 < np.mean(np.array(p) < 0.05) < 0.08


def test_an_effect_that_all_data_sets_share_is_found():
    found = [effects.strategy_effects(two_strategies(0.05, seed=seed), "micro_f1")["p"].item() for seed in range(5)]
    assert max(found) < 0.05


def test_what_cannot_be_compared_is_refused():
    alone = table(*curve({100: [0.5, 0.6]}), *curve({1: [0.5, 0.6]}, strategy="celltype_reweighted"))
    with pytest.raises(ValueError, match="no size has runs of 'random'"):
        effects.strategy_effects(alone, "micro_f1")
    with pytest.raises(ValueError, match="diversity table"):
        effects.diversity_effects(alone, diverse().assign(seed=99), "micro_f1")
    with pytest.raises(ValueError, match="no baseline has the metric 'micro_f1'"):
        effects.overtaking(alone, "micro_f1")
    elsewhere = table(*curve({100: [0.5, 0.6]}, dataset="other"), *BASELINES)
    assert effects.overtaking(elsewhere, "micro_f1").empty
    alike = diverse().assign(**dict.fromkeys(effects.MEASURES, 5.0))
    assert effects.diversity_effects(two_strategies(0.05), alike, "micro_f1").empty


def test_what_does_not_vary_has_no_test():
    single = [*curve({1: 0.5}), *curve({1: 0.6}, strategy="celltype_reweighted")]
    found = effects.strategy_effects(table(*single), "micro_f1").iloc[0]
    assert found["difference"] == pytest.approx(0.1)
    assert found[["low", "high", "p", "p_adjusted"]].isna().all()
    rows = [*curve({1: [0.5, 0.5]}), *curve({1: [0.5, 0.5]}, strategy="a"), *curve({1: [0.6, 0.6]}, strategy="b")]
    assert effects.strategy_effects(table(*rows), "micro_f1")["p"].tolist() == [1, 0]


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-1, 1), order=st.integers(0, 100))
def test_neither_order_nor_level_matters(shift, order):
    results = two_strategies(0.02, n_seeds=3)
    moved = results.assign(value=results["value"] + shift).sample(frac=1, random_state=order)
    before, after = (effects.strategy_effects(each, "micro_f1") for each in (results, moved))
    pd.testing.assert_frame_equal(after, before, atol=1e-9)


def diverse(n_seeds=5, seed=0):
    """Diversity of subsets of three strategies, by strategy, percentage and seed."""
    rng = np.random.default_rng(seed)
    rows = [
        (strategy, float(size), run, level + 0.3 * rng.standard_normal(), 30.0 + level, np.nan)
        for strategy, level in (("random", 6), ("celltype_reweighted", 7), ("geometric_sketching", 6.2))
        for size in (1, 10)
        for run in range(n_seeds)
    ]
    return pd.DataFrame(rows, columns=["strategy", "percentage", "seed", "shannon", "inverse_simpson", "vendi"])


def test_a_planted_slope_on_diversity_is_found():
    subsets, rows, rng = diverse(), [], np.random.default_rng(0)
    within = subsets["shannon"] - subsets.groupby("percentage")["shannon"].transform("mean")
    for number, dataset in enumerate("ab"):
        noise = 0.001 * rng.standard_normal(len(subsets))
        value = 0.3 + 0.1 * number + 0.02 * subsets["shannon"] + 0.1 * (subsets["percentage"] == 10) + noise
        rows += subsets.assign(value=value, dataset=dataset).to_dict("records")
    keys = ("strategy", "percentage", "seed", "value", "dataset")
    results = table(*({key: row[key] for key in keys} for row in rows))
    found = effects.diversity_effects(results, subsets, "micro_f1", confidence=0.99).set_index("measure")
    assert "vendi" not in found.index  # not known of any subset
    row = found.loc["shannon"]
    assert row["low"] < 0.02 * within.std() < row["high"]
    assert row["high"] - row["low"] < 0.002
    # Without clusters, the slope is the ordinary one.
    merged = results.merge(subsets, on=["strategy", "percentage", "seed"])
    merged["cell"] = merged["dataset"] + merged["percentage"].astype(str)
    slope = smf.ols("value ~ shannon + C(cell)", merged).fit().params["shannon"]
    assert row["difference"] == pytest.approx(slope * within.std())


BASELINES = [
    {"strategy": "baseline", "model": name, "percentage": 0.0, "seed": -1, "value": value, "metric": metric}
    for metric, scores in (("micro_f1", {"HVG": 0.6, "PCA": 0.7, "Oracle": 0.99}), ("mse", {"HVG": 0.3, "PCA": 0.4}))
    for name, value in scores.items()
]


@pytest.mark.parametrize(
    ("scores", "metric", "percentage", "lead"),
    [
        ({1: [0.6, 0.61, 0.62], 10: [0.8, 0.81, 0.82], 100: [0.9, 0.91, 0.92]}, "micro_f1", 10, 0.21),
        ({1: [0.6, 0.61, 0.62], 10: [0.5, 0.71, 0.9], 100: [0.65, 0.66, 0.67]}, "micro_f1", np.nan, 0.0034),
        ({1: [0.5, 0.51, 0.52], 10: [0.6, 0.61, 0.62]}, "micro_f1", np.nan, -0.09),
        ({1: 0.9, 10: 0.95}, "micro_f1", np.nan, 0.25),  # single runs
        ({1: [0.35, 0.36, 0.37], 10: [0.2, 0.21, 0.22]}, "mse", 10, 0.09),  # the lowest baseline is to be overtaken
    ],
)
def test_overtaking_the_best_baseline(scores, metric, percentage, lead):
    row = effects.overtaking(table(*curve(scores, metric=metric), *BASELINES), metric).iloc[0]
    assert (row["baseline"], row["score"]) == (("HVG", 0.3) if metric == "mse" else ("PCA", 0.7))
    assert row["percentage"] == percentage or (np.isnan(percentage) and np.isnan(row["percentage"]))
    assert row["lead"] == pytest.approx(lead, abs=0.005)


def test_overtaking_tests_are_one_sided_and_corrected_together():
    scores = {1: [0.71, 0.72, 0.70], 10: [0.74, 0.75, 0.76], 100: [0.72, 0.75, 0.73]}
    p = [stats.ttest_1samp(values, 0.7, alternative="greater").pvalue for values in scores.values()]
    better = multipletests(p, method="fdr_bh")[0]
    assert 0 < better.sum() < 3
    row = effects.overtaking(table(*curve(scores), *BASELINES), "micro_f1").iloc[0]
    assert row["percentage"] == list(scores)[better.argmax()]


def test_range_of_a_metric_is_from_the_better_guess_to_the_ceiling():
    values = {
        "pearson_delta": {"NoChange": 0.0, "MeanShift": 0.6, "TreatedMean": 0.9, "Oracle": 0.9},
        "pearson_r": {"NoChange": 0.9, "MeanShift": 0.85, "TreatedMean": 0.5, "Oracle": 0.99},
        "mse": {"NoChange": 0.4, "MeanShift": 0.2, "TreatedMean": 0.6, "Oracle": 0.01},
    }
    rows = [
        {"strategy": "baseline", "percentage": 0.0, "seed": -1, "model": model, "metric": metric, "split": split,
         "task": "perturbation_response", "value": value * more}
        for metric, of in values.items() for model, value in of.items() for split, more in (("a", 0.9), ("b", 1.1))
    ]  # fmt: skip
    found = effects.dynamic_range(table(*rows, *curve({1: 0.5}, task="perturbation_response"))).set_index("metric")
    told = found[["floor", "ceiling", "range", "tells"]].T.to_dict("list")
    assert told == {
        "pearson_delta": pytest.approx([0.6, 0.9, 0.3, True]),
        "pearson_r": pytest.approx([0.9, 0.99, 0.09, False]),
        "mse": pytest.approx([0.2, 0.01, 0.95, True]),
    }

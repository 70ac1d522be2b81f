import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_tables import curve, table
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

import datawall as dw
from datawall.analysis.results import ALL_COLUMNS, COLUMNS, headline, mean_over_splits, select, tables, write_tables
from datawall.analysis.saturation import curves_of, mean_over_datasets, saturation_points


def point(results, metric="micro_f1", **settings):
    (found,) = saturation_points(results, metric, n_resamples=0, **settings)["percentage"]
    return found


ERROR = {"rule": "error"}


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ({1: 0.5, 10: 0.9, 100: 0.92}, {}, 10),
        ({1: 0.90, 10: 0.94, 100: 0.96}, {}, 10),  # 0.912 is asked
        ({1: 0.76, 10: 0.78, 100: 0.8}, {}, 10),  # 0.76 does not exceed 0.95 × 0.8
        ({1: [0.2, 0.79, 0.2], 10: 0.7, 100: 0.8}, {}, 1),  # any single run
        ({1: 0.7, 10: [0.1, 0.9], 100: 0.8}, {}, 10),  # the best may lie at a smaller size
        ({1: 0.1, 25: 0.2, 100: 0.9}, {}, 100),
        ({1: 0.99, 10: 0.5, 100: 1.0}, {}, 1),  # a later fall does not matter
        ({1: 0.0, 10: 0.0, 100: 0.0}, {}, 1),
        ({1: -0.2, 10: -0.2, 100: -0.2}, {}, 1),
        ({1: 0.90, 10: 0.94, 100: 0.96}, ERROR, 100),  # the errors are 0.10, 0.06, 0.04
        ({1: 0.90, 10: 0.94, 100: 0.96}, {**ERROR, "margin": 0.5}, 10),
        ({1: 0.90, 10: [0.93, 0.99], 100: 0.95}, ERROR, 10),
        ({1: 0.9, 10: 0.96, 100: 0.94}, ERROR, 10),  # the lowest error may lie at a smaller size
        ({1: 3.0, 10: 1.04, 100: 1.0}, {**ERROR, "metric": "mse"}, 10),  # as it is, where lower is better
        ({1: [0.2, 0.99], 10: [0.8, 0.9], 100: [0.89, 0.89]}, {}, 1),
        ({1: [0.2, 0.99], 10: [0.8, 0.9], 100: [0.89, 0.89]}, {"rule": "mean"}, 10),  # 0.85 exceeds 0.95 × 0.89
    ],
)
def test_rules_by_hand(scores, settings, expected):
    results = table(*curve(scores, metric=settings.get("metric", "micro_f1")))
    before = results.copy()
    assert point(results, **settings) == expected
    pd.testing.assert_frame_equal(results, before)


def test_baselines_and_untrained_controls_are_left_out():
    rows = curve({1: 0.5, 10: 0.9, 100: 0.92})
    others = [
        {"strategy": "baseline", "model": "scVI", "percentage": 0.0, "seed": -1, "value": 2.0},
        {"strategy": "baseline", "model": "PCA", "percentage": 100.0, "seed": -1, "value": np.nan},
        {"strategy": "untrained", "percentage": 0.0, "value": 2.0},
        {"strategy": "random", "percentage": 0.0, "value": 2.0},
        {"metric": "macro_f1", "percentage": 1.0, "value": 2.0},
    ]
    alone, beside = (saturation_points(table(*rows, *more), "micro_f1") for more in ([], others))
    pd.testing.assert_frame_equal(beside, alone)


def test_splits_are_averaged_before_the_rule():
    rows = [row | {"split": split} for row in curve({10: 0.5, 100: 0.8}) for split in ("a", "b")]
    rows += [{"percentage": 1.0, "value": 0.9, "split": "a"}, {"percentage": 1.0, "value": 0.1, "split": "b"}]
    assert point(table(*rows)) == 100


@pytest.mark.parametrize(
    ("rows", "metric", "settings", "message"),
    [
        ([{}], "micro_f1", {"rule": "elbow"}, "unknown rule 'elbow'"),
        (curve({1: 0.5, 10: np.nan}), "micro_f1", {}, "1 values of micro_f1 are NaN"),
        ([{"metric": "mse"}], "mse", {}, "lower mse is better"),
        ([{"metric": "mse"}], "mse", {"rule": "mean"}, "lower mse is better"),
        ([{}], "micro_f1", {"margin": 0.1}, "margin"),
        ([{}], "micro_f1", {"rule": "mean", "margin": 0.1}, "margin"),
        ([{}], "micro_f1", {"rule": "error", "margin": -0.1}, "margin"),
        ([{}], "micro_f1", {"rule": "equivalence", "margin": -1}, "margin"),
        ([{"value": 1.5}], "micro_f1", {"rule": "error"}, "micro_f1 exceeds 1"),
        ([{"value": 1.5}], "micro_f1", {"rule": "equivalence"}, "micro_f1 exceeds 1"),
        ([{}, {"study": "other"}], "micro_f1", {}, "several studies"),
        ([{"metric": "nmi", "strategy": "baseline"}, {}], "nmi", {}, "no pretrained run has the metric 'nmi'"),
    ],
)
def test_what_has_no_saturation_point_is_refused(rows, metric, settings, message):
    with pytest.raises(ValueError, match=message):
        saturation_points(table(*rows), metric, **settings)


RULES = ("published", "mean", "error", "equivalence")
MODELS = ["PretrainedPCA", "scVI", "SSL", "Geneformer", "SCimilarity"]
STRATEGIES = ["random", "celltype_reweighted", "geometric_sketching"]
CLASSIFICATION = ["hematopoiesis", "intestine", "periodontitis", "placenta"]
# The published heat maps: percentages in the order of the data sets; what is not named is 1 throughout.
HEAT_MAPS = {
    "zeroshot_classification": ("micro_f1", CLASSIFICATION, {
        ("scVI", "geometric_sketching"): [10, 1, 1, 1],
        ("scVI", "random"): [1, 10, 1, 1],
        ("SSL", "celltype_reweighted"): [10, 25, 10, 10],
        ("SSL", "geometric_sketching"): [25, 10, 10, 10],
        ("SSL", "random"): [10, 25, 25, 25],
        ("Geneformer", "celltype_reweighted"): [10, 10, 1, 1],
        ("Geneformer", "random"): [25, 1, 10, 1],
    }),
    "zeroshot_integration": ("avg_bio", ["kim_lung", "liver", "periodontitis", "renal"], {
        ("PretrainedPCA", "geometric_sketching"): [1, 10, 1, 1],
        ("scVI", "geometric_sketching"): [1, 1, 1, 10],
        ("scVI", "random"): [1, 1, 1, 10],
        ("SSL", "celltype_reweighted"): [10, 10, 25, 10],
        ("SSL", "geometric_sketching"): [10, 25, 25, 10],
        ("SSL", "random"): [10, 10, 50, 50],
        ("Geneformer", "celltype_reweighted"): [10, 10, 10, 25],
        ("Geneformer", "random"): [10, 50, 25, 50],
        ("SCimilarity", "celltype_reweighted"): [1, 1, 1, 10],
        ("SCimilarity", "geometric_sketching"): [1, 10, 1, 10],
        ("SCimilarity", "random"): [1, 10, 1, 10],
    }),
    "finetuned_classification": ("micro_f1", CLASSIFICATION, {
        ("scVI", "geometric_sketching"): [10, 1, 1, 1],
        ("SSL", "celltype_reweighted"): [10, 10, 1, 1],
    }),
    "perturbation_response": ("pearson_r", ["dinaciclib", "homoharringtonine", "ph797804", "tak901"], {}),
}  # fmt: skip

# The spike-in heat maps of zero-shot tasks; rows are subsets without, with 10 % and with 50 % of perturbed cells.
SPIKE_INS = {
    ("zeroshot_classification", "scVI"): [[1, 10, 1, 1], [1] * 4, [1] * 4],
    ("zeroshot_classification", "SSL"): [[10, 25, 25, 25], [10, 25, 10, 25], [10] * 4],
    ("zeroshot_classification", "Geneformer"): [[25, 1, 10, 1], [10, 1, 1, 1], [1] * 4],
    ("zeroshot_integration", "scVI"): [[1, 1], [1, 1], [1, 1]],
    ("zeroshot_integration", "SSL"): [[10, 50], [10, 25], [10, 10]],
    ("zeroshot_integration", "Geneformer"): [[10, 25], [10, 10], [1, 1]],
}


@pytest.fixture(scope="module")
def published_points():
    """Of all models, strategies, tasks and data sets, by metric."""
    published, metrics = dw.published.results(), {metric for metric, *_ in HEAT_MAPS.values()}
    return {metric: saturation_points(published, metric, n_resamples=0) for metric in metrics}


@pytest.mark.parametrize("task", HEAT_MAPS)
def test_published_heat_maps_are_reproduced_cell_for_cell(published_points, task):
    metric, datasets, above_one = HEAT_MAPS[task]
    points = select(published_points[metric], task=task)
    assert list(points) == ["model", "strategy", "task", "dataset", "percentage", "low", "high"]
    assert points[["low", "high"]].isna().all(axis=None)
    points = points[points["strategy"].isin(STRATEGIES)]
    found = points.set_index(["model", "strategy", "dataset"])["percentage"].to_dict()
    expected = dict.fromkeys(itertools.product(MODELS, STRATEGIES, datasets), 1)
    for key, percentages in above_one.items():
        expected |= {(*key, dataset): percentage for dataset, percentage in zip(datasets, percentages, strict=True)}
    assert found == expected


@pytest.mark.parametrize(("task", "model"), SPIKE_INS)
def test_published_spike_in_heat_maps_are_reproduced_cell_for_cell(published_points, task, model):
    metric, datasets = HEAT_MAPS[task][:2]
    points = select(published_points[metric], task=task, model=model)
    shown = points.pivot_table(index="strategy", columns="dataset", values="percentage")
    if task == "zeroshot_integration":
        datasets = ["kim_lung", "periodontitis"]
    assert shown.loc[["random", "spikein_10", "spikein_50"], datasets].to_numpy().tolist() == SPIKE_INS[task, model]


def test_equivalence_is_that_of_two_one_sided_tests_corrected_together():
    rng = np.random.default_rng(3)
    sizes, margin, alpha = [1, 10, 25, 50, 100], 0.05, 0.05
    levels = {"a": [0.6, 0.78, 0.79, 0.8, 0.8], "b": [0.5, 0.6, 0.76, 0.7, 0.8], "c": [0.79, 0.8, 0.8, 0.8, 0.8]}
    scores = {
        dataset: {size: rng.normal(level, 0.02, 4) for size, level in zip(sizes, of, strict=True)}
        for dataset, of in levels.items()
    }
    rows = [row for dataset, of in scores.items() for row in curve(of, dataset=dataset)]
    points = saturation_points(table(*rows), "micro_f1", rule="equivalence", margin=margin, n_resamples=0)
    pairs = [(of[size], of[100]) for of in scores.values() for size in sizes[:-1]]
    p = [ttost_ind(*pair, -margin, margin, usevar="unequal")[0] for pair in pairs]
    equivalent = multipletests(p, alpha, method="fdr_bh")[0].reshape(3, 4)
    expected = [next((sizes[i] for i in range(4) if row[i:].all()), np.nan) for row in equivalent]
    np.testing.assert_array_equal(points["percentage"], expected)
    assert len({*points["percentage"].fillna(0)}) > 1
    assert (points["margin"] == margin).all()


def test_a_strategy_without_the_full_corpus_borrows_it_but_a_spike_in_does_not():
    noise = np.array([-0.001, 0, 0.001])
    rows = [
        *curve({1: 0.5 + noise, 10: 0.8 + noise, 100: 0.8 + noise}),
        *curve({1: 0.5 + noise, 10: 0.8 + noise}, strategy="geometric_sketching"),
        *curve({1: 0.5 + noise, 10: 0.8 + noise}, strategy="spikein_10"),
    ]
    points = saturation_points(table(*rows), "micro_f1", rule="equivalence", margin=0.01).set_index("strategy")
    assert points["percentage"].fillna(0).to_dict() == {"random": 10, "geometric_sketching": 10, "spikein_10": 0}
    assert points.loc["spikein_10", "verdict"] == "undecided"
    # Other rules look at a strategy's own sizes.
    own = saturation_points(table(*rows), "micro_f1", rule="error").set_index("strategy")["percentage"]
    assert own["geometric_sketching"] == 10
    assert [c.n_own for c in curves_of(table(*rows), "micro_f1")] == [2, 3, 2]


def test_the_cells_of_a_size_are_the_mean_over_its_runs():
    rows = [row | {"n_cells": 10 + 4 * row["seed"]} for row in curve({1: [0.6, 0.5], 100: [0.7, 0.9]})]
    (found,) = curves_of(table(*rows), "micro_f1")
    assert found.n_cells.tolist() == [12, 12]
    assert [runs.tolist() for runs in found.runs] == [[0.5, 0.6], [0.7, 0.9]]


@pytest.mark.parametrize(
    ("scores", "margin", "verdict"),
    [
        ({1: [0.5, 0.51, 0.5], 50: [0.8, 0.81, 0.8], 100: [0.8, 0.81, 0.8]}, 0.05, "plateau"),
        ({1: [0.5, 0.51, 0.5], 50: [0.7, 0.71, 0.7], 100: [0.8, 0.81, 0.8]}, 0.05, "still improving"),
        ({1: [0.5, 0.51, 0.5], 50: [0.8, 0.81, 0.8], 100: [0.7, 0.71, 0.7]}, 0.05, "undecided"),  # worse
        ({1: [0.5, 0.51, 0.5], 50: [0.6, 0.81, 0.7], 100: [0.6, 0.71, 0.9]}, 0.05, "undecided"),  # too noisy
        ({1: [0.5, 0.51], 50: [0.5, 0.51], 75: [0.7, 0.71]}, 0.05, "undecided"),  # no full corpus
        ({1: 0.5, 50: 0.5, 100: 0.5}, 0.05, "undecided"),  # one seed
        ({100: [0.5, 0.51]}, 0.05, "undecided"),  # one size
    ],
)
def test_verdicts_of_the_equivalence_rule(scores, margin, verdict):
    points = saturation_points(table(*curve(scores)), "micro_f1", rule="equivalence", margin=margin)
    assert points["verdict"].item() == verdict
    assert points["percentage"].notna().item() == (verdict == "plateau")


def test_interval_of_the_bootstrap_is_the_one_worked_out_by_hand():
    # Runs at 10 % are 0.84 or 0.90 by a coin; scaled by √2, a resample has 0.8276 or 0.9124, and a mean of the two
    # with chances 1/4, 1/4 and 1/2 of 0.87. The mean at 100 % is 0.96, of which 0.95 is 0.912.
    results = table(*curve({1: [0.5, 0.5], 10: [0.84, 0.90], 100: [0.96, 0.96]}))
    wide = saturation_points(results, "micro_f1", rule="mean", confidence=0.95, n_resamples=4000)
    assert wide[["percentage", "low", "high"]].to_numpy().tolist() == [[100, 10, 100]]
    # A quarter of the resamples are at 10 %: the lower bound leaves it at a confidence below one half.
    assert saturation_points(results, "micro_f1", rule="mean", confidence=0.45)["low"].item() == 100
    assert saturation_points(results, "micro_f1", rule="mean", confidence=0.55)["low"].item() == 10


def test_an_interval_that_reaches_beyond_the_corpus_has_no_upper_bound():
    noise = np.array([-0.02, 0, 0.02])
    results = table(*curve({1: 0.5 + noise, 10: 0.8 + noise, 100: 0.8 + noise}))
    points = saturation_points(results, "micro_f1", rule="equivalence", margin=0.065)
    assert points[["percentage", "low"]].iloc[0].tolist() == [10, 10]
    assert np.isnan(points["high"].item())
    default = saturation_points(results, "micro_f1", rule="equivalence")["margin"].item()
    assert default == pytest.approx(2 * np.std(0.8 + noise, ddof=1))  # twice the spread at the full corpus
    single = table(*curve({1: [0.5, 0.6], 10: [0.9, 0.95], 100: 0.92}))  # a size with one run
    assert saturation_points(single, "micro_f1")[["low", "high"]].isna().all(axis=None)


def test_mean_over_datasets_takes_complete_runs():
    rows = [*curve({1: [0.5, 0.6], 10: 0.7}, dataset="a"), *curve({1: [0.5, 0.6], 10: 0.9}, dataset="b")]
    means = mean_over_datasets(table(*rows[:-1]), "micro_f1")
    assert means[["percentage", "seed", "value"]].to_numpy().tolist() == [[1, 0, 0.5], [1, 1, 0.6]]
    means = mean_over_datasets(table(*rows), "micro_f1")
    assert means[["dataset", "percentage", "value"]].iloc[-1].tolist() == ["all", 10, pytest.approx(0.8)]


few = settings(max_examples=15, deadline=None)
curves = st.dictionaries(
    st.sampled_from([1.0, 10.0, 25.0, 50.0, 75.0, 100.0]),
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=4),
    min_size=1,
)


@pytest.mark.parametrize("rule", RULES)
@few
@given(scores=st.lists(curves, min_size=1, max_size=3), order=st.randoms(use_true_random=False))
def test_neither_row_order_nor_names_matter(rule, scores, order):
    rows = [row for number, of in enumerate(scores) for row in curve(of, dataset=f"set {number}")]
    points = saturation_points(table(*rows), "micro_f1", rule=rule, n_resamples=20)
    order.shuffle(rows)
    pd.testing.assert_frame_equal(saturation_points(table(*rows), "micro_f1", rule=rule, n_resamples=20), points)
    # New names of models and data sets, in another order, and of seeds.
    renamed = [r | {"model": "A", "dataset": f"{9 - int(r['dataset'][-1])}", "seed": 7 - r["seed"]} for r in rows]
    again = saturation_points(table(*renamed), "micro_f1", rule=rule, n_resamples=20)[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.drop(columns=["model", "dataset"]), points.drop(columns=["model", "dataset"]))


@pytest.mark.parametrize("rule", RULES)
@few
@given(
    value=st.floats(0, 1),
    sizes=st.sets(st.sampled_from([1.0, 10.0, 25.0, 75.0]), min_size=1),
    n_seeds=st.lists(st.integers(2, 5), min_size=5, max_size=5),
)
def test_a_constant_curve_saturates_at_the_smallest_size(rule, value, sizes, n_seeds):
    scores = {size: [value] * n for size, n in zip([*sorted(sizes), 100.0], n_seeds, strict=False)}
    assert point(table(*curve(scores)), rule=rule) == min(sizes)


@pytest.mark.parametrize("rule", RULES)
@few
@given(
    start=st.floats(0.05, 0.3),
    step=st.floats(0.06, 0.13),
    sizes=st.sets(st.sampled_from([1.0, 10.0, 25.0, 50.0, 75.0]), min_size=1),
)
def test_a_line_that_rises_to_the_end_saturates_nowhere_before(rule, start, step, sizes):
    sizes = [*sorted(sizes), 100.0]
    scores = {size: [start + step * position] * 3 for position, size in enumerate(sizes)}
    found = point(table(*curve(scores)), rule=rule)
    assert np.isnan(found) if rule == "equivalence" else found == 100


@few
@given(scores=curves)
def test_a_wider_margin_never_saturates_later(scores):
    for rule in ("error", "equivalence"):
        narrow, wide = (point(table(*curve(scores)), rule=rule, margin=margin) for margin in (0.02, 0.2))
        assert np.isnan(narrow) or wide <= narrow


def test_results_are_read_as_written_and_the_same_file_whatever_the_row_order(tmp_path):
    results = table(*curve({10: [0.5, 0.6], 1: [0.4, 0.3]}), {"model": "SSL", "value": 0.123456789})
    shuffled = results.sample(frac=1, random_state=1)[COLUMNS[::-1]]
    for name, rows in {"a": results, "b": shuffled}.items():
        write_tables(tables(rows.reindex(columns=ALL_COLUMNS)), tmp_path / name, {})
    back = dw.read_results(tmp_path / "a")
    assert list(back.columns) == COLUMNS
    assert sorted(back["value"]) == sorted(results["value"])
    assert back.dtypes.to_dict() == results.dtypes.to_dict()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a" / "results.csv").astype(back.dtypes), back)
    for name in ("results.csv", "results.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"run_all\.py"):
        dw.read_results(tmp_path)


def test_mean_over_splits_keeps_runs_apart():
    splits = [{"split": "a", "value": 0.2}, {"split": "b", "value": 0.6}]
    results = table(*splits, {"seed": 1, "value": 0.9}, {"metric": "nmi", "value": 0.1})
    means = mean_over_splits(results).set_index(["metric", "seed"])["value"].to_dict()
    assert means == {("micro_f1", 0): pytest.approx(0.4), ("micro_f1", 1): 0.9, ("nmi", 0): 0.1}


def test_a_model_without_an_untrained_control_is_not_told_to_be_level_with_it():
    results = table(
        *curve({1: 0.5, 100: 0.7}, model="scVI"),
        *curve({1: 0.5, 100: 0.7}, model="scvi_2x"),
        {"strategy": "untrained", "percentage": 0.0, "value": 0.69},
        {"strategy": "baseline", "model": "PCA", "percentage": 0.0, "seed": -1, "value": 0.4},
    )
    words = dw.results.beside_controls(results, "micro_f1", margin=0.02).droplevel("dataset")
    assert words["untrained"].to_dict() == {"scVI": "within", "scvi_2x": "unknown"}
    assert words["PCA"].tolist() == ["above", "above"]
    assert dw.results.beside_controls(results.assign(metric="mse"), "mse", margin=0.02)["PCA"].eq("below").all()


def test_headline_sets_each_size_beside_untrained_and_baselines():
    results = table(
        *curve({1: [0.2, 0.4], 100: [0.6, 0.8]}),
        *curve({1: 0.99}, strategy="geometric_sketching"),
        {"strategy": "untrained", "percentage": 0.0, "value": 0.1},
        {"strategy": "baseline", "model": "PCA", "percentage": 0.0, "seed": -1, "value": 0.75},
        {"metric": "macro_f1", "value": 0.0},
    )
    shown = headline(results, "micro_f1")
    assert shown.index.tolist() == [("kang2018", "scVI")]
    assert shown.loc[("kang2018", "scVI")].to_dict() == {
        "untrained": 0.1, "1 %": pytest.approx(0.3), "100 %": pytest.approx(0.7), "PCA": 0.75
    }  # fmt: skip

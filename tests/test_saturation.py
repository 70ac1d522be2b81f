from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import datawall as dw
from datawall.results import COLUMNS, headline, mean_over_splits, select, write_results
from datawall.saturation import saturation_points

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "published" / "results.csv.gz"
DEFAULTS = {
    "study": "quick", "model": "scVI", "strategy": "random", "percentage": 1.0, "seed": 0, "n_cells": 100,
    "task": "zeroshot_classification", "dataset": "kang2018", "metric": "micro_f1", "value": 0.5, "split": "donors",
    "run_id": "a",
}  # fmt: skip


def table(*rows):
    return pd.DataFrame([DEFAULTS | row for row in rows])[COLUMNS]


def curve(scores, **common):
    """A row for each score of each percentage."""
    return [
        common | {"percentage": float(percentage), "seed": seed, "value": value}
        for percentage, values in scores.items()
        for seed, value in enumerate(np.atleast_1d(values))
    ]


def point(results, metric="micro_f1"):
    (found,) = saturation_points(results, metric)["percentage"]
    return found


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1: 0.5, 10: 0.9, 100: 0.92}, 10),
        ({1: 0.90, 10: 0.94, 100: 0.96}, 10),  # 0.912 is asked
        ({1: 0.76, 10: 0.78, 100: 0.8}, 10),  # 0.76 does not exceed 0.95 × 0.8
        ({1: [0.2, 0.79, 0.2], 10: 0.7, 100: 0.8}, 1),  # any single run
        ({1: 0.7, 10: [0.1, 0.9], 100: 0.8}, 10),  # the best may lie at a smaller size
        ({1: 0.1, 25: 0.2, 100: 0.9}, 100),
        ({1: 0.99, 10: 0.5, 100: 1.0}, 1),  # a later fall does not matter
    ],
)
def test_published_rule_by_hand(scores, expected):
    assert point(table(*curve(scores))) == expected


@pytest.mark.parametrize("value", [0.7, 0.0, -0.2])
def test_a_constant_curve_saturates_at_the_smallest_percentage(value):
    assert point(table(*curve({1: value, 10: value, 100: value}))) == 1


def test_row_order_does_not_matter():
    rng = np.random.default_rng(0)
    rows = [
        row | {"model": model, "dataset": dataset}
        for model in ("SSL", "scVI")
        for dataset in ("lung", "liver")
        for row in curve({p: rng.uniform(0.5, 1, 3) for p in (1, 10, 25, 100)})
    ]
    results = table(*rows)
    points = saturation_points(results, "micro_f1")
    assert len(points) == 4
    for seed in range(5):
        pd.testing.assert_frame_equal(saturation_points(results.sample(frac=1, random_state=seed), "micro_f1"), points)


def test_baselines_and_untrained_controls_are_left_out():
    rows = curve({1: 0.5, 10: 0.9, 100: 0.92})
    others = [
        {"strategy": "baseline", "model": "scVI", "percentage": 0.0, "seed": -1, "value": 2.0},
        {"strategy": "baseline", "model": "PCA", "percentage": 100.0, "seed": -1, "value": np.nan},
        {"strategy": "untrained", "percentage": 0.0, "value": 2.0},
        {"strategy": "random", "percentage": 0.0, "value": 2.0},
        {"metric": "macro_f1", "percentage": 1.0, "value": 2.0},
    ]
    pd.testing.assert_frame_equal(
        saturation_points(table(*rows, *others), "micro_f1"), saturation_points(table(*rows), "micro_f1")
    )


def test_splits_are_averaged_before_the_rule():
    rows = [row | {"split": split} for row in curve({10: 0.5, 100: 0.8}) for split in ("a", "b")]
    rows += [{"percentage": 1.0, "value": 0.9, "split": "a"}, {"percentage": 1.0, "value": 0.1, "split": "b"}]
    assert point(table(*rows)) == 100


def test_every_combination_has_its_own_point():
    results = table(
        *curve({1: 0.1, 10: 0.9}, model="scVI"),
        *curve({1: 0.9, 10: 0.9}, model="scVI", strategy="geometric_sketching"),
        *curve({1: 0.5, 10: 0.4}, model="scVI", dataset="lung"),
        *curve({1: 0.1, 10: 0.2}, model="SSL"),
        *curve({1: 0.2, 10: 0.2}, model="SSL", task="finetuned_classification"),
    )
    points = saturation_points(results, "micro_f1")
    assert list(points.columns) == ["model", "strategy", "task", "dataset", "percentage", "low", "high"]
    found = points.set_index(["model", "strategy", "task", "dataset"])["percentage"].to_dict()
    zeroshot = "zeroshot_classification"
    assert found == {
        ("scVI", "random", zeroshot, "kang2018"): 10,
        ("scVI", "geometric_sketching", zeroshot, "kang2018"): 1,
        ("scVI", "random", zeroshot, "lung"): 1,
        ("SSL", "random", zeroshot, "kang2018"): 10,
        ("SSL", "random", "finetuned_classification", "kang2018"): 1,
    }
    assert points[["low", "high"]].isna().all(axis=None)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 values of micro_f1 are NaN"):
        saturation_points(table(*curve({1: 0.5, 10: np.nan})), "micro_f1")


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown rule 'elbow'"):
        saturation_points(table({}), "micro_f1", rule="elbow")


def test_a_metric_that_is_better_when_lower_is_refused():
    with pytest.raises(ValueError, match="lower mse is better"):
        saturation_points(table({"metric": "mse"}), "mse")


def test_a_metric_without_pretrained_runs_is_refused():
    only_a_baseline = table({"metric": "avg_bio", "strategy": "baseline", "percentage": 0.0}, {})
    with pytest.raises(ValueError, match="no pretrained run has the metric 'avg_bio'"):
        saturation_points(only_a_baseline, "avg_bio")


def test_the_results_given_stay_as_they_are():
    results = table(*curve({10: 0.5, 1: 0.9}))
    before = results.copy()
    saturation_points(results, "micro_f1")
    pd.testing.assert_frame_equal(results, before)


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


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not on this machine")
@pytest.mark.parametrize("task", HEAT_MAPS)
def test_published_heat_maps_are_reproduced_cell_for_cell(task):
    metric, datasets, above_one = HEAT_MAPS[task]
    results = pd.read_csv(PUBLISHED).assign(study="published", n_cells=0, split="published", run_id="")
    points = saturation_points(select(results, task=task), metric)
    points = points[points["strategy"].isin(STRATEGIES) & points["dataset"].isin(datasets)]
    found = points.set_index(["model", "strategy", "dataset"])["percentage"].to_dict()
    expected = {
        (model, strategy, dataset): percentage
        for model in MODELS
        for strategy in STRATEGIES
        for dataset, percentage in zip(datasets, above_one.get((model, strategy), [1] * 4), strict=True)
    }
    assert found == expected


def test_results_are_read_as_written(tmp_path):
    results = table(*curve({10: [0.5, 0.6], 1: [0.4, 0.3]}), {"model": "SSL", "value": 0.123456789})
    write_results(results, tmp_path)
    back = dw.read_results(tmp_path)
    assert list(back.columns) == COLUMNS
    assert sorted(back["value"]) == sorted(results["value"])
    assert back.dtypes.to_dict() == results.dtypes.to_dict()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv").astype(back.dtypes), back)


def test_results_are_the_same_file_whatever_the_row_order(tmp_path):
    results = table(*curve({10: [0.5, 0.6], 1: [0.4, 0.3]}, model="SSL"), *curve({1: 0.2}))
    write_results(results, tmp_path / "a")
    write_results(results.sample(frac=1, random_state=1)[COLUMNS[::-1]], tmp_path / "b")
    for name in ("results.csv", "results.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_without_results_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run_all\.py"):
        dw.read_results(tmp_path)


def test_select_asks_for_every_value():
    results = table({"seed": 1}, {"seed": 1, "model": "SSL"}, {"seed": 2})
    assert select(results, seed=1, model="scVI").index.tolist() == [0]
    assert len(select(results)) == 3


def test_mean_over_splits_keeps_runs_apart():
    splits = [{"split": "a", "value": 0.2}, {"split": "b", "value": 0.6}]
    results = table(*splits, {"seed": 1, "value": 0.9}, {"metric": "nmi", "value": 0.1})
    means = mean_over_splits(results).set_index(["metric", "seed"])["value"].to_dict()
    assert means == {("micro_f1", 0): pytest.approx(0.4), ("micro_f1", 1): 0.9, ("nmi", 0): 0.1}


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

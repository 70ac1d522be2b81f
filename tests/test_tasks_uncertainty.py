"""Chance levels by enumeration, intervals by their coverage, and the record that carries both."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from datawall.tasks import classification, uncertainty
from datawall.tasks.uncertainty import Metrics

LABELS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)


def test_chance_levels_are_expectations_over_all_predictions():
    train, test = np.array(list("aaabbc")), np.array(list("aabbd"))
    share = {"a": 3 / 6, "b": 2 / 6, "c": 1 / 6}
    expected = dict.fromkeys(("micro_f1", "macro_f1", "balanced_accuracy", "error_rate", "f1[a]", "f1[b]"), 0.0)
    types = np.unique(test)
    for predicted in itertools.product("abc", repeat=len(test)):
        p = np.prod([share[label] for label in predicted])
        recalls = [np.mean(np.array(predicted)[test == name] == name) for name in types]
        expected["balanced_accuracy"] += p * np.mean(recalls)
        expected["micro_f1"] += p * accuracy_score(test, predicted)
        f1 = f1_score(test, predicted, labels=types, average=None, zero_division=0)
        expected["macro_f1"] += p * f1.mean()
        expected["f1[a]"] += p * f1[0]
        expected["f1[b]"] += p * f1[1]
        expected["error_rate"] += p * np.mean(test != np.array(predicted))
    levels = uncertainty.chance_levels(train, test)
    assert levels == pytest.approx({**expected, "f1[d]": 0})


@settings(deadline=None)
@given(LABELS, st.randoms(use_true_random=False))
def test_metrics_of_confusions_are_scikit_learns(truth, random):
    predicted = [random.choice([label, "a", "z"]) for label in truth]
    truth, predicted = np.array(truth), np.array(predicted)
    types, table = uncertainty.confusion(truth, predicted)
    values = {name: float(metric(table)) for name, metric in uncertainty.OF_CONFUSION.items()}
    assert values == pytest.approx({name: metric(truth, predicted) for name, metric in classification.METRICS.items()})
    f1 = dict(zip(types, uncertainty.f1_of(table), strict=True))
    assert {name: f1[name] for name in np.unique(truth)} == pytest.approx(classification.f1_by_type(truth, predicted))


@settings(deadline=None)
@given(LABELS, st.randoms(use_true_random=False))
def test_intervals_hold_the_value(truth, random):
    predicted = [random.choice([label, "a"]) for label in truth]
    metrics = classification.classification_metrics(np.array(truth), np.array(predicted))
    for name, (low, high) in metrics.intervals.items():
        assert low - 1e-9 <= metrics[name] <= high + 1e-9, name


def test_intervals_are_those_of_cells_drawn_again():
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abc"), 400, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(400) < 0.7, truth, rng.choice(list("abc"), 400))
    intervals = uncertainty.classification_intervals(truth, predicted, n_resamples=4000)
    draws = {"micro_f1": [], "macro_f1": [], "balanced_accuracy": []}
    for _ in range(1000):
        cells = rng.integers(400, size=400)
        draws["micro_f1"].append(accuracy_score(truth[cells], predicted[cells]))
        draws["macro_f1"].append(f1_score(truth[cells], predicted[cells], average="macro"))
        draws["balanced_accuracy"].append(balanced_accuracy_score(truth[cells], predicted[cells]))
    for name, values in draws.items():
        low, high = intervals[name]
        assert high - low == pytest.approx(np.subtract(*np.quantile(values, [0.975, 0.025])), rel=0.1), name


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.repeat(["a", "b"], [150, 50])
    held = {"micro_f1": 0, "balanced_accuracy": 0}
    for seed in range(400):
        predicted = np.where(rng.random(200) < 0.8, truth, np.where(truth == "a", "b", "a"))
        intervals = uncertainty.classification_intervals(truth, predicted, seed=seed)
        for name in held:
            low, high = intervals[name]
            held[name] += low <= 0.8 <= high
    assert all(0.91 < n / 400 < 0.98 for n in held.values()), held


def test_bias_of_resampling_is_taken_off():
    # The squared mean of a sample: resamples are larger by its variance, on average.
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    x += 0.5 - x.mean()
    draws = np.square(uncertainty.resamples(50, 4000) @ x / 50)
    low, high = uncertainty.interval(0.25, draws)
    assert draws.mean() == pytest.approx(0.25 + x.var() / 50, rel=0.02)
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]) - (draws.mean() - 0.25))
    assert np.isnan(uncertainty.interval(0.5, np.array([np.nan]))).all()
    assert uncertainty.interval(0.0, draws)[0] == 0  # an error is never below zero


def test_resamples_draw_cells_with_replacement():
    weights = uncertainty.resamples(60, 500, seed=3)
    assert weights.shape == (500, 60)
    assert (weights.sum(axis=1) == 60).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(60), abs=0.2)
    assert weights.var() == pytest.approx(59 / 60, rel=0.05)  # binomial: 60 draws, each cell one in 60
    assert np.array_equal(weights, uncertainty.resamples(60, 500, seed=3))
    assert not np.array_equal(weights, uncertainty.resamples(60, 500, seed=4))


def test_intervals_of_many_cells_take_no_time():
    rng = np.random.default_rng(0)
    truth = rng.choice([f"type {i}" for i in range(15)], 5000)
    predicted = rng.permutation(truth)
    begin = time.process_time()
    uncertainty.classification_intervals(truth, predicted)
    assert time.process_time() - begin < 0.25


def test_metrics_are_a_dict_with_records():
    metrics = Metrics({"f1": np.float64(0.5), "mse": np.nan}, {"f1": (0.4, 0.6), "other": (0, 1)}, {"f1": 0.2})
    assert metrics == {"f1": 0.5, "mse": pytest.approx(np.nan, nan_ok=True)}
    assert json.loads(json.dumps(metrics.rows())) == [
        {"metric": "f1", "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.2, "ceiling": None},
        {"metric": "mse", "value": None, "low": None, "high": None, "chance": None, "ceiling": None},
    ]
    both = metrics.merged(Metrics({"f1": 0.7}, ceiling={"f1": 0.9}).prefixed("probe_"))
    assert list(both) == ["f1", "mse", "probe_f1"]
    assert both.rows()[2] == {
        "metric": "probe_f1", "value": 0.7, "low": None, "high": None, "chance": None, "ceiling": 0.9,
    }  # fmt: skip
    assert both.rows()[:2] == metrics.rows()

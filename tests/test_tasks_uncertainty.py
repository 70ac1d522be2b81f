"""Metrics as a record: chance levels by enumeration, intervals by their coverage, and metrics.csv, which lists all."""

import itertools
import json
import time

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from statsmodels.stats.proportion import proportion_confint

from datawall import models, tasks
from datawall.models import training
from datawall.tasks import classification, finetuning, uncertainty
from datawall.tasks.metrics import Metrics

LABELS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)


def test_chance_levels_are_expectations_over_all_predictions():
    train, test = np.array(list("aaabbc")), np.array(list("aabbd"))
    share, types = {"a": 3 / 6, "b": 2 / 6, "c": 1 / 6}, np.unique(test)
    expected = np.zeros(7)
    for predicted in map(np.array, itertools.product("abc", repeat=len(test))):
        right = accuracy_score(test, predicted)
        recalls = [np.mean(predicted[test == name] == name) for name in types]
        f1 = f1_score(test, predicted, labels=types, average=None, zero_division=0)
        scores = right, f1.mean(), np.mean(recalls), 1 - right, *f1
        expected += np.prod([share[label] for label in predicted]) * np.array(scores)
    names = "micro_f1", "macro_f1", "balanced_accuracy", "error_rate", "f1[a]", "f1[b]", "f1[d]"
    assert uncertainty.chance_levels(train, test) == pytest.approx(dict(zip(names, expected, strict=True)))


@settings(deadline=None)
@given(LABELS, st.randoms(use_true_random=False))
def test_intervals_hold_the_value(truth, random):
    predicted = [random.choice([label, "a"]) for label in truth]
    metrics = classification.classification_metrics(np.array(truth), np.array(predicted))
    for name, (low, high) in metrics.intervals.items():
        assert low - 1e-9 <= metrics[name] <= high + 1e-9, name


def test_intervals_of_many_cells_are_those_of_cells_drawn_again():
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abc"), 1000, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(1000) < 0.7, truth, rng.choice(list("abc"), 1000))
    intervals = uncertainty.classification_intervals(truth, predicted)
    draws = {"micro_f1": [], "macro_f1": [], "f1[b]": []}
    for _ in range(1000):
        cells = rng.integers(1000, size=1000)
        draws["micro_f1"].append(accuracy_score(truth[cells], predicted[cells]))
        by_type = f1_score(truth[cells], predicted[cells], average=None)
        draws["macro_f1"].append(by_type.mean())
        draws["f1[b]"].append(by_type[1])
    for name, values in draws.items():
        low, high = intervals[name]
        assert high - low == pytest.approx(2 * uncertainty.Z * np.std(values), rel=0.06), name


@pytest.mark.parametrize(("method", "name"), [(uncertainty.wilson, "wilson"), (uncertainty.exact, "beta")])
def test_intervals_of_shares_are_those_of_statsmodels(method, name):
    right, n = np.array([0, 1, 5, 49, 50]), np.array([3, 2, 50, 50, 50])
    np.testing.assert_allclose(method(right, n), proportion_confint(right, n, method=name), atol=1e-6)


@pytest.mark.parametrize("n_cells", [50, 70, 350])
@pytest.mark.parametrize(("n_types", "share_right"), [(2, (0.8,)), (4, (0.9,)), (8, (0.95,)), (8, (0.98, 0.6))])
def test_intervals_hold_the_truth_as_often_as_they_say(n_cells, n_types, share_right):
    """From 50 cells on, with types of a single cell, and near a ceiling; 300 draws: 1.3 % of Monte-Carlo error."""
    rng = np.random.default_rng(0)
    share = 0.7 ** np.arange(n_types)
    n = np.maximum(1, np.round(n_cells * share / share.sum())).astype(int)
    called = np.zeros((n_types, n_types))
    for number, right in zip(range(n_types), itertools.cycle(share_right)):
        called[number] = share * (np.arange(n_types) != number)
        called[number] *= (1 - right) / called[number].sum()
        called[number, number] = right
    expected = n[:, None] * called
    f1 = 2 * np.diag(expected) / (n + expected.sum(axis=0))
    truths = {"micro_f1": np.trace(expected) / n.sum(), "macro_f1": f1.mean(), "f1[0]": f1[0]}
    truths["balanced_accuracy"] = np.diag(called).mean()
    held, truth = dict.fromkeys(truths, 0), np.repeat(np.arange(n_types), n)
    for _ in range(300):
        predicted = np.concatenate([rng.choice(n_types, size, p=p) for size, p in zip(n, called, strict=True)])
        intervals = uncertainty.classification_intervals(truth, predicted)
        for name, value in truths.items():
            held[name] += intervals[name][0] <= value <= intervals[name][1]
    coverage = {name: count / 300 for name, count in held.items()}
    assert min(coverage.values()) > 0.92 - 0.013, coverage
    if len(share_right) == 1:  # fixed numbers of cells that are unequally hard vary less than those of a random sample
        assert max(coverage[name] for name in ("micro_f1", "macro_f1")) < 0.98 + 0.013, coverage


@pytest.mark.parametrize(("n_cells", "right", "agree"), [(50, 0.9, 0.8), (70, 0.98, 0.5), (350, 0.8, 0.9)])
def test_paired_differences_hold_the_truth_and_are_narrower(n_cells, right, agree):
    """Two models, of which the second takes the first's answer in a share of the cells."""
    rng, held, narrower = np.random.default_rng(0), 0, []
    for _ in range(500):
        one = rng.random(n_cells) < right
        other = np.where(rng.random(n_cells) < agree, one, rng.random(n_cells) < right - 0.05)
        gap, low, high = uncertainty.paired_interval(one, other)
        assert gap == pytest.approx(one.mean() - other.mean())
        assert low <= gap <= high
        held += low <= (1 - agree) * 0.05 <= high
        apart = np.sqrt(one.var() / n_cells + other.var() / n_cells) * 2 * uncertainty.Z
        narrower.append((high - low) / apart if apart else np.nan)
    assert held / 500 > 0.92
    assert agree < 0.8 or np.nanmean(narrower) < 0.85


def test_paired_difference_of_two_runs_is_agrestis_and_mins():
    ours, theirs = np.ones(20), np.ones(20)
    theirs[:5], ours[5:7] = 0, 0  # five cells that ours alone has right, and two that theirs has
    more, fewer = (5 + 1 / 2) / (20 + 2), (2 + 1 / 2) / (20 + 2)
    width = uncertainty.Z * np.sqrt((more + fewer - (more - fewer) ** 2) / (20 + 2))
    expected = 3 / 20, more - fewer - width, more - fewer + width
    assert uncertainty.paired_interval(ours, theirs) == pytest.approx(expected)


def test_paired_difference_of_many_cells_is_that_of_their_differences():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 20_000)) < [[0.8], [0.7]]
    gaps = one.astype(float) - other
    error = gaps.std(ddof=1) / np.sqrt(len(gaps))
    expected = [gaps.mean(), gaps.mean() - uncertainty.Z * error, gaps.mean() + uncertainty.Z * error]
    assert uncertainty.paired_interval(one, other) == pytest.approx(expected, abs=1e-4)
    runs = np.stack([one, one & (rng.random(20_000) < 0.9)])  # a second run, worse by a tenth
    gap, low, high = uncertainty.paired_interval(runs, other)
    assert gap == pytest.approx(runs.mean() - other.mean())
    assert high - low > 2 * uncertainty.Z * runs.mean(axis=1).std(ddof=1) / np.sqrt(2)


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


# metrics.csv: each metric that a task returns stands in it, and no other


RECIPE = training.Recipe(steps=5, batch_size=32, learning_rate=1e-3, validate_every=5)


@pytest.fixture(scope="module")
def returned():
    """Names of metrics by task."""
    rng = np.random.default_rng(0)
    labels, batches, part = (np.resize(values, 240) for values in (list("abc"), list("xxyy"), [0, 0, 0, 0, 0, 1, 2]))
    X = 3 * np.eye(3)[np.unique(labels, return_inverse=True)[1]] + rng.normal(size=(240, 3))
    counts = sp.csr_matrix(rng.poisson(2.0, (240, 60)).astype(np.float32))
    ssl = models.create("SSL", n_hidden=[8], n_latent=4).untrained(60, seed=0)
    treated = batches == "y"
    results = {
        "zeroshot_classification": tasks.zeroshot_classification(X, labels, X + 0.1, labels, more_k=(1, 15)),
        "zeroshot_integration": tasks.zeroshot_integration(X, labels, batches, unintegrated=X),
        "finetuned_classification": tasks.finetuned_classification(X, labels, part, seed=0, recipe=RECIPE).merged(
            finetuning.fully_finetuned_classification(
                ssl, counts, labels, part, seed=0, recipe=RECIPE, head_recipe=RECIPE
            )
        ),
        "perturbation_response": tasks.perturbation_response(X, X, treated, labels, "a", seed=0, recipe=RECIPE),
        "reconstruction": tasks.reconstruction(ssl, counts, pd.DataFrame(index=range(240))),
    }
    assert set(results) == set(tasks.TASKS)
    return results


def test_every_metric_is_listed_and_every_listed_one_is_returned(returned):
    table = tasks.metrics_table()
    listed = set(zip(table["task"], table["metric"], strict=True))
    assert listed == {(task, tasks.registered(name)) for task, metrics in returned.items() for name in metrics}
    assert not table.duplicated(["task", "metric"]).any()


def test_the_table_is_complete():
    table = tasks.metrics_table()
    assert list(table) == ["metric", "task", "definition", "best", "direction", "chance", "version", "source"]
    assert set(table["direction"]) <= {"higher", "lower", "none"}
    assert (table["version"].astype(int) >= 1).all()
    for column in ("definition", "chance", "source"):
        assert (table[column].astype(str).str.len() > 0).all(), column
    assert set(table.loc[table["best"] == "", "metric"]) == {"support[]", "loss"}


def test_headlines_are_listed():
    table = tasks.metrics_table().set_index(["task", "metric"])
    assert set(tasks.HEADLINE) == set(tasks.TASKS)
    assert all((task, metric) in table.index for task, metric in tasks.HEADLINE.items())


def test_numbers_are_on_the_side_of_the_best_value_that_the_direction_says(returned):
    table = tasks.metrics_table().set_index(["task", "metric"])
    for task, metrics in returned.items():
        for name, value in metrics.items():
            row = table.loc[(task, tasks.registered(name))]
            if row["best"] == "" or name == "energy_distance":  # unbiased, so now and then below zero
                continue
            gap = float(row["best"]) - value
            assert gap >= -1e-9 if row["direction"] == "higher" else gap <= 1e-9, (task, name)


def test_every_number_has_an_interval_or_counts_something(returned):
    for task, metrics in returned.items():
        for row in metrics.rows():
            if not row["metric"].startswith("support["):
                assert row["low"] <= row["value"] + 1e-9, (task, row)
                assert row["value"] <= row["high"] + 1e-9, (task, row)


def test_a_task_is_its_function_and_what_is_none_is_said():
    assert all(getattr(tasks, name) is task.function for name, task in tasks.TASKS.items())
    with pytest.raises(AttributeError, match="has no attribute 'segmentation'"):
        tasks.segmentation  # noqa: B018

"""metrics.csv: each metric that a task returns stands in it, and no other."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from datawall import models, tasks
from datawall.models import training
from datawall.tasks import finetuning

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

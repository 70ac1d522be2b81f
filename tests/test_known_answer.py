import logging

import numpy as np
import pandas as pd
import pytest
from benchmarks.known_answer import SEEDS, learn, rates

from datawall.analysis import known_answer
from datawall.analysis.known_answer import CORPUS, MARGIN, PAIRS, PERCENTAGES
from datawall.cells import simulate


@pytest.fixture(scope="module")
def results():
    return known_answer.results()


def test_the_packaged_table_is_what_the_pipeline_finds(results, caplog):
    seed = 1
    with caplog.at_level(logging.WARNING):
        learned = learn([seed])
    assert not caplog.records  # cells with hardly a molecule may coincide
    key = ["percentage", "seed", "dataset"]
    packaged = results[results["seed"] == seed].set_index(key)["value"]
    found = learned.set_index(key)["value"]
    assert len(found) == len(packaged) == len(PERCENTAGES) * len(PAIRS)
    # A neighbour may change with the last bits of an embedding: 3 of a pair's 1,000 cells.
    np.testing.assert_allclose(found.reindex(packaged.index), packaged, atol=0.003)


def test_cells_are_evaluated_by_the_programmes_that_were_learned():
    weights = known_answer.WEIGHTS, dict.fromkeys(PAIRS, 1.0)
    pretrained, evaluated = (simulate.truth(known_answer.atlas(CORPUS, each)) for each in weights)
    np.testing.assert_array_equal(pretrained.weights, evaluated.weights)
    np.testing.assert_array_equal(pretrained.capture, evaluated.capture)
    np.testing.assert_allclose(pretrained.loadings, evaluated.loadings, atol=1e-4)  # of up to 0.5


def test_what_is_planted_is_what_is_there(results):
    needed = known_answer.percentage_needed()
    begins = known_answer.plateaus(results)
    assert begins.to_dict() == {"T cells": 1, "monocytes": 25, "B cells": np.inf}
    # Where more cells are planted as needed, the plateau begins later.
    assert needed.sort_values().index.tolist() == begins.sort_values().index.tolist()
    half, full = (results[results["percentage"] == size].groupby("dataset")["value"] for size in (50, 100))
    gain = full.mean() - half.mean()
    error = (full.var() / len(SEEDS) + half.var() / len(SEEDS)) ** 0.5
    assert gain["B cells"] - 3 * error["B cells"] > MARGIN
    for pair in ("T cells", "monocytes"):
        assert abs(gain[pair]) + 3 * error[pair] < MARGIN


def test_a_plateau_begins_after_the_last_size_that_is_off():
    runs = {
        "flat": (0.8, 0.8, 0.8, 0.8, 0.8, 0.8),
        "early": (0.6, 0.81, 0.79, 0.8, 0.8, 0.8),
        "late": (0.8, 0.8, 0.9, 0.81, 0.8, 0.8),
        "rising": (0.5, 0.6, 0.7, 0.75, 0.79, 0.8),
    }
    table = pd.DataFrame(runs, index=pd.Index(map(float, PERCENTAGES), name="percentage"))
    begins = known_answer.plateaus(table.melt(var_name="dataset", ignore_index=False).reset_index())
    assert begins.to_dict() == {"early": 10, "flat": 1, "late": 50, "rising": np.inf}


def test_the_packaged_rates_are_what_the_rules_say(results):
    packaged = pd.read_csv(known_answer.RATES)
    keys = ["pair", "seeds", "rule"]
    plateau = packaged.set_index(keys)["plateau"]
    again = rates(results, (5,), n_draws=10).set_index(keys)["plateau"]
    share = plateau.reindex(again.index)
    assert ((again - share).abs() < 0.1 + 4 * np.sqrt(share * (1 - share) / 10)).all()

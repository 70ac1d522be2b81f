import numpy as np
import pytest

from datawall import power


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

import numpy as np
import pandas as pd
import pytest
from vendi_score import vendi as reference

from datawall.cells import diversity

measures = [diversity.shannon, diversity.inverse_simpson, diversity.gini_simpson]


@pytest.mark.parametrize("k", [1, 2, 3, 7, 164])
def test_equally_common_labels_have_closed_forms(k):
    labels = np.tile([f"type {i}" for i in range(k)], 5)
    expected = [np.log2(k), k, 1 - 1 / k]
    values = [measure(labels) for measure in measures]
    assert values == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert "-" not in str(values)  # no negative zero


def test_half_a_quarter_an_eighth_and_an_eighth_by_hand():
    labels = np.repeat(["a", "b", "c", "d"], [4, 2, 1, 1])
    assert [measure(labels) for measure in measures] == pytest.approx([1.75, 64 / 22, 42 / 64], rel=1e-12)


@pytest.mark.parametrize("measure", measures)
def test_order_and_names_of_labels_and_categories_of_no_cell_do_not_matter(measure):
    labels = np.repeat([0, 1, 2], [5, 3, 1])
    renamed = np.array(["z", "a", "m"])[np.random.default_rng(0).permutation(labels)]
    assert measure(renamed) == pytest.approx(measure(labels), rel=1e-12)
    assert measure(pd.Categorical(renamed, categories=list("bamz"))) == measure(renamed)


@pytest.mark.parametrize("measure", [*measures, diversity.vendi])
def test_no_cells_is_refused(measure):
    with pytest.raises(ValueError, match="no cells"):
        measure(np.empty((0, 3)) if measure is diversity.vendi else np.array([]))


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (20, 20)])
def test_vendi_agrees_with_the_authors_package(shape):
    X = np.random.default_rng(1).gamma(0.5, size=shape)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    assert diversity.vendi(X) == pytest.approx(reference.score_K(unit @ unit.T), rel=1e-8)
    assert diversity.vendi(X) == pytest.approx(reference.score_dual(unit, normalize=False), rel=1e-8)


P = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("X", "expected"),
    [
        (np.eye(6) * np.arange(1, 7)[:, None], 6),  # orthogonal; lengths must not matter
        (np.eye(6, 50), 6),
        (np.outer(np.arange(1, 31), [1, -2, 0.5, 3]), 1),  # all the same
        (np.outer(np.arange(1, 5), np.arange(1, 31)), 1),
        (np.ones((1, 5)), 1),
        (np.repeat(np.eye(3, 5), [5, 3, 2], axis=0), np.exp(-(P * np.log(P)).sum())),
    ],
)
def test_vendi_has_closed_forms(X, expected):
    assert diversity.vendi(X) == pytest.approx(expected, rel=1e-9)


def test_vendi_names_the_row_without_a_direction():
    with pytest.raises(ValueError, match="row 2 is all zero"):
        diversity.vendi(np.diag([1, 1, 0, 1]))


def test_cells_are_drawn_without_replacement():
    drawn = diversity.at_equal_n(diversity.shannon, np.arange(1_000), 64, repeats=5, seed=0)
    assert drawn == pytest.approx((6, 0), abs=1e-12)
    X = np.random.default_rng(0).normal(size=(30, 5))
    assert diversity.at_equal_n(diversity.vendi, X, 30, seed=0) == pytest.approx((diversity.vendi(X), 0), abs=1e-12)


def test_spread_is_that_of_the_draws():
    values = iter([1.0, 2.0, 4.0, 5.0])
    mean, spread = diversity.at_equal_n(lambda drawn: next(values), np.arange(9), 3, repeats=4, seed=0)
    assert (mean, spread) == (3, pytest.approx(np.sqrt(10 / 3)))


def test_draws_depend_on_the_seed_and_on_nothing_else():
    labels = np.random.default_rng(1).geometric(0.3, 500)
    draws = [diversity.at_equal_n(diversity.inverse_simpson, labels, 50, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("n", [0, 4])
def test_more_cells_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f"cannot draw {n} of 3 cells"):
        diversity.at_equal_n(diversity.shannon, np.arange(3), n, seed=0)

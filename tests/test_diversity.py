import numpy as np
import pandas as pd
import pytest
from vendi_score import vendi as reference

from datawall.cells import diversity

measures = [diversity.shannon, diversity.inverse_simpson, diversity.gini_simpson]


@pytest.mark.parametrize("k", [1, 2, 3, 7, 164])
def test_equally_common_labels_have_closed_forms(k):
    labels = np.tile([f"type {i}" for i in range(k)], 5)
    assert diversity.shannon(labels) == pytest.approx(np.log2(k), abs=1e-12)
    assert diversity.inverse_simpson(labels) == pytest.approx(k, rel=1e-12)
    assert diversity.gini_simpson(labels) == pytest.approx(1 - 1 / k, abs=1e-12)


def test_one_label_has_no_diversity_and_no_negative_zero():
    assert str(diversity.shannon(np.array(["T"] * 9))) == "0.0"
    assert str(diversity.gini_simpson(np.array(["T"] * 9))) == "0.0"


def test_half_a_quarter_an_eighth_and_an_eighth_by_hand():
    labels = np.repeat(["a", "b", "c", "d"], [4, 2, 1, 1])
    assert diversity.shannon(labels) == pytest.approx(1.75, abs=1e-12)
    assert diversity.inverse_simpson(labels) == pytest.approx(64 / 22, rel=1e-12)
    assert diversity.gini_simpson(labels) == pytest.approx(42 / 64, rel=1e-12)


@pytest.mark.parametrize("measure", measures)
def test_label_order_and_names_do_not_matter(measure):
    labels = np.repeat([0, 1, 2], [5, 3, 1])
    renamed = np.array(["z", "a", "m"])[np.random.default_rng(0).permutation(labels)]
    assert measure(renamed) == pytest.approx(measure(labels), rel=1e-12)


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


@pytest.mark.parametrize(("n", "d"), [(6, 6), (6, 50)])
def test_vendi_of_orthogonal_cells_is_their_number(n, d):
    X = np.eye(n, d) * np.arange(1, n + 1)[:, None]  # lengths must not matter
    assert diversity.vendi(X) == pytest.approx(n, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (4, 30), (1, 5)])
def test_vendi_of_identical_cells_is_one(n, d):
    X = np.outer(np.arange(1, n + 1), np.random.default_rng(2).standard_normal(d))
    assert diversity.vendi(X) == pytest.approx(1, rel=1e-9)


def test_vendi_of_unequal_groups_is_exp_of_their_entropy():
    X = np.repeat(np.eye(3, 5), [5, 3, 2], axis=0)
    p = np.array([0.5, 0.3, 0.2])
    assert diversity.vendi(X) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_vendi_is_the_same_from_either_matrix():
    X = np.random.default_rng(3).standard_normal((12, 7))
    wide = np.hstack([X, np.zeros((12, 30))])  # more features than cells: decomposes the other matrix
    assert diversity.vendi(wide) == pytest.approx(diversity.vendi(X), rel=1e-9)


def test_vendi_names_the_row_without_a_direction():
    X = np.ones((4, 3))
    X[2] = 0
    with pytest.raises(ValueError, match="row 2 is all zero"):
        diversity.vendi(X)


@pytest.mark.parametrize("measure", measures)
def test_categories_that_no_cell_has_do_not_count(measure):
    labels = pd.Categorical(["a", "b", "b"], categories=["a", "b", "c"])
    assert measure(labels) == measure(np.array(labels))


def test_equal_numbers_of_distinct_labels_are_drawn_without_replacement():
    mean, spread = diversity.at_equal_n(diversity.shannon, np.arange(1_000), 64, repeats=5, seed=0)
    assert mean == pytest.approx(6, abs=1e-12)
    assert spread == pytest.approx(0, abs=1e-12)


def test_all_cells_have_the_measure_itself_and_no_spread():
    X = np.random.default_rng(0).normal(size=(30, 5))
    mean, spread = diversity.at_equal_n(diversity.vendi, X, 30, seed=0)
    assert mean == pytest.approx(diversity.vendi(X), rel=1e-12)
    assert spread == pytest.approx(0, abs=1e-12)


def test_spread_is_that_of_the_draws():
    values = iter([1.0, 2.0, 4.0, 5.0])
    mean, spread = diversity.at_equal_n(lambda drawn: next(values), np.arange(9), 3, repeats=4, seed=0)
    assert (mean, spread) == (3, pytest.approx(np.sqrt(10 / 3)))


def test_draws_depend_on_the_seed_and_on_nothing_else():
    labels = np.random.default_rng(1).geometric(0.3, 500)
    draws = [diversity.at_equal_n(diversity.inverse_simpson, labels, 50, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_vendi_of_many_cells_and_of_few_compares_at_equal_numbers():
    X = np.random.default_rng(2).normal(size=(2_000, 200))
    assert diversity.vendi(X) > 1.3 * diversity.vendi(X[:300])
    many, few = (diversity.at_equal_n(diversity.vendi, cells, 200, seed=0) for cells in (X, X[:300]))
    assert many[0] == pytest.approx(few[0], rel=0.01)


@pytest.mark.parametrize("n", [0, 4])
def test_more_cells_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f"cannot draw {n} of 3 cells"):
        diversity.at_equal_n(diversity.shannon, np.arange(3), n, seed=0)

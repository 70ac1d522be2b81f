import numpy as np
import pytest
from geosketch import gs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from datawall import sampling

steady = settings(deadline=None, derandomize=True, max_examples=80)
n_cells = st.integers(1, 300)
percentages = st.floats(0, 100, exclude_min=True) | st.sampled_from([1, 10, 25, 50, 75, 100])
seeds = st.integers(0, 2**32)


def sample(strategy, n, percentage, seed):
    rng = np.random.default_rng(n)  # the corpus depends on its size, not on the seed of the sample
    if strategy == "random":
        return sampling.random(n, percentage, seed=seed)
    if strategy == "celltype_reweighted":
        return sampling.celltype_reweighted(rng.geometric(0.4, n).astype(str), percentage, seed=seed)
    return sampling.geometric_sketching(rng.standard_normal((n, 3)), percentage, seed=seed)


every_strategy = pytest.mark.parametrize("strategy", ["random", "celltype_reweighted", "geometric_sketching"])


@every_strategy
@given(n=n_cells, percentage=percentages, seed=seeds)
@steady
def test_rows_are_sorted_unique_in_range_and_as_many_as_asked(strategy, n, percentage, seed):
    rows = sample(strategy, n, percentage, seed)
    assert rows.dtype == np.int64
    assert len(rows) == sampling.subset_size(n, percentage)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < n
    np.testing.assert_array_equal(rows, sample(strategy, n, percentage, seed))


@every_strategy
def test_seeds_choose_different_rows(strategy):
    chosen = {sample(strategy, 5_000, 10, seed).tobytes() for seed in range(5)}
    assert len(chosen) == 5


@every_strategy
def test_all_of_the_corpus_is_every_row(strategy):
    np.testing.assert_array_equal(sample(strategy, 321, 100, 0), np.arange(321))


@every_strategy
@pytest.mark.parametrize("percentage", [0, 140, -1, float("nan")])
def test_percentage_out_of_range_is_refused(strategy, percentage):
    with pytest.raises(ValueError, match=f"percentage {percentage} "):
        sample(strategy, 50, percentage, 0)


@every_strategy
def test_no_cells_is_refused(strategy):
    with pytest.raises(ValueError, match="no cells"):
        sample(strategy, 0, 10, 0)


@pytest.mark.parametrize(
    ("n", "percentage", "size"), [(1000, 10, 100), (1000, 0.01, 1), (3, 50, 2), (7, 100, 7), (149, 1, 1), (151, 1, 2)]
)
def test_subset_size_is_the_nearest_and_at_least_one(n, percentage, size):
    assert sampling.subset_size(n, percentage) == size


def test_random_takes_every_cell_equally_often():
    taken = np.zeros(50)
    for seed in range(2_000):
        taken[sampling.random(50, 20, seed=seed)] += 1
    assert np.abs(taken - 400).max() < 5 * np.sqrt(2_000 * 0.2 * 0.8)


@given(
    cell_type=st.lists(st.sampled_from("aaaaaaaabbbbbccd"), min_size=1, max_size=200),
    percentage=percentages,
    seed=seeds,
)
@steady
def test_celltype_reweighted_is_as_even_as_the_corpus_allows(cell_type, percentage, seed):
    cell_type = np.array(cell_type)
    types, available = np.unique(cell_type, return_counts=True)
    chosen = cell_type[sampling.celltype_reweighted(cell_type, percentage, seed=seed)]
    taken = np.array([(chosen == name).sum() for name in types])
    assert (taken <= available).all()
    for kept, limit in zip(taken, available, strict=True):
        if kept < limit:
            assert taken.max() <= kept + 1


def test_celltype_reweighted_shares_what_rare_types_leave():
    cell_type = np.repeat(["B", "NK", "T"], [5, 300, 695])
    chosen = cell_type[sampling.celltype_reweighted(cell_type, 20.5, seed=3)]
    assert [(chosen == name).sum() for name in ("B", "NK", "T")] == [5, 100, 100]


def test_celltype_reweighted_gives_the_remainder_to_types_by_seed():
    cell_type = np.repeat(["B", "NK", "T"], 100)
    one_more = {
        np.bincount(sampling.celltype_reweighted(cell_type, 100 / 300 * 10, seed=s) // 100).argmax() for s in range(30)
    }
    assert one_more == {0, 1, 2}


def test_celltype_reweighted_takes_every_cell_of_a_type_equally_often():
    cell_type, taken = np.repeat(["B", "T"], [10, 90]), np.zeros(100)
    for seed in range(2_000):
        taken[sampling.celltype_reweighted(cell_type, 10, seed=seed)] += 1
    assert np.abs(taken[:10] - 1_000).max() < 5 * np.sqrt(2_000 / 4)
    assert np.abs(taken[10:] - 2_000 / 18).max() < 5 * np.sqrt(2_000 / 18)


def clusters_with_a_rare_one():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(5), [2_500, 1_500, 700, 275, 25])
    centres = rng.standard_normal((5, 10)) * 6
    return centres[label] + rng.standard_normal((5_000, 10)), label == 4


def partial_hausdorff(X, rows):
    """Distance to the nearest chosen cell, of the cell that only one in a thousand cells is farther than."""
    distance, _ = cKDTree(X[rows]).query(X)
    return np.quantile(distance, 0.999)


def test_geometric_sketching_covers_as_well_as_geosketch():
    X, rare = clusters_with_a_rare_one()
    ours = [sampling.geometric_sketching(X, 2, seed=seed) for seed in range(20)]
    theirs = [np.array(gs(X, 100, k=50, seed=seed, replace=False)) for seed in range(20)]
    kept, kept_by_theirs = (np.mean([rare[rows].sum() for rows in sketches]) for sketches in (ours, theirs))
    gap, gap_of_theirs = (np.mean([partial_hausdorff(X, rows) for rows in sketches]) for sketches in (ours, theirs))
    # Two standard errors of 20 seeds; a random sample keeps 0.5 rare cells, not 15, and leaves a gap of 15, not 5.
    assert kept >= kept_by_theirs - 0.8
    assert gap <= gap_of_theirs * 1.02


def test_geometric_sketching_keeps_more_of_a_rare_state_than_random():
    X, rare = clusters_with_a_rare_one()
    ours = np.mean([rare[sampling.geometric_sketching(X, 2, seed=seed)].sum() for seed in range(20)])
    assert ours >= 3 * 100 * rare.mean()


@pytest.mark.parametrize(
    ("available", "taken"), [([400, 50, 10, 3], [17, 17, 10, 3]), ([100, 101, 99, 100], [10, 10, 10, 10])]
)
def test_geometric_sketching_takes_evenly_from_boxes(available, taken):
    box = np.repeat(np.arange(4), available)
    X = np.column_stack([box, box % 2]).astype(float)
    percentage = 100 * sum(taken) / sum(available)
    rows = sampling.geometric_sketching(X, percentage, seed=0, n_boxes=4)
    np.testing.assert_array_equal(np.bincount(box[rows]), taken)


def test_geometric_sketching_in_one_box_takes_every_cell_equally_often():
    taken = np.zeros(100)
    for seed in range(200):
        taken[sampling.geometric_sketching(np.arange(100.0)[:, None], 10, seed=seed, n_boxes=1)] += 1
    assert np.abs(taken - 20).max() < 5 * np.sqrt(200 * 0.1 * 0.9)


def test_geometric_sketching_aims_at_one_percent_of_the_cells_in_boxes():
    X, _ = clusters_with_a_rare_one()
    np.testing.assert_array_equal(
        sampling.geometric_sketching(X, 5, seed=1), sampling.geometric_sketching(X, 5, seed=1, n_boxes=50)
    )


def test_geometric_sketching_of_identical_cells_is_a_random_sample():
    taken = np.zeros(400)
    for seed in range(200):
        taken[sampling.geometric_sketching(np.full((400, 3), 7.5), 10, seed=seed)] += 1
    assert taken.sum() == 200 * 40
    assert np.abs(taken - 20).max() < 5 * np.sqrt(200 * 0.1 * 0.9)


def test_geometric_sketching_is_blind_to_constant_columns_shift_and_scale():
    X, _ = clusters_with_a_rare_one()
    rows = sampling.geometric_sketching(X, 5, seed=2)
    same = np.column_stack([np.full(len(X), -3.0), X * 4 + 8])
    np.testing.assert_array_equal(sampling.geometric_sketching(same, 5, seed=2), rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_geometric_sketching_refuses_scores_that_are_not_finite(value):
    X = np.zeros((10, 2))
    X[3, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        sampling.geometric_sketching(X, 50, seed=0)


def test_geometric_sketching_leaves_the_scores_as_they_are():
    X, _ = clusters_with_a_rare_one()
    before = X.copy()
    sampling.geometric_sketching(X, 5, seed=0)
    np.testing.assert_array_equal(X, before)

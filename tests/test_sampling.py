import numpy as np
import pandas as pd
import pytest
from geosketch import gs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from datawall.cells import diversity, sampling, simulate

steady = settings(deadline=None, derandomize=True, max_examples=80)
n_cells = st.integers(1, 300)
percentages = st.floats(0, 100, exclude_min=True) | st.sampled_from([1, 10, 25, 50, 75, 100])
seeds = st.integers(0, 2**32)
cell_types = st.lists(st.sampled_from("aaaaaaaabbbbbccd"), min_size=1, max_size=200)


def sample(strategy, n, percentage, seed):
    rng = np.random.default_rng(n)  # the corpus depends on its size, not on the seed of the sample
    if strategy == "random":
        return sampling.random(n, percentage, seed=seed)
    if strategy == "celltype_reweighted":
        return sampling.celltype_reweighted(rng.geometric(0.4, n).astype(str), percentage, seed=seed)
    return sampling.geometric_sketching(rng.standard_normal((n, 3)), percentage, seed=seed)


def assert_sorted_rows(rows, n):
    """Rows of n cells, without repeats."""
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < n


every_strategy = pytest.mark.parametrize("strategy", ["random", "celltype_reweighted", "geometric_sketching"])


@every_strategy
@given(n=n_cells, percentage=percentages, seed=seeds)
@steady
def test_rows_are_sorted_unique_in_range_and_as_many_as_asked(strategy, n, percentage, seed):
    rows = sample(strategy, n, percentage, seed)
    assert len(rows) == sampling.subset_size(n, percentage)
    assert_sorted_rows(rows, n)
    np.testing.assert_array_equal(rows, sample(strategy, n, percentage, seed))


@every_strategy
@given(n=n_cells, percentage=percentages, larger=percentages, seed=seeds)
@steady
def test_subsets_of_one_seed_are_nested(strategy, n, percentage, larger, seed):
    few, many = (sample(strategy, n, p, seed) for p in sorted([percentage, larger]))
    assert np.isin(few, many).all()


@every_strategy
def test_subsets_of_seeds_with_their_size_are_independent(strategy):
    few, many = (sample(strategy, 5_000, percentage, (0, percentage)) for percentage in (10, 50))
    assert np.isin(few, many).mean() < 0.95


@every_strategy
def test_percentage_out_of_range_and_no_cells_are_refused(strategy):
    for percentage in (0, 140, -1, float("nan")):
        with pytest.raises(ValueError, match=f"percentage {percentage} "):
            sample(strategy, 50, percentage, 0)
    with pytest.raises(ValueError, match="no cells"):
        sample(strategy, 0, 10, 0)


@pytest.mark.parametrize(
    ("n", "percentage", "size"), [(1000, 10, 100), (1000, 0.01, 1), (3, 50, 2), (7, 100, 7), (149, 1, 1), (151, 1, 2)]
)
def test_subset_size_is_the_nearest_and_at_least_one(n, percentage, size):
    assert sampling.subset_size(n, percentage) == size


LINE, TYPES = np.arange(100.0)[:, None], np.repeat(["B", "T"], [10, 90])
EQUALLY = {
    "random": (lambda seed: sampling.random(50, 20, seed=seed), [0.2] * 50),
    "within types": (lambda seed: sampling.celltype_reweighted(TYPES, 10, seed=seed), [1 / 2] * 10 + [1 / 18] * 90),
    "in one box": (lambda seed: sampling.geometric_sketching(LINE, 10, seed=seed, n_boxes=1), [0.1] * 100),
    "identical": (lambda seed: sampling.geometric_sketching(np.full((400, 3), 7.5), 10, seed=seed), [0.1] * 400),
    "kept": (lambda seed: sampling.spike_in(40, 30, 25, seed=seed)[0], [0.75] * 40),
    "perturbed": (lambda seed: sampling.spike_in(40, 30, 25, seed=seed)[1], [1 / 3] * 30),
}


@pytest.mark.parametrize("kind", EQUALLY)
def test_every_cell_is_taken_equally_often(kind):
    draw, share = EQUALLY[kind]
    taken, share = np.zeros(len(share)), np.array(share)
    for seed in range(1_000):
        taken[draw(seed)] += 1
    assert (np.abs(taken - 1_000 * share) < 5 * np.sqrt(1_000 * share * (1 - share))).all()


@given(cell_type=cell_types, percentage=percentages, seed=seeds)
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


def test_celltype_reweighted_gives_the_remainder_to_types_by_seed():
    cell_type = np.repeat(["B", "NK", "T"], 100)
    draws = (sampling.celltype_reweighted(cell_type, 100 / 300 * 10, seed=seed) for seed in range(30))
    assert {np.bincount(rows // 100).argmax() for rows in draws} == {0, 1, 2}


def test_celltype_reweighted_reads_any_kind_of_labels():
    cell_type = np.random.default_rng(0).choice(["B", "NK", "T"], 500, p=[0.1, 0.2, 0.7])
    unused = pd.Categorical(cell_type, categories=["A", "B", "NK", "S", "T", "Z"])
    rows = sampling.celltype_reweighted(unused, 20, seed=0)
    taken = unused[rows].value_counts()
    assert taken[["A", "S", "Z"]].sum() == 0
    assert np.ptp(taken[["B", "NK", "T"]]) <= 1
    for labels in (pd.Categorical(cell_type), pd.Series(cell_type, dtype="category"), list(cell_type)):
        same = sampling.celltype_reweighted(cell_type, 20, seed=0)
        np.testing.assert_array_equal(sampling.celltype_reweighted(labels, 20, seed=0), same)
    with pytest.raises(ValueError, match="2 cells, such as row 1, have no cell type"):
        sampling.celltype_reweighted(pd.Categorical(["B", None, "T", None]), 50, seed=0)


@pytest.fixture(scope="module")
def sctab_cell_type():
    table = pd.read_csv(simulate.COMPOSITION)
    return pd.Categorical.from_codes(np.repeat(np.arange(len(table)), table["n_cells"]), table["cell_type"])


# Shannon and inverse Simpson index at 1, 10, 25, 50 and 75 %, as published, and how far the latter may be off. The
# counts at hand are of scTab's test split, whose own inverse Simpson index is 33.76, 9 to 10 % above.
DIVERSITY = {
    "celltype_reweighted": ([7.357, 7.311, 7.110, 6.775, 6.398], [164.0, 155.5, 127.3, 91.5, 60.9], 0.05),
    "random": ([5.898, 5.902, 5.903, 5.903, 5.903], [30.7, 30.8, 30.9, 30.9, 30.9], 0.10),
}


@pytest.mark.parametrize("strategy", DIVERSITY)
def test_diversity_of_sctab_subsets_is_the_published(sctab_cell_type, strategy):
    given = len(sctab_cell_type) if strategy == "random" else sctab_cell_type
    shannon, inverse_simpson, within = DIVERSITY[strategy]
    found = []
    for percentage in (1, 10, 25, 50, 75):
        seeds = range(5 if strategy == "random" and percentage <= 10 else 1)
        draws = [sctab_cell_type[getattr(sampling, strategy)(given, percentage, seed=seed)] for seed in seeds]
        found.append([np.mean([index(of) for of in draws]) for index in (diversity.shannon, diversity.inverse_simpson)])
    np.testing.assert_allclose([each[0] for each in found], shannon, atol=0.06)
    np.testing.assert_allclose([each[1] for each in found], inverse_simpson, rtol=within)


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


@pytest.mark.parametrize(
    ("available", "taken"), [([400, 50, 10, 3], [17, 17, 10, 3]), ([100, 101, 99, 100], [10, 10, 10, 10])]
)
def test_geometric_sketching_takes_evenly_from_boxes(available, taken):
    box = np.repeat(np.arange(4), available)
    X = np.column_stack([box, box % 2]).astype(float)
    percentage = 100 * sum(taken) / sum(available)
    rows = sampling.geometric_sketching(X, percentage, seed=0, n_boxes=4)
    np.testing.assert_array_equal(np.bincount(box[rows]), taken)


def test_geometric_sketching_is_blind_to_constant_columns_shift_and_scale_and_reads_memory_maps(tmp_path):
    X, _ = clusters_with_a_rare_one()
    before = X.copy()
    rows = sampling.geometric_sketching(X, 5, seed=2)
    np.testing.assert_array_equal(X, before)
    same = np.column_stack([np.full(len(X), -3.0), X * 4 + 8])
    np.testing.assert_array_equal(sampling.geometric_sketching(same, 5, seed=2), rows)
    np.testing.assert_array_equal(sampling.geometric_sketching(X, 5, seed=2, n_boxes=50), rows)  # 1 % of the cells
    np.save(tmp_path / "X_pca.npy", X.astype(np.float32))
    mapped = np.load(tmp_path / "X_pca.npy", mmap_mode="r")
    in_memory = sampling.geometric_sketching(X.astype(np.float32), 5, seed=2)
    np.testing.assert_array_equal(sampling.geometric_sketching(mapped, 5, seed=2), in_memory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_geometric_sketching_refuses_scores_that_are_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        sampling.geometric_sketching(np.array([[0, 0], [0, value]]), 50, seed=0)


@pytest.mark.parametrize("n_components", [1, 2, 10, 50])
@pytest.mark.parametrize("n_boxes", [2, 40, 400])
def test_occupied_boxes_are_as_many_as_asked_for_or_a_tenth_fewer(n_components, n_boxes):
    X = np.random.default_rng(4).normal(size=(5_000, n_components)) / np.sqrt(1 + np.arange(n_components))
    occupied = sampling._occupied_boxes(X, n_boxes).max() + 1
    assert 0.9 * n_boxes <= occupied <= n_boxes


@pytest.mark.parametrize("length", [0.25, 1, 4, 8])
def test_cells_share_a_key_where_they_share_every_interval(length):
    X = np.random.default_rng(5).normal(size=(6_000, 4)) * [8, 4, 2, 0.8]
    low = X.min(axis=0)
    keys = pd.factorize(sampling._box_keys(X, low, X.max(axis=0) - low, length))[0]
    boxes = pd.factorize(pd.MultiIndex.from_arrays(np.floor((X - low) / length).T))[0]
    np.testing.assert_array_equal(keys, boxes)


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((1, 3)),
        np.repeat(np.eye(4), 50, axis=0),  # 4 different cells
        np.arange(200)[:, None] // 50,  # integers; no length gives 3 boxes
        np.arange(200.0)[:, None] * 1e-30,
        np.column_stack([np.zeros(200), np.r_[np.zeros(199), 1e6]]),
    ],
)
@pytest.mark.parametrize("n_boxes", [1, 3, 1_000])
def test_geometric_sketching_of_degenerate_scores(X, n_boxes):
    rows = sampling.geometric_sketching(X, 25, seed=0, n_boxes=n_boxes)
    assert len(np.unique(rows)) == len(rows) == sampling.subset_size(len(X), 25)


@given(n_train=st.integers(2, 300), n_perturbed=st.integers(0, 300), percentage=st.floats(0.1, 99), seed=seeds)
@steady
def test_spike_in_keeps_the_size_or_names_the_largest_that_is_possible(n_train, n_perturbed, percentage, seed):
    replaced = sampling.subset_size(n_train, percentage)
    assume(replaced < n_train)
    if replaced > n_perturbed:
        with pytest.raises(ValueError, match=f"needs {replaced} perturbed cells, and there are {n_perturbed};"):
            sampling.spike_in(n_train, n_perturbed, percentage, seed=seed)
        return
    kept, perturbed = sampling.spike_in(n_train, n_perturbed, percentage, seed=seed)
    assert len(kept) + len(perturbed) == n_train
    assert len(perturbed) == replaced
    assert_sorted_rows(kept, n_train)
    assert_sorted_rows(perturbed, n_perturbed)
    again = sampling.spike_in(n_train, n_perturbed, percentage, seed=seed)
    np.testing.assert_array_equal(kept, again[0])
    np.testing.assert_array_equal(perturbed, again[1])


def test_spike_ins_of_one_seed_are_nested():
    kept, perturbed = sampling.spike_in(500, 400, 10, seed=0)
    fewer_kept, more_perturbed = sampling.spike_in(500, 400, 50, seed=0)
    assert np.isin(fewer_kept, kept).all()
    assert np.isin(perturbed, more_perturbed).all()


def test_spike_in_names_what_cannot_be_done():
    # DenAdel et al. 2026 have 2,547,877 perturbed cells, which cannot replace half of 17,751,245 cells.
    with pytest.raises(ValueError, match=r"needs 8,875,622 perturbed cells, and there are 2,547,877; at most 14\.35 %"):
        sampling.spike_in(17_751_245, 2_547_877, 50, seed=0)
    assert len(sampling.spike_in(177_512, 25_478, 14.35, seed=0)[1]) == 25_473
    with pytest.raises(ValueError, match="would leave none of the 4 training cells"):
        sampling.spike_in(4, 100, 100, seed=0)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=3, max_size=25),
    shares=st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5], [0.9, 0, 0.1], [1.0]]),
    seed=seeds,
)
@steady
def test_split_by_group_keeps_groups_whole_and_sizes_near(sizes, shares, seed):
    groups = np.random.default_rng(len(sizes)).permutation(np.repeat(np.arange(len(sizes)), sizes))
    part = sampling.split_by_group(groups, shares, seed=seed)
    assert part.dtype == np.int64
    parts_of_group = {name: set(part[groups == name]) for name in groups}
    assert all(len(parts) == 1 for parts in parts_of_group.values())
    n_of_part = np.bincount(part, minlength=len(shares))
    assert ((n_of_part > 0) == (np.array(shares) > 0)).all()
    assert (n_of_part < np.array(shares) * len(groups) + max(sizes)).all()
    np.testing.assert_array_equal(part, sampling.split_by_group(groups, shares, seed=seed))


def test_split_by_group_of_many_donors_is_near_the_shares_and_fair_to_large_donors():
    size = np.random.default_rng(0).lognormal(6, 1, 100).astype(int) + 1
    donor = np.repeat(np.arange(100), size)
    parts = [sampling.split_by_group(donor, [0.8, 0.1, 0.1], seed=seed) for seed in range(20)]
    for part in parts:
        np.testing.assert_allclose(np.bincount(part) / len(donor), [0.8, 0.1, 0.1], atol=0.005)
    assert len({part.tobytes() for part in parts}) == 20
    of_donor = np.array([part[np.cumsum(size) - 1] for part in parts])
    in_train = (of_donor == 0).mean(axis=0)
    assert in_train[size > np.median(size)].mean() == pytest.approx(in_train[size < np.median(size)].mean(), abs=0.1)


@pytest.mark.parametrize(
    ("groups", "shares", "message"),
    [
        (["a", "b", "a"], [0.8, 0.1, 0.1], "2 groups cannot fill 3 parts"),
        (["a", "b", "a"], [0.8, 0.1], "must be positive and add up to 1"),
        (["a", "b", "a"], [1.1, -0.1], "must be positive and add up to 1"),
        (["a", None, "b"], [0.5, 0.5], "1 cells, such as row 1, have no group"),
    ],
)
def test_split_by_group_refuses(groups, shares, message):
    with pytest.raises(ValueError, match=message):
        sampling.split_by_group(groups, shares, seed=0)

"""Hashes of cells: equal for equal cells only, and what an evaluation set shares with a corpus."""

import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from datawall.cells import corpus, duplicates
from datawall.cells.duplicates import SeenCells, cell_hashes, contamination

GENES = corpus.gene_table().index


def poisson(n_cells, n_genes, seed=0, mean=3.0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(mean, (n_cells, n_genes)).astype(np.float32))


def test_hash_is_the_weighted_sum_modulo_2_to_the_64():
    counts = poisson(5, 60)
    weights = duplicates._weights()[:60].astype(object)  # Python integers do not overflow
    expected = (counts.toarray().astype(int).astype(object) @ weights) % 2**64
    assert cell_hashes(counts, GENES[:60]).tolist() == expected.tolist()


@given(seed=st.integers(0, 10**6), n_genes=st.integers(30, 80))
@settings(max_examples=50, deadline=None)
def test_order_of_genes_and_genes_without_counts_do_not_matter(seed, n_genes):
    rng = np.random.default_rng(seed)
    counts, genes = poisson(6, n_genes, seed), GENES[rng.permutation(len(GENES))[:n_genes]]
    hashes = cell_hashes(counts, genes)
    order = rng.permutation(n_genes)
    assert np.array_equal(cell_hashes(counts[:, order], genes[order]), hashes)
    wider = sp.hstack([counts, sp.csr_matrix((6, 10))], format="csr")
    assert np.array_equal(cell_hashes(wider, genes.append(GENES.difference(genes)[:10])), hashes)
    some = genes[: n_genes - 5]
    assert np.array_equal(cell_hashes(counts, genes, some), cell_hashes(counts[:, : n_genes - 5], some))


def test_one_count_more_or_two_counts_exchanged_is_another_cell():
    dense = np.tile(poisson(1, 60, mean=5.0).toarray(), (121, 1))
    for gene in range(60):
        dense[1 + gene, gene] += 1
        dense[61 + gene, [gene, (gene + 1) % 60]] += [1000, 1001]
    assert len(np.unique(cell_hashes(sp.csr_matrix(dense), GENES[:60]), axis=0)) == 121


def test_cells_with_few_genes_are_equal_to_none():
    dense = np.zeros((4, 60), np.float32)
    dense[:2, : duplicates.MIN_EXPRESSED - 1] = 1
    dense[2:, : duplicates.MIN_EXPRESSED] = 1
    hashes = cell_hashes(sp.csr_matrix(dense), GENES[:60])
    assert (hashes[:2] == 0).all()
    assert (hashes[2:] != 0).all()
    assert SeenCells().add(hashes, 7).tolist() == [-1, -1, -1, 7]
    found = contamination(hashes, [hashes])
    assert (found.duplicates, found.duplicate_rows.tolist()) == (2, [2, 3])


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_seen_cells_equal_a_dictionary(batches):
    # Real hashes never share a first half alone; here the second follows from the first, as it does in effect.
    seen, first = SeenCells(), {}
    for origin, batch in enumerate(batches):
        keys = [a * 5 + b for a, b in batch]
        hashes = np.array([(key, key * 7) for key in keys], np.uint64).reshape(-1, 2)
        expected = []
        for key in keys:
            expected.append(first.get(key, -1) if key else -1)
            if key:
                first.setdefault(key, origin)
        assert seen.find(hashes).tolist() == [o if o < origin else -1 for o in expected]
        assert seen.add(hashes, origin).tolist() == expected
    assert sum(len(origins) for _, origins in seen._runs) == len(first)


def test_seen_cells_keep_few_runs():
    seen, rng = SeenCells(), np.random.default_rng(0)
    for _ in range(200):
        seen.add(rng.integers(1, 2**63, (50, 2), dtype=np.uint64), 0)
    assert len(seen._runs) <= 9
    assert sum(hashes.nbytes + origins.nbytes for hashes, origins in seen._runs) == 20 * 200 * 50


def test_contamination_counts_both_sides():
    pretraining, evaluation = poisson(50, 60), poisson(20, 60, seed=1).tolil()
    evaluation[[4, 5, 9]] = pretraining[[30, 30, 2]]
    both = [cell_hashes(sp.csr_matrix(counts), GENES[:60]) for counts in (evaluation, pretraining)]
    both[1] = np.split(both[1], [1, 30, 31])  # a block ends before, after and with a cell that is in both
    found = contamination(*both, np.repeat(["d1", "d2"], 10), np.array(["d2", "d3"] * 25))
    names = ["n_cells", "duplicates", "shared_donors", "donor_cells", "duplicate_rows", "donor_rows"]
    assert list(found.row().items()) == list(zip(names, [20, 3, 1, 10, 2, 25], strict=True))
    assert found.shared_donors == ("d2",)
    assert found.duplicate_rows.tolist() == [2, 30]
    assert found.donor_rows.tolist() == list(range(0, 50, 2))
    assert found.rows_to_drop().tolist() == list(range(0, 50, 2))
    assert found.rows_to_drop().dtype == np.int64
    alone = contamination(*both)
    assert (alone.shared_donors, alone.rows_to_drop().tolist()) == ((), [2, 30])


def test_donors_that_are_numbers_and_categories_compare_as_text():
    nothing = np.zeros((3, 2), np.uint64)
    found = contamination(nothing, [nothing], pd.Categorical(["1", "2", "2"]), np.array([2, 3, 4]))
    assert found.shared_donors == ("2",)
    assert (found.donor_cells, found.donor_rows.tolist(), found.duplicates) == (2, [0], 0)

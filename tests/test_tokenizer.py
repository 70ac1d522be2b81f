import tracemalloc

import numpy as np
import pytest
import real
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datawall.cells import datasets
from datawall.models import tokenizer
from datawall.models.tokenizer import RankTokenizer, Tokens, gene_medians, streamed_gene_medians
from datawall.models.transformer import N_SPECIAL

steady = settings(deadline=None, derandomize=True, max_examples=150)


def plain_encode(dense, medians, max_length):
    """Each cell by a stable sort: the definition, without its speed."""
    cells = []
    for cell in dense:
        values = cell.astype(np.float32) / medians.astype(np.float32)
        ranked = np.argsort(-values, kind="stable")
        cells.append(ranked[values[ranked] > 0][:max_length] + N_SPECIAL)
    return cells


def plain_medians(dense):
    medians = np.ones(dense.shape[1], np.float32)
    scaled = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4
    for gene in range(dense.shape[1]):
        if (dense[:, gene] > 0).any():
            medians[gene] = np.median(scaled[dense[:, gene] > 0, gene])
    return medians


def assert_same_cells(tokens, cells):
    assert tokens.ids.dtype == np.int32
    assert tokens.offsets.dtype == np.int64
    np.testing.assert_array_equal(np.diff(tokens.offsets), [len(cell) for cell in cells])
    assert tokens.offsets[0] == 0
    np.testing.assert_array_equal(tokens.ids, np.concatenate([*cells, np.empty(0)]))


def with_all_entries_stored(dense):
    """CSR that stores its zeros, and each cell's genes from last to first."""
    n_cells, n_genes = dense.shape
    indices = np.tile(np.arange(n_genes)[::-1], n_cells)
    return sp.csr_matrix((dense[:, ::-1].ravel(), indices, np.arange(n_cells + 1) * n_genes), shape=dense.shape)


@st.composite
def counts_and_medians(draw):
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 12)))
    dense = draw(arrays(draw(st.sampled_from([np.int64, np.float32])), shape, elements=st.integers(0, 4)))
    value = st.sampled_from([0.5, 1.0, 2.0, 3.0]) | st.floats(0.0625, 8, width=32)
    return dense, draw(arrays(np.float32, shape[1], elements=value))


@given(case=counts_and_medians(), max_length=st.integers(1, 12))
@steady
def test_encoding_is_that_of_a_stable_sort(case, max_length):
    dense, medians = case
    expected = plain_encode(dense, medians, max_length)
    tokenizer = RankTokenizer(medians, max_length)
    assert_same_cells(tokenizer.encode(sp.csr_matrix(dense)), expected)
    assert_same_cells(tokenizer.encode(with_all_entries_stored(dense)), expected)


@pytest.mark.parametrize("max_length", [200, 14_053])
def test_real_cells_are_encoded_as_by_a_stable_sort(max_length):
    counts = real.kang().X[:200]
    medians = gene_medians(counts)
    tokens = RankTokenizer(medians, max_length).encode(counts)
    assert_same_cells(tokens, plain_encode(counts.toarray(), medians, max_length))


@pytest.mark.parametrize("medians", [np.ones(8), np.linspace(0.5, 2, 8), np.geomspace(1e-30, 1e30, 8)])
@pytest.mark.parametrize("n_cells", [1, 4, 100])
def test_cells_encoded_together_do_not_change_one_another(monkeypatch, n_cells, medians):
    monkeypatch.setattr(tokenizer, "CELLS_PER_BLOCK", n_cells)
    dense = np.random.default_rng(2).poisson(0.5, (30, 8))
    dense[[0, 7, 8, 29]] = 0
    for counts in (sp.csr_matrix(dense), with_all_entries_stored(dense)):
        assert_same_cells(RankTokenizer(medians, 3).encode(counts), plain_encode(dense, medians, 3))


def test_memory_beyond_the_tokens_does_not_grow_with_the_cells():
    n_cells, n_genes = 4_000, 1_000
    indices = np.tile(np.arange(n_genes, dtype=np.int32), n_cells)
    counts = np.random.default_rng(3).geometric(0.5, len(indices)).astype(np.float32)
    counts = sp.csr_matrix((counts, indices, np.arange(n_cells + 1) * n_genes), shape=(n_cells, n_genes))
    tracemalloc.start()
    try:
        tokens = RankTokenizer(np.ones(n_genes)).encode(counts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens.ids.nbytes == 16_000_000
    assert peak - tokens.ids.nbytes < 8_000_000


def test_encoding_leaves_the_counts_as_they_are():
    counts = with_all_entries_stored(np.random.default_rng(1).poisson(0.5, (5, 8)))
    before = counts.copy()
    RankTokenizer(gene_medians(counts)).encode(counts)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(counts, part), getattr(before, part))


def test_counts_of_other_genes_are_refused():
    with pytest.raises(ValueError, match="4 genes, the tokenizer 3"):
        RankTokenizer(np.ones(3)).encode(sp.csr_matrix((2, 4)))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_median_that_divides_nothing_sensibly_is_refused(bad):
    with pytest.raises(ValueError, match=f"median of gene 1 is {bad}"):
        RankTokenizer(np.array([1, bad, 2]))


@given(case=counts_and_medians())
@steady
def test_medians_are_over_the_cells_that_express_a_gene(case):
    dense, _ = case
    for counts in (sp.csr_matrix(dense), with_all_entries_stored(dense)):
        medians = gene_medians(counts)
        assert medians.dtype == np.float32
        np.testing.assert_allclose(medians, plain_medians(dense), rtol=1e-6)


@given(cells=st.lists(st.integers(0, 4), max_size=8))
@steady
def test_take_gives_the_sequences_in_the_order_asked(cells):
    sequences = [[5, 3], [], [9], [2, 4, 6], []]
    tokens = Tokens(np.array([5, 3, 9, 2, 4, 6], np.int32), np.array([0, 2, 2, 3, 6, 6]))
    taken = tokens[np.array(cells, np.int64)]
    assert_same_cells(taken, [np.array(sequences[cell]) for cell in cells])


@steady
@given(
    arrays(
        np.int64,
        st.tuples(st.integers(1, 12), st.integers(1, 4)),
        elements=st.sampled_from([0, 0, 1, 1, 2, 3, 9, 10**6]),
    ),
    st.integers(1, 12),
)
def test_streamed_medians_are_those_of_all_cells(counts, size):
    X = sp.csr_matrix(counts.astype(np.float32))
    streamed = streamed_gene_medians(lambda: (X[i : i + size] for i in range(0, X.shape[0], size)))
    np.testing.assert_array_equal(streamed, gene_medians(X))


def test_streamed_medians_of_real_cells(monkeypatch):
    X = sp.csr_matrix(datasets.load("pbmc68k").X)
    monkeypatch.setattr(tokenizer, "N_GATHERED", 100)
    streamed = streamed_gene_medians(lambda: (X[i : i + 97] for i in range(0, X.shape[0], 97)))
    np.testing.assert_array_equal(streamed, gene_medians(X))

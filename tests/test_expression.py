"""Expression steps and baselines against scanpy, scikit-learn and by hand."""

import tracemalloc

import anndata as ad
import numpy as np
import pytest
import real
import scanpy as sc
import scipy.sparse as sp
from sklearn.decomposition import PCA

from datawall.cells import expression
from datawall.tasks import baselines


@pytest.fixture(scope="module")
def counts():
    return real.kang().X[:400]


def in_blocks(counts, size):
    return lambda: (counts[begin : begin + size] for begin in range(0, counts.shape[0], size))


def random_counts(n_cells, n_genes, seed=0):
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(-2, 1.5, n_genes) * rng.lognormal(0, 1, (4, n_genes))[rng.integers(4, size=n_cells)]
    return sp.csr_matrix(rng.poisson(rate), dtype=np.float32)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts:UserWarning")
def test_lognormalise_is_the_formula_and_scanpys(counts):
    counts = sp.vstack([counts, sp.csr_matrix((1, counts.shape[1]))], format="csr", dtype=np.float32)
    before = counts.copy()
    X = expression.lognormalise(counts)
    assert (before != counts).nnz == 0
    dense = counts.toarray().astype(np.float64)
    expected = np.log1p(dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4)
    np.testing.assert_allclose(X.toarray(), expected, rtol=1e-5)
    adata = ad.AnnData(counts.toarray())  # of a sparse matrix scanpy would compile its steps first, for seconds
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(X.toarray(), adata.X, rtol=1e-6)
    assert (X.format, X.dtype) == ("csr", np.float32)


@pytest.mark.parametrize("n_genes", [None, 300])
def test_variable_genes_are_scanpys(counts, n_genes):
    X = expression.lognormalise(counts)
    adata = ad.AnnData(X.copy())
    sc.pp.highly_variable_genes(adata, n_top_genes=n_genes)
    assert np.array_equal(expression.variable_genes(X, n_genes), adata.var["highly_variable"])
    assert 0 < adata.var["highly_variable"].sum() < counts.shape[1]
    # All that are detected where more are asked for.
    assert np.array_equal(expression.variable_genes(X, 10**6), np.asarray(counts.sum(axis=0)).ravel() > 0)


def test_no_variable_gene_and_no_cells_are_refused():
    with pytest.raises(ValueError, match="no gene is variable among 3 cells"):
        expression.variable_genes(sp.csr_matrix((3, 4), dtype=np.float32))
    panel = np.random.default_rng(0).poisson(20, (50, 5)).astype(np.float32)  # each a fifth of a cell's 10,000
    assert expression.variable_genes(expression.lognormalise(sp.csr_matrix(panel))).all()
    with pytest.raises(ValueError, match="there are no cells"):
        expression.streamed_variable_genes(lambda: iter([]))


@pytest.mark.parametrize("shape", [(80, 20), (20, 80)])
@pytest.mark.parametrize("as_sparse", [False, True])
def test_pca_is_scikit_learns_up_to_sign(shape, as_sparse):
    X = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 0.1, shape[1]) + 1
    given = sp.csr_matrix(X) if as_sparse else X
    reference = PCA(5, svd_solver="full").fit(X)
    axes, mean = expression.principal_axes(given, 5)
    np.testing.assert_allclose(np.abs(axes), np.abs(reference.components_), atol=1e-9)
    np.testing.assert_allclose(mean, X.mean(axis=0))
    scores = expression.pca_scores(given, 5)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (X - X.mean(axis=0)) @ axes.T, atol=1e-5)
    np.testing.assert_allclose(np.abs(scores), np.abs(reference.transform(X)), atol=1e-5)


def test_largest_loading_of_each_axis_is_positive():
    X = np.random.default_rng(1).normal(size=(50, 12))
    axes, turned = (expression.principal_axes(given, 10)[0] for given in (X, -X))
    assert (axes[np.arange(10), np.abs(axes).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(turned, axes, atol=1e-9)


@pytest.mark.parametrize(("shape", "rank"), [((5, 30), 4), ((30, 5), 5), ((2, 9), 1)])
def test_no_more_components_than_rank(shape, rank):
    X = np.random.default_rng(2).normal(size=shape)
    scores = expression.pca_scores(X, 50)
    assert scores.shape == (shape[0], rank)
    distances = np.linalg.norm(X[0] - X[1]), np.linalg.norm(scores[0] - scores[1])
    np.testing.assert_allclose(*distances, rtol=1e-5)


@pytest.mark.parametrize("n_genes", [None, 300])
@pytest.mark.parametrize("size", [1, 70, 400])
def test_variable_genes_in_blocks_are_those_of_all_cells(counts, n_genes, size):
    chosen = expression.streamed_variable_genes(in_blocks(counts, size), n_genes)
    assert np.array_equal(chosen, expression.variable_genes(expression.lognormalise(counts), n_genes))


@pytest.mark.parametrize("size", [70, 400])
@pytest.mark.parametrize("shape", [None, (600, 150), (150, 600), (60, 150)])
def test_pca_in_blocks_is_that_of_all_cells(counts, shape, size, tmp_path):
    counts, path = random_counts(*shape) if shape else counts, tmp_path / "X_pca.npy"
    X = expression.lognormalise(counts)
    whole = expression.pca_scores(X[:, expression.variable_genes(X)])
    streamed = expression.streamed_pca(in_blocks(counts, size), path)
    assert streamed.dtype == np.float32
    assert np.array_equal(streamed, np.load(path))
    np.testing.assert_allclose(streamed, whole, atol=1e-5)


def test_pca_in_blocks_that_fails_leaves_no_file(tmp_path):
    counts, passes = random_counts(300, 100), []

    def blocks():
        passes.append(0)
        yield counts[:150]
        if len(passes) == 3:
            raise OSError("the disk is gone")
        yield counts[150:]

    with pytest.raises(OSError, match="the disk is gone"):
        expression.streamed_pca(blocks, tmp_path / "X_pca.npy")
    assert not list(tmp_path.iterdir())


def test_pca_in_blocks_needs_memory_for_a_block_and_not_for_the_corpus(tmp_path):
    block = random_counts(200, 400)
    peaks = []
    for n_blocks in (2, 2, 20):  # the first time imports, too
        tracemalloc.start()
        expression.streamed_pca(lambda n=n_blocks: (block for _ in range(n)), tmp_path / "X_pca.npy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


# Baselines


@pytest.fixture(scope="module")
def some():
    return real.kang()[:600].copy()


@pytest.fixture(scope="module")
def scaled(some):
    """scanpy's steps; its scaling divides by the sample deviation (n - 1), ours by the population's (n)."""
    adata = ad.AnnData(some.X.toarray())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata)
    adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.scale(adata)
    adata.X = adata.X * np.sqrt(adata.n_obs / (adata.n_obs - 1))
    return adata


def test_variable_gene_embedding_is_scanpys(some, scaled):
    embedding = baselines.variable_gene_embedding(some.X)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, scaled.X, atol=1e-3)
    np.testing.assert_allclose(embedding.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(embedding.std(axis=0), 1, atol=1e-4)


def test_pca_embedding_is_scanpys_up_to_sign(some, scaled):
    embedding = baselines.pca_embedding(some.X, n_components=10)
    assert (embedding.shape, embedding.dtype) == ((600, 10), np.float32)
    sc.pp.pca(scaled, n_comps=10, svd_solver="full")
    np.testing.assert_allclose(np.abs(embedding), np.abs(scaled.obsm["X_pca"]), atol=1e-2)
    assert baselines.pca_embedding(some.X).shape == (600, 50)


def test_logistic_regression_beats_the_majority(some):
    labels = some.obs["cell_type"].to_numpy().astype(str)
    train = np.arange(600) % 2 == 0
    before = some.X.copy()
    predicted = baselines.logistic_regression(some.X[train], labels[train], some.X[~train], max_iter=30)
    majority = max(np.mean(labels[~train] == label) for label in np.unique(labels))
    assert np.mean(predicted == labels[~train]) > majority + 0.4
    assert (before != some.X).nnz == 0
    assert set(baselines.logistic_regression(some.X[train], np.repeat("T", 300), some.X[~train])) == {"T"}


def test_contexts_weigh_alike_in_the_treated_mean():
    treated = np.array([[5.0, 2], [1, 6], [2, 6], [3, 6]])
    np.testing.assert_allclose(baselines.treated_mean(treated, np.array(["a", "b", "b", "b"])), [[3.5, 4]])

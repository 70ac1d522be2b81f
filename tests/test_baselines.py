"""Baselines against scanpy's steps and by hand."""

import anndata as ad
import numpy as np
import pytest
import real
import scanpy as sc

from datawall.tasks import baselines


@pytest.fixture(scope="module")
def kang():
    return real.kang()[:600].copy()


@pytest.fixture(scope="module")
def scaled(kang):
    """scanpy's steps; its scaling divides by the sample deviation (n - 1), ours by the population's (n)."""
    adata = ad.AnnData(kang.X.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata)
    adata = adata[:, adata.var["highly_variable"]].copy()
    adata.X = adata.X.toarray()
    sc.pp.scale(adata)
    adata.X = adata.X * np.sqrt(adata.n_obs / (adata.n_obs - 1))
    return adata


def test_variable_gene_embedding_is_scanpys(kang, scaled):
    embedding = baselines.variable_gene_embedding(kang.X)
    assert embedding.dtype == np.float32
    assert embedding.shape == scaled.shape
    np.testing.assert_allclose(embedding, scaled.X, atol=1e-3)
    np.testing.assert_allclose(embedding.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(embedding.std(axis=0), 1, atol=1e-4)


def test_pca_embedding_is_scanpys_up_to_sign(kang, scaled):
    embedding = baselines.pca_embedding(kang.X, n_components=10)
    assert (embedding.shape, embedding.dtype) == ((600, 10), np.float32)
    sc.pp.pca(scaled, n_comps=10, svd_solver="full")
    np.testing.assert_allclose(np.abs(embedding), np.abs(scaled.obsm["X_pca"]), atol=1e-2)
    assert (np.diff(embedding.std(axis=0)) < 0).all()
    assert baselines.pca_embedding(kang.X).shape == (600, 50)


def test_logistic_regression_beats_the_majority(kang):
    labels = kang.obs["cell_type"].to_numpy().astype(str)
    train = np.arange(600) % 2 == 0
    before = kang.X.copy()
    predicted = baselines.logistic_regression(kang.X[train], labels[train], kang.X[~train], max_iter=30)
    majority = max(np.mean(labels[~train] == label) for label in np.unique(labels))
    assert np.mean(predicted == labels[~train]) > majority + 0.4
    assert (before != kang.X).nnz == 0


def test_contexts_weigh_alike_in_the_treated_mean():
    treated = np.array([[5.0, 2], [1, 6], [2, 6], [3, 6]])
    np.testing.assert_allclose(baselines.treated_mean(treated, np.array(["a", "b", "b", "b"])), [[3.5, 4]])

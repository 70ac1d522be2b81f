"""PretrainedPCA against scikit-learn; what it shares with other families is in test_models."""

import numpy as np
import scanpy as sc
from sklearn.decomposition import PCA
from test_models import N_GENES, fitted_once, simulated

from datawall import models


def test_embedding_is_scikit_learns_up_to_sign():
    counts, _ = simulated()
    dense = counts.toarray().astype(np.float64)
    X = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    variable = sc.pp.highly_variable_genes(sc.AnnData(X), inplace=False)["highly_variable"].to_numpy()
    assert 20 < variable.sum() < N_GENES
    scores = PCA(5, svd_solver="full").fit_transform(X[:, variable])
    ours = fitted_once("PretrainedPCA").embed(counts)
    ours = ours - ours.mean(axis=0)  # the embedding is not centred
    ours *= np.sign((ours * scores).sum(axis=0))
    np.testing.assert_allclose(ours, scores, atol=1e-3)


def test_seed_and_steps_change_nothing():
    counts, obs = simulated()
    model = models.create("PretrainedPCA", n_components=5)
    assert model.fit(counts, obs, steps=7, seed=8) is None
    np.testing.assert_array_equal(model.embed(counts), fitted_once("PretrainedPCA").embed(counts))


def test_no_more_axes_than_cells_span():
    counts, obs = simulated()
    model = models.create("PretrainedPCA", n_components=50)
    model.fit(counts[:6], obs[:6], steps=0, seed=0)
    assert model.embed(counts).shape == (120, 5)

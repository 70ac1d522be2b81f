"""What is Geneformer's own; its encoder is in test_transformer, its tokens in test_tokenizer."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from test_models import N_GENES, SMALL, fitted_once, simulated

from datawall import models


def test_untrained_has_statistics_of_no_data():
    model = models.create("Geneformer", **SMALL["Geneformer"]).untrained(N_GENES, seed=0)
    assert (model.medians == 1).all()
    assert not model.module.training


def test_it_learns():
    counts, obs = simulated()
    settings = {"n_genes": 40, "init_std": 0.02, "learning_rate": 1e-2, "batch_size": 32, "dropout": 0.0}
    model = models.create("Geneformer", **SMALL["Geneformer"] | settings)
    history = model.fit(counts, obs, steps=80, seed=0)
    assert model.module.config.vocab_size == len(model.medians) + 2 == 42
    assert history.loss[0] == pytest.approx(np.log(40), rel=0.05)
    assert history.loss[-10:].mean() < history.loss[0] - 0.5


def test_it_trains_around_cells_without_counts():
    counts, obs = simulated()
    empty = sp.csr_matrix((5, N_GENES), dtype=np.float32)
    model = models.create("Geneformer", **SMALL["Geneformer"])
    history = model.fit(sp.vstack([empty, counts], format="csr"), pd.concat([obs[:5], obs]), steps=4, seed=0)
    assert history.unique_cells == 32
    # Up to rounding: matrices lie elsewhere in memory.
    np.testing.assert_allclose(model.embed(counts), fitted_once("Geneformer").embed(counts), atol=1e-6)
    with pytest.raises(ValueError, match="no cell of the subset expresses a gene"):
        model.fit(empty, obs[:5], steps=2, seed=0)

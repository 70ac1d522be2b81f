from functools import cache

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from datawall import models
from datawall.cells import expression
from datawall.models import hyperparameters
from datawall.models.base import NotFittedError
from datawall.models.transformer import Encoder, EncoderConfig

N_GENES = 800
SMALL = {
    "PretrainedPCA": {"n_components": 5},
    "scVI": {"n_hidden": 16, "n_latent": 6, "batch_size": 32},
    "SSL": {"n_hidden": [16, 12], "n_latent": 7, "batch_size": 32},
    "Geneformer": {
        "max_length": 64, "n_layers": 2, "n_heads": 2, "n_embd": 16, "batch_size": 8, "dropout": 0.1, "init_std": 0.2
    },
    "SCimilarity": {"n_hidden": [16, 12], "n_latent": 8, "batch_size": 32},
}  # fmt: skip
N_LATENT = {"PretrainedPCA": 5, "scVI": 6, "SSL": 7, "Geneformer": 16, "SCimilarity": 8}
networks = pytest.mark.parametrize("family", [family for family in SMALL if family != "PretrainedPCA"])
every_family = pytest.mark.parametrize("family", SMALL)


def simulated(n_cells=120, seed=0):
    """Counts of three cell types."""
    rng = np.random.default_rng(seed)
    cell_type = rng.integers(0, 3, n_cells)
    rates = np.random.default_rng(99).gamma(0.3, 1, (3, N_GENES))[cell_type] * rng.uniform(0.5, 2, (n_cells, 1))
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    return counts, pd.DataFrame({"cell_type": cell_type.astype(str)})


def fitted(family, *, seed=0, **hyperparameters):
    model = models.create(family, **SMALL[family] | hyperparameters)
    model.fit(*simulated(), steps=4, seed=seed)
    return model


@cache
def fitted_once(family):
    """For tests that only look at it."""
    return fitted(family)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'scGPT' is no model.*PretrainedPCA, .*Geneformer"):
        models.create("scGPT")


@every_family
def test_an_unknown_hyperparameter_is_refused_by_name(family):
    with pytest.raises(ValueError, match=rf"^{family}: n_layer 3: Extra inputs are not permitted"):
        models.create(family, n_layer=3)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("PretrainedPCA", "n_components", 0),
        ("PretrainedPCA", "n_components", "five"),
        ("Geneformer", "n_layers", 1),
        ("Geneformer", "n_layers", "six"),
        ("Geneformer", "n_heads", 3),
        ("Geneformer", "n_heads", 0),
        ("Geneformer", "n_embd", 30),  # not a multiple of n_heads
        ("Geneformer", "n_genes", 0),
        ("Geneformer", "max_length", 0),
        ("Geneformer", "batch_size", 0),
        ("Geneformer", "dropout", 1.5),
        ("Geneformer", "warmup", 2),
        ("Geneformer", "learning_rate", -1e-3),
    ],
)
def test_a_bad_value_is_refused_by_name(family, name, value):
    with pytest.raises(ValueError, match=name):
        models.create(family, **{name: value})


@every_family
def test_embedding_and_saving_come_after_fitting(family, tmp_path):
    model = models.create(family, **SMALL[family])
    with pytest.raises(NotFittedError, match=f"this {family} has no weights yet"):
        model.embed(simulated()[0])
    with pytest.raises(NotFittedError, match=family):
        model.save(tmp_path)


@every_family
def test_embedding_has_a_row_for_each_cell(family):
    embedding = fitted_once(family).embed(simulated(n_cells=33, seed=1)[0])
    assert embedding.shape == (33, N_LATENT[family])
    assert embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    assert embedding.std(axis=0).min() > 1e-4


@every_family
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_the_callers_counts_stay_as_they_are(family, dtype):
    counts, obs = simulated()
    counts = counts.astype(dtype)
    before = counts.copy()
    model = models.create(family, **SMALL[family])
    model.fit(counts, obs, steps=2, seed=0)
    model.embed(counts)
    assert counts.dtype == dtype
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(counts, part), getattr(before, part))


@every_family
def test_a_saved_model_embeds_the_same_bits(family, tmp_path):
    counts, _ = simulated(seed=1)
    model = fitted_once(family)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.embed(counts), model.embed(counts))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@every_family
def test_loading_from_a_folder_without_a_model_is_refused(family, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        models.model_class(family).load(tmp_path)


@every_family
def test_fitting_repeats_bit_for_bit(family):
    counts, _ = simulated(seed=1)
    torch.manual_seed(1)
    first = fitted(family, seed=3).embed(counts)
    torch.manual_seed(2)
    np.testing.assert_array_equal(fitted(family, seed=3).embed(counts), first)


@networks
def test_fits_of_other_seeds_differ(family):
    counts, _ = simulated(seed=1)
    assert np.abs(fitted(family, seed=3).embed(counts) - fitted(family, seed=4).embed(counts)).max() > 0.01


@networks
def test_initial_weights_have_a_seed_of_their_own(family):
    """A first loss depends on the weights and on the batch: it differs when either seed does."""
    first = {
        (seed, init_seed): models.create(family, **SMALL[family])
        .fit(*simulated(), steps=1, seed=seed, init_seed=init_seed)
        .loss[0]
        for seed, init_seed in ((0, None), (0, 0), (0, 1), (1, 0))
    }
    assert first[0, None] == first[0, 0]
    assert len(set(first.values())) == 3


@networks
def test_fitting_reports_its_budget(family):
    history = models.create(family, **SMALL[family]).fit(*simulated(), steps=4, seed=0)
    assert len(history.loss) == 4
    assert history.samples_seen == 4 * SMALL[family]["batch_size"]
    n = history.samples_seen
    if family != "SCimilarity":  # see below
        assert history.unique_cells == min(n, 108)  # a tenth chooses the weights


@networks
def test_the_weights_kept_are_those_of_the_lowest_validation_loss(family, monkeypatch):
    """Whose loss is that of the cells set aside; the last weights are other ones, where training goes on too long."""
    counts, obs = simulated(40)
    settings, found = {"learning_rate": 0.05}, {}
    for keep in ("best", "last"):
        model = models.create(family, **SMALL[family] | settings, keep=keep)
        history = model.fit(counts, obs, steps=60, seed=0)
        found[keep] = model.embed(counts)
        assert history.unique_cells == (36 if keep == "best" else 40)
        assert len(history.validation_loss) == (10 if keep == "best" else 0)
        if keep == "best":
            _, loss = models.base.hold_out(model, counts, obs, np.arange(40), seed=0)
            assert loss() == pytest.approx(history.validation_loss.min(), rel=1e-6)
            assert history.validation_loss.argmin() < 9
    assert not np.array_equal(found["best"], found["last"])


@networks
def test_a_panel_is_of_the_subsets_most_variable_genes_and_all_that_a_network_sees(family, tmp_path):
    counts, obs = simulated()
    model = models.create(family, **SMALL[family], n_genes=20)
    model.fit(counts, obs, steps=2, seed=0)
    expected = expression.variable_genes(expression.lognormalise(counts), 20)
    np.testing.assert_array_equal(model.genes, np.flatnonzero(expected))
    # Counts of genes beyond the panel change places: a cell's sum stays, and so does what the network sees.
    others = counts.toarray()
    others[:, ~expected] = others[:, ~expected][:, ::-1]
    assert not np.array_equal(others, counts.toarray())
    np.testing.assert_allclose(model.embed(sp.csr_matrix(others)), model.embed(counts), rtol=1e-5, atol=1e-6)
    model.save(tmp_path)
    np.testing.assert_array_equal(type(model).load(tmp_path).embed(counts), model.embed(counts))
    with pytest.raises(ValueError, match=f"{family}: counts have 20 genes, the model {N_GENES}"):
        model.embed(counts[:, expected])


def test_scimilarity_counts_the_cells_that_it_drew():
    """With replacement, so that some come again before others come at all."""
    counts, obs = simulated()
    history = models.create("SCimilarity", **SMALL["SCimilarity"], keep="last").fit(counts, obs, steps=4, seed=0)
    labels, studies, _ = models.scimilarity._codes(obs)
    weights = models.scimilarity.sampling_weights(labels, studies)
    drawn = np.concatenate(list(models.scimilarity.weighted_batches(weights, 32, 4, seed=0)))
    assert history.unique_cells == len(set(drawn.tolist())) < 120


@pytest.mark.parametrize("name", hyperparameters.VARIANTS)
def test_a_variant_is_its_family_with_other_values(name):
    family, values = hyperparameters.VARIANTS[name]
    model = models.create(name)
    assert type(model) is models.resolve(family).model_class
    assert model.hyperparameters.model_dump() == {**models.create(family).hyperparameters.model_dump(), **values}


def test_a_variants_values_can_be_replaced():
    assert models.create("scvi_2x", n_latent=3).hyperparameters.model_dump(include={"n_hidden", "n_latent"}) == {
        "n_hidden": 256, "n_latent": 3
    }  # fmt: skip


def test_geneformer_has_the_published_number_of_weights():
    encoder = Encoder(EncoderConfig(vocab_size=25_426))
    token_types = 2 * 256  # of BERT, left out of ours
    assert sum(weight.numel() for weight in encoder.parameters()) + token_types == 10_288_722


@every_family
def test_untrained_controls_follow_their_seed_and_survive_saving(family, tmp_path):
    counts, _ = simulated()
    first, again, other = (models.create(family, **SMALL[family]).untrained(N_GENES, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.embed(counts), again.embed(counts))
    assert np.abs(first.embed(counts) - other.embed(counts)).max() > 0.01
    first.save(tmp_path)
    np.testing.assert_array_equal(models.load(tmp_path).embed(counts), first.embed(counts))


@every_family
def test_a_cell_does_not_see_the_others_of_the_call(family):
    counts, _ = simulated(seed=1)
    model = fitted_once(family)
    together = model.embed(counts)
    few = [7, 3, 90]
    np.testing.assert_allclose(model.embed(counts[few]), together[few], atol=1e-5, rtol=1e-5)


@every_family
def test_no_cells_have_no_embedding(family):
    assert fitted_once(family).embed(sp.csr_matrix((0, N_GENES), dtype=np.float32)).shape == (
        0,
        N_LATENT[family],
    )


@every_family
def test_cells_without_counts_embed_alike_and_disturb_no_other(family):
    counts, _ = simulated(n_cells=3, seed=1)
    empty = sp.csr_matrix((2, N_GENES), dtype=np.float32)
    model = fitted_once(family)
    embedding = model.embed(sp.vstack([empty, counts], format="csr"))
    assert np.isfinite(embedding).all()
    np.testing.assert_array_equal(embedding[0], embedding[1])
    np.testing.assert_allclose(embedding[2:], model.embed(counts), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(embedding[:2], model.embed(empty), atol=1e-5, rtol=1e-5)
    if family in ("PretrainedPCA", "Geneformer"):
        assert not embedding[:2].any()


@every_family
@pytest.mark.parametrize("n_genes", [N_GENES - 1, N_GENES + 1])
def test_counts_of_other_genes_are_refused(family, n_genes):
    with pytest.raises(ValueError, match=str(N_GENES)):
        fitted_once(family).embed(sp.csr_matrix(np.ones((4, n_genes), dtype=np.float32)))


def test_pretrained_pca_is_scikit_learns_up_to_sign():
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


def test_pretrained_pca_ignores_seed_and_steps():
    counts, obs = simulated()
    model = models.create("PretrainedPCA", n_components=5)
    assert model.fit(counts, obs, steps=7, seed=8) is None
    np.testing.assert_array_equal(model.embed(counts), fitted_once("PretrainedPCA").embed(counts))


def test_pretrained_pca_has_no_more_axes_than_cells_span():
    counts, obs = simulated()
    model = models.create("PretrainedPCA", n_components=50)
    model.fit(counts[:6], obs[:6], steps=0, seed=0)
    assert model.embed(counts).shape == (120, 5)


def test_geneformer_reads_the_most_variable_genes_only():
    counts, _ = simulated()
    model = fitted("Geneformer", n_genes=60)
    assert len(model.genes) == len(model.medians) == 60
    assert model.module.config.vocab_size == 62
    assert (np.diff(model.genes) > 0).all()
    others = counts.toarray()
    others[:, np.setdiff1d(np.arange(N_GENES), model.genes)] = 0
    np.testing.assert_array_equal(model.embed(sp.csr_matrix(others)), model.embed(counts))
    X = sc.pp.log1p(sc.pp.normalize_total(sc.AnnData(counts.copy()), target_sum=1e4, copy=True), copy=True)
    chosen = sc.pp.highly_variable_genes(X, n_top_genes=60, inplace=False)["highly_variable"].to_numpy()
    np.testing.assert_array_equal(model.genes, np.flatnonzero(chosen))


def test_geneformer_reads_every_gene_by_default():
    np.testing.assert_array_equal(fitted_once("Geneformer").genes, np.arange(N_GENES))


def test_untrained_geneformer_has_statistics_of_no_data():
    model = models.create("Geneformer", **SMALL["Geneformer"]).untrained(N_GENES, seed=0)
    assert (model.medians == 1).all()
    assert not model.module.training


def test_geneformer_learns():
    counts, obs = simulated()
    settings = {"n_genes": 40, "init_std": 0.02, "learning_rate": 1e-2, "batch_size": 32, "dropout": 0.0}
    model = models.create("Geneformer", **SMALL["Geneformer"] | settings)
    history = model.fit(counts, obs, steps=80, seed=0)
    assert history.loss[0] == pytest.approx(np.log(40), rel=0.05)
    assert history.loss[-10:].mean() < history.loss[0] - 0.5
    assert not model.module.training


def test_geneformer_splits_a_call_into_batches_without_a_trace(monkeypatch):
    counts, _ = simulated(seed=1)
    model = fitted_once("Geneformer")
    whole = model.embed(counts)
    monkeypatch.setattr(models.geneformer, "TOKENS_PER_BATCH", 100)
    np.testing.assert_allclose(model.embed(counts), whole, atol=1e-5, rtol=1e-5)


def test_geneformer_trains_around_cells_without_counts():
    counts, obs = simulated()
    empty = sp.csr_matrix((5, N_GENES), dtype=np.float32)
    model = models.create("Geneformer", **SMALL["Geneformer"])
    history = model.fit(sp.vstack([empty, counts], format="csr"), pd.concat([obs[:5], obs]), steps=4, seed=0)
    assert history.unique_cells == 32
    # Up to rounding: matrices lie elsewhere in memory.
    np.testing.assert_allclose(model.embed(counts), fitted_once("Geneformer").embed(counts), atol=1e-6)


def test_geneformer_refuses_to_train_on_nothing(monkeypatch):
    class Endless(Exception):
        pass

    def permutations(seed):
        raise Endless  # minibatches were asked of no cells, and would never come

    monkeypatch.setattr(np.random, "default_rng", permutations)
    empty = sp.csr_matrix((5, N_GENES), dtype=np.float32)
    with pytest.raises(ValueError, match="cell"):
        models.create("Geneformer", **SMALL["Geneformer"]).fit(empty, pd.DataFrame(index=range(5)), steps=2, seed=0)

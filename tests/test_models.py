"""What every family promises: fit, save, load, resume, embed, stay untrained, see a panel, keep its best weights."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances

from datawall import models
from datawall.cells import datasets, expression
from datawall.models import base, geneformer, hyperparameters, scimilarity, scvi, sparse, ssl, training, transformer
from datawall.models.base import NotFittedError
from datawall.models.training import Recipe

N_GENES = 800
SMALL = {
    "PretrainedPCA": {"n_components": 5},
    "scVI": {"n_hidden": 16, "n_latent": 6, "batch_size": 32},
    "SSL": {"n_hidden": [16, 12], "n_latent": 7, "batch_size": 32},
    "ssl_vae": {"n_hidden": [16, 12], "n_latent": 7, "batch_size": 32},
    "ssl_contrastive": {"n_hidden": [16, 12], "n_latent": 7, "batch_size": 32},
    "Geneformer": {
        "max_length": 64, "n_layers": 2, "n_heads": 2, "n_embd": 16, "batch_size": 8, "dropout": 0.1, "init_std": 0.2
    },
    "SCimilarity": {"n_hidden": [16, 12], "n_latent": 8, "batch_size": 32},
}  # fmt: skip
N_LATENT = {
    "PretrainedPCA": 5,
    "scVI": 6,
    "SSL": 7,
    "ssl_vae": 7,
    "ssl_contrastive": 7,
    "Geneformer": 16,
    "SCimilarity": 8,
}
NETWORKS = [name for name in SMALL if name != "PretrainedPCA"]
networks = pytest.mark.parametrize("name", NETWORKS)
every_model = pytest.mark.parametrize("name", SMALL)


def simulated(n_cells=120, seed=0):
    """Counts of three cell types."""
    rng = np.random.default_rng(seed)
    cell_type = rng.integers(0, 3, n_cells)
    rates = np.random.default_rng(99).gamma(0.3, 1, (3, N_GENES))[cell_type] * rng.uniform(0.5, 2, (n_cells, 1))
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    return counts, pd.DataFrame({"cell_type": cell_type.astype(str)})


def fitted(name, *, seed=0, steps=4, checkpoint=None, **hyperparameters):
    model = models.create(name, **SMALL[name] | hyperparameters)
    model.fit(*simulated(), steps=steps, seed=seed, checkpoint=checkpoint)
    return model


@cache
def fitted_once(name):
    """For tests that only look at it."""
    return fitted(name)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'scGPT' is no model.*PretrainedPCA, .*Geneformer"):
        models.create("scGPT")


@every_model
def test_an_unknown_hyperparameter_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}: n_layer 3: Extra inputs are not permitted"):
        models.create(name, n_layer=3)


BAD = {
    "PretrainedPCA": {"n_components": (0, "five")},
    "Geneformer": {
        "n_layers": (1, "six"), "n_heads": (3, 0), "n_embd": (30,), "n_genes": (0,), "max_length": (0,),
        "batch_size": (0,), "dropout": (1.5,), "warmup": (2,), "learning_rate": (-1e-3,),
    },  # 30 is no multiple of n_heads
    "SSL": {"mask": (1.5,)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for name, keys in BAD.items() for key, values in keys.items() for value in values],
)
def test_a_bad_value_is_refused_by_name(name, key, value):
    with pytest.raises(ValueError, match=rf"^{name}: .*{key}"):
        models.create(name, **{key: value})


def test_hyperparameters_of_a_family_yield_to_a_variants_and_these_to_a_models():
    given = {"scVI": {"n_latent": 3, "n_layers": 2}, "scvi_2x": {"n_hidden": 7}}
    spec = models.resolve("scvi_2x", given, schedule="epochs")
    assert (spec.name, spec.family, spec.is_external, spec.takes_steps) == ("scvi_2x", "scVI", False, True)
    assert spec.module == "datawall.models.scvi"
    expected = {"n_latent": 20, "n_layers": 2, "n_hidden": 7, "schedule": "epochs"}
    assert spec.hyperparameters.model_dump(include=set(expected)) == expected
    given["scVI"]["schedule"] = "steps"
    assert models.resolve("scvi_2x", given, schedule="epochs").hyperparameters.schedule == "steps"
    assert not models.resolve("PretrainedPCA", schedule="epochs").takes_steps


def test_a_label_sets_a_model_apart_whose_values_are_given_under_its_whole_name():
    given = {"SSL": {"n_latent": 9}, "ssl_contrastive": {"dropout": 0.3}, "ssl_contrastive@wide": {"n_hidden": [64]}}
    spec = models.resolve("ssl_contrastive@wide", given)
    assert (spec.name, spec.family, spec.is_external) == ("ssl_contrastive@wide", "SSL", False)
    expected = {"loss": "contrastive", "n_latent": 9, "dropout": 0.3, "n_hidden": [64]}
    assert spec.hyperparameters.model_dump(include=set(expected)) == expected
    with pytest.raises(ValueError, match="'scGPT@wide' is no model"):
        models.resolve("scGPT@wide")


@pytest.mark.parametrize("name", hyperparameters.VARIANTS)
def test_a_variant_is_its_family_with_other_values(name):
    family, values = hyperparameters.VARIANTS[name]
    model = models.create(name)
    assert type(model) is models.resolve(family).model_class
    assert model.hyperparameters.model_dump() == {**models.create(family).hyperparameters.model_dump(), **values}


@every_model
def test_embedding_and_saving_come_after_fitting_and_loading_after_saving(name, tmp_path):
    model = models.create(name, **SMALL[name])
    message = f"this {models.resolve(name).family} has no weights yet"
    with pytest.raises(NotFittedError, match=message):
        model.embed(simulated()[0])
    with pytest.raises(NotFittedError, match=message):
        model.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        models.resolve(name).model_class.load(tmp_path)


@every_model
def test_embedding_has_a_row_for_each_cell(name):
    embedding = fitted_once(name).embed(simulated(n_cells=33, seed=1)[0])
    assert embedding.shape == (33, N_LATENT[name])
    assert embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    assert embedding.std(axis=0).min() > 1e-4
    assert fitted_once(name).embed(sp.csr_matrix((0, N_GENES), dtype=np.float32)).shape == (0, N_LATENT[name])


@every_model
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_the_callers_counts_stay_as_they_are(name, dtype):
    counts, obs = simulated()
    counts = counts.astype(dtype)
    before = counts.copy()
    model = models.create(name, **SMALL[name])
    model.fit(counts, obs, steps=4, seed=0)
    embedding = model.embed(counts)
    assert counts.dtype == dtype
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(counts, part), getattr(before, part))
    np.testing.assert_allclose(embedding, fitted_once(name).embed(before.astype(np.float32)), rtol=1e-5, atol=1e-6)


@every_model
def test_a_saved_model_embeds_the_same_bits(name, tmp_path):
    counts, _ = simulated(seed=1)
    model = fitted_once(name)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.embed(counts), model.embed(counts))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@every_model
def test_fitting_repeats_bit_for_bit_and_follows_its_seed(name):
    counts, _ = simulated(seed=1)
    torch.manual_seed(1)
    first = fitted(name, seed=3).embed(counts)
    torch.manual_seed(2)
    np.testing.assert_array_equal(fitted(name, seed=3).embed(counts), first)
    if name != "PretrainedPCA":
        assert np.abs(fitted(name, seed=4).embed(counts) - first).max() > 0.01


@networks
def test_initial_weights_have_a_seed_of_their_own(name):
    """A first loss depends on the weights and on the batch: it differs when either seed does."""

    def first(seed, init_seed):
        history = models.create(name, **SMALL[name]).fit(*simulated(), steps=1, seed=seed, init_seed=init_seed)
        return history.loss[0]

    assert first(0, None) == first(0, 0)
    assert len({first(0, 0), first(0, 1), first(1, 0)}) == 3


LEARNS = {
    "scVI": ({"n_hidden": 16, "n_latent": 4, "learning_rate": 5e-3}, 0.75, 1),
    "SSL": ({"n_hidden": [64, 32], "n_latent": 16}, 0.8, 1),
    "ssl_vae": ({"n_hidden": [64, 32], "n_latent": 16}, 0.8, 1),
    "SCimilarity": ({"n_hidden": [64, 64], "n_latent": 16, "triplet_weight": 0.5, "margin": 0.5}, 0.7, 0.6),
}


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_from_real_cells(name):
    """Its losses fall, and cells of a type are closer to each other than to others, each to a share at most."""
    (settings, of_loss, of_distance), cells = LEARNS[name], datasets.load("pbmc68k")
    studies = np.random.default_rng(0).integers(0, 2, cells.n_obs).astype(str)
    model = models.create(name, **settings, batch_size=128, keep="best")
    history = model.fit(sp.csr_matrix(cells.X), cells.obs.assign(dataset_id=studies), steps=150, seed=0)
    assert history.loss[-20:].mean() < of_loss * history.loss[0]
    assert history.validation_loss[-1] < 0.9 * history.validation_loss[0]
    distance = pairwise_distances(model.embed(sp.csr_matrix(cells.X)), metric="sqeuclidean")
    types = cells.obs["cell_type"].to_numpy()
    same = (types[:, None] == types) & ~np.eye(len(types), dtype=bool)
    assert distance[same].mean() < of_distance * distance[types[:, None] != types].mean()


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


def test_seed_and_steps_do_not_change_pretrained_pca():
    counts, obs = simulated()
    model = models.create("PretrainedPCA", n_components=5)
    assert model.fit(counts, obs, steps=7, seed=8) is None
    np.testing.assert_array_equal(model.embed(counts), fitted_once("PretrainedPCA").embed(counts))


def test_geneformer_learns_from_the_chance_loss_on():
    settings = {"n_genes": 40, "init_std": 0.02, "learning_rate": 1e-2, "batch_size": 32, "dropout": 0.0}
    model = models.create("Geneformer", **SMALL["Geneformer"] | settings)
    history = model.fit(*simulated(), steps=80, seed=0)
    assert model.module.config.vocab_size == len(model.medians) + 2 == 42
    assert history.loss[0] == pytest.approx(transformer.chance_loss(42), rel=0.05)
    assert history.loss[-10:].mean() < history.loss[0] - 0.5


def test_geneformer_trains_around_cells_without_counts():
    counts, obs = simulated()
    empty = sp.csr_matrix((5, N_GENES), dtype=np.float32)
    model = models.create("Geneformer", **SMALL["Geneformer"])
    history = model.fit(sp.vstack([empty, counts], format="csr"), pd.concat([obs[:5], obs]), steps=4, seed=0)
    assert history.unique_cells == 32
    # Up to rounding: matrices lie elsewhere in memory.
    np.testing.assert_allclose(model.embed(counts), fitted_once("Geneformer").embed(counts), atol=1e-6)
    with pytest.raises(ValueError, match="no cell of the subset expresses a gene"):
        model.fit(empty, obs[:5], steps=2, seed=0)


@pytest.mark.parametrize("n_cells", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {"keep": keep}) for name in NETWORKS for keep in ("best", "last")), ("SSL", {"schedule": "epochs"})],
)
def test_a_subset_may_be_smaller_than_a_batch(name, settings, n_cells):
    model = models.create(name, **SMALL[name] | settings)
    history = model.fit(*simulated(n_cells), steps=3, seed=0)
    assert history.samples_seen == 3 * SMALL[name]["batch_size"]
    assert np.isfinite(history.loss).all()
    assert np.isfinite(model.embed(simulated()[0])).all()


@networks
def test_training_on_nothing_is_refused(name):
    counts, obs = simulated(5)
    with pytest.raises(ValueError, match="cell"):
        models.create(name, **SMALL[name]).fit(counts[:0], obs[:0], steps=2, seed=0)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ssl_vae"])  # which learns until the end
def test_the_weights_kept_are_those_of_the_lowest_validation_loss(name):
    """Whose loss is that of the cells set aside; the last weights are other ones, where training goes on too long."""
    counts, obs = simulated(40)
    embedding = {}
    for keep in ("best", "last"):
        model = models.create(name, **SMALL[name] | {"learning_rate": 0.05}, keep=keep)
        history = model.fit(counts, obs, steps=60, seed=0)
        embedding[keep] = model.embed(counts)
        assert history.unique_cells == (36 if keep == "best" else 40)
        assert len(history.validation_loss) == (10 if keep == "best" else 0)
        assert not model.module.training
        if keep == "best":
            _, loss = base.hold_out(model, counts, obs, np.arange(40), seed=0)
            assert loss() == pytest.approx(history.validation_loss.min(), rel=1e-6)
            assert history.validation_loss.argmin() < 9
    assert not np.array_equal(embedding["best"], embedding["last"])


@pytest.mark.parametrize(("n_cells", "n_held"), [(1, 0), (2, 1), (9, 1), (40, 4), (6000, 250)])
def test_a_tenth_chooses_the_weights(n_cells, n_held):
    rows = np.arange(10, 10 + n_cells)
    counts = sp.csr_matrix((n_cells + 10, 3), dtype=np.float32)
    learned, loss = base.hold_out(models.create("SSL"), counts, None, rows, seed=0)
    assert loss is not None
    assert len(learned) == n_cells - n_held == len(set(learned) & set(rows))


@pytest.mark.parametrize("steps", [1, 5, 10, 19, 25, 99, 100])
def test_the_validation_loss_is_looked_at_ten_to_twenty_times(steps):
    history = models.create("scVI", **SMALL["scVI"], n_genes=20).fit(*simulated(20), steps=steps, seed=0)
    assert min(steps, 10) <= len(history.validation_loss) <= 20


WITHOUT_TOKEN_TYPES = 10_288_722 - 2 * 256


@pytest.mark.parametrize(
    ("build", "n_weights"),
    [
        (lambda: scvi.Autoencoder(19_331, hyperparameters.ScVI()), 4_992_026),
        (lambda: ssl.Autoencoder(19_331, hyperparameters.SSL()), 20_767_683),
        (lambda: scimilarity.TripletAutoencoder(19_331, hyperparameters.SCimilarity()), 44_084_233),
        (lambda: transformer.Encoder(transformer.EncoderConfig(vocab_size=25_426)), WITHOUT_TOKEN_TYPES),
    ],
)
def test_the_number_of_weights_is_the_originals(build, n_weights):
    with torch.device("meta"):
        assert sum(weight.numel() for weight in build().parameters()) == n_weights


ORIGINAL = {
    "scVI": {"batch_size": 1024, "learning_rate": 1e-3, "weight_decay": 1e-6, "optimiser": "Adam", "epsilon": 0.01,
             "decay_vectors": True, "decay": "none"},
    "SSL": {"batch_size": 16_384, "learning_rate": 1e-3, "weight_decay": 0.01, "decay": "stepwise", "clip_norm": 1.0,
            "decay_every": 30 / 54, "decay_vectors": True},
    "Geneformer": {"batch_size": 144, "learning_rate": 1e-3, "weight_decay": 1e-3, "warmup": 0.027},
    "SCimilarity": {"batch_size": 1000, "learning_rate": 0.005, "weight_decay": 0.01, "decay": "cosine",
                    "decay_vectors": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_recipe_is_the_originals(name, monkeypatch):
    recipes = []
    monkeypatch.setattr(training, "train", lambda module, loss_of, n_cells, recipe, **_: recipes.append(recipe))
    models.create(name, n_genes=20).fit(*simulated(), steps=30, seed=0)
    assert recipes == [Recipe(steps=30, validate_every=3, **ORIGINAL[name])]


@networks
def test_a_panel_is_of_the_subsets_most_variable_genes_and_all_that_a_network_sees(name, tmp_path):
    counts, obs = simulated()
    model = models.create(name, **SMALL[name], n_genes=20)
    model.fit(counts, obs, steps=2, seed=0)
    expected = expression.variable_genes(expression.lognormalise(counts), 20)
    np.testing.assert_array_equal(model.genes, np.flatnonzero(expected))
    np.testing.assert_array_equal(fitted_once(name).genes, np.arange(N_GENES))
    # Counts of genes beyond the panel change places: a cell's sum stays, and so does what the network sees.
    others = counts.toarray()
    others[:, ~expected] = others[:, ~expected][:, ::-1]
    assert not np.array_equal(others, counts.toarray())
    np.testing.assert_allclose(model.embed(sp.csr_matrix(others)), model.embed(counts), rtol=1e-5, atol=1e-6)
    model.save(tmp_path)
    np.testing.assert_array_equal(models.load(tmp_path).embed(counts), model.embed(counts))
    with pytest.raises(ValueError, match=f"counts have 20 genes, the model {N_GENES}"):
        model.embed(counts[:, expected])


@every_model
def test_untrained_controls_follow_their_seed_and_survive_saving(name, tmp_path):
    counts, _ = simulated()
    first, again, other = (models.create(name, **SMALL[name]).untrained(N_GENES, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.embed(counts), again.embed(counts))
    assert np.abs(first.embed(counts) - other.embed(counts)).max() > 0.01
    assert name == "PretrainedPCA" or not first.module.training
    assert name != "Geneformer" or (first.medians == 1).all()  # statistics of no data
    first.save(tmp_path)
    np.testing.assert_array_equal(models.load(tmp_path).embed(counts), first.embed(counts))


@every_model
def test_a_cell_does_not_see_the_others_of_the_call(name, monkeypatch):
    counts, _ = simulated(seed=1)
    model = fitted_once(name)
    together = model.embed(counts)
    few = [7, 3, 90]
    np.testing.assert_allclose(model.embed(counts[few]), together[few], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(sparse, "CELLS_AT_ONCE", 7)
    monkeypatch.setattr(geneformer, "TOKENS_PER_BATCH", 100)
    np.testing.assert_allclose(model.embed(counts), together, atol=1e-5, rtol=1e-5)


@every_model
def test_cells_without_counts_embed_as_zero_and_disturb_no_other(name):
    counts, _ = simulated(n_cells=3, seed=1)
    empty = sp.csr_matrix((2, N_GENES), dtype=np.float32)
    embedding = fitted_once(name).embed(sp.vstack([empty, counts], format="csr"))
    assert not embedding[:2].any()
    assert embedding[2:].any(axis=1).all()
    np.testing.assert_allclose(embedding[2:], fitted_once(name).embed(counts), atol=1e-5, rtol=1e-5)
    assert not fitted_once(name).embed(empty).any()


@every_model
@pytest.mark.parametrize("n_genes", [N_GENES - 1, N_GENES + 1])
def test_counts_of_other_genes_are_refused(name, n_genes):
    family = models.resolve(name).family
    with pytest.raises(ValueError, match=f"^{family}: counts have {n_genes} genes, the model {N_GENES}"):
        fitted_once(name).embed(sp.csr_matrix(np.ones((4, n_genes), dtype=np.float32)))

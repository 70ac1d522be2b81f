"""Tasks that run a model: full fine-tuning, and reconstruction in each family's own units."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from datawall import models, tasks
from datawall.cells import expression, sampling
from datawall.models import training
from datawall.tasks import finetuning

FAMILIES = {
    "PretrainedPCA": {"n_components": 10},
    "scVI": {"n_hidden": 32, "batch_size": 64, "learning_rate": 0.005},
    "SSL": {"n_hidden": [64], "n_latent": 16, "batch_size": 64, "learning_rate": 0.003},
    "Geneformer": {"max_length": 40, "n_layers": 2, "n_embd": 32, "batch_size": 16, "learning_rate": 0.004,
                   "dropout": 0.0, "init_std": 0.05},
    "SCimilarity": {"n_hidden": [64], "n_latent": 16, "batch_size": 64},
}  # fmt: skip
N_GENES = 600
FINETUNABLE = ("scVI", "SSL", "Geneformer", "SCimilarity")


@pytest.fixture(scope="module")
def cells():
    """Poisson counts of three types over 600 genes, in two studies; every fourth cell is held out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=800)
    rates = rng.gamma(0.2, 1.0, size=(3, N_GENES))[labels] * rng.lognormal(0.5, 0.3, size=(800, 1))
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    obs = pd.DataFrame({"cell_type": np.array(["x", "y", "z"])[labels], "batch": rng.integers(2, size=800).astype(str)})
    return counts, obs, np.arange(800) % 4 == 0


@pytest.fixture(scope="module")
def fitted(cells):
    counts, obs, held = cells
    trained = {}
    for family, hyperparameters in FAMILIES.items():
        trained[family] = models.create(family, **hyperparameters)
        trained[family].fit(counts[~held], obs[~held], steps=300 if family == "Geneformer" else 80, seed=0)
    return trained


# Reconstruction


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_models_do_what_they_were_trained_to_do_better_than_chance(family, cells, fitted):
    counts, obs, held = cells
    metrics = tasks.reconstruction(fitted[family], counts[held], obs[held])
    untrained = models.create(family, **FAMILIES[family]).untrained(N_GENES, seed=0)
    assert metrics["loss"] < 0.98 * metrics.chance["loss"]
    assert metrics["loss"] < 0.98 * tasks.reconstruction(untrained, counts[held], obs[held])["loss"]
    low, high = metrics.intervals["loss"]
    assert low < metrics["loss"] < high
    assert high - low < 0.5 * metrics["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_repeats_and_leaves_no_trace(family, cells, fitted):
    counts, obs, held = cells
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = tasks.reconstruction(fitted[family], counts[held], obs[held])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    assert tasks.reconstruction(fitted[family], counts[held], obs[held]) == first
    if family not in ("PretrainedPCA", "SCimilarity"):  # other masks, other noise
        assert tasks.reconstruction(fitted[family], counts[held], obs[held], seed=1) != first


def test_loss_of_ssl_is_of_hidden_entries_alone(cells, fitted):
    counts, obs, held = cells
    model = fitted["SSL"]
    X = expression.lognormalise(counts[held]).toarray()
    module = model.module
    # By hand: hide entries, put the others through the network densely.
    losses, rng = [], torch.Generator().manual_seed(0)
    first, last, x = module.encoder[0], module.reconstruction, torch.from_numpy(X)
    for _ in range(40):
        hidden = torch.rand(X.shape, generator=rng) < 0.5
        with torch.no_grad():
            h = torch.where(hidden, 0, 2 * x) @ first.weight + first.bias
            out = F.linear(module.decoder(module.encoder[1:](h)), last.weight, last.bias)
        losses.append((hidden * (out - x) ** 2).mean().item())
    seeds = [tasks.reconstruction(model, counts[held], obs[held], seed=seed)["loss"] for seed in range(10)]
    assert np.mean(seeds) == pytest.approx(np.mean(losses), rel=0.01)
    # A model that saw what it is asked for would be scored far better: what is left of hidden cells says so.
    assert np.mean(losses) > 1e-2


def test_loss_of_pca_is_the_residual(cells, fitted):
    counts, obs, held = cells
    X = expression.lognormalise(counts[held]).toarray().astype(float)[:128]
    axes = fitted["PretrainedPCA"].axes.astype(float)
    centred = X - X.mean(axis=0)
    residual = centred - centred @ axes.T @ axes
    expected = np.square(residual).mean()
    assert fitted["PretrainedPCA"].heldout_loss(counts[held][:128], obs) == pytest.approx(expected, rel=1e-4)


def test_chance_is_what_knows_the_mean_alone(cells, fitted):
    counts, _, held = cells
    X = expression.lognormalise(counts[held]).toarray().astype(float)
    variance = X.var(axis=0).mean()
    assert fitted["PretrainedPCA"].chance_loss(counts[held]) == pytest.approx(variance, rel=1e-5)
    assert fitted["SSL"].chance_loss(counts[held]) == pytest.approx(0.5 * variance, rel=1e-5)
    assert fitted["SCimilarity"].chance_loss(counts[held]) == pytest.approx(0.999 * variance, rel=1e-5)
    tokens = fitted["Geneformer"].prepare(counts[held]).ids
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert fitted["Geneformer"].chance_loss(counts[held]) == pytest.approx(-(share * np.log(share)).sum())
    # scVI: negative binomials around each cell's library times the mean shares.
    from scipy.stats import nbinom

    x = counts[held].toarray()
    mean = x.sum(axis=1, keepdims=True) * (x.sum(axis=0) / x.sum())
    theta = fitted["scVI"].module.log_theta.exp().detach().cpu().numpy()
    expected = -nbinom.logpmf(x, theta, theta / (theta + mean)).sum(axis=1).mean()
    assert fitted["scVI"].chance_loss(counts[held]) == pytest.approx(expected, rel=1e-4)


def test_no_cells_cannot_be_reconstructed(cells, fitted):
    counts, obs, _ = cells
    with pytest.raises(ValueError, match="there are no held-out cells to reconstruct"):
        tasks.reconstruction(fitted["SSL"], counts[:0], obs[:0])


# Full fine-tuning

SHORT = training.Recipe(steps=60, batch_size=32, learning_rate=1e-3, warmup=0.1, validate_every=20, patience=3)


def test_every_network_can_be_finetuned(fitted):
    assert [family for family in FAMILIES if hasattr(fitted[family], "finetunable")] == list(FINETUNABLE)


@pytest.mark.parametrize("family", FINETUNABLE)
def test_finetunable_encodes_as_the_model_embeds(family, cells, fitted):
    counts, model = cells[0], fitted[family]
    module, encode = model.finetunable()
    module.eval()
    latent = encode(counts[:50])
    np.testing.assert_allclose(latent.detach().cpu().numpy(), model.embed(counts[:50]), atol=2e-5)
    latent.square().sum().backward()
    assert sum(weight.grad is not None and bool(weight.grad.any()) for weight in module.parameters()) >= 2


def test_geneformer_encodes_a_cell_without_tokens_as_zero(cells, fitted):
    counts = cells[0][:5].tolil()
    counts[2] = 0
    _, encode = fitted["Geneformer"].finetunable()
    latent = encode(counts.tocsr()).detach()
    assert not latent[2].any()
    assert latent[[0, 1, 3, 4]].any(dim=1).all()


@pytest.mark.parametrize("family", FINETUNABLE)
def test_the_encoder_learns_and_the_model_stays(family, cells):
    counts, obs, _ = cells
    labels = obs["cell_type"].to_numpy()
    part = sampling.stratified_split(labels, [0.6, 0.2, 0.2], seed=0)
    model = models.create(family, **FAMILIES[family]).untrained(N_GENES, seed=0)
    before = model.embed(counts[:50])
    options = {"seed": 0, "recipe": SHORT, "head_recipe": SHORT}
    full = finetuning.fully_finetuned_classification(model, counts, labels, part, **options)
    assert set(full) == {"full_micro_f1", "full_macro_f1", "full_balanced_accuracy", "full_error_rate"}
    np.testing.assert_array_equal(model.embed(counts[:50]), before)
    frozen = tasks.finetuned_classification(model.embed(counts), labels, part, seed=0, recipe=SHORT)
    assert full["full_micro_f1"] >= frozen["micro_f1"] - 0.02
    assert full["full_micro_f1"] > full.chance["full_micro_f1"] + 0.3
    assert finetuning.fully_finetuned_classification(model, counts, labels, part, **options) == full


def test_labels_of_test_cells_are_not_learnt(cells, fitted):
    counts, obs, _ = cells
    labels = obs["cell_type"].to_numpy()
    part = sampling.stratified_split(labels, [0.6, 0.2, 0.2], seed=0)
    turned = np.where(part == 2, [{"x": "y", "y": "z", "z": "x"}[label] for label in labels], labels)
    options = {"seed": 0, "recipe": SHORT, "head_recipe": SHORT}
    right = finetuning.fully_finetuned_classification(fitted["SSL"], counts, labels, part, **options)["full_micro_f1"]
    wrong = finetuning.fully_finetuned_classification(fitted["SSL"], counts, turned, part, **options)["full_micro_f1"]
    assert right > 0.8
    assert wrong <= 1 - right

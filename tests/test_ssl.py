from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from datawall.cells import datasets, expression
from datawall.models import base, hyperparameters, sparse, training
from datawall.models.base import NotFittedError
from datawall.models.sparse import Cells, Reconstruction, SparseLinear
from datawall.models.ssl import SSL, Autoencoder

N_GENES = 60
SMALL = {"n_hidden": [12, 8], "n_latent": 4, "batch_size": 16}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small gain nothing from more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def simulated(n_cells=40, n_genes=N_GENES, seed=0):
    counts = np.random.default_rng(seed).poisson(0.3, (n_cells, n_genes)).astype(np.float32)
    counts[:, 0] += 1  # no cell without counts
    return sp.csr_matrix(counts)


def fitted(n_cells=40, steps=20, seed=0, **settings):
    model = SSL(**SMALL | settings)
    history = model.fit(simulated(n_cells), pd.DataFrame(index=range(n_cells)), steps=steps, seed=seed)
    return model, history


def autoencoder(n_genes=N_GENES, **settings):
    """With every dropout at zero, so that a dense reference can follow."""
    torch.manual_seed(0)
    return Autoencoder(n_genes, hyperparameters.SSL(**SMALL | {"dropout": 0.0} | settings))


def dense_output(module, seen):
    """What the decoder makes of dense cells, and the encoder's output, with torch's own layers."""
    first, last = module.encoder[0], module.reconstruction
    encoded = module.encoder[1:](seen @ first.weight + first.bias)
    output = F.linear(module.decoder(encoded[:, : module.n_latent]), last.weight, last.bias)
    return (output.sigmoid() if last.sigmoid else output), encoded


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters()}


def assert_same_gradients(ours, theirs):
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn for the masks, in order."""
    draws, draw = [], sparse.bernoulli

    def recorded(*arguments):
        draws.append(draw(*arguments))
        return draws[-1]

    monkeypatch.setattr(sparse, "bernoulli", recorded)
    return draws


def whole_mask(x, drawn):
    """The mask (n_cells, n_genes) that the draws amount to: values first, then blocks of genes, zeros of them alone."""
    of_values, *blocks = drawn
    mask = torch.cat([block.view(len(x), -1) for block in blocks], dim=1)
    mask[x != 0] = of_values
    return mask.float()


@pytest.mark.parametrize("entries", [1, 7 * 40, 2**20])
@pytest.mark.parametrize("settings", [{}, {"mask": 0.15}, {"output": "sigmoid"}, {"n_hidden": [9]}])
def test_the_masked_loss_and_its_gradients_are_those_of_dense_cells(settings, entries, drawn, monkeypatch):
    monkeypatch.setitem(sparse.ENTRIES_AT_ONCE, "cpu", entries)
    module, X = autoencoder(**settings), expression.lognormalise(simulated())
    loss = module(Cells.of(X))
    ours = gradients(module, loss)
    x = torch.from_numpy(X.toarray())
    hidden = whole_mask(x, drawn)
    output, _ = dense_output(module, x * (1 - hidden) / (1 - module.mask))
    reference = (hidden * (output - x) ** 2).mean()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert_same_gradients(ours, gradients(module, reference))


sparse_cells = st.tuples(
    st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**32 - 1), st.sampled_from([1, 13, 2**20])
)


def random_matrix(n_cells, n_genes, density, seed):
    rng = np.random.default_rng(seed)
    kept = rng.random((n_cells, n_genes)) < density
    return sp.csr_matrix(kept * rng.normal(0, 3, (n_cells, n_genes)).astype(np.float32))


@settings(deadline=None)
@given(sparse_cells)
def test_sparse_layers_are_dense_ones_on_any_cells(case):
    *shape, seed, entries = case
    X = random_matrix(*shape, seed)
    x, cells = torch.from_numpy(X.toarray()), Cells.of(X)
    torch.manual_seed(0)
    first, last = SparseLinear(x.shape[1], 5), Reconstruction(5, x.shape[1])
    loss = _with_entries(entries, lambda: last(first(cells).tanh(), cells))
    loss.backward()
    ours = [weight.grad.clone() for weight in (*first.parameters(), *last.parameters())]
    first.zero_grad(), last.zero_grad()
    reference = F.mse_loss(F.linear((x @ first.weight + first.bias).tanh(), last.weight, last.bias), x)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-7)
    for mine, weight in zip(ours, (*first.parameters(), *last.parameters()), strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-6)


def _with_entries(entries, compute):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sparse.ENTRIES_AT_ONCE, "cpu", entries)
        return compute()


@settings(deadline=None)
@given(sparse_cells)
def test_thinned_cells_are_the_product_with_what_is_kept(case):
    *shape, seed, _ = case
    X = random_matrix(*shape, seed)
    kept = (np.random.default_rng(seed + 1).random(X.nnz) < 0.5).astype(np.uint8)
    thinned = Cells.of(X).thinned(torch.from_numpy(kept), 2.0)
    expected = sp.csr_matrix((X.data * kept * 2, X.indices, X.indptr), shape=X.shape).toarray()
    by_cell = sp.csr_matrix((thinned.data.numpy(), thinned.genes.numpy(), thinned.offsets.numpy()), shape=X.shape)
    values = thinned.data.numpy()[thinned.order.numpy()]
    by_gene = sp.csc_matrix((values, thinned.cells.numpy(), thinned.gene_offsets.numpy()), shape=X.shape)
    np.testing.assert_array_equal(by_cell.toarray(), expected)
    np.testing.assert_array_equal(by_gene.toarray(), expected)
    assert by_cell.nnz == by_gene.nnz == kept.sum()


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_a_step_never_waits_for_the_device(loss):
    """On the meta device there are no values, so what asks for one fails (see test_transformer)."""
    module = autoencoder(**({"loss": "vae"} if loss == "vae" else {})).to("meta").train()
    cells = Cells(*(each.to("meta") for each in Cells.of(simulated(8))))
    module(cells).backward()
    assert all(weight.grad.shape == weight.shape for weight in module.parameters())


def test_a_reconstruction_that_is_nearly_right_has_a_loss_of_nearly_zero():
    x = torch.rand(20, N_GENES) * 9
    last = Reconstruction(N_GENES, N_GENES)
    with torch.no_grad():
        last.weight.copy_(torch.eye(N_GENES))
        last.bias.fill_(1e-4)
    loss = last(x, Cells.of(sp.csr_matrix(x.numpy())))  # x² - 2 x x̂ + x̂² would lose it: 81 has steps of 8e-6
    assert loss.item() == pytest.approx(1e-8, rel=0.02)


def test_a_loss_is_differentiated_once():
    module, cells = autoencoder(), Cells.of(expression.lognormalise(simulated()))
    loss = module(cells)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()  # gradients are scaled in place: a second time must not pass silently


@settings(deadline=None)
@given(st.floats(1e-3, 1 - 1e-3), st.integers(0, 2**31))
def test_draws_have_the_probability_asked_for(share, seed):
    n = 20_003
    torch.manual_seed(seed)
    draws = sparse.bernoulli(n, share, CPU)
    assert draws.shape == (n,)
    assert draws.dtype == torch.uint8
    assert draws.max() <= 1
    assert abs(draws.float().mean().item() - share) < 7 * np.sqrt(share * (1 - share) / n)
    torch.manual_seed(seed)
    torch.testing.assert_close(sparse.bernoulli(n, share, CPU), draws)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_draws_are_independent(share):
    torch.manual_seed(0)
    draws = sparse.bernoulli(100_000, share, CPU).double() - share
    for lag in (*range(1, 66), 128, 256):
        assert abs((draws[lag:] * draws[:-lag]).mean()) < 6 * share * (1 - share) / np.sqrt(len(draws)), lag


@pytest.mark.parametrize(("share", "all_are"), [(1e-15, 0), (1 - 1e-15, 1)])
def test_draws_of_extreme_shares(share, all_are):
    assert (sparse.bernoulli(1000, share, CPU) == all_are).all()
    assert sparse.bernoulli(0, share, CPU).shape == (0,)


@pytest.mark.parametrize("mask", [0.5, 0.2])
def test_the_encoder_sees_what_is_left_scaled_up(mask):
    module, cells = autoencoder(mask=mask), Cells.of(expression.lognormalise(simulated(400)))
    seen = []
    module.encoder[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    module(cells)
    assert len(seen[0].data) / len(cells.data) == pytest.approx(1 - mask, abs=0.03)
    assert set(seen[0].data.tolist()) <= set((cells.data * (1 / (1 - mask))).tolist())


def test_masks_follow_torchs_seed():
    module, cells = autoencoder(), Cells.of(expression.lognormalise(simulated()))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(module(cells).item())
    assert losses[0] == losses[1] != losses[2]


def test_a_sigmoid_output_stays_below_one():
    X = expression.lognormalise(simulated())
    model, history = fitted(output="sigmoid", steps=200, learning_rate=0.02)
    assert dense_output(model.module, torch.from_numpy(X.toarray()))[0].max() <= 1
    _, linear = fitted(steps=200, learning_rate=0.02)
    assert linear.loss[-20:].mean() < history.loss[-20:].mean()


@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_the_vae_loss_and_its_gradients_by_hand(output):
    module, X = autoencoder(loss="vae", output=output), expression.lognormalise(simulated())
    x = torch.from_numpy(X.toarray())
    torch.manual_seed(5)
    loss = module(Cells.of(X))
    ours = gradients(module, loss)
    _, encoded = dense_output(module, x)
    posterior = Normal(encoded[:, :4], (encoded[:, 4:] / 2).exp())
    torch.manual_seed(5)
    latent = posterior.mean + posterior.stddev * torch.randn(40, 4)
    x_hat = F.linear(module.decoder(latent), module.reconstruction.weight, module.reconstruction.bias)
    x_hat = x_hat.sigmoid() if output == "sigmoid" else x_hat
    divergence = kl_divergence(posterior, Normal(0, 1)).sum(1)
    reference = (((x_hat - x) ** 2).sum(1) / 2 + divergence).mean() / N_GENES
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert_same_gradients(ours, gradients(module, reference))


def test_the_number_of_weights_is_the_originals():
    with torch.device("meta"):
        module = Autoencoder(19_331, hyperparameters.SSL())
    assert sum(weight.numel() for weight in module.parameters()) == 20_767_683


def test_first_weights_start_as_torchs_own():
    layer, linear = SparseLinear(400, 300), torch.nn.Linear(400, 300)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max() <= 0.05
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


def test_the_rate_decays_a_number_of_times_in_the_budget():
    _, history = fitted(steps=60, n_decays=6)
    np.testing.assert_allclose(history.learning_rate, 1e-3 * 0.9 ** (np.arange(60) // 10))


@pytest.mark.parametrize(("n_cells", "every"), [(40, 10), (18, 4.5), (8, 2), (3, 2)])  # a pass takes a step at least
def test_the_rate_decays_every_two_passes(n_cells, every):
    _, history = fitted(n_cells, steps=25, schedule="epochs", keep="last", batch_size=8)
    np.testing.assert_allclose(history.learning_rate, 1e-3 * 0.9 ** (np.arange(25) // every))


@pytest.fixture
def spied(monkeypatch):
    """What the training loop was given."""
    given_to, train = {}, training.train

    def recorded(*arguments, batches, **options):
        given_to.update(options, recipe=arguments[3], batches=list(batches))
        return train(*arguments, batches=given_to["batches"], **options)

    monkeypatch.setattr(training, "train", recorded)
    return given_to


def test_the_best_weights_are_kept(spied):
    model, history = fitted(steps=50, learning_rate=0.05, batch_size=4)
    assert history.validation_loss.argmin() < len(history.validation_loss) - 1
    with torch.no_grad(), torch.random.fork_rng():
        assert spied["validation_loss"]() == pytest.approx(history.validation_loss.min(), rel=1e-5)
    assert not model.module.training


@pytest.mark.parametrize(("n_cells", "n_held"), [(40, 4), (9, 1), (2, 1)])
def test_a_tenth_is_held_out(n_cells, n_held, spied):
    _, history = fitted(n_cells, steps=30)
    trained_on = set(np.concatenate(spied["batches"]).tolist())
    assert len(trained_on) == history.unique_cells == n_cells - n_held
    assert trained_on < set(range(n_cells))


def test_no_more_than_a_number_are_held_out(monkeypatch):
    monkeypatch.setattr(base, "HELD_OUT", 3)
    assert fitted(40)[1].unique_cells == 37


@pytest.mark.parametrize("steps", [1, 5, 10, 19, 25, 99, 100])
def test_the_validation_loss_is_looked_at_ten_to_twenty_times(steps):
    looks = len(fitted(steps=steps)[1].validation_loss)
    assert min(steps, 10) <= looks <= 20


def test_validation_does_not_depend_on_its_blocks(monkeypatch):
    _, whole = fitted(2000, steps=2)
    monkeypatch.setattr(sparse, "CELLS_AT_ONCE", 7)
    _, parts = fitted(2000, steps=2)
    np.testing.assert_allclose(parts.validation_loss, whole.validation_loss, rtol=0.05)  # masks are drawn by block


def test_the_last_weights_are_trained_on_every_cell(spied):
    _, history = fitted(steps=30, keep="last")
    assert spied["validation_loss"] is None
    assert history.unique_cells == 40
    assert not len(history.validation_loss)


def test_the_recipe_is_the_originals(spied):
    model = SSL()
    assert model.hyperparameters.batch_size == 16_384
    fitted()
    recipe = spied["recipe"]
    assert (recipe.optimiser, recipe.decay) == ("AdamW", "stepwise")
    assert (recipe.weight_decay, recipe.decay_vectors, recipe.clip_norm, recipe.warmup) == (0.01, True, 1.0, 0.0)


@pytest.mark.parametrize("n_cells", [1, 2, 5])
@pytest.mark.parametrize("settings", [{}, {"keep": "last"}, {"loss": "vae"}, {"schedule": "epochs"}])
def test_tiny_subsets(n_cells, settings):
    model, history = fitted(n_cells, steps=3, **settings)
    assert np.isfinite(history.loss).all()
    assert np.isfinite(model.embed(simulated())).all()


def test_training_on_nothing_is_refused():
    with pytest.raises(ValueError, match="no cells"):
        fitted(0)


@cache
def fitted_once(loss="masked"):
    return fitted(loss=loss)[0]


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_the_embedding_is_the_encoders_output_for_whole_cells(loss):
    model, counts = fitted_once(loss), simulated(seed=1)
    x = torch.from_numpy(expression.lognormalise(counts).toarray())
    expected = dense_output(model.module, x)[1][:, :4].detach().numpy()
    np.testing.assert_allclose(model.embed(counts), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.embed(counts), model.embed(counts))


def test_a_cell_does_not_see_the_others_of_a_call(monkeypatch):
    model, counts = fitted_once(), simulated(50, seed=1)
    whole = model.embed(counts)
    monkeypatch.setattr(sparse, "CELLS_AT_ONCE", 7)
    np.testing.assert_allclose(model.embed(counts), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.embed(counts[[7, 3]]), whole[[7, 3]], rtol=1e-4, atol=1e-5)


def test_cells_without_counts_embed_as_zero():
    empty = sp.csr_matrix((2, N_GENES), dtype=np.float32)
    embedding = fitted_once().embed(sp.vstack([empty, simulated(3)], format="csr"))
    assert not embedding[:2].any()
    assert embedding[2:].any(axis=1).all()
    assert fitted_once().embed(empty[:0]).shape == (0, 4)


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_a_saved_model_embeds_the_same_bits(loss, tmp_path):
    fitted_once(loss).save(tmp_path)
    np.testing.assert_array_equal(SSL.load(tmp_path).embed(simulated()), fitted_once(loss).embed(simulated()))


def test_clear_errors():
    with pytest.raises(NotFittedError, match="this SSL has no weights yet"):
        SSL().embed(simulated())
    with pytest.raises(ValueError, match="SSL: counts have 61 genes, the model 60"):
        fitted_once().embed(simulated(n_genes=61))
    with pytest.raises(ValueError, match=r"SSL: mask 1\.5"):
        SSL(mask=1.5)


def test_fitting_repeats_bit_for_bit():
    counts = simulated(seed=1)
    torch.manual_seed(1)
    first = fitted(seed=3)[0].embed(counts)
    torch.manual_seed(2)
    np.testing.assert_array_equal(fitted(seed=3)[0].embed(counts), first)
    assert np.abs(fitted(seed=4)[0].embed(counts) - first).max() > 0.01


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(loss, tmp_path, monkeypatch):
    class CutOffError(Exception):
        pass

    def fit():
        model = SSL(**SMALL, loss=loss)
        model.fit(simulated(), pd.DataFrame(index=range(40)), steps=12, seed=0, checkpoint=tmp_path / "checkpoint.npz")
        return model

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    decay = training.Recipe.rate

    def cut_off(recipe, step):
        if step == 7:
            raise CutOffError
        return decay(recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Recipe, "rate", cut_off)
        with pytest.raises(CutOffError):
            fit()
    assert (tmp_path / "checkpoint.npz").exists()
    resumed = fit().embed(simulated())
    np.testing.assert_array_equal(resumed, fitted(steps=12, loss=loss)[0].embed(simulated()))


def test_the_loss_is_right_under_autocast():
    module, cells = autoencoder(), Cells.of(expression.lognormalise(simulated()))
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module(cells)
        assert loss.dtype == torch.float32
        found.append((loss.item(), gradients(module, loss)))
    (exact, ours), (rounded, theirs) = found
    assert rounded == pytest.approx(exact, rel=0.01)
    for name, gradient in ours.items():
        assert theirs[name].dtype == torch.float32
        torch.testing.assert_close(theirs[name], gradient, rtol=0.1, atol=0.03 * gradient.abs().max().item())


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_it_learns_from_real_cells(loss):
    adata = datasets.load("pbmc68k")
    model = SSL(n_hidden=[64, 32], n_latent=16, batch_size=128, loss=loss)
    history = model.fit(sp.csr_matrix(adata.X), adata.obs, steps=150, seed=0)
    assert history.validation_loss[-1] < 0.9 * history.validation_loss[0]
    assert history.loss[-20:].mean() < 0.8 * history.loss[0]

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from datawall.cells import expression
from datawall.models import hyperparameters, sparse
from datawall.models.sparse import Cells, DenseCells, Reconstruction, SparseLinear
from datawall.models.ssl import SSL, Autoencoder

N_GENES = 60
SMALL = {"n_hidden": [12, 8], "n_latent": 4, "batch_size": 16}
CPU = torch.device("cpu")
both_forms = pytest.mark.parametrize("form", [Cells, DenseCells])  # a processor's, and a GPU's


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
    if not blocks:  # of `DenseCells` every entry is a value
        return of_values.view_as(x).float()
    mask = torch.cat([block.view(len(x), -1) for block in blocks], dim=1)
    mask[x != 0] = of_values
    return mask.float()


@both_forms
@pytest.mark.parametrize("entries", [1, 7 * 40, 2**20])
@pytest.mark.parametrize("settings", [{}, {"mask": 0.15}, {"output": "sigmoid"}, {"n_hidden": [9]}])
def test_the_masked_loss_and_its_gradients_are_those_of_dense_cells(settings, entries, form, drawn, monkeypatch):
    monkeypatch.setattr(sparse, "ENTRIES_AT_ONCE", entries)
    module, X = autoencoder(**settings), expression.lognormalise(simulated())
    loss = module(form.of(X))
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


@both_forms
@settings(deadline=None)
@given(case=sparse_cells)
def test_sparse_layers_are_dense_ones_on_any_cells(form, case):
    *shape, seed, entries = case
    X = random_matrix(*shape, seed)
    x, cells = torch.from_numpy(X.toarray()), form.of(X)
    torch.manual_seed(0)
    first, last = SparseLinear(x.shape[1], 5), Reconstruction(5, x.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "ENTRIES_AT_ONCE", entries)
        loss = last(first(cells).tanh(), cells)
    loss.backward()
    ours = [weight.grad.clone() for weight in (*first.parameters(), *last.parameters())]
    first.zero_grad(), last.zero_grad()
    reference = F.mse_loss(F.linear((x @ first.weight + first.bias).tanh(), last.weight, last.bias), x)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-7)
    for mine, weight in zip(ours, (*first.parameters(), *last.parameters()), strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("loss", ["masked", "vae", "contrastive"])
def test_a_step_never_waits_for_the_device(loss):
    """On the meta device there are no values, so what asks for one fails (see test_transformer)."""
    module = autoencoder(loss=loss).to("meta").train()
    cells = DenseCells(torch.empty(8, N_GENES, device="meta"))
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
    assert (draws.shape, draws.dtype) == ((n,), torch.uint8)
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


@pytest.mark.parametrize("loss", ["masked", "vae"])
def test_the_embedding_is_the_encoders_output_for_whole_cells(loss):
    model, counts = fitted(loss=loss)[0], simulated(seed=1)
    x = torch.from_numpy(expression.lognormalise(counts).toarray())
    expected = dense_output(model.module, x)[1][:, :4].detach().numpy()
    np.testing.assert_allclose(model.embed(counts), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.embed(counts), model.embed(counts))


@both_forms
def test_the_loss_is_right_under_autocast(form):
    module, cells = autoencoder(), form.of(expression.lognormalise(simulated()))
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

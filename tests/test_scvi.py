import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.distributions import NegativeBinomial

from datawall.models import scvi as family
from datawall.models import sparse, training
from datawall.models.hyperparameters import ScVI as Hyperparameters
from datawall.models.scvi import Autoencoder, ScVI

N_GENES = 120
SMALL = {"n_hidden": 16, "n_latent": 4, "batch_size": 32, "keep": "last"}


def simulated(n_cells=70, seed=0, n_genes=N_GENES):
    """Counts of which nine in ten are zero and some are in the hundreds, over libraries of different sizes."""
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(-3.5, 3, n_genes) * rng.lognormal(0, 1, (n_cells, 1)) * rng.gamma(0.5, 2, (n_cells, n_genes))
    counts = rng.poisson(rates)
    counts[:, 0] += 1  # no cell without counts
    return sp.csr_matrix(counts.astype(np.float32))


def autoencoder(n_genes=N_GENES, **sizes):
    torch.manual_seed(0)
    sizes = {"n_hidden": 16, "n_latent": 4, **sizes}
    return Autoencoder(n_genes, Hyperparameters(**sizes)).train()


def fitted(*, n_cells=70, steps=6, seed=0, **hyperparameters):
    model = ScVI(**SMALL | hyperparameters)
    history = model.fit(simulated(n_cells), pd.DataFrame(index=range(n_cells)), steps=steps, seed=seed)
    return model, history


def vae(n_genes, **sizes):
    """The peer: scvi-tools' module."""
    with warnings.catch_warnings(action="ignore"):
        from scvi.module import VAE

        return VAE(n_genes, n_batch=1, n_labels=1, gene_likelihood="nb", use_observed_lib_size=True, **sizes)


def shared(peer, kind):
    """Those of the peer's tensors by name that take part; ours have the same order."""
    unused = ("l_encoder", "decoder.px_r_decoder", "decoder.px_dropout_decoder")
    return {name: tensor for name, tensor in getattr(peer, kind)() if not name.startswith(unused)}


def peer_of(module, n_layers=1):
    """A peer of the same weights."""
    n_hidden, n_latent = module.mean.in_features, module.mean.out_features
    peer = vae(len(module.log_theta), n_hidden=n_hidden, n_latent=n_latent, n_layers=n_layers).train()
    for kind in ("named_parameters", "named_buffers"):
        theirs, ours = shared(peer, kind), dict(getattr(module, kind)())
        for tensor, (name, own) in zip(theirs.values(), ours.items(), strict=True):
            tensor.data.copy_(own.data.T if name == "encoder.0.weight" else own.data)
    return peer


def outcome(peer, counts, kl_weight):
    """Loss of a batch in the peer."""
    x = torch.from_numpy(counts.toarray()).to(peer.px_r)
    zeros = torch.zeros(len(x), 1)
    return peer({"X": x, "batch": zeros, "labels": zeros}, loss_kwargs={"kl_weight": kl_weight})[2]


def assert_same_gradients(module, peer, tolerance=1e-4):
    """Up to a share of their norm; those of the rounding error that batch normalisation leaves are all but zero."""
    ours = dict(module.named_parameters())
    largest = max(float(weight.grad.norm()) for weight in ours.values())
    for theirs, (name, own) in zip(shared(peer, "named_parameters").values(), ours.items(), strict=True):
        expected = theirs.grad.T if name == "encoder.0.weight" else theirs.grad
        error = float((own.grad - expected).norm())
        assert error < tolerance * float(expected.norm()) or error < 1e-6 * largest, name


def same_step(module, peer, counts, kl_weight):
    """The peer's outcome, once ours has been found to have its loss and gradients."""
    torch.manual_seed(1)  # of dropout and noise
    theirs = outcome(peer, counts, kl_weight)
    theirs.loss.backward()
    torch.manual_seed(1)
    loss = module(counts, kl_weight)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert_same_gradients(module, peer)
    return theirs


@pytest.mark.parametrize("form", [sparse.Cells, sparse.DenseCells])  # a processor's, and a GPU's
@pytest.mark.parametrize(("n_cells", "n_layers", "n_genes"), [(64, 1, 120), (2, 1, 50), (131, 2, 120), (7, 3, 33)])
def test_loss_and_gradients_are_scvi_tools(n_cells, n_layers, n_genes, form, monkeypatch):
    monkeypatch.setattr(sparse, "on_device", form.of)
    module = autoencoder(n_genes, n_layers=n_layers)
    peer = peer_of(module, n_layers)
    same_step(module, peer, simulated(n_cells, n_genes=n_genes), 0.3)
    for expected, ours in zip(shared(peer, "named_buffers").values(), module.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_training_is_scvi_tools():
    counts, init_seed, seed = simulated(), 3, 4
    model = ScVI(**SMALL, kl_warmup=1.0, weight_decay=0.1)
    peer = peer_of(model.build(N_GENES, init_seed).train())
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-3, eps=0.01, weight_decay=0.1)
    expected = []
    for step, rows in enumerate(training.minibatches(70, 32, 10, seed=seed)):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, 0]).generate_state(1, np.uint64)[0]))
        loss = outcome(peer, counts[rows], step / 10).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    history = model.fit(counts, pd.DataFrame(index=range(70)), steps=10, seed=seed, init_seed=init_seed)
    np.testing.assert_allclose(history.loss, expected, rtol=1e-5)
    theirs = shared(peer, "named_parameters").values()
    for expected, (name, ours) in zip(theirs, model.module.named_parameters(), strict=True):
        torch.testing.assert_close(ours.T if name == "encoder.0.weight" else ours, expected, atol=1e-6, rtol=1e-4)


def test_embedding_is_scvi_tools():
    counts, model = simulated(90, seed=1), fitted()[0]
    peer = peer_of(model.module).eval()
    with torch.no_grad():
        expected = peer.inference(torch.from_numpy(counts.toarray()), torch.zeros(90, 1))["qz"].loc
    np.testing.assert_allclose(model.embed(counts), expected.numpy(), rtol=1e-4, atol=1e-5)


def dense(module, counts, z):
    """The reconstruction term from the definition, of any matrix of counts."""
    x = torch.from_numpy(counts.toarray()).to(z)
    log_mu = x.sum(1, keepdim=True).log() + module.share(module.decoder(z)).log_softmax(1)
    log_odds = log_mu - module.log_theta
    return -NegativeBinomial(module.log_theta.exp(), logits=log_odds).log_prob(x).sum(1).mean()


def compared(module, counts, *, tolerance):
    """Ours and the definition in double precision have the same value and gradients by latent variables and weights."""
    z = torch.randn(counts.shape[0], module.mean.out_features, dtype=torch.float64)
    weights = [*module.decoder.parameters(), module.share.weight, module.share.bias, module.log_theta]
    results = []
    terms = (module.reconstruction, module.log_theta.dtype), (partial(dense, module), torch.float64)
    for term, dtype in terms:
        module.to(dtype)
        latent = z.to(dtype).requires_grad_()
        loss = term(counts, latent)
        results.append([loss.detach(), *torch.autograd.grad(loss, [latent, *weights])])
    largest = max(float(each.norm()) for each in results[1][1:])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all()
        error = float((ours - expected).norm())
        assert error <= tolerance * float(expected.norm()) + 1e-2 * tolerance * largest


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_reconstruction_is_the_negative_binomial(dtype, tolerance):
    counts = simulated(70)
    assert (counts.data > family.SMALL).sum() > 20
    compared(autoencoder().to(dtype), counts, tolerance=tolerance)


@given(
    arrays(np.int64, st.tuples(st.integers(2, 9), st.integers(1, 7)), elements=st.integers(0, 60)),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_reconstruction_of_any_counts(counts, seed, stored):
    counts[:, 0] += counts.sum(1) == 0
    X = sp.csr_matrix(counts)
    if stored:  # zeros too
        n_cells, n_genes = counts.shape
        indices, offsets = np.tile(np.arange(n_genes), n_cells), np.arange(n_cells + 1) * n_genes
        X = sp.csr_matrix((counts.ravel(), indices, offsets))
    module = autoencoder(counts.shape[1]).double()
    torch.manual_seed(seed)
    torch.nn.init.normal_(module.share.weight)
    compared(module, X, tolerance=1e-8)


@pytest.mark.parametrize("log_theta", [-12.0, 12.0, 17.0])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_reconstruction_at_the_edges_of_single_precision(log_theta, scale):
    module = autoencoder()
    torch.nn.init.constant_(module.log_theta, log_theta)
    torch.nn.init.normal_(module.share.weight, std=scale)
    compared(module, simulated(40), tolerance=1e-3)


def test_blocks_leave_no_trace(monkeypatch):
    counts, results = simulated(), []
    for block in (70, 1, 32):
        monkeypatch.setattr(family, "BLOCK", block)
        module = autoencoder()
        loss = module(counts, 1.0)
        loss.backward()
        results.append([loss, *(weight.grad for weight in module.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_a_step_never_waits_for_the_device(monkeypatch):
    """On the meta device there are no values, so what asks for one fails (see test_transformer)."""
    dense = sparse.DenseCells(torch.empty(70, N_GENES, device="meta"))
    monkeypatch.setattr(sparse, "on_device", lambda counts: dense)
    module = autoencoder().to("meta")
    module(simulated(), 0.3).backward()
    assert all(weight.grad.shape == weight.shape for weight in module.parameters())


def test_cells_without_counts_train_on_the_kl_term_alone():
    counts = sp.vstack([sp.csr_matrix((2, N_GENES), dtype=np.float32), simulated(9)], format="csr")
    module = autoencoder()
    theirs = same_step(module, peer_of(module), counts, 1.0)
    assert not theirs.reconstruction_loss["reconstruction_loss"][:2].any()


def test_kl_weight_rises_in_a_share_of_the_steps():
    weights = [ScVI(kl_warmup=0.4).kl_weight(step, 10, 50) for step in range(10)]
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])
    assert ScVI(kl_warmup=0.0).kl_weight(0, 10, 50) == 1
    assert ScVI(kl_warmup=1.0).kl_weight(9, 10, 50) == 0.9


def test_kl_weight_rises_in_passes_as_scvi_tools():
    with warnings.catch_warnings(action="ignore"):
        from scvi.train._trainingplans import _compute_kl_weight

    model = ScVI(schedule="epochs", batch_size=10)
    for step in (0, 4, 5, 99, 1999, 2000, 2001, 5000):  # five steps a pass
        assert model.kl_weight(step, 10_000, 50) == _compute_kl_weight(step // 5, step, 400, None)


@pytest.mark.parametrize("schedule", ["steps", "epochs"])
def test_fit_takes_its_kl_weight_from_the_schedule(schedule, monkeypatch):
    seen = []
    monkeypatch.setattr(ScVI, "kl_weight", lambda self, *of: seen.append((self.hyperparameters.schedule, *of)) or 0.5)
    fitted(steps=3, schedule=schedule)
    assert seen == [(schedule, step, 3, 70) for step in range(3)]

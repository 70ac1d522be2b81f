import os
import re
import termios
from contextlib import redirect_stderr, suppress
from functools import partial

import numpy as np
import pytest
import shared_fit
import torch
from torch import nn
from tqdm import tqdm

from datawall.models import training
from datawall.models.training import NonFiniteLossError, Recipe, minibatches, seeded, train


def test_every_cell_comes_once_a_pass():
    rows = np.concatenate(list(minibatches(7, 3, 7, seed=0)))
    passes = rows.reshape(3, 7)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(7), (3, 1)))
    assert len({tuple(one) for one in passes}) == 3  # shuffled anew each pass


def test_a_batch_larger_than_the_data_holds_repeats():
    (batch,) = minibatches(3, 8, 1, seed=0)
    assert batch.dtype == np.int64
    assert sorted(np.bincount(batch)) == [2, 3, 3]


def test_batches_follow_their_seed_whatever_the_budget():
    first, again, other = (np.stack(list(minibatches(50, 8, steps, seed=s))) for steps, s in ((20, 1), (5, 1), (20, 2)))
    np.testing.assert_array_equal(first[:5], again)
    assert (first != other).any()


def test_every_step_has_random_numbers_of_its_own():
    def drawn(seed, steps):
        found, module = [], nn.Linear(1, 1)

        def loss_of(forward, rows, step):
            found.append(torch.rand(1).item())
            return forward(torch.ones(1)).square().sum()

        train(module, loss_of, 40, Recipe(steps=steps, batch_size=8, learning_rate=1e-3), seed=seed)
        return found

    first = drawn(0, 5)
    assert len(set(first)) == 5
    assert drawn(0, 8)[:5] == first
    assert not set(first) & set(drawn(1, 5))


@pytest.mark.parametrize(
    ("warmup", "decay", "rates"),
    [
        (0.2, "linear", [8, 16, 24, 21, 18, 15, 12, 9, 6, 3]),
        (0.25, "linear", [24 / 3.5, 48 / 3.5, 72 / 3.5, 22.4, 19.2, 16, 12.8, 9.6, 6.4, 3.2]),
        (1.0, "linear", 24 / 11 * np.arange(1, 11)),
        (0.4, "none", [4.8, 9.6, 14.4, 19.2] + 6 * [24]),
    ],
)
def test_rate_rises_then_falls_linearly_or_stays(warmup, decay, rates):
    recipe = Recipe(steps=10, batch_size=1, learning_rate=24.0, warmup=warmup, decay=decay)
    np.testing.assert_allclose([recipe.rate(step) for step in range(10)], rates)


def noisy_problem(seed=0):
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((40, 6)).astype(np.float32))
    y = torch.from_numpy(rng.standard_normal((40, 1)).astype(np.float32))
    module = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1)), seed).cpu()
    return module, lambda forward, rows, step: ((forward(X[rows]) - y[rows]) ** 2).mean()


def trained(*, seed, build_seed=0):
    module, loss_of = noisy_problem(build_seed)
    history = train(module, loss_of, 40, Recipe(steps=25, batch_size=8, learning_rate=1e-2), seed=seed)
    return torch.cat([weight.detach().ravel() for weight in module.parameters()]), history


def test_training_repeats_bit_for_bit_whatever_the_global_random_state_and_leaves_it():
    torch.manual_seed(1)
    weights, history = trained(seed=5)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, history_again = trained(seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights, again)
    np.testing.assert_array_equal(history.loss, history_again.loss)
    assert not torch.equal(weights, trained(seed=6)[0])


def test_history_counts_what_was_seen():
    _, history = trained(seed=0)
    assert len(history.loss) == 25
    assert np.isfinite(history.loss).all()
    np.testing.assert_allclose(history.learning_rate, [1e-2 * (25 - step) / 25 for step in range(25)])
    assert (history.samples_seen, history.unique_cells, history.n_timed, history.n_averaged) == (200, 40, 200, 200)
    assert len(history.validation_step) == len(history.validation_loss) == 0


LATE = "seen 3 steps later: the cause is in these cells, or training diverged"


@pytest.mark.parametrize(
    ("value", "breaks", "at_once", "said"),
    [  # looked at late, its gradients are in the weights by then, whatever was at fault
        (float("nan"), 4, 1, "the weights are finite"), (float("inf"), 4, 1, "the weights are finite"),
        (float("nan"), 2, 5, LATE),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_named_by_its_step(value, breaks, at_once, said, monkeypatch):
    monkeypatch.setitem(training.LOSSES_AT_ONCE, "cpu", at_once)
    module, loss_of = noisy_problem()

    def broken(forward, rows, step):
        return loss_of(forward, rows, step) * (value if step == breaks - 1 else 1)

    with pytest.raises(NonFiniteLossError, match=rf"at step {breaks} of 10\b.*{said}"):
        train(module, broken, 40, Recipe(steps=10, batch_size=8, learning_rate=1e-3), seed=0)


def test_cells_are_counted_that_were_drawn():
    module, loss_of = noisy_problem()
    batches = [np.array([3, 3, 39]), np.array([3, 1, 0])]
    history = train(module, loss_of, 40, Recipe(2, 3, 1e-3), seed=0, batches=batches)
    assert (history.samples_seen, history.unique_cells) == (6, 4)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_with_loss_and_rate_is_shown_in_a_terminal(monkeypatch, terminal):
    shown, (ours, theirs) = b"", os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(ours, (24, 120))
    monkeypatch.setattr(training, "tqdm", partial(tqdm, mininterval=0))  # after every step
    with open(theirs, "w") as stderr, redirect_stderr(stderr):
        shared_fit.head()
    with suppress(OSError):  # as the other end of a terminal is closed
        while some := os.read(ours, 4096):
            shown += some
    os.close(ours)
    found = re.search(rb"training: .*30/30 .*(it/s|s/it), loss=\d", shown)
    assert bool(found) is terminal, shown


def scripted_validation(module, losses):
    """Validation losses as given, and the weights that each was taken of."""
    seen, script = [], iter(losses)

    def look():
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.append([weight.detach().clone() for weight in module.parameters()])
        return next(script)

    return look, seen


@pytest.mark.parametrize(
    ("steps", "patience", "losses", "looked_at", "best"),
    [
        (100, 3, [5, 3, 1, 2, 1, 4, 0, 0], [2, 4, 6, 8, 10, 12], 2),  # stops early
        (5, None, [1, 2, 3], [2, 4, 5], 0),  # without patience, with a look at the end
    ],
)
def test_training_ends_with_the_best_weights(steps, patience, losses, looked_at, best):
    module, loss_of = noisy_problem()
    look, seen = scripted_validation(module, losses)
    recipe = Recipe(steps=steps, batch_size=8, learning_rate=1e-2, validate_every=2, patience=patience)
    history = train(module, loss_of, 40, recipe, seed=0, validation_loss=look)
    np.testing.assert_array_equal(history.validation_step, looked_at)
    np.testing.assert_array_equal(history.validation_loss, losses[: len(looked_at)])
    assert len(history.loss) == len(history.learning_rate) == looked_at[-1]
    assert history.samples_seen == looked_at[-1] * 8
    for weight, kept, last in zip(module.parameters(), seen[best], seen[-1], strict=True):
        assert torch.equal(weight, kept)
        assert not torch.equal(weight, last)


def test_looking_at_the_validation_loss_does_not_change_training():
    weights, _ = trained(seed=0)
    module, loss_of = noisy_problem()
    look, _ = scripted_validation(module, range(100, 0, -1))
    recipe = Recipe(steps=25, batch_size=8, learning_rate=1e-2, validate_every=4)
    train(module, loss_of, 40, recipe, seed=0, validation_loss=look)
    assert torch.equal(torch.cat([weight.detach().ravel() for weight in module.parameters()]), weights)


def test_module_trains_in_training_mode_and_ends_in_evaluation_mode():
    module, loss_of = noisy_problem()
    modes, recipe = [], Recipe(steps=4, batch_size=8, learning_rate=1e-3, validate_every=2)
    module.register_forward_hook(lambda *_: modes.append(module.training))
    look = lambda: loss_of(module, np.arange(40), 0)  # noqa: E731
    train(module.eval(), loss_of, 40, recipe, seed=0, validation_loss=look)
    assert modes == [True, True, False, True, True, False]
    assert not module.training


def test_weight_decay_shrinks_matrices_and_leaves_biases():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    recipe = Recipe(steps=3, batch_size=2, learning_rate=0.1, decay="none", weight_decay=0.5)
    train(module, lambda *_: 0 * sum(weight.sum() for weight in module.parameters()), 4, recipe, seed=0)
    for name, weight in module.named_parameters():
        shrunk = 0.95**3 if weight.ndim > 1 else 1
        torch.testing.assert_close(weight.detach(), before[name] * shrunk, rtol=1e-6, atol=0)


def test_linear_regression_is_recovered():
    rng = np.random.default_rng(0)
    slope, intercept = np.array([[2.0, -1.0, 0.5]]), np.array([3.0])
    X = rng.standard_normal((200, 3))
    y = torch.from_numpy((X @ slope.T + intercept).astype(np.float32))
    X = torch.from_numpy(X.astype(np.float32))
    module = nn.Linear(3, 1)
    recipe = Recipe(steps=600, batch_size=32, learning_rate=0.1, warmup=0.1)
    history = train(module, lambda forward, rows, step: ((forward(X[rows]) - y[rows]) ** 2).mean(), 200, recipe, seed=0)
    np.testing.assert_allclose(module.weight.detach(), slope, atol=1e-3)
    np.testing.assert_allclose(module.bias.detach(), intercept, atol=1e-3)
    assert history.loss[-1] < 1e-5 < history.loss[0]

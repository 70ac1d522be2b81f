"""Training that is killed and resumed, or shared among processes, ends as if nothing had happened."""

import itertools
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import shared_fit
import torch
import yaml
from small import FAMILIES, STUDY
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import datawall as dw
from datawall import models
from datawall.cells import datasets
from datawall.models import training
from datawall.study import together

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_fit_ends_with_the_same_bits(family, tmp_path, monkeypatch):
    """Within a random step, twice: what lies on the disk at that moment is all that is left."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)  # a checkpoint after every step
    cells, checkpoint, left = datasets.load("pbmc68k"), tmp_path / "checkpoint.npz", tmp_path / "left.npz"
    obs = cells.obs.assign(batch=np.where(np.arange(cells.n_obs) % 2, "a", "b"))

    def fit(name, killed_in=None):
        steps = itertools.count(len(np.load(checkpoint)["losses"]) + 1 if checkpoint.exists() else 1)

        def die(*_):
            if next(steps) == killed_in:
                shutil.copy(checkpoint, left)
                raise KeyboardInterrupt

        model, hook = models.create(family, **FAMILIES[family]), register_optimizer_step_pre_hook(die)
        try:
            model.fit(cells.X, obs, steps=12, seed=1, checkpoint=checkpoint)
        finally:
            hook.remove()
        model.save(tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    undisturbed = fit("undisturbed")
    checkpoint.unlink(missing_ok=True)
    kills = sorted(np.random.default_rng().choice(np.arange(2, 13), 2, replace=False).tolist())
    for killed_in in kills if family != "PretrainedPCA" else ():
        with pytest.raises(KeyboardInterrupt):
            fit("killed", killed_in)
        left.replace(checkpoint)
    assert fit("disturbed") == undisturbed, kills


@pytest.fixture
def train_to(monkeypatch):
    """Trains a head to a checkpoint that is due after every step; interrupted in a step, if one is named."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32))

    def train(checkpoint, *, steps=10, seed=0, stop_at=None):
        def loss_of(forward, rows, step):
            if step == stop_at:
                raise KeyboardInterrupt
            return forward(X[rows]).square().mean()

        module = training.seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 1)), 0).cpu()
        recipe = training.Recipe(steps=steps, batch_size=8, learning_rate=1e-2, validate_every=3, patience=100)
        # The less is left to learn the worse, so that the weights to keep are those of the first look.
        options = {"seed": seed, "validation_loss": lambda: -module(X).square().mean().item(), "checkpoint": checkpoint}
        return module, training.train(module, loss_of, 40, recipe, **options)

    return train


def test_resumed_history_is_whole(tmp_path, train_to):
    with pytest.raises(KeyboardInterrupt):
        train_to(tmp_path / "a.npz", stop_at=7)
    kept, resumed = train_to(tmp_path / "a.npz")
    undisturbed, whole = train_to(tmp_path / "b.npz")
    assert whole.validation_loss.argmin() == 0  # of three, two before the interruption
    assert all(map(torch.equal, kept.parameters(), undisturbed.parameters()))
    np.testing.assert_array_equal(resumed.loss, whole.loss)
    np.testing.assert_array_equal(resumed.validation_step, whole.validation_step)
    assert resumed.samples_seen == whole.samples_seen == 80
    assert resumed.unique_cells == whole.unique_cells == 40
    with pytest.raises(KeyboardInterrupt):  # within a pass, so that not all cells have been seen
        train_to(tmp_path / "c.npz", steps=4, stop_at=2)
    assert train_to(tmp_path / "c.npz", steps=4)[1].unique_cells == 32


def test_checkpoint_of_another_run_is_refused(tmp_path, train_to):
    train_to(tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]  # nothing is left half written
    with pytest.raises(ValueError, match=r"a\.npz is a checkpoint of another run .*seed=0.*remove it"):
        train_to(tmp_path / "a.npz", seed=1)


@pytest.mark.parametrize("damage", ["truncated", "not an archive", "empty"])
def test_damaged_checkpoint_is_named_and_not_used(tmp_path, train_to, caplog, damage):
    checkpoint = tmp_path / "a.npz"
    whole, _ = train_to(checkpoint)
    content = checkpoint.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "not an archive": b"x" * 99, "empty": b""}
    checkpoint.write_bytes(damaged[damage])
    again, history = train_to(checkpoint)
    assert "a.npz is damaged" in caplog.text
    assert len(history.loss) == 10
    for weight, same in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What `shared_fit.py` ends with, by the number of processes and network, and the folder of two."""
    folder = tmp_path_factory.mktemp("shared")
    command = [*TORCHRUN, str(TESTS / "shared_fit.py"), str(folder)]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = {(2, path.stem): dict(np.load(path)) for path in folder.glob("[!c]*.npz")}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "randn_like"), (models.geneformer, "mask_tokens")):  # which are changed there
            patch.setattr(owner, name, getattr(owner, name))
        for name, train in {
            "head": shared_fit.head,
            "SSL": shared_fit.ssl,
            "Geneformer": shared_fit.geneformer,
        }.items():
            ended[1, name] = shared_fit.outcome(*train())
    return ended, folder


@pytest.mark.parametrize("network", ["head", "SSL", "Geneformer"])
def test_two_processes_train_as_one(shared, network):
    """Also where they do not divide a batch, or the tokens to predict; but for what they draw for themselves."""
    one, two = (shared[0][n, network] for n in (1, 2))
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert one["loss"][-10:].mean() < one["loss"][:10].mean()


def test_processes_whose_losses_are_looked_at_late_agree_when_the_first_saves(shared):
    """As on GPUs: a checkpoint is due to the first process alone, at a step at which the others look at no loss."""
    ended, folder = shared
    assert (folder / "checkpoint.npz").exists()
    for name, expected in ended[2, "head"].items():
        np.testing.assert_array_equal(ended[2, "late"][name], expected, err_msg=name)


def test_a_model_that_is_made_by_hand_lies_with_its_study(tmp_path, monkeypatch):
    """Here by one process; `tests/test_cluster.py` has two."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    for seed in (0, 1):
        monkeypatch.setattr(sys, "argv", ["together", str(tmp_path), "PretrainedPCA", "random", "100", str(seed)])
        with pytest.raises(SystemExit, match="has no such run") if seed else nullcontext():
            together.main()
    study = dw.open_study(str(tmp_path))
    (run,) = study.pretraining_runs()
    assert study.store.find(study.model_unit(run))

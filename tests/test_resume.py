"""Training that is killed and resumed, or shared among processes, ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from killed_fits import SMALL
from small import STUDY

import datawall as dw
from datawall.models import training
from datawall.study.units import Run, Subset

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(TESTS / "killed_fits.py"), str(folder), *SMALL]
    ended = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


@pytest.mark.parametrize("family", SMALL)
def test_killed_fit_ends_with_the_same_bits(killed, family):
    folder, story = killed
    once, again = (folder / family / name / "model.safetensors" for name in ("undisturbed", "disturbed"))
    assert once.read_bytes() == again.read_bytes(), story


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

        module = training.seeded(lambda: training.Head(6, 1, n_hidden=16), 0).cpu()
        recipe = training.Recipe(steps=steps, batch_size=8, learning_rate=1e-2, validate_every=3, patience=100)
        looks = iter(np.arange(100.0, 0, -1))
        options = {"seed": seed, "validation_loss": lambda: next(looks), "checkpoint": checkpoint}
        return module, training.train(module, loss_of, 40, recipe, **options)

    return train


def test_resumed_history_is_whole(tmp_path, train_to):
    with pytest.raises(KeyboardInterrupt):
        train_to(tmp_path / "a.npz", stop_at=7)
    _, resumed = train_to(tmp_path / "a.npz")
    _, whole = train_to(tmp_path / "b.npz")
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


def shared(file, *words, processes=2):
    """What `shared_fit.py` ends with."""
    begin = TORCHRUN if processes > 1 else [sys.executable]
    command = [*begin, str(TESTS / "shared_fit.py"), str(file), *words]
    ended = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("network", ["head", "SSL", "Geneformer"])
def test_two_processes_train_as_one(tmp_path, network):
    """Also where they do not divide a batch, or the tokens to predict; but for what they draw for themselves."""
    one, two = (shared(tmp_path / f"{n}.npz", network, processes=n) for n in (1, 2))
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert one["loss"][-10:].mean() < one["loss"][:10].mean()


def test_processes_whose_losses_are_looked_at_late_agree_when_the_first_saves(tmp_path):
    """As on GPUs: a checkpoint is due to the first process alone, at a step at which the others look at no loss."""
    late, often = shared(tmp_path / "late.npz", "head", "7"), shared(tmp_path / "often.npz", "head")
    assert (tmp_path / "late.npz.checkpoint.npz").exists()
    for name in often:
        np.testing.assert_array_equal(late[name], often[name], err_msg=name)


def test_torchrun_makes_a_model_of_a_study(tmp_path):
    tiny = {"Geneformer": {"n_layers": 2, "n_embd": 16, "max_length": 32, "batch_size": 8}}
    given = STUDY | {"models": ["Geneformer"], "steps": 4, "hyperparameters": tiny}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
    command = [*TORCHRUN, "-m", "datawall.study.together", str(tmp_path), "Geneformer", "random", "100", "0"]
    ended = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    study = dw.open_study(str(tmp_path))
    (run,) = study.pretraining_runs()
    made = study.store.find(study.model_unit(run)).made
    assert (made["steps"], made["samples_seen"]) == (4, 32)
    assert not list((study.folder / "checkpoints").glob("*"))
    assert study.embedding(run, study.held_out_name).shape[1] == 16
    assert run == Run("Geneformer", Subset("random", 100, 0))

"""Training from a disk is training from memory: the same batches, the same weights, killed or not."""

import threading

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from small import FAMILIES

from datawall import models
from datawall.cells import cellstore, datasets
from datawall.models import streaming, training

STEPS = 9


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Some cells of real ones, in memory and on disk."""
    folder, cells = tmp_path_factory.mktemp("real"), datasets.load("pbmc68k")
    cells.obs["batch"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    cellstore.write(folder, [cells])
    rows = np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:500])
    return sp.csr_matrix(cells.X[rows]), cellstore.Cells(folder / "cells.zarr").take(rows)


@pytest.fixture
def many(monkeypatch):
    """500 cells are many: a pass over them is shuffled in blocks, and read in groups of batches."""
    monkeypatch.setattr(training, "MIXED", 96)
    monkeypatch.setattr(training, "NEIGHBOURS", 4)
    monkeypatch.setattr(cellstore, "CELLS_AT_ONCE", 128)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def fit(family, counts, obs, folder, checkpoint=None):
    model = models.create(family, **FAMILIES[family])
    model.fit(counts, obs, steps=STEPS, seed=1, checkpoint=checkpoint)
    model.save(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("many")
def test_streamed_training_gives_the_weights_of_training_in_memory(real, family, tmp_path):
    counts, cells = real
    resident = fit(family, counts, cells.obs, tmp_path / "resident")
    streamed = fit(family, cells, cells.obs, tmp_path / "streamed")
    if family == "PretrainedPCA":  # a covariance that adds up block by block is another one in the last digits
        np.testing.assert_allclose(resident.axes, streamed.axes, atol=1e-6)
    else:
        assert weights(tmp_path / "resident") == weights(tmp_path / "streamed")


@pytest.mark.usefixtures("many")
def test_streamed_training_resumes_where_it_was_killed_and_reads_nothing_before(real, tmp_path, monkeypatch):
    _, cells = real
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    whole = fit("scVI", cells, cells.obs, tmp_path / "whole")
    step, taken = torch.optim.Adam.step, iter(range(100))

    def killed(*given, **named):
        if next(taken) == 5:
            raise KeyboardInterrupt
        return step(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit("scVI", cells, cells.obs, tmp_path / "killed", tmp_path / "checkpoint.npz")
    read, groups = cellstore._File.read, []
    monkeypatch.setattr(cellstore._File, "read", lambda file, batches: groups.append(batches) or read(file, batches))
    fit("scVI", cells, cells.obs, tmp_path / "resumed", tmp_path / "checkpoint.npz")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    assert whole.hyperparameters.batch_size == 32
    # The panel; cells that choose the weights; then three steps each, of which the sixth was not finished.
    assert [len(group) for group in groups] == [1, 1, 1, 3]


def test_a_pass_over_many_cells_takes_each_once_and_groups_of_batches_share_blocks():
    n, size = 100_003, 256
    together = training.batches_together(size)
    assert together == 128
    drawn = np.concatenate(list(training.minibatches(n, size, 900, seed=0)))
    for first in (0, n):
        np.testing.assert_array_equal(np.sort(drawn[first : first + n]), np.arange(n))
    assert not np.array_equal(drawn[:n], drawn[n : 2 * n])
    groups = drawn[: len(drawn) // (together * size) * together * size].reshape(-1, together * size)
    n_blocks = [len(np.unique(group // training.NEIGHBOURS)) for group in groups]
    assert max(n_blocks) <= together * size / training.NEIGHBOURS + 4  # also where a pass ends


def test_batches_of_many_cells_are_mixed():
    """Of 100 donors, one after the other in the corpus, a batch holds nearly as many as one drawn at random."""
    rows = np.stack(list(training.minibatches(100_000, 256, 390, seed=0)))
    n_donors = [len(np.unique(batch // 1000)) for batch in rows]
    assert np.mean(n_donors) > 0.94 * 100 * (1 - 0.99**256)
    neighbours = np.mean([(np.diff(np.sort(batch)) == 1).mean() for batch in rows])
    assert neighbours < 0.03  # against 0.0026 at random


def test_rows_stand_for_themselves_in_any_order():
    rows = np.random.default_rng(0).permutation(10**6)[:500]
    drawn, numbers = (list(training.minibatches(given, 32, 20, seed=3)) for given in (rows, 500))
    np.testing.assert_array_equal(drawn, rows[np.array(numbers)])


@pytest.mark.usefixtures("many")
def test_many_rows_are_drawn_with_their_neighbours_also_when_given_in_disorder():
    given = 500, np.random.default_rng(0).permutation(500)
    ordered, disordered = (list(training.minibatches(rows, 32, 20, seed=3)) for rows in given)
    np.testing.assert_array_equal(ordered, disordered)


def test_choice_between_memory_and_disk_is_by_size_and_logged(real, caplog):
    counts, cells = real
    gib = 2 * cells.nbytes() / 2**30
    with caplog.at_level("INFO"):
        assert cells.within(gib * 0.99) is cells
        assert "streamed from the disk" in caplog.text
        assert (cells.within(gib * 1.01) != counts).nnz == 0
        assert "kept in memory" in caplog.text


def test_reading_ahead_gives_items_in_order_an_error_in_its_place_and_is_never_too_far_ahead():
    made = []

    def items():
        for item in range(20):
            made.append(item)
            yield item
        raise ValueError("unreadable")

    given = streaming.read_ahead(items(), 3)
    for item in range(20):
        assert next(given) == item
        assert len(made) <= item + 4
    with pytest.raises(ValueError, match="unreadable"):
        next(given)


def test_reading_ahead_ends_its_thread_when_nobody_wants_more():
    before = threading.active_count()
    given = streaming.read_ahead(iter(range(10**9)), 3)
    assert next(given) == 0
    assert threading.active_count() == before + 1
    given.close()
    assert threading.active_count() == before


def test_a_store_may_be_read_while_another_read_is_under_way(real):
    counts, cells = real
    first = cells.read([np.arange(5), np.arange(5, 9)])
    np.testing.assert_array_equal(next(first).toarray(), counts[:5].toarray())
    np.testing.assert_array_equal(cells[np.array([3, 1])].toarray(), counts[[3, 1]].toarray())
    np.testing.assert_array_equal(next(first).toarray(), counts[5:9].toarray())
    assert isinstance(ad.io.read_zarr(cells.path).X, sp.csr_matrix)

"""A corpus on disk gives back the cells that were written, whatever the blocks, the rows asked for and their order."""

import hashlib
import itertools
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from datawall.cells import cellstore, datasets

SMALL_FILES = {"CHUNK": 4, "SHARD": 8, "NAMES": 3, "CELLS_AT_ONCE": 2, "NEARBY": 1}


def atlas(n_cells, *, n_genes=6, seed=0, largest=9):
    rng = np.random.default_rng(seed)
    X = rng.poisson(0.5, (n_cells, n_genes)).astype(np.float32)
    X[rng.integers(n_cells), rng.integers(n_genes)] = largest
    kinds = np.array(["T cell", "B cell", None], dtype=object)
    obs = pd.DataFrame(
        {"cell_type": kinds[rng.integers(3, size=n_cells)], "donor_id": "d1", "n_umi": X.sum(1)},
        index=[f"cell {i} é" for i in range(n_cells)],
    )
    var = pd.DataFrame({"feature_name": [f"G{i}" for i in range(n_genes)]}, index=[f"ENSG{i}" for i in range(n_genes)])
    return ad.AnnData(sp.csr_matrix(X), obs=obs, var=var)


def in_blocks(cells, cuts):
    bounds = [0, *sorted(cuts), cells.n_obs]
    return [cells[a:b].copy() for a, b in itertools.pairwise(bounds) if a < b]


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    cells = datasets.load("pbmc68k")
    cellstore.write(folder, in_blocks(cells, range(97, 700, 97)))
    return cells, folder / "cells.zarr"


def test_any_reader_of_anndata_reads_it(real):
    cells, path = real
    again = ad.io.read_zarr(path)
    assert (again.X != cells.X).nnz == 0
    assert again.X.dtype == np.uint16  # the largest count is 419
    pd.testing.assert_frame_equal(again.var, cells.var, check_index_type=False)
    pd.testing.assert_frame_equal(again.obs.astype(str), cells.obs.astype(str), check_names=False)
    sc.pp.calculate_qc_metrics(again, percent_top=None, inplace=True)
    sc.pp.normalize_total(again)
    sc.pp.log1p(again)
    sc.pp.pca(again, n_comps=5)
    assert np.isfinite(again.obsm["X_pca"]).all()


@pytest.fixture(scope="module", params=[255, 256, 2**16], ids=["uint8", "uint16", "uint32"])
def tiny(request, tmp_path_factory):
    """Few cells in many files: the type grows twice at most, the first time with several files on disk."""
    folder, cells = tmp_path_factory.mktemp("tiny"), atlas(40, largest=request.param)
    cells.X[5, 0] = min(request.param, 256)
    with mock.patch.multiple(cellstore, **SMALL_FILES):
        cellstore.write(folder, in_blocks(cells, [1, 2, 15, 17, 32]))
    return cells, folder / "cells.zarr"


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_cells_come_back_in_any_order(tiny, data):
    cells, path = tiny
    with mock.patch.multiple(cellstore, **SMALL_FILES):
        corpus = cellstore.Cells(path)
        kept = np.array(sorted(data.draw(st.sets(st.integers(0, 39), min_size=1))))
        subset = corpus.take(kept)
        rows = np.array(data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1)))
        expected = cells.X[kept].toarray()
        np.testing.assert_array_equal(subset.counts(rows).toarray(), expected[rows])
        np.testing.assert_array_equal(subset.take(np.unique(rows)).counts().toarray(), expected[np.unique(rows)])
        first, second = list(subset.read([rows, rows[::-1]]))
        np.testing.assert_array_equal(first.toarray(), expected[rows])
        np.testing.assert_array_equal(second.toarray(), expected[rows[::-1]])
    assert subset.names(rows).tolist() == cells.obs_names[kept][rows].tolist()
    labels = cells.obs["cell_type"].iloc[kept]
    assert subset.obs["cell_type"].astype(object).fillna("none").tolist() == labels.fillna("none").tolist()
    np.testing.assert_array_equal(subset.obs["n_umi"], cells.obs["n_umi"].iloc[kept])


@pytest.mark.parametrize("size", [1, 7, 40, 4096])
def test_blocks_are_all_cells_in_turn(tiny, size):
    cells, path = tiny
    kept = np.arange(1, 40, 2)
    for corpus, X in ((cellstore.Cells(path), cells.X), (cellstore.Cells(path).take(kept), cells.X[kept])):
        rows, blocks = zip(*corpus.blocks(size), strict=True)
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(X.shape[0]))
        np.testing.assert_array_equal(sp.vstack(blocks).toarray(), X.toarray())
        assert max(map(len, rows)) <= size


def test_files_do_not_depend_on_blocks(tiny, tmp_path):
    cells, path = tiny
    with mock.patch.multiple(cellstore, **SMALL_FILES):
        cellstore.write(tmp_path, [cells])
    assert hashes(tmp_path / "cells.zarr") == hashes(path)
    assert ad.io.read_zarr(path).X.dtype == np.min_scalar_type(int(cells.X.max()))  # the smallest that will do
    assert len(list((path / "X/data/c").iterdir())) > 5


def test_memory_is_foretold_exactly(real):
    _, path = real
    for cells in (cellstore.Cells(path), cellstore.Cells(path).take(np.arange(3, 700, 7))):
        counts = cells.counts()
        assert cells.nbytes() == counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
        assert counts.dtype == np.float32


def test_what_is_no_corpus_is_refused(tmp_path):
    cells = atlas(4)
    other = cells.copy()
    del other.obs["n_umi"]
    for name, blocks, message in (
        ("columns", [cells, other], "must share genes and columns"),
        ("none", [], "there are no cells to write"),
    ):
        with pytest.raises(ValueError, match=message):
            cellstore.write(tmp_path / name, blocks)

"""Files of any size as one corpus: what comes equals the in-memory path, in bounded memory, or is refused in a line."""

import tracemalloc

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datawall.cells import backed, corpus, sources
from datawall.cells.corpus import CorpusError
from datawall.cells.sources import Options, open_source

TABLE = corpus.gene_table()
LABELS = {"cell_type": "cell_type"}


def toy(n_cells=60, genes=slice(0, 40), *, seed=0, ids=True):
    """Poisson counts of some genes of the table in shuffled order; every cell expresses more than 20 of 40."""
    rng = np.random.default_rng(seed)
    chosen = TABLE.iloc[genes].sample(frac=1, random_state=seed)
    counts = rng.poisson(3.0, (n_cells, len(chosen))).astype(np.float32)
    obs = pd.DataFrame({"cell_type": rng.choice(["B", "T", "NK"], n_cells)}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=list(chosen.index if ids else chosen["feature_name"]))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


def opened(folder, X, like, name="a.h5ad"):
    """A source of one file, which holds X with another's cells and genes."""
    return open_source([write(ad.AnnData(X, obs=like.obs, var=like.var), folder / name)], LABELS)


def write(adata, path):
    (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
    return path


def read_all(source, block_size=7):
    return ad.concat(list(source.blocks(block_size)))


def assert_same_cells(found, expected):
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert found.var_names.tolist() == expected.var_names.tolist()
    assert (found.X != expected.X).nnz == 0
    assert found.obs["cell_type"].astype(str).tolist() == expected.obs["cell_type"].astype(str).tolist()


# The same cells, however they are stored

LAYOUTS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["X", "layers['counts']", "raw.X"])
def test_every_layout_and_place_equals_the_in_memory_path(tmp_path, suffix, layout, place):
    adata = toy()
    matrix = LAYOUTS[layout](adata.X)
    stored = ad.AnnData(matrix, obs=adata.obs, var=adata.var)
    if place != "X":
        stored.X = matrix * 0.5
        if place == "raw.X":
            stored.raw = ad.AnnData(matrix, obs=adata.obs, var=adata.var)
            stored = stored[:, :30].copy()
        else:
            stored.layers["counts"] = matrix
    source = open_source([write(stored, tmp_path / f"mine{suffix}")], LABELS)
    expected, match = corpus.align(adata, "mine")
    assert [match.row() for match in source.matches] == [{**match.row(), "counts_from": place}]
    assert source.n_cells == 60
    for block in source.blocks(25):
        assert block.X.format == "csr"
        assert block.X.dtype == np.float32
        assert block.X.has_sorted_indices
        assert block.var.equals(source.var)
        assert block.n_obs <= 25
    assert_same_cells(read_all(source), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, np.float64, ">f4", bool])
@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_counts_of_any_numeric_type_are_read(tmp_path, dtype, layout):
    adata = toy()
    adata.X.data = np.minimum(adata.X.data, 1)
    matrix = adata.X.astype(np.float32) if layout == "csr" else adata.X.toarray()
    path = write(ad.AnnData(LAYOUTS[layout](sp.csr_matrix(matrix)), obs=adata.obs, var=adata.var), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        node = file["X/data" if layout == "csr" else "X"]
        key, values, attributes = node.name, node[:].astype(dtype), dict(node.attrs)
        del file[key]
        file.create_dataset(key, data=values).attrs.update(attributes)
    found = read_all(open_source([path], LABELS, Options(drop_duplicates=False)))
    assert_same_cells(found, corpus.align(adata, "a")[0])


def test_dense_and_column_stored_matrices_are_read_in_pieces(tmp_path, monkeypatch, caplog):
    adata = toy(200)
    monkeypatch.setattr(backed, "PIECE", 150)
    monkeypatch.setattr(backed, "PANEL", 1000)
    expected = corpus.align(adata, "a")[0]
    for layout in ("dense", "csc"):
        source = opened(tmp_path, LAYOUTS[layout](adata.X), adata, f"{layout}.h5ad")
        assert_same_cells(read_all(source, 11), expected)
        assert_same_cells(read_all(source, 64), expected)
    assert "csc.h5ad: X is stored by column (CSC) and will be read about 8 times" in caplog.text


@given(seed=st.integers(0, 10**6), start=st.integers(0, 50), size=st.integers(1, 60), panel=st.integers(1, 3000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_of_a_column_stored_matrix(tmp_path, monkeypatch, seed, start, size, panel):
    matrix = sp.random(60, 23, density=0.3, format="csc", random_state=seed)
    monkeypatch.setattr(backed, "PANEL", panel)
    monkeypatch.setattr(backed, "PIECE", 1 + panel // 7)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        ad.io.write_elem(file, "X", matrix)
        reader = backed.Columns(file["X"], (60, 23), "a")
        for begin in (start, 0, start):
            stop = min(begin + size, 60)
            assert np.array_equal(reader.rows(begin, stop).toarray(), matrix.toarray()[begin:stop])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_labels_of_every_kind_are_text(tmp_path, suffix):
    adata = toy(6)
    kinds = {
        "number": [3, 1, 2, 3, 1, 2],
        "flag": pd.array([True, False, True, True, False, True], dtype="boolean"),
        "text": pd.array(list("abcabc"), dtype="string"),
        "category": pd.Categorical(list("xyxyxy")),
    }
    adata.obs = adata.obs.assign(**kinds)
    obs = read_all(open_source([write(adata, tmp_path / f"a{suffix}")], {name: name for name in kinds})).obs
    for name, values in kinds.items():
        assert obs[name].astype(str).tolist() == [str(value) for value in values]


@pytest.mark.parametrize("missing", [pd.array(["a", None] * 3, dtype="string"), pd.array([True, None] * 3, "boolean")])
def test_missing_values_of_nullable_columns_are_refused(tmp_path, missing):
    adata = toy(6)
    adata.obs["kind"] = missing
    with pytest.raises(CorpusError, match=r"a\.h5ad: column 'kind' \(batch\) is missing for 3 cells; label or drop"):
        open_source([write(adata, tmp_path / "a.h5ad")], {"batch": "kind"})


def test_stored_zeros_and_genes_in_two_columns_count_once(tmp_path):
    adata = toy(30)
    adata.X.data[::3] = 0
    dense = adata.X.toarray()
    adata.var_names = [*adata.var_names[:-1], adata.var_names[0] + ".2"]
    dense[:, 0] += dense[:, -1]
    [block] = open_source([write(adata, tmp_path / "a.h5ad")], LABELS).blocks()
    assert block.X.nnz == (dense[:, :-1] > 0).sum()
    assert block.obs["n_genes"].tolist() == (dense[:, :-1] > 0).sum(axis=1).tolist()
    assert block.obs["n_counts"].tolist() == dense[:, :-1].sum(axis=1).tolist()


# Several files


def test_genes_of_several_files_are_joined_and_absent_ones_are_zero(tmp_path):
    first, second = toy(30, slice(0, 40)), toy(20, slice(20, 60), seed=1, ids=False)
    paths = [write(first, tmp_path / "first.h5ad"), write(second, tmp_path / "second.zarr")]
    source = open_source(paths, LABELS)
    assert source.var.index.tolist() == TABLE.index[:60].tolist()
    assert source.shared_genes.tolist() == TABLE.index[20:40].tolist()
    cells = read_all(source)
    names = [*(f"first_{n}" for n in first.obs_names), *(f"second_{n}" for n in second.obs_names)]
    assert cells.obs_names.tolist() == names
    assert cells.obs["dataset_id"].tolist() == ["first"] * 30 + ["second"] * 20
    for adata, rows in ((first, slice(0, 30)), (second, slice(30, 50))):
        aligned = corpus.align(adata, "a")[0]
        assert np.array_equal(cells[rows].X.toarray(), corpus.to_genes(aligned, source.var.index).toarray())
    assert [match.row()["named_by"] for match in source.matches] == ["Ensembl id", "symbol"]


def test_columns_are_harmonised_by_role_and_file(tmp_path):
    first, second = toy(10), toy(10, seed=1)
    first.obs["patient"] = ["p1", "p2"] * 5
    second.obs = second.obs.rename(columns={"cell_type": "celltype_major"})
    second.obs["donor"] = ["d1"] * 10
    second.obs["study"] = ["s"] * 10
    first.obs["study"] = ["t"] * 10
    paths = [write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "b.h5ad")]
    columns = {"cell_type": {"a": "cell_type", "b": "celltype_major"}, "donor_id": {"a": "patient", "b": "donor"}}
    columns["dataset_id"] = "study"
    source = open_source(paths, columns)
    assert source.labels == {"cell_type": ["B", "NK", "T"], "donor_id": ["d1", "p1", "p2"], "dataset_id": ["s", "t"]}
    for block in source.blocks(6):
        for role, labels in source.labels.items():
            assert block.obs[role].cat.categories.tolist() == labels
    obs = read_all(source).obs
    assert obs["donor_id"].tolist() == ["p1", "p2"] * 5 + ["d1"] * 10
    assert obs["cell_type"].tolist() == [*first.obs["cell_type"], *second.obs["celltype_major"]]
    with pytest.raises(CorpusError, match=r"b\.h5ad: no column is named for the cell_type, only for a; name one"):
        open_source(paths, {"cell_type": {"a": "cell_type"}})
    with pytest.raises(CorpusError, match=r"b\.h5ad: no column 'cell_type' in obs .*it has 'celltype_major', 'donor'"):
        open_source(paths, LABELS)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    paths = [write(toy(10, seed=i), tmp_path / folder / "cells.h5ad") for i, folder in enumerate("ab")]
    assert [match.dataset for match in open_source(paths, LABELS).matches] == ["a_cells", "b_cells"]
    with pytest.raises(CorpusError, match="a_cells names more than one file"):
        open_source([paths[0], paths[0]], LABELS)
    with pytest.raises(CorpusError, match="no files"):
        open_source([], LABELS)


def test_files_of_which_two_cells_would_share_a_name_are_refused(tmp_path):
    first, second = toy(2), toy(2, seed=1)
    first.obs_names = ["b_1", "b_2"]
    paths = [write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "a_b.h5ad")]
    assert open_source(paths, LABELS).n_cells == 4
    second.obs_names = ["2", "3"]
    write(second, paths[1])
    with pytest.raises(CorpusError, match=r"a\.h5ad, .*a_b\.h5ad: each has a cell .* called 'a_b_2'; rename one"):
        open_source(paths, LABELS)


# Cells dropped


def test_duplicates_within_and_between_files_are_dropped_and_told(tmp_path):
    first, second = toy(30), toy(40, seed=1)
    dense = first.X.toarray()
    dense[17] = dense[3]
    first.X = sp.csr_matrix(dense)
    order = first.var_names.get_indexer(second.var_names)
    dense_second = second.X.toarray()
    dense_second[[5, 11, 39]] = dense[[3, 29, 0]][:, order]
    dense_second[12] = dense_second[20]
    second.X = sp.csr_matrix(dense_second)
    paths = [write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "b.h5ad")]
    for size in (1, 8, 1000):
        source = open_source(paths, LABELS)
        names = set(read_all(source, size).obs_names)
        gone = {"a_cell17", "b_cell5", "b_cell11", "b_cell39", "b_cell20"}
        assert names == {f"a_{n}" for n in first.obs_names}.union(f"b_{n}" for n in second.obs_names) - gone
        assert source.reports["duplicates"].to_numpy().tolist() == [["a", "a", 1], ["a", "b", 3], ["b", "b", 1]]
        assert source.reports["cells"]["duplicate"].tolist() == [1, 4]
    kept = open_source(paths, LABELS, Options(drop_duplicates=False))
    assert sum(block.n_obs for block in kept.blocks()) == 70


def test_cells_without_counts_are_dropped_and_told(tmp_path):
    adata = toy(20)
    dense = adata.X.toarray()
    dense[[2, 9]] = 0
    dense[5, :-1] = 0
    dense[5, -1] = 4
    adata.X = sp.csr_matrix(dense)
    adata.var_names = [*adata.var_names[:-1], "novel"]
    source = open_source([write(adata, tmp_path / "a.h5ad")], LABELS)
    assert read_all(source).obs_names.tolist() == [f"cell{i}" for i in range(20) if i not in (2, 5, 9)]
    assert source.reports["cells"].iloc[0].tolist() == ["a", 20, 3, 0, 0, 17]


MITO = TABLE.index[TABLE["feature_name"].str.startswith("MT-")]


def test_quality_is_measured_and_filters_are_off_by_default(tmp_path):
    rng = np.random.default_rng(0)
    genes = [*TABLE.index[:87], *MITO]
    counts = rng.poisson(rng.gamma(0.5, 2.0, (500, 1)), (500, 100)).astype(np.float32)
    counts[0] = 0
    obs = pd.DataFrame({"cell_type": ["T"] * 500}, index=[f"c{i}" for i in range(500)])
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    path = write(adata, tmp_path / "a.h5ad")
    n_genes, n_counts = (counts > 0).sum(axis=1), counts.sum(axis=1)
    mito = counts[:, 87:].sum(axis=1) / np.maximum(n_counts, 1)
    source = open_source([path], LABELS, Options(drop_duplicates=False))
    cells = read_all(source, 64)
    full = n_genes > 0
    assert cells.obs["n_genes"].tolist() == n_genes[full].tolist()
    assert cells.obs["n_counts"].tolist() == n_counts[full].tolist()
    assert np.allclose(cells.obs["mito_share"], mito[full], atol=1e-6)
    source = open_source([path], LABELS, Options(min_genes=20, min_counts=30, max_mito=0.2, drop_duplicates=False))
    good = (n_genes >= 20) & (n_counts >= 30) & (mito <= 0.2)
    assert 20 < good.sum() < full.sum()
    assert read_all(source, 64).obs_names.tolist() == adata.obs_names[good].tolist()
    assert source.reports["cells"].iloc[0].tolist() == ["a", 500, (~full).sum(), (full & ~good).sum(), 0, good.sum()]


def test_filters_that_do_nothing_and_that_leave_nothing_are_told(tmp_path, caplog):
    path = write(toy(), tmp_path / "a.h5ad")
    open_source([path], LABELS, Options(max_mito=0.1))
    assert "has no mitochondrial gene, so that max_mito keeps all its cells" in caplog.text
    with pytest.raises(CorpusError, match=r"a\.h5ad: no cell is left of 60 \(0 without counts, 60 filtered, 0 dup"):
        list(open_source([path], LABELS, Options(min_genes=41)).blocks())


# Faults


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault_that_the_sample_missed_stops_the_reading(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE", 10)
    adata = toy(100)
    dense = adata.X.toarray()
    dense[20, 3] = 0.5
    blocks = opened(tmp_path, LAYOUTS[layout](sp.csr_matrix(dense)), adata).blocks(16)
    next(blocks)
    with pytest.raises(CorpusError, match=r"a\.h5ad: X holds fractions \(such as 0\.5\) in cells 16 to 31; counts"):
        next(blocks)
    dense[50, 3] = 0.5
    with pytest.raises(CorpusError, match=r"b\.h5ad: no raw counts found \(X holds fractions"):
        opened(tmp_path, LAYOUTS[layout](sp.csr_matrix(dense)), adata, "b.h5ad")


def test_damage_to_a_place_that_is_not_needed_does_no_harm(tmp_path):
    adata = toy()
    adata.layers["counts"] = adata.X.copy()
    path = write(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][:] = 10**6
    assert open_source([path], LABELS).matches[0].counts_from == "layers['counts']"


def test_file_that_was_refused_is_closed_and_can_be_mended(tmp_path):
    path = write(toy(), tmp_path / "a.h5ad")
    sound = path.read_bytes()
    with h5py.File(path, "r+") as file:
        del file["obs"]
    with pytest.raises(CorpusError, match=r"a\.h5ad: obs is no table") as error:
        open_source([path], LABELS)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0, error
    path.write_bytes(sound)
    assert read_all(open_source([path], LABELS)).n_obs == 60


@pytest.mark.parametrize("part", ["data", "indices"])
def test_zarr_that_lost_a_chunk_is_refused_not_read_as_zeros(tmp_path, part):
    path = write(toy(), tmp_path / "a.zarr")
    files = (each for each in (path / "X" / part).rglob("*") if each.is_file())
    next(each for each in files if not each.name.startswith(("z", "."))).unlink()  # a chunk, not what describes it
    with pytest.raises(CorpusError, match=r"a\.zarr: not readable .*ChunkNotFoundError"):
        open_source([path], LABELS)


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n_cells in (3_000, 12_000):
        path = write(toy(n_cells, slice(0, 150)), tmp_path / f"{n_cells}.h5ad")
        tracemalloc.start()
        for _ in open_source([path], LABELS).blocks(500):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 9_000 * 60
    assert peaks[1] < 12_000 * 150 * 8 / 2  # half of the matrix

"""Malformed files, a row a kind: each ends in one line that names the file, or in a stated repair."""

import json
import re
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
import zarr
from small import STUDY
from test_files import N_CELLS, TABLE, assert_twin, clean, read, written

from datawall.cells import corpus, datasets
from datawall.planning import preflight, starter
from datawall.study import params

LAYOUTS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}
STORED = [("csr", ".h5ad"), ("csc", ".zarr"), ("dense", ".h5ad"), ("dense", ".zarr")]


# What is done to a file: `root` is of h5py or zarr, and `rng` chooses the details.


def edit(key, change):
    """Another array in place of one: of a sparse matrix its values, of texts that may be missing the texts."""

    def spoil(root, rng):
        place = next(each for each in (f"{key}/data", f"{key}/values", key) if each in root)
        group, _, name = place.rpartition("/")
        values = np.asarray(ad.io.read_elem(root[place]))
        ad.io.write_elem(root[group] if group else root, name, np.asarray(change(values, rng)))

    return spoil


def rewritten(change):
    """Other cells in place of those of the file."""

    def spoil(root, _):
        adata = change(ad.AnnData(*(ad.io.read_elem(root[part]) for part in ("X", "obs", "var")))).copy()
        for part in ("X", "obs", "var"):
            ad.io.write_elem(root, part, getattr(adata, part))

    return spoil


def one(value):
    """One of the values, replaced."""

    def change(values, rng):
        values.flat[rng.integers(values.size)] = value
        return values

    return change


def fewer(values, rng):
    return values[: rng.integers(len(values))]


def one_twice(values, rng):
    first, second = rng.permutation(len(values))[:2]
    values[first] = values[second]
    return values


def one_very_long(values, rng):
    return one("x" * int(rng.integers(1000, 30_000)))(values.astype(object), rng)


def some_as_symbols(values, rng):
    chosen = rng.permutation(len(values))[: len(values) // 2]
    values[chosen] = TABLE.loc[values[chosen], "feature_name"].to_numpy()
    return values


def unnamed(values, _):
    return np.full(len(values), "", object)


def remove(key):
    return lambda root, _: root.__delitem__(key)


def attribute(key, choose):
    return lambda root, rng: root["X"].attrs.update({key: choose(rng)})


def group_for_array(root, _):
    key = "X/data" if "X/data" in root else "X"
    del root[key]
    root.create_group(key)


DEEP = 1.0 * (np.arange(N_CELLS) > 4)
PARTS = ("X", "obs", "var", "obs/_index", "var/_index", "obs/cell_type", "obs/cell_type/categories")
OF_A_MATRIX = {
    "negative": edit("X", one(-1)),
    "NaN": edit("X", one(np.nan)),
    "infinite": edit("X", one(np.inf)),
    "fraction": edit("X", one(0.5)),
    "beyond single precision": edit("X", one(1e30)),
    "text for counts": edit("X", lambda values, _: values.astype(str).astype(object)),
    "complex counts": edit("X", lambda values, _: values.astype(np.complex64)),
    "log-normalised": edit("X", lambda values, _: np.log1p(values)),
    "values too few": edit("X", fewer),
    "values in another dimension": edit("X", lambda values, _: values[None]),
    "group for an array": group_for_array,
    "no counts": edit("X", lambda values, _: values * 0),
}
OF_A_SPARSE_MATRIX = {
    "index too large": edit("X/indices", one(10**6)),
    "index negative": edit("X/indices", one(-1)),
    "indices that are fractions": edit("X/indices", lambda values, _: values + 0.5),
    "indices in two dimensions": edit("X/indices", lambda values, _: values[:, None]),
    "indptr falls": edit("X/indptr", one(10**6)),
    "indptr too short": edit("X/indptr", fewer),
    "indptr begins elsewhere": edit("X/indptr", lambda values, _: np.append(1, values[1:])),
    "another shape": attribute("shape", lambda rng: rng.integers(1, 10**9, 2).tolist()),
    "another encoding": attribute("encoding-type", lambda rng: str(rng.choice(["coo_matrix", "", "awkward-array"]))),
}
OF_A_DENSE_MATRIX = {
    "columns for rows": edit("X", lambda values, _: values.T),
    "one row of values": edit("X", lambda values, _: values.ravel()),
}
OF_OTHER_PARTS = {
    "cell named twice": edit("obs/_index", one_twice),
    "cells without names": edit("obs/_index", unnamed),
    "too many names of cells": edit("obs/_index", lambda values, _: np.array([*values, "more"], object)),
    "mouse genes": edit("var/_index", lambda values, _: np.array([f"Gm{i}" for i in range(len(values))], object)),
    "genes without names": edit("var/_index", unnamed),
    "too few names of genes": edit("var/_index", lambda values, _: values[:-3]),
    "label missing": edit("obs/cell_type/codes", one(-1)),
    "label out of range": edit("obs/cell_type/codes", one(77)),
    "blank label": edit("obs/cell_type/categories", lambda values, _: np.array([" ", *values[1:]], object)),
    "short column": edit("obs/cell_type/codes", fewer),
    "no cells": rewritten(lambda adata: adata[:0]),
    "no genes": rewritten(lambda adata: adata[:, :0]),
    **{f"no {part}": remove(part) for part in PARTS},
}
REPAIRED = {
    "mixed symbols and ids": edit("var/_index", some_as_symbols),
    "gene named twice": edit("var/_index", one_twice),
    "genes in another order": edit("var/_index", lambda values, rng: rng.permutation(values)),
    "some genes without names": edit("var/_index", lambda values, _: np.array(["", "", *values[2:]], object)),
    "very long name of a cell": edit("obs/_index", one_very_long),
    "very long name of a gene": edit("var/_index", one_very_long),
    "very long label": edit("obs/cell_type/categories", one_very_long),
    "cells without counts": rewritten(lambda adata: ad.AnnData(sp.diags(DEEP) @ adata.X, adata.obs, adata.var)),
    "one gene": rewritten(lambda adata: adata[:, :1]),
    "one cell": rewritten(lambda adata: adata[:1]),
}
KINDS = OF_A_MATRIX | OF_A_SPARSE_MATRIX | OF_A_DENSE_MATRIX | OF_OTHER_PARTS | REPAIRED


def damage(path, rng):
    """Truncate a file, or truncate or overwrite a file of a zarr folder."""
    if path.suffix == ".zarr":
        held = [part for part in sorted(path.rglob("*")) if part.is_file() and part.name != "zarr.json"]
        held = [part for part in held if {"X", "_index", "cell_type"} & set(part.parts)]
        path = held[rng.integers(len(held))]
        if rng.random() < 0.3:
            path.write_bytes(rng.bytes(int(rng.integers(1, 200))))
            return
    path.write_bytes(fewer(path.read_bytes(), rng))


def new(path):
    """Write a study file of it."""
    study = Path("params", "new.yaml")
    study.unlink(missing_ok=True)
    starter.new(study.stem, [str(path)], {}, ask=None, say=len, settings={"min_matched_genes": 0.4})
    assert params.read(study).study == study.stem


def check(path):
    study = STUDY | {"corpus": str(path), "tasks": ["reconstruction"], "min_matched_genes": 0.4}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    return preflight.check(Path("study.yaml")).errors


def attempt(reader, path):
    """What a reader gives, or the line in which it refuses; it may raise nothing else."""
    try:
        return reader(path)
    except (corpus.CorpusError, datasets.DatasetError) as error:
        message = str(error)
    assert re.fullmatch(rf".{{,500}}{path.name}.{{,1000}}", message), message
    return message


def cells_of(path):
    """Cells, or why there are none, of which `--check` and `--new` say so too; the file is left as it was."""
    before = {part: part.stat().st_mtime_ns for part in (path, *path.rglob("*"))}
    cells, errors = attempt(lambda path: read(path, min_matched=0.4)[0], path), check(path)
    attempt(new, path)
    assert errors or not isinstance(cells, str), f"--check passes what is refused: {cells}"
    assert all("\n" not in line for line in errors)
    assert not [part for part in Path("params").iterdir() if part.suffix != ".yaml"]
    assert {part: part.stat().st_mtime_ns for part in (path, *path.rglob("*"))} == before
    return cells


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what `--new` reads and writes."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    shutil.copy(Path(__file__).parents[1] / "params" / "quick.yaml", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Files that are as they should be, by layout and suffix."""
    folder, files = tmp_path_factory.mktemp("sound"), {}
    for layout, suffix in STORED:
        adata = clean()
        adata.X = LAYOUTS[layout](adata.X)
        path = files[layout, suffix] = written(adata, folder / layout, suffix)
        if suffix == ".zarr":  # whose consolidated metadata would hide what is done to the rest
            root = path / "zarr.json"
            root.write_text(json.dumps({**json.loads(root.read_text()), "consolidated_metadata": None}))
    return files


def copied(path, folder):
    copy = shutil.copytree if path.is_dir() else shutil.copy
    return Path(copy(path, folder / path.name))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_files_are_refused_in_a_line_or_repaired(kind, folder, sound):
    sparse, dense = kind in OF_A_SPARSE_MATRIX | OF_OTHER_PARTS, kind in OF_A_DENSE_MATRIX
    for seed, (layout, suffix) in enumerate(STORED[:2] if sparse else STORED[2:] if dense else STORED):
        path, rng = copied(sound[layout, suffix], folder), np.random.default_rng(seed)
        if suffix == ".zarr":
            KINDS[kind](zarr.open_group(path, mode="r+"), rng)
        else:
            with h5py.File(path, "r+") as root:
                KINDS[kind](root, rng)
        cells = cells_of(path)
        if kind in REPAIRED:
            whole = ad.io.read_zarr(path) if suffix == ".zarr" else ad.read_h5ad(path)
            expected, _ = corpus.align(whole, "anndata's", min_matched=0.4)
            pd.testing.assert_frame_equal(cells.to_df(), expected.to_df(), check_names=False)
            assert cells.X.getnnz(axis=1).min() > 0
            assert cells.obs["cell_type"].notna().all()
        else:
            assert isinstance(cells, str)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(150))
def test_damaged_bytes_are_refused_where_they_matter(seed, folder, sound):
    layout, suffix = STORED[seed % 4]
    path = copied(sound[layout, suffix], folder)
    damage(path, np.random.default_rng(seed))
    cells = cells_of(path)
    if not isinstance(cells, str):
        assert suffix == ".zarr"
        assert_twin(cells)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr", "x.loom"])
def test_what_is_no_such_file_is_named(tmp_path, name, make):
    make(tmp_path / name)
    assert isinstance(attempt(read, tmp_path / name), str)

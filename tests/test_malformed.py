"""Malformed files, 300 generated variants: each ends in one line that names the file, or in a stated repair."""

import json
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml

from datawall.cells import corpus, datasets, sources
from datawall.planning import preflight, starter
from datawall.study import params

TABLE = corpus.gene_table()
N_CELLS, N_GENES = 24, 40
LAYOUTS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound files to spoil, by layout and suffix."""
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["B", "T"] * (N_CELLS // 2))},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=TABLE.index[:N_GENES].to_list())
    for layout, store in LAYOUTS.items():
        adata = ad.AnnData(store(sp.csr_matrix(counts)), obs=obs, var=var)
        adata.write_h5ad(folder / f"{layout}.h5ad")
        adata.write_zarr(folder / f"{layout}.zarr")
        root = folder / f"{layout}.zarr" / "zarr.json"  # consolidated metadata would hide what is done to the rest
        root.write_text(json.dumps({**json.loads(root.read_text()), "consolidated_metadata": None}))
    return folder


# What is done to a file; `root` is an h5py file or a zarr group, and `rng` chooses the details.


def put(root, key, values, **attributes):
    """An array in place of what was there, with its attributes but for those given."""
    kept = {**dict(root[key].attrs), **attributes} if key in root else attributes
    if key in root:
        del root[key]
    create = root.create_dataset if isinstance(root, h5py.Group) else root.create_array
    if isinstance(root, h5py.Group) and getattr(values, "dtype", np.dtype(int)).kind in "OU":
        node = create(key, data=values.astype(object), dtype=h5py.string_dtype())
    else:
        node = create(key, data=values.astype(str) if values.dtype.kind == "O" else values)
    node.attrs.update(kept)


def values_key(root):
    return "X/data" if "X/data" in root else "X"


def text_key(root, key):
    return f"{key}/values" if f"{key}/values" in root else key


def texts(root, key):
    node = root[text_key(root, key)]
    return np.asarray(node.asstr()[:] if hasattr(node, "asstr") else node[:]).astype(object)


def put_texts(root, key, values):
    put(root, text_key(root, key), np.asarray(values, dtype=object))


def value(bad):
    def spoil(root, rng):
        key = values_key(root)
        values = root[key][:]
        values.flat[rng.integers(values.size)] = bad
        put(root, key, values)

    return spoil


def count_type(convert):
    def spoil(root, rng):
        put(root, values_key(root), convert(root[values_key(root)][:]))

    return spoil


def names(key, change):
    def spoil(root, rng):
        values = texts(root, key)
        put_texts(root, key, change(values, rng))

    return spoil


def swap_some_for_symbols(values, rng):
    chosen = rng.permutation(len(values))[: len(values) // 2]
    values[chosen] = TABLE.loc[values[chosen], "feature_name"].to_numpy()
    return values


def one_twice(values, rng):
    one, other = rng.permutation(len(values))[:2]
    values[one] = values[other]
    return values


def one_very_long(values, rng):
    values[rng.integers(len(values))] = "x" * int(rng.integers(1000, 30_000))
    return values


def remove(*keys):
    def spoil(root, rng):
        del root[keys[rng.integers(len(keys))]]

    return spoil


def label_code(code):
    def spoil(root, rng):
        codes = root["obs/cell_type/codes"][:]
        codes[rng.integers(len(codes))] = code
        put(root, "obs/cell_type/codes", codes)

    return spoil


def short_column(root, rng):
    put(root, "obs/cell_type/codes", root["obs/cell_type/codes"][: rng.integers(N_CELLS)])


def counts_of(make, n_cells=N_CELLS, n_genes=N_GENES):
    """Replace the matrix's content, whichever way it is stored: `make` changes it dense."""

    def spoil(root, rng):
        stored = root["X"]
        dense = (stored[:] if hasattr(stored, "dtype") else ad.io.read_elem(stored).toarray())[:n_cells, :n_genes]
        make(dense, rng)
        layout = LAYOUTS["dense" if hasattr(stored, "dtype") else stored.attrs["encoding-type"][:3]]
        del root["X"]
        ad.io.write_elem(root, "X", layout(sp.csr_matrix(dense)))

    return spoil


def clear_cells(dense, rng):
    dense[rng.permutation(N_CELLS)[: rng.integers(1, 6)]] = 0


def clear_all(dense, rng):
    dense[:] = 0


def resized(n_cells, n_genes):
    def spoil(root, rng):
        for part, size in (("obs", n_cells), ("var", n_genes)):
            frame = ad.io.read_elem(root[part]).iloc[:size]
            del root[part]
            ad.io.write_elem(root, part, frame)
        counts_of(lambda dense, rng: None, n_cells, n_genes)(root, rng)

    return spoil


def sparse_part(part, change):
    """Change data, indices or indptr; a dense matrix gets another shape instead."""

    def spoil(root, rng):
        if "X/data" not in root:
            put(root, "X", root["X"][: rng.integers(1, N_CELLS)])
            return
        values = root[f"X/{part}"][:]
        put(root, f"X/{part}", change(values, rng))

    return spoil


def at_random(values, rng, value):
    values[rng.integers(1, len(values))] = value
    return values


def shape_attribute(root, rng):
    if "X/data" not in root:
        put(root, "X", root["X"][:].reshape(N_GENES, N_CELLS))
    else:
        root["X"].attrs["shape"] = [int(size) for size in rng.integers(1, 10**9, 2)]


def encoding(root, rng):
    if "X/data" not in root:
        put(root, "X", root["X"][:].ravel())
    else:
        root["X"].attrs["encoding-type"] = str(rng.choice(["coo_matrix", "", "awkward-array"]))


def group_for_array(root, rng):
    key = values_key(root)
    del root[key]
    root.create_group(key)


def strange_uns(root, rng):
    del root["uns"]
    put(root, "uns", np.array(["<object>"], dtype=object))


REFUSED = {
    "negative": value(-1),
    "NaN": value(np.nan),
    "infinite": value(np.inf),
    "fraction": value(0.5),
    "beyond single precision": value(1e30),
    "text for counts": count_type(lambda values: values.astype(str).astype(object)),
    "complex counts": count_type(lambda values: values.astype(np.complex64)),
    "log-normalised": count_type(lambda values: np.log1p(values)),
    "cell named twice": names("obs/_index", one_twice),
    "cells without names": names("obs/_index", lambda values, _: np.full(len(values), "")),
    "mouse genes": names("var/_index", lambda values, _: [f"Gm{i}" for i in range(len(values))]),
    "genes without names": names("var/_index", lambda values, _: np.full(len(values), "")),
    "too few names of genes": names("var/_index", lambda values, _: values[:-3]),
    "too many names of cells": names("obs/_index", lambda values, _: [*values, "more"]),
    "part removed": remove("X", "obs", "var", "obs/_index", "var/_index", "obs/cell_type", "obs/cell_type/categories"),
    "label missing": label_code(-1),
    "label out of range": label_code(77),
    "blank label": names("obs/cell_type/categories", lambda values, _: [" ", *values[1:]]),
    "short column": short_column,
    "no counts": counts_of(clear_all),
    "no cells": resized(0, N_GENES),
    "no genes": resized(N_CELLS, 0),
    "index too large": sparse_part("indices", lambda values, rng: at_random(values, rng, 10**6)),
    "index negative": sparse_part("indices", lambda values, rng: at_random(values, rng, -1)),
    "indices that are fractions": sparse_part("indices", lambda values, rng: values + 0.5),
    "indptr falls": sparse_part("indptr", lambda values, rng: at_random(values, rng, 10**6)),
    "indptr too short": sparse_part("indptr", lambda values, rng: values[: rng.integers(len(values))]),
    "indptr begins elsewhere": sparse_part("indptr", lambda values, rng: np.append(1, values[1:])),
    "values too few": sparse_part("data", lambda values, rng: values[: rng.integers(len(values))]),
    "indices in two dimensions": sparse_part("indices", lambda values, rng: values[:, None]),
    "another shape": shape_attribute,
    "another encoding": encoding,
    "group for an array": group_for_array,
}
REPAIRED = {
    "mixed symbols and ids": names("var/_index", swap_some_for_symbols),
    "gene named twice": names("var/_index", one_twice),
    "genes in another order": names("var/_index", lambda values, rng: rng.permutation(values)),
    "some genes without names": names("var/_index", lambda values, _: ["", "", *values[2:]]),
    "very long name of a cell": names("obs/_index", one_very_long),
    "very long name of a gene": names("var/_index", one_very_long),
    "very long label": names("obs/cell_type/categories", one_very_long),
    "cells without counts": counts_of(clear_cells),
    "one gene": resized(N_CELLS, 1),
    "one cell": resized(1, N_GENES),
    "strange uns": strange_uns,
}
SPOILS = REFUSED | REPAIRED


def damage_bytes(path, rng):
    """Truncate a file, or a file of a zarr folder, or remove or overwrite the latter."""
    if path.suffix == ".zarr":
        held = [part for part in sorted(path.rglob("*")) if part.is_file() and "uns" not in part.parts]
        held = [part for part in held if {"X", "_index", "cell_type"} & set(part.parts) and part.name != "zarr.json"]
        path = held[rng.integers(len(held))]
        if rng.random() < 0.3:
            path.write_bytes(rng.bytes(int(rng.integers(1, 200))))
            return
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


VARIANTS = 300


def made(number, sound, folder):
    """Variant of that number: its path, what was done to it, and whether it must be refused (None: either will do)."""
    rng = np.random.default_rng(number)
    layout, suffix = rng.choice(list(LAYOUTS)), rng.choice([".h5ad", ".zarr"], p=[0.7, 0.3])
    path = folder / f"variant_{number}{suffix}"
    source = sound / f"{layout}{suffix}"
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    kinds = [*SPOILS, *["bytes"] * 6]
    kind = kinds[number % len(kinds)]
    if kind == "bytes":
        damage_bytes(path, rng)
        return path, kind, True if suffix == ".h5ad" else None
    if suffix == ".h5ad":
        with h5py.File(path, "r+") as root:
            SPOILS[kind](root, rng)
    else:
        import zarr

        SPOILS[kind](zarr.open_group(path, mode="r+"), rng)
    return path, kind, kind in REFUSED


def by_blocks(path):
    options = sources.Options(min_matched=0.4, drop_duplicates=False)
    source = sources.open_source([path], {"cell_type": "cell_type"}, options)
    cells = ad.concat(list(source.blocks(10)))
    assert source.report.cells["kept"].sum() + source.report.cells["empty"].sum() == source.n_cells
    return cells


def in_memory(path):
    """As anndata reads it: what the readers here are held against."""
    try:
        adata = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
        if sp.issparse(adata.X):
            adata.X.check_format(full_check=True)
    except Exception as error:
        raise corpus.CorpusError(f"{path.name}: {error}") from error
    adata, _ = corpus.align(adata, str(path), min_matched=0.4)
    corpus.column(adata, str(path), "cell_type", "cell_type")
    return adata


def new_and_check(path, number):
    """Whether `--check` lets a file pass; it and `--new` say why in a line if they do not, and leave nothing half."""
    study = path.with_name("study.yaml")
    given = {"study": "s", "corpus": str(path), "strategies": ["random"], "percentages": [100], "seeds": [0]}
    given |= {"models": ["PretrainedPCA"], "steps": 1, "tasks": ["reconstruction"], "min_matched_genes": 0.4}
    study.write_text(yaml.safe_dump(given))
    found = preflight.check(study)
    assert all("\n" not in line for line in found.errors)
    study.unlink()
    written = Path("params") / f"s{number}.yaml"
    try:
        starter.new(written.stem, [str(path)], {}, ask=None, say=len, settings={"min_matched_genes": 0.4})
    except (corpus.CorpusError, datasets.DatasetError) as error:
        said = str(error)
    else:
        said = path.name
    assert path.name in said
    assert "\n" not in said
    assert not [part for part in Path("params").iterdir() if part.suffix != ".yaml"]
    assert not written.exists() or params.read(written).study == written.stem
    return not found.errors


def outcome(read, path, kind):
    """The cells and no message, or no cells and what the reader says; it may raise nothing else."""
    try:
        return read(path), None
    except (corpus.CorpusError, datasets.DatasetError) as error:
        message = str(error)
    except Exception as error:
        pytest.fail(f"{path.name} ({kind}), {read.__name__}: {type(error).__name__}: {error}")
    assert path.name in message, kind
    assert "\n" not in message, kind
    assert len(message) < 1100, kind
    return None, message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_generated_variants_are_refused_in_a_line_or_repaired(sound, tmp_path, monkeypatch):
    seen = set()
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    shutil.copy(Path(__file__).parents[1] / "params" / "quick.yaml", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    for number in range(VARIANTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, kind, refused = made(number, sound, folder)
        before = {part: part.stat().st_mtime_ns for part in folder.rglob("*")}
        cells, message = outcome(by_blocks, path, kind)
        whole, _ = outcome(in_memory, path, kind)
        assert refused is None or (message is not None) == refused, f"{path.name} ({kind}): {message}"
        passed = new_and_check(path, number)
        assert not (passed and message), f"{path.name} ({kind}): --check passes what is refused: {message}"
        if cells is not None:
            assert (cells.X.data > 0).all()
            assert (cells.X.data == np.rint(cells.X.data)).all()
            assert cells.X.getnnz(axis=1).min() > 0
            assert cells.obs_names.is_unique
            assert cells.obs["cell_type"].notna().all()
        if cells is not None and whole is not None:
            assert cells.obs_names.equals(whole.obs_names), kind
            assert cells.var_names.equals(whole.var_names), kind
            assert (cells.X != whole.X).nnz == 0, kind
        assert {part: part.stat().st_mtime_ns for part in folder.rglob("*")} == before
        shutil.rmtree(folder)
        seen.add(kind)
    assert seen == {*SPOILS, "bytes"}


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr", "x.loom"])
def test_what_is_no_such_file_is_named(tmp_path, name, make):
    make(tmp_path / name)
    assert outcome(by_blocks, tmp_path / name, "no file")[1] is not None

"""What is made of the files that people bring, a row a kind: the values of the clean twin, or a line that says why."""

import os
import re

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datawall.cells import corpus, datasets, sources
from datawall.models import external
from datawall.planning import starter

TABLE = corpus.gene_table()
N_CELLS = 40
LABELS = np.array(["B", "T", "NK µ"], object)[np.arange(N_CELLS) % 3]


def clean(*, symbols=False):
    """Counts of 60 genes, HLA-A, HLA-B and MT-CO1 among them, of cells of unlike depth."""
    rng = np.random.default_rng(0)
    some = TABLE.iloc[np.sort(rng.permutation(len(TABLE))[:57])]
    named = TABLE["feature_name"].isin(["HLA-A", "HLA-B", "MT-CO1"]) & ~TABLE.index.isin(some.index)
    genes = pd.concat([some, TABLE[named]])
    depth = rng.uniform(0.3, 3, (N_CELLS, 1)) * rng.uniform(0.2, 4, (1, len(genes)))
    counts = rng.poisson(depth).astype(np.float32) + (np.arange(len(genes)) == 0)
    obs = pd.DataFrame({"cell_type": pd.Categorical(LABELS)}, index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=list(genes["feature_name"] if symbols else genes.index))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


TWIN = corpus.align(clean(), "twin")[0].to_df()


def read(path, **options):
    """Cells as the reader of corpora and evaluation sets gives them, and what it says of them."""
    source = sources.open_source([path], {"cell_type": "cell_type"}, sources.Options(drop_duplicates=False, **options))
    cells = ad.concat(list(source.blocks(17)), merge="same")
    return cells, source


def assert_twin(cells):
    pd.testing.assert_frame_equal(cells.to_df(), TWIN, check_names=False, check_dtype=False)
    assert cells.obs["cell_type"].astype(str).tolist() == LABELS.tolist()


# Kinds of files, each made from the clean cells; `path` has no ending.


def written(adata, path, ending=".h5ad"):
    path = path.with_name(f"{path.name}{ending}")
    (adata.write_zarr if ending == ".zarr" else adata.write_h5ad)(path)
    return path


def changed(change, *, symbols=False):
    """A file of the clean cells after a change of them, which may return others."""

    def make(path):
        adata = clean(symbols=symbols)
        return written(change(adata) or adata, path)

    return make


def spoiled(spoil):
    """A file of the clean cells after a change of the file."""

    def make(path):
        path = written(clean(), path)
        with h5py.File(path, "r+") as root:
            spoil(root)
        return path

    return make


def numpys_text(path):
    """Names as zarr reads those that older versions of anndata wrote."""
    path = written(clean(), path, ".zarr")
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    for table, text in (("obs", clean().obs_names), ("var", clean().var_names)):
        del root[f"{table}/_index"]
        root[table].create_array("_index", data=np.array(list(text), np.dtypes.StringDType()))
    zarr.consolidate_metadata(path)
    return path


def put(root, key, values, **attributes):
    if key in root:
        del root[key]
    node = root.create_dataset(key, data=values)
    node.attrs.update(attributes)
    return node


def names(change):
    return changed(lambda adata: setattr(adata.var, "index", pd.Index(change(adata.var_names))))


def with_var(**columns):
    def change(adata):
        ids = adata.var_names.to_series().reset_index(drop=True)
        adata.var_names = TABLE.loc[adata.var_names, "feature_name"].to_list()
        adata.var = pd.DataFrame({key: list(of(ids)) for key, of in columns.items()}, index=adata.var_names)

    return changed(change)


def beside(n, label, value, var):
    """More columns, which are no genes: `label` names them, and `var` says what they and the genes are."""

    def change(adata):
        more = sp.csr_matrix(np.full((N_CELLS, n), value, np.float32))
        ids = adata.var_names.to_list()
        index = [*TABLE.loc[ids, "feature_name"], *(label(i) for i in range(n))]
        columns = {key: [*(gene(i) for i in ids), *(other(i) for i in range(n))] for key, (gene, other) in var.items()}
        table = pd.DataFrame(columns, index=index)
        return ad.AnnData(sp.hstack([adata.X, more], format="csr"), obs=adata.obs, var=table)

    return changed(change)


def symbol(i):
    return TABLE.loc[TWIN.columns[i], "feature_name"]


def types(other):
    return {"feature_types": (lambda i: "Gene Expression", lambda i: other)}


def symbols_beside_ids(adata):
    X, names = sp.hstack([adata.X, adata.X[:, :9] * 9], format="csr"), [*adata.var_names, *map(symbol, range(9))]
    return ad.AnnData(X, obs=adata.obs, var=pd.DataFrame(index=names))


TYPES = {"gene_ids": (str, lambda i: f"chr1:{i}00-{i}50"), **types("Peaks")}
ANTIBODIES = {"gene_ids": (str, symbol)}


def scaled(adata):
    X = adata.X.toarray()
    return sp.csr_matrix(X / X.sum(axis=1, keepdims=True) * 1e4)


def logged(adata):
    return scaled(adata).log1p()


def layer(name, X):
    def change(adata):
        adata.layers[name] = adata.X.copy()
        adata.X = X(adata)

    return changed(change)


def counts(X):
    return changed(lambda adata: setattr(adata, "X", sp.csr_matrix(X(adata)).astype(np.float32)))


def rounded(adata):
    return np.rint(scaled(adata).toarray())


def variable_in_x(adata):
    adata.raw = adata
    return adata[:, :20].copy()


def presence(adata):
    return (adata.X > 0).astype(np.float32)


def half_corrected(adata):
    X = adata.X.copy()
    X.data[::2] *= 0.93
    return X


def velocity(adata, *, spliced_alone):
    adata.layers["spliced"], adata.layers["unspliced"] = adata.X.copy(), adata.X.copy()
    if not spliced_alone:
        adata.X = logged(adata)


def old_categories(root, *, reference, fixed=False, table="obs", column="cell_type"):
    node = root[table][column]
    categories = node["categories"]
    categories = categories["values"] if isinstance(categories, h5py.Group) else categories
    codes, texts = node["codes"][:], categories.asstr()[:]
    kept = np.array([text.encode() for text in texts]) if fixed else texts.astype(object)
    place = f"{table}/__categories/{column}"
    root.create_dataset(place, data=kept, dtype=None if fixed else h5py.string_dtype())
    put(root, f"{table}/{column}", codes, **({"categories": root[place].ref} if reference else {}))


def plain_labels(root, values, dtype=None):
    del root["obs/cell_type"]
    root.create_dataset("obs/cell_type", data=values, dtype=dtype)


def tagged_ascii(root):
    plain_labels(root, [text.encode() for text in LABELS], h5py.string_dtype("ascii"))


def features_by_place(root):
    old_categories(root, reference=False, table="var", column="feature_types")


def features_unlisted(root):
    root["var"].attrs["column-order"] = np.array([], "S1")


def features_listed_alone(root):
    root["var"].attrs["column-order"] = "feature_types"


def features_without_attributes(root):
    for key in list(root["var/feature_types"].attrs):
        del root["var/feature_types"].attrs[key]


def antibodies(spoil):
    """Antibodies with genes' names, told from genes by a column of types alone; `spoil` changes how it is stored."""

    def make(path):
        path = beside(9, symbol, 50, types("Antibody Capture"))(path)
        with h5py.File(path, "r+") as root:
            spoil(root)
        return path

    return make


def latin(root):
    plain_labels(root, [text.encode("latin1") for text in LABELS], h5py.string_dtype())


def bytes_without_attributes(root):
    old_categories(root, reference=True, fixed=True)
    for part in ("obs", "var"):
        for key in ("encoding-type", "encoding-version"):
            del root[part].attrs[key]
        index = root[part]["_index"]
        values = (index["values"] if isinstance(index, h5py.Group) else index).asstr()[:]
        put(root, f"{part}/_index", np.array([value.encode() for value in values]))


def attributes_as_bytes(root):
    def visit(_, node):
        for key, value in list(node.attrs.items()):
            if isinstance(value, str):
                node.attrs[key] = np.bytes_(value)

    root.visititems(visit)


def not_listed(root):
    root["obs"].attrs["column-order"] = np.array([], "S1")
    for key in list(root["obs/cell_type"].attrs):
        del root["obs/cell_type"].attrs[key]


def h5sparse(root):
    shape = root["X"].attrs["shape"]
    for key in list(root["X"].attrs):
        del root["X"].attrs[key]
    root["X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": shape})


def foreign_parts(root):
    for key in ("uns/future", "obsm/future", "layers/future", "obs/future"):
        root.create_dataset(key, data=np.arange(3)).attrs.update({"encoding-type": "lazy", "encoding-version": "9"})
    root["uns/nowhere"] = h5py.SoftLink("/nothing")
    root.create_group("__DATA_TYPES__")["text"] = h5py.string_dtype()


def external_link(root, key="X"):
    with h5py.File(f"{root.filename}.other", "w") as other:
        root.copy(key, other, "moved")
    del root[key]
    root[key] = h5py.ExternalLink(f"{root.filename}.other", "/moved")


def link_to_a_link(root):
    external_link(root)
    root.move("X", "elsewhere")
    root["X"] = h5py.SoftLink("/elsewhere")


def virtual(root):
    layout = h5py.VirtualLayout((N_CELLS,), dtype="i1")
    put(root, "obs/real", np.arange(N_CELLS, dtype="i1"))
    layout[:] = h5py.VirtualSource(root["obs/real"])
    del root["obs/cell_type"]
    root.create_virtual_dataset("obs/cell_type", layout)


def unknown_compression(root):
    values = root["X/data"][:]
    del root["X/data"]
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((len(values),))
    made.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
    space, kind = h5py.h5s.create_simple((len(values),)), h5py.h5t.py_create(np.dtype("f4"))
    h5py.h5d.create(root["X"].id, b"data", kind, space, made).write(h5py.h5s.ALL, h5py.h5s.ALL, values)


def of_another_format(*groups, ending=".h5ad", **arrays):
    def make(path):
        path = path.with_name(f"{path.name}{ending}")
        with h5py.File(path, "w") as root:
            for name in groups:
                root.create_group(name)
            for name, values in arrays.items():
                root[name] = values
        return path

    return make


def bytes_in(ending, content):
    def make(path):
        path = path.with_name(f"{path.name}{ending}")
        path.write_bytes(content)
        return path

    return make


OF_0_6 = np.array([(b"cell0", 0)], dtype=[("index", "S5"), ("cell_type", "i1")])


KINDS = {
    # The same cells, however they are stored
    "plain": (changed(lambda adata: None), None),
    "by column": (changed(lambda adata: setattr(adata, "X", adata.X.tocsc())), None),
    "dense": (changed(lambda adata: setattr(adata, "X", adata.X.toarray())), None),
    "zarr": (lambda path: written(clean(), path, ".zarr"), None),
    "zarr with numpy's text": (numpys_text, None),
    "zarr and a slash": (lambda path: f"{written(clean(), path, '.zarr')}/", None),
    "ending in capitals": (lambda path: written(clean(), path).rename(path.with_name("X.H5AD")), None),
    "categories by reference": (spoiled(lambda root: old_categories(root, reference=True)), None),
    "categories by place": (spoiled(lambda root: old_categories(root, reference=False)), None),
    "bytes without attributes": (spoiled(bytes_without_attributes), None),
    "UTF-8 tagged as ASCII": (spoiled(tagged_ascii), None),
    "no UTF-8": (spoiled(latin), "obs/cell_type holds text that is not UTF-8"),
    "attributes as bytes": (spoiled(attributes_as_bytes), None),
    "column not listed": (spoiled(not_listed), None),
    "h5sparse": (spoiled(h5sparse), None),
    "foreign parts": (spoiled(foreign_parts), (None, r"besides, layers\['future'\] has the shape \(3,\)")),
    "text for uns": (spoiled(lambda root: put(root, "uns", [b"<object>"])), None),
    "external link": (spoiled(external_link), "X lies in another file"),
    "external values": (spoiled(lambda root: external_link(root, "X/data")), "X/data lies in another file"),
    "external codes": (
        spoiled(lambda root: external_link(root, "obs/cell_type/codes")), "cell_type/codes lies in another file"
    ),
    "link to a link": (spoiled(link_to_a_link), "X lies in another file"),
    "virtual data set": (spoiled(virtual), "obs/cell_type lies in another file"),
    "codes out of range": (
        spoiled(lambda root: put(root, "obs/cell_type/codes", np.full(N_CELLS, 9, "i1"))),
        "obs/cell_type has the code 9, and 3 categories",
    ),
    "unknown compression": (spoiled(unknown_compression), r"X/data is compressed by .*32099.*pip install hdf5plugin"),
    "anndata 0.6": (of_another_format("var", obs=OF_0_6), "obs is no table of anndata 0.7"),
    "10x": (of_another_format("matrix/barcodes"), "a 10x file.*read_10x_h5.*write_h5ad"),
    "10x under its name": (of_another_format("matrix/barcodes", ending=".h5"), "a 10x file.*read_10x_h5.*write_h5ad"),
    "loom": (of_another_format("row_attrs", "col_attrs", matrix=[0.0]), "a loom file.*read_loom.*write_h5ad"),
    "h5mu": (of_another_format("mod/rna", "obs", "var"), r"a MuData file.*read_h5mu.*\['rna'\].*write_h5ad"),
    "Seurat": (bytes_in(".rds", b"\x1f\x8b"), "a Seurat or other compressed file.*readRDS.*write_h5ad"),
    "Seurat under another name": (bytes_in(".h5ad", b"\x1f\x8b"), "a Seurat .*readRDS.*write_h5ad"),
    "h5Seurat": (of_another_format("assays", ending=".h5seurat"), "Convert"),
    "table of text": (bytes_in(".csv", b"a,b\n"), "a text file.*read_csv"),
    # Genes
    "symbols": (changed(lambda adata: None, symbols=True), None),
    "versions of ids": (names(lambda ids: [f"{name}.{i % 9 + 1}" for i, name in enumerate(ids)]), None),
    "names changed by R": (names(lambda ids: TABLE.loc[ids, "feature_name"].str.replace("-", ".")), None),
    "another gene's ids": (
        with_var(gene_ids=lambda ids: ids, antisense_of=lambda ids: np.roll(ids, 1)),
        (None, "gene_ids and antisense_of of var name different genes in 60 of 60 rows .* or .*; gene_ids is taken"),
    ),
    "other gene's ids, first in order": (
        with_var(a_neighbour=lambda ids: np.roll(ids, 1), feature_id=lambda ids: ids),
        (None, "feature_id and a_neighbour of var name different genes"),
    ),
    "known columns disagree": (
        with_var(gene_ids=lambda ids: np.roll(ids, 1)),
        "gene_ids and the index of var name different genes in 60 of 60 rows .* take the wrong column out",
    ),
    "symbols with gaps": (
        with_var(feature_name=lambda ids: TABLE.loc[ids, "feature_name"].where(np.arange(60) % 2 > 0, None)), None
    ),
    "ids with gaps": (with_var(gene_ids=lambda ids: ids.where(np.arange(60) % 3 > 0, "NA")), None),
    "antibodies": (beside(9, symbol, 50, ANTIBODIES | types("Antibody Capture")), None),
    "antibodies by place": (antibodies(features_by_place), None),
    "antibodies not listed": (antibodies(features_unlisted), None),
    "antibodies listed alone": (antibodies(features_listed_alone), None),
    "antibodies without attributes": (antibodies(features_without_attributes), None),
    "nearest genes of the rest": (
        beside(30, lambda i: f"LINC{i:05d}", 1, {"nearest_gene": (lambda i: TABLE.loc[i, "feature_name"], symbol)}),
        None,
    ),
    "antibodies without a type": (
        beside(9, symbol, 50, ANTIBODIES), (None, "9 rows with no id in a column of ids .* are left out as no")
    ),
    "antibodies under an index of ids": (
        changed(symbols_beside_ids),
        (None, "9 rows with the symbol of another row's id .* are left out as no genes"),
    ),
    "peaks": (beside(500, lambda i: f"chr1:{i}00-{i}50", 3, TYPES), None),
    "peaks without a type": (beside(500, lambda i: f"chr1-{i}00-{i}50", 3, {}), None),
    "guides": (beside(50, lambda i: f"{symbol(i)}_sg1", 9, types("CRISPR Guide Capture")), None),
    "control probes": (beside(50, lambda i: f"NegControlProbe_{i:05d}", 1, {}), None),
    "all of GENCODE": (beside(300, lambda i: f"ENSG{30_000_000 + i:011d}", 0, {}), None),
    "few of the counts": (beside(300, lambda i: f"novel{i}", 3, {}), r"with 21% of the counts, .*min_matched_genes"),
    "mouse": (names(lambda ids: [f"Gm{i}" for i in range(len(ids))]), "only 0 of 60 genes .*Name genes by Ensembl id"),
    # Counts
    "another layer": (layer("raw_counts", logged), (None, "counts are taken from layers.*log-normalised")),
    "variable genes in X": (changed(variable_in_x), (None, r"from raw\.X; besides, X holds counts too \(20 genes")),
    "rounded in X": (layer("umi", rounded), (None, "from .*umi.*; besides, X has nearly the same sum in every cell")),
    "presence in X": (layer("umi", presence), (None, "besides, X holds only 0 and 1")),
    "rounded alone": (counts(rounded), ("warned", "X has nearly the same sum in every cell .*are these raw counts")),
    "presence alone": (counts(presence), ("warned", "X holds only 0 and 1.*are these raw counts")),
    "logged and rounded": (
        changed(lambda adata: adata.uns.update(log1p={"base": 2})), (None, "says that X was logged.*are these raw")
    ),
    "log values": (counts(logged), "X holds fractions .*looks like log-normalised"),
    "scaled to equal sums": (counts(lambda adata: scaled(adata) * 1.5), "X holds fractions .*scaled to equal sums"),
    "z-scores": (counts(lambda adata: adata.X.toarray() - 1), "X holds negative values .*looks like scaled"),
    "corrected for ambient RNA": (counts(half_corrected), "X holds fractions .*ambient"),
    "spliced alone": (changed(lambda adata: velocity(adata, spliced_alone=False)), "a part of the counts, the spliced"),
    "spliced in X": (changed(lambda adata: velocity(adata, spliced_alone=True)), (None, "spliced molecules alone")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning", "ignore:Consolidated metadata is")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_of_a_file(tmp_path, kind):
    make, expected = KINDS[kind]
    path = make(tmp_path / "cells")
    if isinstance(expected, str):
        for reader in (lambda: read(path), lambda: [starter.look([str(path)], ["cell_type"]).fault("cell_type")]):
            try:
                [message] = [found for found in reader() if isinstance(found, str)]
            except (corpus.CorpusError, datasets.DatasetError) as error:
                message = str(error)
            assert re.search(expected, message), message
            assert "\n" not in message
            assert "cells" in message or "X.H5AD" in message
        return
    values, note = expected or (None, None)
    cells, source = read(path)
    if values is None:
        assert_twin(cells)
    assert starter.look([str(path)], ["cell_type"]).matches[0].matched == 60
    assert bool(note) == bool(source.notes), source.notes
    assert note is None or re.search(note, source.notes[0]), source.notes


@given(
    order=st.permutations(["gene_ids", "feature_name", "decoy", "chromosome"]),
    quirks=st.sets(st.sampled_from(range(6))),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_of_columns_and_quirks_of_writers_change_nothing(tmp_path, order, quirks, seed):
    adata = clean()
    ids = adata.var_names.to_numpy()
    gap = np.random.default_rng(seed).random(len(ids)) < 0.3
    symbols = TABLE.loc[ids, "feature_name"].to_list()
    columns = {"gene_ids": ids, "feature_name": symbols, "decoy": np.roll(ids, 3), "chromosome": "chr1"}
    adata.var = pd.DataFrame({key: np.resize(columns[key], len(ids)) for key in order}, index=symbols)
    adata.var.loc[gap, "gene_ids"] = None
    path = tmp_path / "cells.h5ad"
    path.unlink(missing_ok=True)
    adata.write_h5ad(path)
    steps = [lambda root: old_categories(root, reference=True), attributes_as_bytes, h5sparse, foreign_parts]
    steps += [lambda root: root["obs"].attrs.__delitem__("encoding-type"), lambda root: root.create_group("uns/more")]
    with h5py.File(path, "r+") as root:
        for quirk in sorted(quirks):
            steps[quirk](root)
    assert_twin(read(path)[0])


def test_numbers_are_the_same_labels_whichever_way_they_are_stored(tmp_path):
    paths = []
    for name, kind in (("whole", np.int32), ("float", np.float64), ("text", str)):
        adata = clean()
        adata.obs["cluster"] = (np.arange(N_CELLS) % 5).astype(kind)
        paths.append(written(adata, tmp_path / name))
    source = sources.open_source(paths, {"cell_type": "cluster"})
    assert source.labels["cell_type"] == list("01234")
    assert source.notes == []


def test_labels_that_no_reader_sees_and_missing_integers_are_missing():
    values = [np.float32(0.1), 0.1, 3.0, np.float32(3), 3, -(2**31), "\u200b", None]
    codes, texts = corpus.label_codes(np.array(values, dtype=object))
    assert [texts[code] if code >= 0 else None for code in codes] == ["0.1", "0.1", "3", "3", "3", None, None, None]


def test_what_several_files_share_is_told(tmp_path):
    paths = []
    for name, genes in (("one", slice(0, 35)), ("other", slice(25, 60))):
        adata = clean()[:, genes].copy()
        adata.obs["donor"] = ["1", "2"] * 20
        paths.append(written(adata, tmp_path / name))
    notes = sources.open_source(paths, {"cell_type": "cell_type", "donor_id": "donor"}).notes
    assert [note.partition(": ")[2] for note in notes] == [
        "'donor': 2 values are in more than one file, and count as one (1, 2)",
        "the files share 10 of their 60 genes; what a file has not measured is zero in its cells",
    ]


def test_spellings_are_told_and_joined(tmp_path):
    adata = clean()
    spelled = ["B cell", "bcell ", "B\u00a0\u200bcell", "nai\u0308ve", "naïve", "1", "1.0", "nan"]
    adata.obs["cell_type"] = np.resize(np.array(spelled, object), N_CELLS)
    path = written(adata, tmp_path / "cells")
    told, missing = read_labels(path, {})
    for label in ("'B cell'", "'bcell '", r"'B\xa0\u200bcell'", r"'nai\u0308ve'", "'1.0'"):
        assert f"{label} (5)" in told
    assert "labels: {old: new}" in told
    assert "'nan' (5)" in missing
    joined = {"bcell ": "B cell", "B\u00a0\u200bcell": "B cell", "nai\u0308ve": "naïve", "1.0": "1", "nan": "other"}
    assert read_labels(path, joined) == []
    assert set(read(path, labels=joined)[0].obs["cell_type"]) == {"B cell", "naïve", "1", "other"}


def read_labels(path, labels):
    return sources.open_source([path], {"cell_type": "cell_type"}, sources.Options(labels=labels)).notes


@pytest.mark.parametrize("kind", ["array", "sparse", "table"])
def test_embeddings_are_read_however_they_are_stored(tmp_path, kind):
    adata, values = clean(), np.arange(N_CELLS * 3, dtype=np.float32).reshape(N_CELLS, 3)
    table = pd.DataFrame(values, adata.obs_names, list("abc"))
    adata.obsm["X_mine"] = {"array": values, "sparse": sp.csr_matrix(values), "table": table}[kind]
    path = written(adata[::-1].copy(), tmp_path / "cells")
    with h5py.File(path, "r+") as root:
        foreign_parts(root)
    assert np.array_equal(external.read_embedding(str(path), "X_mine", adata.obs_names, "cells"), values)
    with pytest.raises(ValueError, match=r"no 'X_other' in obsm; it has .*'X_mine'"):
        external.read_embedding(str(path), "X_other", adata.obs_names, "cells")


def test_a_file_that_is_being_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    path = written(clean(), tmp_path / "cells")

    def locked(*_, **__):
        raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)")

    monkeypatch.setattr(h5py, "File", locked)
    message = r"cells\.h5ad: another program has it open.*HDF5_USE_FILE_LOCKING=FALSE"
    with pytest.raises(corpus.CorpusError, match=message):
        read(path)


def test_a_name_that_is_no_utf8_is_refused_with_the_remedy():
    with pytest.raises(datasets.DatasetError, match=r"k\\xf6ln\.h5ad: its name is not UTF-8.*rename the file"):
        datasets.file(os.fsdecode(b"k\xf6ln.h5ad"))


def test_links_within_a_zarr_folder_are_part_of_its_identity(tmp_path):
    path = written(clean(), tmp_path / "cells", ".zarr")
    (path / "X").rename(tmp_path / "elsewhere")
    (path / "X").symlink_to(tmp_path / "elsewhere")
    before = datasets.identity(str(path))
    (tmp_path / "elsewhere" / "more").write_text("changed")
    assert datasets.identity(str(path)) != before

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small import small_study

from datawall.cells import census, corpus, ontology
from datawall.cells.census import Recipe
from datawall.cells.corpus import CorpusError
from datawall.cells.datasets import DatasetError
from datawall.study import curation

# cell > native cell > a > b > c > d, with e beside d (two parents); engineered cell is native to nothing
TERMS = ["cell", "native cell", "a", "b", "c", "d", "e", "engineered cell"]
ABOVE = ["", "is_a: CL:0 ! cell", "is_a: CL:1 ! native cell", "is_a: CL:2 ! a", "is_a: CL:3 ! b"]
ABOVE += ["is_a: CL:4 ! c", "is_a: CL:4 ! c", "is_a: CL:0 ! cell"]
ABOVE[3] += "\nrelationship: part_of CL:9 ! counts for nothing"
ABOVE[6] += '\nis_a: UBERON:1 {is_inferred="true"} ! a term of another ontology'
STANZAS = [
    f"[Term]\nid: CL:{i}\nname: {name}\n{above}" for i, (name, above) in enumerate(zip(TERMS, ABOVE, strict=True))
]
OBO = "\n\n".join(["format-version: 1.2", *STANZAS, "[Term]\nid: CL:8\nname: of old\nis_obsolete: true\n"])
N_ANCESTORS = {"cell": 0, "native cell": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "engineered cell": 1}
BELOW_NATIVE = {"a", "b", "c", "d", "e"}
TYPES = [*N_ANCESTORS, "unknown"]
LOW = {"min_cells": 8, "min_tech_samples": 3, "min_ancestors": 4, "min_matched_genes": 0.0}


@pytest.fixture(scope="module")
def obo(tmp_path_factory):
    path = tmp_path_factory.mktemp("ontology") / "cl.obo"
    path.write_text(OBO)
    return str(path)


def simulated_obs(rng, n=600):
    choose = lambda *values: rng.choice(values, n)  # noqa: E731
    columns = {
        "is_primary_data": rng.random(n) < 0.9,
        "dataset_id": choose("s1", "s2", "s2_x"),
        "donor_id": choose("1", "2", "x_1"),  # s2_x + 1 and s2 + x_1 are one tech_sample by name
        "assay": choose("10x 3' v3", "10x 5' v2", "10x 5' v1", "Smart-seq2"),
        "cell_type": rng.choice(TYPES, n, p=[0.02, 0.05, 0.2, 0.2, 0.01, 0.3, 0.02, 0.1, 0.1]),
    }
    columns |= {"development_stage": choose("adult", "child"), "disease": choose("normal", "flu")}
    columns |= {"tissue": choose("left lung", "blood", "right lung"), "tissue_general": choose("lung", "blood")}
    return pd.DataFrame(columns)


# The rules, in plain pandas and plain Python


def reference(obs, recipe, n_ancestors=N_ANCESTORS, native=BELOW_NATIVE):
    """Rows that scTab's filters keep, and the types that each filter removes."""
    rows = obs["is_primary_data"] | (not recipe.primary)
    if recipe.assay is not None:
        rows &= obs["assay"].isin(recipe.assay)
    for column, values in recipe.where.items():
        rows &= obs[column].isin(values)
    left = obs[rows]
    removed = {"cells": set(), "tech_samples": set(), "ancestors": set(), "root": set(), "unknown": set()}
    for name, cells in left.groupby("cell_type"):
        if len(cells) < recipe.min_cells:
            removed["cells"].add(name)
        if len(set(cells["dataset_id"] + "_" + cells["donor_id"])) <= recipe.min_tech_samples - 1:
            removed["tech_samples"].add(name)
        if recipe.ontology is not None and name not in n_ancestors:
            removed["unknown"].add(name)
        elif recipe.ontology is not None:
            if name not in native:
                removed["root"].add(name)
            if n_ancestors[name] <= recipe.min_ancestors - 1:
                removed["ancestors"].add(name)
    gone = set().union(*removed.values())
    return left[~left["cell_type"].isin(gone)], removed, left


def judged(obs, recipe, terms):
    obs = obs.assign(tech_sample=(obs["dataset_id"] + "_" + obs["donor_id"]).astype("category"))
    return census.judge_types(obs.astype({"cell_type": "category"}), recipe, terms)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    limits=st.tuples(st.integers(0, 200), st.integers(0, 10), st.integers(0, 8)),
    root=st.sampled_from(["native cell", "b", "cell"]),
)
def test_filters_of_types_one_by_one_and_together(obo, seed, limits, root):
    limits = dict(zip(("min_cells", "min_tech_samples", "min_ancestors"), limits, strict=True))
    recipe = Recipe(ontology=obo, root=root, primary=False, assay=None, **limits)
    below = {"native cell": BELOW_NATIVE, "b": {"c", "d", "e"}, "cell": {*N_ANCESTORS} - {"cell"}}[root]
    obs = simulated_obs(np.random.default_rng(seed), 300)
    kept, removed, _ = reference(obs, recipe, native=below)
    types, fails = judged(obs, recipe, ontology.read(obo, relations=("is_a",)))
    names = ["unknown", "root", "ancestors", "cells", "tech_samples"]
    assert {name: set(fails.index[fails.iloc[:, place]]) for place, name in enumerate(names)} == removed
    assert set(types.index[types["removed"] == ""]) == set(kept["cell_type"])
    assert (types["n_cells"] == obs["cell_type"].value_counts().reindex(types.index)).all()


def test_sctabs_limits_are_as_strict_as_its_code(tmp_path):
    chain = "".join(f"[Term]\nid: {i}\nname: t{i}\nis_a: {i - 1}\n\n" for i in range(1, 10))
    (tmp_path / "cl.obo").write_text(f"[Term]\nid: 0\nname: native cell\n\n{chain}")
    recipe = Recipe(ontology=str(tmp_path / "cl.obo"))

    def obs_of(name, n_cells, n_samples):
        donors = np.arange(n_cells) % n_samples
        return pd.DataFrame({"cell_type": name, "dataset_id": "s", "donor_id": donors.astype(str)})

    cases = {
        ("t8", 5000, 31): "",  # 8 ancestors, 5,000 cells and 31 tech_samples: all just enough
        ("t9", 4999, 31): "fewer than 5,000 cells",
        ("t8", 5000, 30): "fewer than 31 tech_samples",
        ("t7", 5000, 31): "fewer than 8 ancestors",
        ("t7", 4999, 30): "fewer than 8 ancestors; fewer than 5,000 cells; fewer than 31 tech_samples",
    }
    terms = ontology.read(recipe.ontology, relations=("is_a",))
    for case, why in cases.items():
        types, _ = judged(obs_of(*case), recipe, terms)
        assert types.loc[case[0], "removed"] == why


@pytest.mark.parametrize(
    "wrong",
    [{"tissue": "lung"}, {"min_cells": -1}, {"min_cells": "5000"}, {"assay": []}, {"where": {"disease": "flu"}}],
)
def test_a_recipe_is_checked(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Recipe(ontology=None, **wrong)
    with pytest.raises(ValidationError, match="ontology"):
        Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not an ontology", r"cl\.obo: holds no \[Term\]"),
        ("[Term]\nname: T cell\n", "the term named 'T cell' has no id"),
        (None, r"cl\.obo: no such ontology file"),
    ],
)
def test_what_is_no_ontology_is_named(text, message, tmp_path):
    if text:
        (tmp_path / "cl.obo").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ontology.read(tmp_path / "cl.obo")


def test_faults_of_the_ontology(tmp_path, obo):
    obs, circle = simulated_obs(np.random.default_rng(0), 100), tmp_path / "circle.obo"
    circle.write_text(OBO.replace("is_a: CL:1 ! native cell", "is_a: CL:1\nis_a: CL:5"))
    for path, labels, changes, message in (
        (obo, obs, {"root": "of old"}, r"cl\.obo: has no term named 'of old' that is not obsolete"),
        (obo, obs.assign(cell_type="T"), {}, r"none of the 1 cell types \(T, …\) is a term of it"),
        (circle, obs, {}, r"circle\.obo: '[abcd]' is its own ancestor by is_a"),
    ):
        with pytest.raises(CorpusError, match=message):
            judged(labels, Recipe(ontology=str(path), **changes), ontology.read(path, relations=("is_a",)))


# A Census on disk


def write_frame(parent, key, table, plain):
    """Write a SOMA data frame; text is dictionary-encoded but for the columns in `plain`, as old releases have it."""
    columns = {"soma_joinid": pa.array(np.arange(len(table)))}
    for name in table:
        kind = pa.bool_() if table[name].dtype == bool else pa.large_string()
        column = pa.array(table[name].to_numpy(), kind, from_pandas=True)
        text = table[name].dtype != bool and name not in plain
        columns[name] = column.dictionary_encode() if text else column
    arrow = pa.table(columns)
    domain = [(0, len(table) - 1)]
    # Made by itself and added afterwards: within an open collection the categories are lost.
    index = {"index_column_names": ["soma_joinid"], "domain": domain}
    with tiledbsoma.DataFrame.create(f"{parent.uri}/{key}", schema=arrow.schema, **index) as frame:
        for rows in (np.arange(len(arrow)) % 2 == 1, np.arange(len(arrow)) % 2 == 0):  # rows need not lie in order
            frame.write(arrow.filter(pa.array(rows)))
    parent.set(key, tiledbsoma.open(f"{parent.uri}/{key}"), use_relative_uri=True)


def write_census(uri, obs, genes, X, plain=("assay", "feature_id")):
    with tiledbsoma.Collection.create(str(uri)) as top:
        human = top.add_new_collection("census_data").add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        write_frame(human, "obs", obs, plain)
        rna = human.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        write_frame(rna, "var", pd.DataFrame({"feature_id": genes}), plain)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=X.shape)
        raw.write(pa.SparseCOOTensor.from_scipy(sp.coo_matrix(X)))
    return str(uri)


def planted():
    """Cells, genes and counts: 40 genes of the table in random order, the first of it among them, and 10 others."""
    rng = np.random.default_rng(0)
    table = corpus.gene_table().index.to_numpy()
    others = [f"ENSG9{i:010}" for i in range(10)]
    genes = rng.permutation([table[0], *rng.choice(table[1:], 39, replace=False), *others])
    counts = np.where(rng.random((600, 50)) < 0.3, rng.integers(1, 200, (600, 50)), 0)
    return simulated_obs(rng), genes, counts.astype(np.float32)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_census(tmp_path_factory.mktemp("census") / "soma", *planted())


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"primary": False},
        {"assay": ["10x 5' v2", "Smart-seq2"]},
        {"assay": None, "where": {"tissue_general": ["lung"], "disease": ["flu"]}},
        {"ontology": None},
    ],
)
def test_cells_are_those_of_plain_pandas(uri, obo, edit):
    recipe = Recipe(**{"uri": uri, "ontology": obo, **LOW, **edit})
    kept, removed, left = reference(planted()[0], recipe)
    selection = census.select(recipe)
    np.testing.assert_array_equal(selection.obs["soma_joinid"], kept.index)
    for column in recipe.columns:
        np.testing.assert_array_equal(selection.obs[column].astype(str), kept[column].astype(str))
    names = (kept["dataset_id"] + "_" + kept["donor_id"]).to_numpy()
    np.testing.assert_array_equal(selection.obs["tech_sample"].astype(str), names)
    assert sorted(selection.obs["cell_type"].cat.categories) == sorted(set(kept["cell_type"]))

    report = selection.report.set_index("step")
    assert report.loc["in the Census", "n_cells"] == 600
    if recipe.primary:
        assert report.loc["removed: other is_primary_data", "n_cells"] == (~planted()[0]["is_primary_data"]).sum()
    assert tuple(report.loc["left for the filters of types"]) == (len(left), left["cell_type"].nunique())
    for name, step in {
        "cells": "fewer than 8 cells",
        "tech_samples": "fewer than 3 tech_samples",
        "root": "not below 'native cell'",
        "ancestors": "fewer than 4 ancestors",
        "unknown": "no term of cl.obo",
    }.items():
        if recipe.ontology is not None or name in ("cells", "tech_samples"):
            n_cells = left["cell_type"].isin(removed[name]).sum()
            assert tuple(report.loc[f"removed: {step}"]) == (n_cells, len(removed[name]))
    assert tuple(report.loc["kept"]) == (len(kept), kept["cell_type"].nunique())


@pytest.mark.parametrize(("block_size", "silent"), [(1, False), (7, True), (4096, False)])
def test_blocks_hold_the_planted_counts(uri, obo, block_size, silent, monkeypatch):
    monkeypatch.setattr(census, "tqdm", partial(census.tqdm, disable=silent))  # as TQDM_DISABLE=1 does
    recipe = Recipe(uri=uri, ontology=obo, **LOW)
    selection = census.select(recipe)
    blocks = list(census.blocks(recipe, selection, block_size=block_size))
    obs, genes, counts = planted()
    kept = reference(obs, recipe)[0]
    order = [np.flatnonzero(genes == gene)[0] for gene in corpus.gene_table().index if gene in genes]
    assert len(order) == 40
    np.testing.assert_array_equal(sp.vstack([block.X for block in blocks]).toarray(), counts[kept.index][:, order])
    assert [name for block in blocks for name in block.obs_names] == kept.index.astype(str).to_list()
    assert [kind for block in blocks for kind in block.obs["cell_type"]] == kept["cell_type"].to_list()
    for block in blocks:
        assert isinstance(block.X, sp.csr_matrix)
        assert block.X.dtype == np.float32
        assert block.n_obs == block_size or block is blocks[-1]
        assert block.var.equals(corpus.gene_table().loc[genes[order], ["feature_name"]])


def test_neither_where_an_experiment_lies_nor_the_size_of_buffers_matters(uri, obo, monkeypatch):
    recipe = Recipe(uri=uri, ontology=obo, **LOW)
    whole = census.select(recipe)
    bare = census.select(recipe.model_copy(update={"uri": f"{uri}/census_data/homo_sapiens"}))
    monkeypatch.setattr(census, "BUFFER_BYTES", 1024)
    parts = census.select(recipe)
    assert bare.obs.equals(whole.obs)
    assert parts.obs.equals(whole.obs)
    assert parts.report.equals(whole.report)
    for one, other in zip(census.blocks(recipe, whole), census.blocks(recipe, parts), strict=True):
        assert (one.X != other.X).nnz == 0


def test_rows_may_come_in_any_order():
    obs = simulated_obs(np.random.default_rng(0))
    table = pa.Table.from_pandas(obs.rename_axis("soma_joinid").reset_index(), preserve_index=False)
    read = lambda column_names: [part.select(column_names) for part in (table[300:], table[:0], table[:300])]  # noqa: E731
    experiment = SimpleNamespace(obs=SimpleNamespace(schema=table.schema, count=600, read=read))
    rows, steps = census._passing_rows(experiment, Recipe(ontology=None))
    left = reference(obs, Recipe(ontology=None))[2]
    np.testing.assert_array_equal(rows["soma_joinid"], left.index)
    np.testing.assert_array_equal(rows["tissue"].astype(str), left["tissue"])
    assert steps[-1] == ("left for the filters of types", len(left), left["cell_type"].nunique())


def test_a_public_release_is_found_by_cellxgene_census(uri, obo, monkeypatch):
    def open_soma(census_version, tiledb_config):
        assert census_version == "2023-05-15"
        return tiledbsoma.open(uri)

    monkeypatch.setitem(sys.modules, "cellxgene_census", SimpleNamespace(open_soma=open_soma))
    assert len(census.select(Recipe(ontology=obo, **LOW)).obs)
    with pytest.raises(DatasetError, match="census 2030-01-01: cannot be opened"):
        census.select(Recipe(ontology=obo, release="2030-01-01"))


@pytest.mark.parametrize("package", ["tiledbsoma", "cellxgene_census"])
def test_what_is_not_installed_is_named(package, obo, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DatasetError, match=rf"{package} is not installed; `pip install datawall\[census\]`"):
        census.select(Recipe(ontology=obo))


def test_faults_of_the_census(uri, obo, tmp_path):
    bare = str(tmp_path / "bare")
    with tiledbsoma.Experiment.create(bare) as experiment:
        experiment.add_new_collection("ms")
    cases = [
        ({"uri": str(tmp_path / "nowhere")}, DatasetError, "nowhere: cannot be opened"),
        ({"uri": f"{uri}/census_data"}, DatasetError, "no organism 'homo_sapiens'; it has none"),
        ({"uri": f"{uri}/census_data/homo_sapiens/obs"}, DatasetError, "no organism 'homo_sapiens'; it has none"),
        ({"uri": bare}, DatasetError, r"has no raw counts, ms\['RNA'\].X\['raw'\]"),
        ({"organism": "mus_musculus"}, DatasetError, "no organism 'mus_musculus'; it has homo_sapiens"),
        ({"columns": ["sex"]}, CorpusError, "obs has no column 'sex'; it has 'soma_joinid', "),
        ({"where": {"suspension_type": ["cell"]}}, CorpusError, "obs has no column 'suspension_type'"),
        ({"where": {"tissue": ["lug"]}}, CorpusError, "no cell passes .*removed: other tissue: 600; left"),
        ({"min_cells": 10_000}, CorpusError, "no cell passes .*removed: fewer than 10,000 cells"),
        ({"min_matched_genes": 0.5}, CorpusError, "only 40 of the 19331 human genes"),
    ]
    for edit, error, message in cases:
        with pytest.raises(error, match=message):
            census.select(Recipe(**{"uri": uri, "ontology": obo, **LOW, **edit}))


def test_what_cannot_be_used_is_named(tmp_path, obo):
    obs, genes, counts = planted()
    recipe = Recipe(ontology=obo, primary=False, assay=None, **LOW)
    cell = reference(obs, recipe)[0].index[100]
    first = np.flatnonzero(genes == corpus.gene_table().index[0])
    gaps = obs.assign(donor_id=[None if row < 5 else donor for row, donor in enumerate(obs["donor_id"])])
    twice, half, negative = genes.copy(), counts.copy(), counts.copy()
    twice[1], half[cell, first], negative[cell, first] = genes[0], 0.5, -2
    for name, made, message in (
        ("half", (obs, genes, half), r"census: X holds fractions .*0.5\); counts must be"),
        ("negative", (obs, genes, negative), r"census: X holds negative values .*-2\); counts must be"),
        ("gaps", (gaps, genes, counts), "donor_id is missing for 5 cells"),
        ("twice", (obs, twice, counts), f"gene {genes[0]} occurs more than once"),
    ):
        plain = ("donor_id",) if name == "gaps" else ("assay", "feature_id")
        spoiled = recipe.model_copy(update={"uri": write_census(tmp_path / name, *made, plain)})
        with pytest.raises(CorpusError, match=message):
            [corpus.align(block, "census") for block in census.blocks(spoiled, census.select(spoiled))]


def test_a_corpus_is_known_by_what_its_ontology_says(tmp_path, obo):
    copy = tmp_path / "copy.obo"
    copy.write_text(OBO)
    records = [census.identity(Recipe(ontology=path)) for path in (obo, str(copy))]
    copy.write_text(OBO + "\n")
    assert records[0] == records[1] != census.identity(Recipe(ontology=str(copy)))


def test_a_study_curates_it(uri, obo, tmp_path):
    recipe = {"uri": uri, "ontology": str(obo), **LOW}
    keys = {"batch_key": "dataset_id", "donor_key": "donor_id", "min_matched_genes": 0.0}
    atlas = small_study(tmp_path, corpus="census", census=recipe, percentages=[10], **keys)
    selection = census.select(Recipe(**recipe))
    assert atlas.corpus.n_obs == len(selection.obs)
    assert atlas.corpus.names().tolist() == selection.obs["soma_joinid"].astype(str).tolist()
    assert atlas.corpus.obs["donor_id"].tolist() == selection.obs["donor_id"].tolist()
    assert set(curation.reports(atlas)) == {"census", "types"}

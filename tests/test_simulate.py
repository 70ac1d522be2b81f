"""Simulated atlases: the cells follow from the settings, and what was planted can be found in them."""

import json
import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import real
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_study

from datawall.cells import corpus, simulate
from datawall.cells.simulate import Atlas, Cells
from datawall.models.scimilarity import kinship
from datawall.reading import plots
from datawall.study import curation, params

BLOOD = {
    "classical monocyte": 10, "natural killer cell": 8, "naive B cell": 7, "memory B cell": 5,
    "capillary endothelial cell": 5, "mast cell": 2,
}  # fmt: skip
SMALL = Atlas(n_cells=1000, n_genes=200, composition=BLOOD)


def changed(atlas, **values):
    return Atlas(**{**atlas.model_dump(), **values})


def same(a, b):
    return a.obs.astype(str).equals(b.obs.astype(str)) and a.var.equals(b.var) and (a.X != b.X).nnz == 0


@pytest.fixture(scope="module")
def whole():
    return simulate.load(SMALL)


@pytest.fixture(scope="module")
def cells():
    return Cells(simulate.truth(SMALL))


@given(begin=st.integers(0, 999), length=st.integers(1, 300))
@settings(deadline=None, max_examples=20)
def test_any_cells_can_be_made_alone(whole, cells, begin, length):
    end = min(1000, begin + length)
    assert same(cells.block(begin, end), whole[begin:end])


@pytest.mark.parametrize("block_size", [1000, 300, 128, 2000])
def test_cells_are_the_same_however_they_are_cut(whole, block_size):
    blocks = list(simulate.blocks(SMALL, block_size))
    assert [block.n_obs for block in blocks[:-1]] == [block_size] * (len(blocks) - 1)
    assert all(block.var is not None and block.var.equals(whole.var) for block in blocks)
    assert same(ad.concat(blocks, merge="same"), whole)


def test_a_larger_atlas_begins_with_the_same_cells_and_another_seed_is_another_truth(whole, cells):
    assert same(simulate.load(changed(SMALL, n_cells=1500))[:1000], whole)
    other = changed(SMALL, seed=1)
    assert not np.array_equal(simulate.truth(other).loadings, cells.truth.loadings)
    assert (simulate.load(other).X != whole.X).nnz > 10_000


def test_blocks_are_as_a_corpus_wants_them(whole):
    block = whole
    aligned, match = corpus.align(block, "simulated", min_matched=1)
    assert (match.named_by, match.missing, aligned.n_vars) == ("Ensembl id", 0, 200)
    assert block.X.dtype == np.int32
    assert block.X.has_canonical_format
    assert block.X.data.min() > 0
    assert not block.obs.isna().any().any()
    assert (block.obs.groupby("donor_id", observed=True)[["dataset_id", "assay"]].nunique() < 2).all(axis=None)
    assert block.obs["dataset_id"].nunique() == 4
    assert set(block.obs["condition"]) == {"ctrl", "treated"}


def test_composition_is_the_one_asked_for():
    n_cells = 20_000
    cells = simulate.load(Atlas(n_cells=n_cells, n_genes=50, composition=BLOOD, counts_per_cell=5.0))
    share = pd.Series(BLOOD) / sum(BLOOD.values())
    observed = cells.obs["cell_type"].value_counts()[share.index] / n_cells
    assert (np.abs(observed - share) < 4 * np.sqrt(share * (1 - share) / n_cells)).all()
    assert abs((cells.obs["condition"] == "treated").mean() - 0.5) < 4 * 0.5 / np.sqrt(n_cells)


def test_default_composition_is_that_of_sctab_and_has_its_diversity():
    types = simulate.truth(Atlas(n_genes=50)).types
    assert len(types) == 164
    assert types["share"].sum() == pytest.approx(1)
    assert types["share"].idxmax() == "neuron"
    # Published for the whole of scTab: 5.903 bits and 30.9 effective types; the counts at hand are of its test split.
    assert -(types["share"] * np.log2(types["share"])).sum() == pytest.approx(5.903, abs=0.06)
    assert 1 / (types["share"] ** 2).sum() == pytest.approx(30.9, rel=0.1)


PLAIN = {"treated": 0.0, "assay_effect": 0.0, "dataset_effect": 0.0, "donor_effect": 0.0, "counts_spread": 0.0}
PLAIN |= {"n_states": 0, "composition": {"mast cell": 1}, "activity": 1e-9}


def test_counts_are_negative_binomial_with_the_planted_variance():
    atlas = Atlas(n_cells=20_000, n_genes=100, **PLAIN)
    X = simulate.load(atlas).X.toarray().astype(float)
    planted = simulate.truth(atlas)
    theta, mean = planted.genes["theta"].to_numpy(), X.mean(axis=0)
    assert X.sum(axis=1).mean() == pytest.approx(1500, rel=0.01)
    common = mean > 1
    expected = planted.loadings[0] * 1500
    assert np.abs(mean / expected - 1)[common].max() < 0.05
    # With the squared coefficient of variation that was asked for, 0.3 beyond Poisson's.
    assert np.abs(X.var(axis=0) / (mean * (1 + theta)) - 1)[common].max() < 0.1
    assert np.abs((X.var(axis=0) - mean) / mean**2 - 0.3)[common].max() < 0.06
    # The share of zeros is the third thing that the distribution fixes: (1 + theta) ** (-mean / theta).
    zeros = (1 + theta) ** (-mean / theta)
    assert np.abs((X == 0).mean(axis=0) - zeros).max() < 5 * 0.5 / np.sqrt(len(X))


def test_without_dispersion_counts_are_poisson():
    atlas = Atlas(n_cells=5000, n_genes=50, dispersion=0.0, **PLAIN)
    X = simulate.load(atlas).X.toarray().astype(float)
    assert np.abs(X.var(axis=0) / X.mean(axis=0) - 1)[X.mean(axis=0) > 0.1].max() < 0.15


def test_library_sizes_are_log_normal():
    atlas = changed(SMALL, n_cells=5000, assay_effect=0.0, dataset_effect=0.0, donor_effect=0.0, counts_spread=0.5)
    log_size = np.log(np.asarray(simulate.load(atlas).X.sum(axis=1)).ravel())
    assert np.median(log_size) == pytest.approx(np.log(1500), abs=0.05)
    assert log_size.std() == pytest.approx(0.5, abs=0.05)


def test_counts_look_like_those_of_real_cells():
    cells = real.kang()
    kang, _ = corpus.align(cells[cells.obs["condition"] == "ctrl"].copy(), "kang2018")
    library = np.asarray(kang.X.sum(axis=1)).ravel()
    spread = {"counts_per_cell": float(np.median(library)), "counts_spread": 0.3}
    blood = {"CD4-positive, alpha-beta T cell": 6, "classical monocyte": 3, "B cell": 2, "natural killer cell": 1}
    cells = simulate.load(Atlas(n_cells=2000, n_genes=kang.n_vars, composition=blood, treated=0.0, **spread))
    genes, cells = curation.realism({"real": kang.X, "simulated": cells.X})
    dense = kang.X.toarray().astype(np.float64)
    expected = np.column_stack([dense.mean(axis=0), dense.var(axis=0), (dense == 0).mean(axis=0)])
    real_genes = genes.loc[genes["dataset"] == "real", ["mean", "variance", "zeros"]]
    np.testing.assert_allclose(real_genes, expected[dense.any(axis=0)], atol=1e-9)
    genes["fano"] = genes["variance"] / genes["mean"]
    genes["bin"] = pd.cut(genes["mean"], [0.01, 0.1, 0.3, 1, 3, 10])
    table = genes.pivot_table(["fano", "zeros"], "bin", "dataset", aggfunc="median", observed=True)
    assert (np.abs(np.log(table["fano", "simulated"] / table["fano", "real"])) < np.log(2.2)).all()
    assert (np.abs(table["zeros", "simulated"] - table["zeros", "real"]) < 0.12).all()
    n_genes = cells.groupby("dataset")["n_genes"].median()
    assert n_genes["simulated"] == pytest.approx(n_genes["real"], rel=0.25)
    assert len(plots.realism(genes, cells).axes) == 4


def recovered(atlas, n_cells):
    """Squared cosine of each programme's direction with the leading principal components of Pearson residuals."""
    planted = simulate.truth(atlas)
    X = Cells(planted).block(0, n_cells).X.toarray().astype(float)
    profile = X.sum(axis=0) / X.sum()
    seen = profile > 0
    expected = X.sum(axis=1, keepdims=True) * profile[seen]
    noise = 1 + planted.genes["theta"].to_numpy()[seen]
    residuals = (X[:, seen] - expected) / np.sqrt(expected * noise)
    axes = np.linalg.svd(residuals - residuals.mean(axis=0), full_matrices=False)[2]
    n_effects = len(planted.programmes) + len(planted.donors)
    direction = ((planted.loadings - profile)[:, seen] / np.sqrt(profile[seen] * noise))[1:]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return pd.Series(((direction @ axes[:n_effects].T) ** 2).sum(axis=1), planted.programmes.index[1:])


def test_programmes_are_found_with_as_many_cells_as_the_truth_says_and_not_with_few():
    faint = {"activity": 0.03, "response": 0.05, "n_states": 7}
    atlas = Atlas(n_genes=400, counts_per_cell=3000.0, composition=BLOOD, **faint)
    needed = simulate.truth(atlas).programmes["cells_needed"][1:]
    few, many = recovered(atlas, 64), recovered(atlas, 2048)
    assert (needed > 4 * 64).sum() >= 4
    assert few[needed > 4 * 64].max() < 0.3
    assert (needed < 2048 / 4).sum() >= 15
    assert many[needed < 2048 / 4].min() > 0.7


def test_drug_moves_treated_cells_of_responsive_types_only():
    atlas = Atlas(n_cells=12_000, n_genes=500, composition=BLOOD, responsive=["B cell"], response=0.3)
    planted, cells = simulate.truth(atlas), simulate.load(atlas)
    row = planted.loadings[planted.programmes.index.get_loc("response")]
    top = np.argsort(row)[-10:]
    share = np.asarray(cells.X[:, top].sum(axis=1)).ravel() / np.asarray(cells.X.sum(axis=1)).ravel()
    treated = (cells.obs["condition"] == "treated").to_numpy()
    responds = {"naive B cell", "memory B cell"}
    assert set(planted.types.index[planted.types["response"] > 0]) == responds
    for name in BLOOD:
        of_type = (cells.obs["cell_type"] == name).to_numpy()
        a, b = share[of_type & treated], share[of_type & ~treated]
        z = (a.mean() - b.mean()) / np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert z > 20 if name in responds else abs(z) < 4, (name, z)


def test_technical_effects_change_genes_between_data_sets_and_can_be_left_out():
    def distance(**values):
        cells = simulate.load(changed(SMALL, n_cells=4000, composition={"mast cell": 1}, treated=0.0, **values))
        names = cells.obs["dataset_id"].to_numpy()
        parts = [cells.X[names == name] for name in ("dataset_1", "dataset_2")]
        counts = np.array([np.asarray(part.sum(axis=0)).ravel() for part in parts])
        share = counts / counts.sum(axis=1, keepdims=True)
        common = counts.min(axis=0) > 1000
        return np.abs(np.log(share[0, common] / share[1, common])).mean()

    assert distance() > 3 * distance(assay_effect=0.0, dataset_effect=0.0, donor_effect=0.0)


def test_memory_does_not_grow_with_the_atlas():
    def peak(n_cells):
        tracemalloc.start()
        for block in simulate.blocks(changed(SMALL, n_cells=n_cells), 512):
            del block
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(512)
    assert peak(16 * 512) < 1.1 * peak(2 * 512)


def test_truth_is_written(tmp_path):
    planted = simulate.truth(SMALL)
    planted.write(tmp_path)
    told = json.loads((tmp_path / "truth.json").read_text())
    assert Atlas(**told["atlas"]) == SMALL
    programmes = pd.DataFrame(told["programmes"]).set_index("programme")
    pd.testing.assert_frame_equal(programmes, planted.programmes, check_dtype=False)
    assert told["types"]["cell_type"] == list(BLOOD)


def test_ontology_fits_the_types_and_tells_kin_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    types = simulate.truth(Atlas(n_genes=50)).types.index.to_numpy()
    kin = pd.DataFrame(kinship(types, "lib/datawall/data/cell_types.obo"), types, types)
    assert kin.loc["T cell", "regulatory T cell"]
    assert not kin.loc["naive B cell", "memory B cell"]
    assert not kin.loc["neuron", "T cell"]


def test_types_carry_the_programmes_of_their_lineage():
    planted = simulate.truth(SMALL)
    carried = planted.programmes.index[planted.weights[2] > 0]
    assert {"leukocyte", "lymphocyte", "mature B cell", "naive B cell"} < set(carried)
    assert not {"memory B cell", "myeloid leukocyte"} & set(carried)


def test_study_makes_the_corpus_with_its_truth_and_its_keys_follow_the_settings(tmp_path):
    def opened(**simulation):
        return small_study(tmp_path, corpus="simulated", simulation=SMALL.model_dump() | simulation)

    mine = opened()
    assert (mine.corpus_artifact.folder / "truth.json").exists()
    assert mine.corpus.shape == (1000, 200)
    assert opened().corpus_unit.key == mine.corpus_unit.key
    assert opened(seed=1).corpus_unit.key != mine.corpus_unit.key
    assert opened(n_cells=999).corpus_unit.key != mine.corpus_unit.key
    default = small_study(tmp_path, corpus="simulated").params
    assert default.simulation == Atlas()
    assert params.Params.model_validate_json(default.model_dump_json()) == default


def test_planted_markers_stand_out_in_their_type(tmp_path):
    mine = small_study(tmp_path, corpus="simulated", simulation=changed(SMALL, n_cells=3000).model_dump())
    markers = curation.markers(mine)
    assert list(markers) == list(BLOOD)
    table = curation.marker_expression(mine)
    assert all(table.loc[:, genes[0]].idxmax() == name for name, genes in markers.items())

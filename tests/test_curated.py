"""A study's corpus, split, evaluation sets and subsets, from files of its user's own."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from small import atlas, small_study

from datawall.cells import cellstore, corpus, datasets, simulate
from datawall.planning import preflight
from datawall.study import curation, dataset, params
from datawall.study.records import Subset

ATLAS = atlas(100, 600)


@pytest.fixture(scope="module")
def own_cells():
    """100 simulated cells x 600 genes, named by symbol."""
    adata = simulate.load(ATLAS)
    var = pd.DataFrame(index=adata.var["feature_name"].to_numpy())
    return ad.AnnData(adata.X.astype(np.float32), obs=adata.obs[["cell_type"]], var=var)


def study_of(adata, tmp_path, **values):
    path = tmp_path / "mine.h5ad"
    adata.write_h5ad(path)
    return small_study(tmp_path / "run", **{"study": "mine", "corpus": str(path), **values})


def checked(study):
    """What `--check` says of a study."""
    path = study.folder.with_suffix(".yaml")
    path.write_text(params.to_yaml(study.params.model_dump()))
    return preflight.check(path)


def test_own_corpus_is_aligned_and_split(own_cells, tmp_path):
    study = study_of(own_cells, tmp_path, held_out=0.25)
    made = study.corpus
    assert made.shape == own_cells.shape
    symbols = made.var["feature_name"].to_numpy()
    assert np.array_equal(made.counts().toarray(), own_cells[:, symbols].X.toarray())
    assert made.obs["cell_type"].astype(str).tolist() == own_cells.obs["cell_type"].astype(str).tolist()
    parts = [study.split_rows("pretraining"), study.split_rows("held_out")]
    assert [len(part) for part in parts] == [75, 25]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    other = study_of(own_cells, tmp_path, held_out=0.25, split_seed=1)
    assert not np.array_equal(other.split_rows("held_out"), parts[1])
    held_out = study.dataset("mine_held_out")
    assert held_out.obs_names.tolist() == own_cells.obs_names[parts[1]].tolist()
    assert np.array_equal(held_out.X.toarray(), own_cells[parts[1], symbols].X.toarray())


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"X": lambda adata: adata.X * 0.5}, r"no raw counts found \(X holds fractions"),
        ({"obs": lambda adata: adata.obs[[]]}, "no column 'cell_type'"),
        ({"var_names": lambda adata: [f"Gm{i}" for i in range(adata.n_vars)]}, "only 0 of 600 genes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_bad_corpus_is_refused_and_leaves_nothing(own_cells, tmp_path, spoiled, message):
    adata = own_cells.copy()
    for part, spoil in spoiled.items():
        setattr(adata, part, spoil(adata))
    study = study_of(adata, tmp_path)
    with pytest.raises(corpus.CorpusError, match=message) as error:
        _ = study.corpus
    assert "mine.h5ad: " in str(error.value)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_context_that_is_no_cell_type_is_refused_also_of_a_corpus_made_before(own_cells, tmp_path):
    response = {"tasks": ["perturbation_response"], "perturbation_key": "cell_type", "control": "any"}
    message = r"held_out_contexts names \['Nobody'\].*cell_type.*name some of these"
    with pytest.raises(corpus.CorpusError, match=message):
        _ = study_of(own_cells, tmp_path, held_out_contexts=["Nobody"], **response).corpus
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    # Contexts of a task that is left out do not matter.
    assert study_of(own_cells, tmp_path, held_out_contexts=["Nobody"]).corpus.n_obs == own_cells.n_obs
    with pytest.raises(corpus.CorpusError, match=message):
        _ = study_of(own_cells, tmp_path, held_out_contexts=["Nobody"], **response).corpus


# Several files


def test_files_become_one_corpus_that_reports_what_became_of_their_cells(own_cells, tmp_path):
    first, second = own_cells[:60].copy(), own_cells[50:].copy()  # ten cells are in both
    second.obs = second.obs.rename(columns={"cell_type": "label"})
    paths = []
    for name, part in (("first", first), ("second", second)):
        paths.append(tmp_path / f"{name}.h5ad")
        part.write_h5ad(paths[-1])
    keys = {"cell_type_key": {"first": "cell_type", "second": "label"}, "min_genes": 1}
    study = study_of(own_cells, tmp_path, corpus=[str(path) for path in paths], **keys)
    assert study.corpus.n_obs == 100
    assert study.corpus.obs["dataset_id"].value_counts().to_dict() == {"first": 60, "second": 40}
    assert study.corpus.names()[:1] == [f"first_{own_cells.obs_names[0]}"]
    reports = curation.reports(study)
    assert reports["duplicates"].iloc[0].to_dict() == {"kept_in": "first", "dropped_from": "second", "n_cells": 10}
    assert reports["cells"]["kept"].tolist() == [60, 40]
    assert curation.gene_matches(study).index.tolist() == ["first", "second"]
    assert list(study.params.evaluation_sets()) == ["first_held_out"]
    key = study_of(own_cells, tmp_path, corpus=str(paths[0])).corpus_unit.key
    renamed = str(paths[0].rename(tmp_path / "renamed.h5ad"))  # whose cells have the new name
    assert study_of(own_cells, tmp_path, corpus=renamed).corpus_unit.key != key


# Splits


def with_donors(adata, n_donors=5):
    adata = adata.copy()
    adata.obs["patient"] = [f"P{i % n_donors}" for i in range(adata.n_obs)]
    return adata


def test_whole_donors_are_held_out(own_cells, tmp_path):
    study = study_of(with_donors(own_cells), tmp_path, donor_key="patient", split_by="donor_id", held_out=0.2)
    donors = study.corpus.obs["donor_id"]
    parts = [set(donors.iloc[study.split_rows(part)]) for part in ("pretraining", "held_out")]
    assert [len(part) for part in parts] == [4, 1]
    assert not parts[0] & parts[1]
    assert curation.contamination(study)["shared_donors"].tolist() == [0]


def test_contamination_is_found_and_dropped(own_cells, tmp_path):
    other = with_donors(own_cells)[:7].copy()
    other.obs["patient"] = ["P0", "P0", *["Q"] * 5]
    other.obs_names = [f"other{i}" for i in range(7)]
    other.write_h5ad(tmp_path / "other.h5ad")
    values = {"donor_key": "patient", "evaluation": [str(tmp_path / "other.h5ad")]}
    study = study_of(with_donors(own_cells), tmp_path, **values)
    found = curation.contamination(study).loc["other"]
    # Seven cells twice, and the twenty cells of donor P0 in the corpus, of which two are among the seven.
    expected = {"duplicates": 7, "duplicate_rows": 7, "shared_donors": 1, "donor_cells": 2, "donor_rows": 20}
    assert found[list(expected)].to_dict() == expected
    assert len(study.split_rows("pretraining")) == 70
    dropping = study_of(with_donors(own_cells), tmp_path, drop_contaminated=True, **values)
    donors = dropping.corpus.obs["donor_id"].iloc[dropping.split_rows("pretraining")]
    assert "P0" not in set(donors)
    dropped = {*range(7), *range(0, 100, 5)}
    assert set(dropping.split_rows("pretraining")) == set(study.split_rows("pretraining")) - dropped
    assert np.array_equal(dropping.split_rows("held_out"), study.split_rows("held_out"))
    n_left = len(dropping.split_rows("pretraining"))
    facts = "\n".join(checked(dropping).facts)
    assert f"left out of pretraining: {70 - n_left} cells" in facts
    assert f"subsets of {n_left} cells" in facts


def test_contamination_that_leaves_no_cell_is_an_error(own_cells, tmp_path):
    study = study_of(own_cells, tmp_path, evaluation=[str(tmp_path / "mine.h5ad")], drop_contaminated=True)
    with pytest.raises(corpus.CorpusError, match="no cell of the corpus is left to pretrain on"):
        study.split_rows("pretraining")
    assert "no cell of the corpus is left to pretrain on" in checked(study).errors[0]


def test_counts_of_an_evaluation_set_may_lie_in_a_layer_and_are_read_in_blocks(own_cells, tmp_path, monkeypatch):
    other = own_cells[:10].copy()
    other.layers["counts"], other.X = other.X.copy(), other.X * 0.5
    other.write_h5ad(tmp_path / "other.h5ad")
    study = study_of(own_cells, tmp_path, evaluation=[str(tmp_path / "other.h5ad")])
    found = study.dataset("other")
    assert np.array_equal(found.X.toarray(), study.corpus.counts(np.arange(10)).toarray())
    monkeypatch.setattr(dataset, "AT_ONCE", 3)
    for name in ("other", "mine_held_out"):
        read = np.concatenate([counts.toarray() for counts in study.count_blocks(name)])
        assert np.array_equal(read, study.dataset(name).X.toarray())
    assert curation.gene_matches(study)["counts_from"].tolist() == ["X", "layers['counts']"]


def test_what_lies_on_disk_is_compared_in_blocks(own_cells, tmp_path, monkeypatch):
    study = study_of(with_donors(own_cells), tmp_path, donor_key="patient", held_out=0.2)
    monkeypatch.setattr(cellstore.Cells, "counts", None)  # what would load cells
    monkeypatch.setattr(dataset, "AT_ONCE", 3)  # of fewer it would
    found = curation.contamination(study).loc["mine_held_out"]
    assert found[["n_cells", "duplicates", "donor_cells", "donor_rows"]].tolist() == [20, 0, 20, 80]


# What notebook 1 shows


def test_quality_has_the_quantiles_of_all_cells(own_cells, tmp_path):
    study = study_of(own_cells, tmp_path)
    X, mitochondrial = study.corpus.counts().toarray(), study.corpus.var["feature_name"].str.startswith("MT-")
    totals = X.sum(axis=1)
    values = [(X > 0).sum(axis=1), totals, X[:, mitochondrial].sum(axis=1) / totals]
    expected = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1).T
    np.testing.assert_allclose(curation.quality(study), expected, rtol=1e-6)


def test_held_out_cells_are_set_beside_simulated_ones(own_cells, tmp_path, monkeypatch):
    study = study_of(own_cells, tmp_path, held_out=0.25)
    held_out = study.dataset("mine_held_out").X.toarray()
    counts = curation.beside_simulated(study)
    assert list(counts) == ["mine_held_out", "simulated"]
    assert np.array_equal(counts["mine_held_out"].toarray(), held_out)
    assert counts["simulated"].shape == held_out.shape
    monkeypatch.setattr(curation, "COMPARED", 10)
    some, simulated = curation.beside_simulated(study).values()
    assert some.shape == simulated.shape == (10, 600)
    assert {row.tobytes() for row in some.toarray()} < {row.tobytes() for row in held_out}


def test_simulated_cells_and_a_single_gene_are_set_beside_nothing(own_cells, tmp_path):
    simulation = ATLAS.model_dump()
    assert not curation.beside_simulated(study_of(own_cells, tmp_path, corpus="simulated", simulation=simulation))
    everywhere = np.asarray((own_cells.X > 0).sum(axis=0)).ravel().argmax()
    study = study_of(own_cells[:, [everywhere]], tmp_path)
    assert study.corpus.n_vars == 1
    assert not curation.beside_simulated(study)


def test_cells_that_a_named_data_set_loses_are_reported(own_cells, tmp_path, monkeypatch):
    cells = own_cells.copy()
    cells.X.data[: cells.X.indptr[3]] = 0
    monkeypatch.setattr(datasets, "load", lambda name: cells)
    table = curation.reports(study_of(own_cells, tmp_path, corpus="kang2018"))["cells"]
    assert table.to_dict("list") == {"dataset": ["kang2018"], "read": [100], "empty": [3], "kept": [97]}


def test_cell_ids_of_subsets_are_written(own_cells, tmp_path, monkeypatch):
    study = study_of(own_cells, tmp_path, percentages=[10, 100], held_out=0.2)
    table = curation.write_cell_ids(study, tmp_path / "ids")
    assert pd.read_csv(tmp_path / "ids" / "subsets.csv").equals(table)
    assert table["n_cells"].tolist() == [8, 80]
    for name, subset in zip(table["file"], study.subsets(), strict=True):
        names = (tmp_path / "ids" / name).read_text().splitlines()
        assert names == own_cells.obs_names[study.rows(subset)].tolist()
        for rows in (study.rows(subset), study.split_rows("pretraining"), study.split_rows("spike_in")):
            assert isinstance(rows, np.memmap)  # they stay in their files
            assert not rows.flags.writeable
    monkeypatch.setattr(cellstore.Cells, "names", None)
    with pytest.raises(TypeError):
        curation.write_cell_ids(study, tmp_path / "ids")
    assert len((tmp_path / "ids" / table["file"][0]).read_text().splitlines()) == 8  # as before


# Subsets


def test_nested_subsets_lie_within_each_other_and_others_do_not(own_cells, tmp_path):
    strategies = ["random", "celltype_reweighted", "geometric_sketching"]
    values = {"strategies": strategies, "percentages": [20, 50]}
    nested, apart = (study_of(own_cells, tmp_path, nested=each, **values) for each in (True, False))
    for strategy in strategies:
        small, large = (set(nested.rows(Subset(strategy, percentage, 0))) for percentage in (20, 50))
        assert small < large
    small, large = (set(apart.rows(Subset("random", percentage, 0))) for percentage in (20, 50))
    assert not small < large
    assert large <= set(apart.split_rows("pretraining"))


def test_spiked_in_cells_replace_a_share_of_a_random_subset(own_cells, tmp_path, monkeypatch):
    perturbed = own_cells[:30].copy()
    perturbed.obs = perturbed.obs[[]]
    perturbed.write_h5ad(tmp_path / "perturbed.h5ad")
    monkeypatch.setattr(datasets, "load", None)  # files are read in blocks
    values = {"strategies": ["random", "spikein_10", "spikein_50"], "percentages": [50, 100]}
    study = study_of(own_cells, tmp_path, spike_in=str(tmp_path / "perturbed.h5ad"), held_out=0.2, **values)
    spike_in = study.split_rows("spike_in")
    assert curation.gene_matches(study).loc["perturbed", ["matched", "in_corpus"]].tolist() == [600, 600]
    assert np.array_equal(spike_in, np.arange(100, 130))
    assert (study.corpus.obs["cell_type"].iloc[spike_in] == "spike-in").all()
    assert np.array_equal(study.corpus.counts(spike_in).toarray(), study.corpus.counts(np.arange(30)).toarray())
    for strategy, n_spiked in (("random", 0), ("spikein_10", 4), ("spikein_50", 20)):
        rows = study.rows(Subset(strategy, 50, 0))
        assert len(np.unique(rows)) == 40
        assert (rows >= 100).sum() == n_spiked
    assert study.pca_scores(study.rows(Subset("spikein_50", 50, 0))).shape[0] == 40
    with pytest.raises(ValueError, match="needs 40 perturbed cells, and there are 30"):
        study.rows(Subset("spikein_50", 100, 0))


def test_a_corpus_without_labels_is_clustered(own_cells, tmp_path):
    truth = own_cells.obs["cell_type"].to_numpy()
    unlabelled = own_cells.copy()
    unlabelled.obs = unlabelled.obs[[]]
    study = study_of(unlabelled, tmp_path, cell_type_key="leiden")
    clusters = study.corpus.obs["cell_type"]
    table = pd.crosstab(clusters, truth)
    assert 2 <= len(table) <= 20
    assert table.max(axis=1).sum() > 0.7 * len(truth)  # most cells of a cluster are of one type
    small = study.rows(Subset("random", 100, 0))
    assert len(small) == 70

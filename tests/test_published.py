import pytest

from datawall.analysis import published
from datawall.analysis.results import BASELINE, COLUMNS, select
from datawall.engine import disk

# Of the tables that the original study published, as they were read from its repository.
SHA256 = {
    "diversity.csv": "380bb9b4c5807d5870750fbe93e56414a07a183c7a1e6397ca8ba86f231030ec",
    "embedding_seconds.csv": "b40f039bcca0334274ffa71f0db0a2c18b9e6109c85d501f78c42a0111e547b9",
    "results.csv.gz": "4fc83e2a01add918a32c399866b8c89908b4edf09d20e0ac5f024c5fe5d31b8b",
    "vendi.csv": "ae50472199bf3f8d236d5d408596091a8142bfbaa46043813d6fd3a7a4d117b5",
}
RUN = ["model", "strategy", "percentage", "seed", "task", "dataset", "metric"]


@pytest.fixture(scope="module")
def everything():
    return published.results(in_figures=False)


def test_the_packaged_tables_are_the_published_ones():
    assert {path.name: disk.file_sha256(path) for path in published.TABLES.glob("*.csv*")} == SHA256


def test_results_have_the_columns_of_a_study_and_one_row_a_run(everything):
    assert list(everything.columns) == COLUMNS
    assert not everything.duplicated(RUN).any()
    assert not everything.isna().any(axis=None)
    assert len(everything) == 26_274 - 12  # two metrics of six rows that repeat a run


def test_rows_that_belong_to_another_run_are_dropped(everything):
    untrained = select(everything, task="zeroshot_classification", strategy="untrained", dataset="placenta")
    untrained = select(untrained, metric="micro_f1")
    assert "Geneformer" not in set(untrained["model"])
    assert untrained.groupby("model").size().to_dict() == {"PretrainedPCA": 5, "SCimilarity": 5, "SSL": 5, "scVI": 5}
    # The second five are at 0.906 to 0.910.
    assert select(untrained, model="SSL")["value"].mean() == pytest.approx(0.897, abs=5e-4)
    spiked = select(everything, model="SSL", strategy="spikein_10", percentage=100, dataset="periodontitis")
    spiked = select(spiked, task="finetuned_classification", metric="micro_f1")
    assert sorted(spiked["seed"]) == [26, 27, 28, 29]


def test_numbers_known_from_the_paper(everything):
    baselines = select(everything, strategy=BASELINE, metric="micro_f1", dataset="hematopoiesis")
    expected = {"HVG": 0.6427, "PCA": 0.9383, "LogisticRegression": 0.9285}
    assert baselines.set_index("model")["value"].round(4).to_dict() == expected
    scimilarity = select(everything, model="SCimilarity", strategy="random", dataset="hematopoiesis", metric="micro_f1")
    means = select(scimilarity, task="zeroshot_classification").groupby("percentage")["value"].mean()
    assert means.round(4).to_dict() == {1: 0.9185, 10: 0.9322, 25: 0.9349, 50: 0.9378, 75: 0.9380, 100: 0.9385}


def test_cells_are_counted_in_whole_per_cents(everything):
    cells = everything.groupby("percentage")["n_cells"].agg(["min", "max"])
    assert (cells["min"] == cells["max"]).all()
    assert cells["max"].to_dict() == {p: p * 177_525 for p in (0, 1, 10, 25, 50, 75, 100)}


def test_diversity_of_the_published_subsets():
    table = published.diversity()
    assert not table.duplicated(["strategy", "percentage", "seed"]).any()
    means = table.groupby(["strategy", "percentage"])[["shannon", "inverse_simpson", "vendi"]].mean()
    assert means.loc[("celltype_reweighted", 1)].round(3).tolist() == [7.357, 163.969, 133.746]
    assert means.loc[("geometric_sketching", 50)].round(1).tolist() == [6.0, 24.8, 193.4]
    assert means.loc[("random", 100), "inverse_simpson"] == pytest.approx(30.9, abs=0.05)
    assert means.loc["spikein_50", "shannon"].isna().all()
    assert set(table["strategy"]) < set(published.results()["strategy"])

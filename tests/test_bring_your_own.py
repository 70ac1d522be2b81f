"""Models, embeddings and data sets of the user's own, through a whole study."""

import importlib
import re
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from small import STUDY, atlas, small_study

import datawall as dw
from datawall import tasks
from datawall.analysis import results
from datawall.cells import datasets, simulate
from datawall.engine import disk
from datawall.models import external
from datawall.study import curation, dataset, evaluation, params, questions
from datawall.study.records import Embedding, Evaluation, EvaluationSet

README = (Path(__file__).resolve().parents[1] / "params" / "README.md").read_text()
SECTION = README.partition("## Bring your own")[2].partition("\n## ")[0]
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", SECTION, flags=re.S) for kind in ("python", "yaml")}
ATLAS = atlas(240, n_datasets=2, donors_per_dataset=2, responsive=["myeloid leukocyte", "lymphocyte"])
MINE = STUDY | {
    "corpus": "corpus.h5ad", "strategies": ["random", "untrained"], "percentages": [50, 100], "splits": 2,
    "perturbation_genes": 50,
}  # fmt: skip
TASK = "zeroshot_classification"


@pytest.fixture(scope="module")
def cells():
    """Simulated cells, the first 160 and the other 80."""
    adata = simulate.load(ATLAS)
    return adata[:160].copy(), adata[160:].copy()


@pytest.fixture
def here(cells, tmp_path, monkeypatch):
    """A working directory with the README's model, a corpus, and a data set whose columns have other names."""
    monkeypatch.chdir(tmp_path)
    corpus, other = cells
    corpus.write_h5ad("corpus.h5ad")
    other = other.copy()
    renamed = {"cell_type": "label", "dataset_id": "sample", "condition": "drug", "donor_id": "patient"}
    other.obs = other.obs.rename(columns=renamed)
    other.write_h5ad("other.h5ad")
    Path("mymodel.py").write_text(BLOCKS["python"][0])
    return tmp_path


def study_of(folder, **values):
    return small_study(folder / "run", **MINE | values)


def evaluated(study, task):
    """Results of a task, made in this process: the only one that knows what a test adds."""
    for one in evaluation.evaluations(study, task):
        evaluation.evaluation_artifact(study, one)
    return evaluation.evaluate(study, task)


def embed_elsewhere(study, file, key, scale=1.0):
    """Write what another tool would: the held-out cells in another order, and their labels as an embedding."""
    data = study.dataset(study.params.held_out_name)
    data = data[np.random.default_rng(0).permutation(data.n_obs)]
    types = pd.Categorical(data.obs["cell_type"]).codes
    noise = np.random.default_rng(1).normal(size=(data.n_obs, 3))
    X = np.eye(data.obs["cell_type"].nunique())[types][:, :3] + scale * 0.01 * noise
    ad.AnnData(obs=pd.DataFrame(index=data.obs_names), obsm={key: X}).write_h5ad(file)


# Models


def test_the_readmes_model_is_judged_like_any_other(here):
    section = yaml.safe_load(BLOCKS["yaml"][0])
    study = study_of(here, **section)
    table = evaluation.evaluate(study, "zeroshot_classification")
    scores = results.headline(table, "micro_f1").loc["corpus_held_out"]
    assert set(scores.index) == {"PretrainedPCA", "mymodel:SVD"}
    assert scores.loc["mymodel:SVD", "100 %"] > 0.9 > scores.loc["mymodel:SVD", "untrained"]
    run = next(run for run in study.pretraining_runs() if run.model == "mymodel:SVD")
    assert study.embedding(run, "corpus_held_out").shape[1] == 30
    assert study.pretrain()["model"].value_counts()["mymodel:SVD"] == 3


def test_a_users_model_is_asked_for_no_panel(here):
    Path("mymodel.py").write_text(BLOCKS["python"][0].replace("n_components", "n_genes"))
    given = {"models": ["mymodel:SVD"], "hyperparameters": {"mymodel:SVD": {"n_genes": 20}}}
    assert questions.panels(study_of(here, **given)).empty
    given = {"models": ["SSL"], "strategies": ["celltype_reweighted"], "percentages": [50]}  # no random subset
    assert questions.panels(study_of(here, **given, hyperparameters={"SSL": {"n_genes": 20}})).empty


def test_an_adaptive_study_takes_a_model_that_tells_no_loss_and_whose_batches_are_its_own(here):
    Path("mymodel.py").write_text(BLOCKS["python"][0].replace("n_components", "batch_size"))
    given = {"models": ["mymodel:SVD"], "tasks": [TASK, "reconstruction"], "seeds": [0, 1], "adaptive": True}
    study = study_of(here, **given, gpus={"mymodel:SVD": 2})
    assert questions.pretrain_adaptively(study)["task"].tolist() == [TASK]
    assert set(questions.levers(study)["samples"]) == {0}
    assert {study.costs.run(run).gpus for run in study.all_runs()} == {0, 2}  # none where there is nothing to learn


def test_an_edited_model_file_redoes_its_own_work_only_and_is_read_again(here):
    def keys():
        return {run: study.model_unit(run).key for run in study.pretraining_runs()}

    study = study_of(here, models=["PretrainedPCA", "mymodel:SVD"])
    before = keys()
    evaluation.evaluate(study, TASK)
    mine = next(run for run in before if run.model == "mymodel:SVD")
    assert study.embedding(mine, "corpus_held_out").shape[1] == 20
    Path("mymodel.py").write_text(BLOCKS["python"][0].replace("n_components=20", "n_components=7"))
    after = keys()
    assert {run.model for run in before if before[run] != after[run]} == {"mymodel:SVD"}
    assert study.embedding(mine, "corpus_held_out").shape[1] == 7


def test_what_a_model_imports_of_its_own_counts_as_its_source(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which may be as old as what is edited right after
    helped = BLOCKS["python"][0].replace("n_components=20", "n_components=size.OF_IT")
    files = {
        "mymodel.py": helped.replace("import", "import size\nimport", 1),
        "size.py": "import other\nfrom beside.inner import OF_IT\n",
        "beside/inner.py": "OF_IT = 20\n",
        "other.py": "import mymodel\n",
        "not_imported.py": "",
        "own/__init__.py": "",
        "own/inner.py": "from own import size\n",
        "own/size.py": "",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    alone, packaged = external.version("mymodel:SVD"), external.version("own.inner:SVD")
    assert external.model_class("mymodel:SVD")().n_components == 20
    Path("not_imported.py").write_text("x = 1\n")
    assert (external.version("mymodel:SVD"), external.version("own.inner:SVD")) == (alone, packaged)
    Path("own/size.py").write_text("x = 1\n")
    assert external.version("own.inner:SVD") != packaged
    Path("other.py").write_text("")
    assert external.version("mymodel:SVD") != alone
    Path("beside/inner.py").write_text("OF_IT = 7\n")
    assert external.model_class("mymodel:SVD")().n_components == 7


def test_a_module_is_found_and_checking_a_study_file_runs_nothing_of_it(here, monkeypatch):
    monkeypatch.syspath_prepend(here / "packages")
    Path("packages/explosive/inner").mkdir(parents=True)
    for part in ("__init__.py", "inner/__init__.py", "inner/model.py"):
        Path("packages/explosive", part).write_text("raise RuntimeError('was run')\n")
    study = study_of(here, models=["explosive.inner.model:Model"])
    assert external.source_file(study.params.models[0]) == here / "packages/explosive/inner/model.py"
    places = {"mymodel:SVD": here, "run_all:Any": Path(__file__).resolve().parents[1]}  # here, in the repository
    assert {name: external.source_file(name).parent for name in places} == places
    assert external.source_file("sklearn.svm:SVC").parts[-3:] == ("sklearn", "svm", "__init__.py")
    for name in ("explosive.nowhere:Model", "explosive.inner.model.more:Model"):
        with pytest.raises(ValueError, match="no module"):
            external.source_file(name)


def test_a_subclass_of_a_family_is_a_model(here):
    Path("wider.py").write_text("from datawall.models import SSL\nclass Wider(SSL):\n    pass\n")
    options = {"n_hidden": [8], "n_latent": 4, "batch_size": 16}
    study = study_of(here, models=["SSL", "wider:Wider"], hyperparameters={"SSL": options, "wider:Wider": options})
    runs = {run.model: run for run in study.pretraining_runs() if run.subset.percentage == 100}
    embeddings = [study.embedding(run, "corpus_held_out") for run in runs.values()]
    assert type(study.model(runs["wider:Wider"])).__name__ == "Wider"
    assert np.array_equal(*embeddings)


def test_an_installed_model_is_the_one_that_is_imported_already(here, monkeypatch):
    monkeypatch.syspath_prepend(here / "packages")
    Path("packages").mkdir()
    Path("packages/installed_model.py").write_text("from datawall.models import SSL\nclass Model(SSL):\n    pass\n")
    imported = importlib.import_module("installed_model")
    assert external.model_class("installed_model:Model") is imported.Model
    assert sys.modules["installed_model"] is imported


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("x = 1\n", ["half.py", "no class 'Model'"]),
        ("class Model:\n    def fit(self): ...\n    def embed(self): ...\n", ["lacks untrained, save, load"]),
    ],
)
def test_a_class_that_is_no_model_is_named(here, source, named):
    Path("half.py").write_text(source)
    with pytest.raises(ValueError, match="half:Model") as error:
        dw.models.create("half:Model")
    assert all(part in str(error.value) for part in named)


def test_an_embedding_of_the_wrong_shape_is_named(here):
    Path("mymodel.py").write_text(BLOCKS["python"][0].replace("@ self.axes.T", "@ self.axes[0]"))
    study = study_of(here, models=["mymodel:SVD"])
    with pytest.raises(ValueError, match=r"mymodel:SVD: embed gave an array of shape \(48,\) for 48 cells"):
        study.embedding(study.pretraining_runs()[0], "corpus_held_out")


# Embeddings


def test_embeddings_from_files_are_scored_under_their_models_name(here):
    subset = {"strategy": "random", "percentage": 50, "seed": 0}
    given = [
        {"model": "scGPT", "dataset": "corpus_held_out", "file": "scgpt.h5ad"},
        {"model": "ours", "dataset": "corpus_held_out", "file": "ours.h5ad", "key": "X_latent", **subset},
    ]
    plain = study_of(here)
    embed_elsewhere(plain, "scgpt.h5ad", "X_scGPT")
    embed_elsewhere(plain, "ours.h5ad", "X_latent", scale=100)
    study = study_of(here, embeddings=given)
    table = evaluated(study, "zeroshot_classification")
    scores = results.mean_over_splits(results.select(table, metric="micro_f1")).set_index("model")
    published, ours = scores.loc["scGPT"], scores.loc["ours"]
    assert published[["strategy", "percentage", "seed", "n_cells", "value"]].tolist() == ["checkpoint", 0, -1, 0, 1]
    assert ours[["strategy", "percentage", "seed", "n_cells"]].tolist() == ["random", 50, 0, 56]
    assert ours["value"] < 0.9
    head = Evaluation("finetuned_classification", "corpus_held_out", study.params.embeddings[0])
    found = {split: metrics["micro_f1"] for split, metrics in evaluation.score(study, head)}
    assert found == {"cells 0": 1, "cells 1": 1}


def test_a_checkpoint_is_a_line_and_a_model_on_a_subset_a_curve():
    rows = [("PCA", "baseline", 0, 0.9), ("scGPT", "checkpoint", 0, 0.8), ("ours", "random", 50, 0.7)]
    table = pd.DataFrame(rows, columns=["model", "strategy", "percentage", "value"])
    same = {"study": "mine", "seed": 0, "n_cells": 1, "task": "t", "dataset": "d", "metric": "m", "split": "cells 0"}
    figure = dw.plots.learning_curves(table.assign(**same), "m")
    assert [axis.get_title() for axis in figure.axes] == ["ours"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"PCA", "scGPT", "random"}


def test_a_new_file_of_embeddings_redoes_its_evaluations(here):
    study, keys = study_of(here), []
    for scale in (1, 2):
        embed_elsewhere(study, "scgpt.h5ad", "X_scGPT", scale=scale)
        mine = study_of(here, embeddings=[{"model": "scGPT", "dataset": "corpus_held_out", "file": "scgpt.h5ad"}])
        keys.append([evaluation.evaluation_unit(mine, one).key for one in evaluation.evaluations(mine, TASK)])
    assert keys[0][:-1] == keys[1][:-1]
    assert keys[0][-1] != keys[1][-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda names, X: (names[:-2], X[:-2], "X_a"), r"a\.h5ad: lacks 2 of the 48 .* \(first: .*; cells are matched"),
        (lambda names, X: (names, X, "X_b"), r"a\.h5ad: no 'X_a' in obsm; it has 'X_b'"),
        (lambda names, X: ([names[0], *names[:-1]], X, "X_a"), "occurs more than once"),
        (lambda names, X: (names, X / np.arange(-3, len(X) - 3)[:, None], "X_a"), r"obsm\['X_a'\] is NaN or infinite"),
        (lambda names, X: (names, pd.DataFrame({"a": "x"}, names), "X_a"), r"obsm\['X_a'\] holds .* no numbers"),
        (lambda names, X: (names, X[:, :0], "X_a"), r"obsm\['X_a'\] has the shape \(48, 0\)"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Observation names are not unique:UserWarning", "ignore:invalid value:RuntimeWarning"
)
def test_a_file_that_does_not_fit_is_one_clear_error(here, spoil, message):
    study = study_of(here)
    data = study.dataset("corpus_held_out")
    names, X, key = spoil(data.obs_names, np.zeros((data.n_obs, 2)))  # 0 / 0 is no number
    ad.AnnData(obs=pd.DataFrame(index=names), obsm={key: X}).write_h5ad("a.h5ad")
    with pytest.raises(ValueError, match=message):
        study.embedding(Embedding(model="a", dataset="corpus_held_out", file="a.h5ad"), "corpus_held_out")


# Data sets


def test_a_data_set_joins_the_tasks_that_its_columns_allow(here):
    every = ["zeroshot_classification", "zeroshot_integration", "perturbation_response"]
    columns = {"cell_type_key": "label", "batch_key": "sample", "perturbation_key": "drug", "control": "ctrl"}
    mine = {"file": "other.h5ad", "name": "lung", "donor_key": "patient", **columns}
    only = {"file": "other.h5ad", "name": "response", **columns, "tasks": ["perturbation_response"]}
    study = study_of(here, evaluation=[mine, only], tasks=every)
    joined = {task: {one.dataset for one in evaluation.evaluations(study, task)} for task in every}
    assert joined == {
        "zeroshot_classification": {"corpus_held_out", "lung"},
        "zeroshot_integration": {"lung"},
        "perturbation_response": {"lung", "response"},
    }
    obs, wanted = study.dataset("lung").obs, simulate.load(ATLAS).obs[160:]
    for role, column in {"cell_type": "cell_type", "batch": "dataset_id", "donor_id": "donor_id"}.items():
        assert obs[role].astype(str).tolist() == wanted[column].astype(str).tolist()
    assert "donor_id" not in study.dataset("response").obs
    tables = [evaluated(study, task) for task in every]
    assert {"donors 0", "cells 0"} <= set(results.select(tables[0], dataset="lung")["split"])
    assert set(results.select(tables[0], dataset="corpus_held_out")["split"]) == {"cells 0", "cells 1"}
    response = results.select(tables[2], metric="pearson_delta", split="classical monocyte held out")
    assert set(response["dataset"]) == {"lung", "response"}


def test_cells_of_which_the_corpus_has_no_count_are_left_out_and_told(here, cells):
    corpus, other = cells[0][:, :100].copy(), cells[1].copy()
    corpus.write_h5ad("corpus.h5ad")
    other.X = sp.csr_matrix(other.X.toarray() * ((np.arange(80)[:, None] >= 5) | (np.arange(300) >= 100)))
    other.write_h5ad("other.h5ad")
    study = study_of(here, evaluation=[{"file": "other.h5ad", "name": "lung"}])
    assert study.dataset("lung").n_obs == 75
    told = r"lung: 100 of its genes, with \d+% of its counts, are in the corpus; 5 cells have none .* are left out"
    assert re.search(told, "\n".join(curation.remarks(study)))


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_keys_of_a_whole_study_read_each_file_once(here, monkeypatch, suffix):
    if suffix == "zarr":
        ad.read_h5ad("other.h5ad").write_zarr("other.zarr")
    hashed, looked_at = [], []
    of_file, of_set = disk.file_sha256, datasets.identity
    monkeypatch.setattr(disk, "file_sha256", lambda path: hashed.append(path) or of_file(path))
    monkeypatch.setattr(datasets, "identity", lambda *of: looked_at.append(of) or of_set(*of))
    study = study_of(here, evaluation=[{"file": f"other.{suffix}", "cell_type_key": "label"}])
    for one in evaluation.evaluations(study, TASK):
        assert evaluation.evaluation_unit(study, one).key
    assert len(hashed) == len(set(hashed))
    assert {Path(path).parts[0] for path, *_ in looked_at} == {"corpus.h5ad", f"other.{suffix}"}
    assert len(looked_at) == 2


def test_data_sets_stay_in_memory_as_far_as_it_goes(here, monkeypatch):
    records = [{"file": "other.h5ad", "name": name, "cell_type_key": "label"} for name in "abc"]
    read, reading = [], ad.read_h5ad
    monkeypatch.setattr(ad, "read_h5ad", lambda path: read.append(path) or reading(path))
    study = study_of(here, evaluation=records)
    size = max(sys.getsizeof(study.dataset(name)) for name in "abc")
    read.clear()
    for name in "abcacb":
        study.dataset(name)
    assert not read
    study = study_of(here, evaluation=records)
    monkeypatch.setattr(dataset, "KEPT", size)  # one beside the one that is worked on
    for name in "abcacb":
        study.dataset(name)
    assert [path.parent for path in read] == [study.dataset_artifact(name).folder for name in "abcab"]


def test_a_data_set_that_is_only_named_is_written_back_as_a_name():
    study = params.check({**MINE, "evaluation": ["pbmc68k", {"file": "a.h5ad", "batch_key": "b"}]}, "mine.yaml")
    assert study.evaluation[0] == EvaluationSet(file="pbmc68k")
    assert study.model_dump()["evaluation"] == ["pbmc68k", {"file": "a.h5ad", "batch_key": "b"}]
    assert params.Params.model_validate_json(study.model_dump_json()) == study


GIVEN = {"model": "a", "dataset": "corpus_held_out", "file": "a.h5ad"}
NO_SUBSET = {"strategy": "random", "percentage": 3, "seed": 0}
WITHOUT_BATCHES = {"file": "x.h5ad", "tasks": ["zeroshot_integration"]}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"models": ["nowhere:Model"]}, ["nowhere:Model", "no module 'nowhere'", "put the file there"]),
        ({"evaluation": ["a/x.h5ad", "b/x.h5ad"]}, ["'x', 'x'", "`name`"]),
        ({"evaluation": [{"file": "x.h5ad", "batchkey": "b"}]}, ["evaluation.0.batchkey", "did you mean 'batch_key'?"]),
        ({"evaluation": [WITHOUT_BATCHES]}, ["evaluation: x: zeroshot_integration needs batch_key"]),
        ({"embeddings": [GIVEN | {"file": "no.h5ad"}]}, ["no.h5ad: no such file"]),
        ({"embeddings": [GIVEN | {"file": "a.npy"}]}, ["a.npy", ".h5ad"]),
        ({"embeddings": [GIVEN | {"dataset": "nosuch"}]}, ["'nosuch'", "corpus_held_out"]),
        ({"embeddings": [GIVEN | {"seed": 0}]}, ["embeddings.0", "all three, or none"]),
        ({"embeddings": [GIVEN | NO_SUBSET]}, ["random at 3 %, seed 0", "no subset of this study"]),
        ({"embeddings": [GIVEN | {"model": "PretrainedPCA"}]}, ["has a model of that name"]),
        ({"embeddings": [GIVEN] * 2}, ["listed twice"]),
        ({"embeddings": [GIVEN | {"model": "SSL"}], "also": [{"name": "b", "models": ["SSL"]}]}, ["of that name"]),
    ],
)
def test_a_wrong_declaration_is_one_line(here, changes, parts):
    Path("a.h5ad").touch()
    with pytest.raises(params.ParamsError) as error:
        params.check({**MINE, **changes}, "mine.yaml")
    [line] = str(error.value).splitlines()
    assert line.startswith("mine.yaml: ")
    assert all(part in line for part in parts)


def test_the_readmes_declarations_are_valid(here):
    for name in ("scgpt_kang.h5ad", "mine_10.h5ad"):
        Path(name).touch()
    values = {**MINE, "corpus": "kang2018", "percentages": [10], "tasks": list(tasks.TASKS)}
    values |= {"batch_key": "condition", "perturbation_key": "condition", "control": "ctrl"}
    for block in BLOCKS["yaml"]:
        values |= yaml.safe_load(block)
    study = params.check(values, "mine.yaml")
    assert list(study.evaluation_sets()) == ["kang2018_held_out", "pbmc68k", "lung", "glioblastoma"]
    assert [one.obsm_key for one in study.embeddings] == ["X_scGPT", "X_latent"]

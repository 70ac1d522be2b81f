"""`run_all.py --new` and `--check`: what is proposed for data of one's own, and what is found before a run."""

import io
import shutil
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import real
import scipy.sparse as sp
import yaml
from small import STUDY

import run_all
from datawall.cells import corpus, datasets, sources
from datawall.planning import preflight, starter
from datawall.study import params

ROOT = Path(__file__).resolve().parents[1]
N = 600


@pytest.fixture
def compendium(tmp_path, monkeypatch):
    """A compendium with the default study and some labelled cells, as the working directory."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "params" / "quick.yaml", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    cells("cells.h5ad", **LABELLED)
    return tmp_path


def cells(path, n_cells=N, **columns):
    """Write counts of 60 genes, with columns of obs that repeat the values given."""
    rng = np.random.default_rng(0)
    genes = corpus.gene_table().index[:60]
    counts = sp.csr_matrix(rng.poisson(1.0, (n_cells, len(genes))).astype(np.float32))
    of_text = {key: np.array(values, object) for key, values in columns.items() if key != "n_counts"}
    obs = {key: np.resize(values, n_cells) for key, values in (columns | of_text).items()}
    index = [f"cell {i}" for i in range(n_cells)]
    ad.AnnData(counts, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(index=genes)).write_h5ad(path)
    return str(path)


def blocks(values):
    """Labels in long runs, so that they cross with labels that alternate."""
    return np.repeat(values, -(-N // len(values)))


LABELLED = {
    "barcode": [f"b{i}" for i in range(N)],
    "cell_type_ontology_term_id": ["CL:1", "CL:2", "CL:3"],
    "cell_type": ["B cell", "T cell", "NK cell"],
    "patient": blocks(["p1", "p2", "p3"]),
    "sample_id": blocks(["s1", "s2", "s3", "s4", "s5", "s6"]),
    "condition": ["stim", "ctrl"],
    "disease": ["normal", "lupus", "asthma"],
    "n_counts": np.linspace(0.5, 9.5, N),
}


def test_columns_are_proposed_by_name_and_content(tmp_path):
    looked = starter.look([cells(tmp_path / "cells.h5ad", **LABELLED)])
    assert (looked.n_cells, looked.matches[0].matched) == (N, 60)
    assert "n_counts" not in looked.obs  # numbers with fractions label nothing
    columns = {"cell_type": "cell_type", "batch": "sample_id", "donor": "patient"}
    assert starter.propose(looked) == columns | {"perturbation": "condition", "control": "ctrl"}


@pytest.mark.parametrize(
    ("values", "control"),
    [
        (["DMSO 0.1 %", "drug"], "DMSO 0.1 %"),
        (["Untreated", "IFN"], "Untreated"),
        (["wt", "ko"], "wt"),
        (["a", "b"], None),
        (["control", "mock"], None),  # which of them?
        (["ctrl", "a", "b"], "ctrl"),
        (["ctrl", "mock", "b"], None),
        (["ctrl", None], None),
    ],
)
def test_control_is_told_by_its_name(values, control):
    assert starter.control_of(pd.Series(values * 3)) == control


def test_column_with_gaps_or_one_value_is_not_proposed(tmp_path):
    gaps = ["B", None]
    looked = starter.look([cells(tmp_path / "cells.h5ad", cell_type=gaps, batch=["o\n"], louvain=["0", "1"])])
    assert starter.describe(looked, "batch") == r"1 values: 'o\n' (600)"
    nothing = dict.fromkeys(["batch", "donor", "perturbation", "control"])
    assert starter.propose(looked) == {"cell_type": "louvain", **nothing}


@pytest.mark.parametrize("n_cells", [60, 600, 5_000, 10_000, 1_000_000])
def test_sizes_are_large_enough_and_four_where_they_can_be(n_cells):
    sizes = starter.sizes(n_cells, [1, 10, 25, 100])
    assert list(sizes) == sorted(sizes)
    assert list(sizes)[-1] == 100
    assert sizes[100] == n_cells
    assert min(sizes.values()) >= min(starter.FEW, n_cells / 2)
    assert len(sizes) >= 4 or n_cells < 4 * starter.FEW


def test_new_writes_a_study_file_that_checks(compendium, capsys):
    assert run_all.main(["--new", "mine", "--corpus", "cells.h5ad"]) == 0
    said = capsys.readouterr().out
    assert "600 cells, counts in X, 60 of 60 genes known by Ensembl id" in said
    assert "written: params/mine.yaml" in said
    p = params.read(Path("params/mine.yaml"))
    columns = {"cell_type": "cell_type", "batch": "sample_id", "perturbation": "condition", "donor_id": "patient"}
    assert p.columns() == columns
    assert p.control == "ctrl"
    assert p.hyperparameters == params.read(Path("params/quick.yaml")).hyperparameters
    assert set(p.held_out_contexts) < {"B cell", "T cell", "NK cell"}
    assert "# 3 values: " in Path("params/mine.yaml").read_text()
    assert run_all.main(["--check", "mine"]) == 0
    said = capsys.readouterr().out
    assert "subsets of 420 cells" in said
    assert "mistakes that would stop it: none" in said
    assert not (compendium / "runs").exists()


ALL_NONE = ["--batch", "none", "--perturbation", "none", "--donor", "none"]
WITHOUT_COLUMNS = ["zeroshot_classification", "finetuned_classification", "reconstruction"]
NASTY = {"cell type: 'x' # no": ["yes", "a: b\n- c"], "null": ["1", "2"]}  # what YAML would read otherwise


@pytest.mark.parametrize(
    ("columns", "words", "expected"),
    [
        (
            LABELLED,
            ["--label", "cell_type_ontology_term_id", *ALL_NONE],
            {"cell_type_key": "cell_type_ontology_term_id", "donor_key": None, "tasks": WITHOUT_COLUMNS},
        ),
        ({"n_counts": [0.0, 1.0, 2.0, 3.0, 4.0]}, ["--label", "n_counts"], {"cell_type_key": "n_counts"}),
        ({"batch": ["a", "b"]}, [], {"cell_type_key": params.CLUSTERS}),
        (NASTY, ["--batch", "null"], {"cell_type_key": "cell type: 'x' # no", "batch_key": "null"}),
    ],
)
def test_new_takes_what_is_given_and_leaves_out_what_is_not_there(compendium, columns, words, expected):
    assert run_all.main(["--new", "mine", "--corpus", cells(compendium / "cells.h5ad", **columns), *words]) == 0
    p = params.read(Path("params/mine.yaml"))
    assert {key: getattr(p, key) for key in expected} == expected
    assert set(yaml.safe_load(Path("params/mine.yaml").read_text())) <= set(params.Params.model_fields)


def test_new_takes_more_settings(compendium, capsys):
    words = ["--set", "steps=7", "--set", "min_matched_genes=0.1", "--set", "hyperparameters={}"]
    assert run_all.main(["--new", "mine", "--corpus", "cells.h5ad", *words]) == 0
    p = params.read(Path("params/mine.yaml"))
    assert (p.steps, p.min_matched_genes, p.hyperparameters) == (7, 0.1, {})
    assert p.steps_by_model["Geneformer"] == 240  # no fewer than in the default study
    words = ["--set", "percentages=[20, 100]", "--set", "labels={B cell: b, T cell: t, NK cell: nk}"]
    assert run_all.main(["--new", "sized", "--corpus", "cells.h5ad", *words]) == 0
    p = params.read(Path("params/sized.yaml"))
    assert (p.budget_check.percentages, p.also[0].percentages) == ([100], [20])
    assert set(p.held_out_contexts) < {"b", "t", "nk"}
    assert run_all.main(["--new", "other", "--corpus", "cells.h5ad", "--set", "batch_key=x"]) == 2
    assert "--set batch_key: with --new, name it as --batch." in capsys.readouterr().err


def test_new_joins_files_by_the_columns_that_all_have(compendium):
    one = cells(compendium / "one.h5ad", cell_type=["B", "T"], batch=["a", "b"])
    other = cells(compendium / "other.h5ad", cell_type=["B", "NK"])
    assert run_all.main(["--new", "mine", "--corpus", one, other]) == 0
    p = params.read(Path("params/mine.yaml"))
    assert (p.corpus, p.batch_key, p.cell_type_key) == ([one, other], None, "cell_type")
    assert "3 values" in Path("params/mine.yaml").read_text()


def test_new_asks_on_a_terminal_until_the_answer_is_there(compendium, monkeypatch):
    asked = []
    answers = iter(["nosuch", "cell_type_ontology_term_id", "", "none", "condition", "nothing", "stim"])

    def answer(question):
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run_all.main(["--new", "mine", "--corpus", "cells.h5ad"]) == 0
    p = params.read(Path("params/mine.yaml"))
    assert p.columns() == {"cell_type": "cell_type_ontology_term_id", "batch": "sample_id", "perturbation": "condition"}
    assert p.control == "stim"
    assert asked[0] == "column with the cell types (or leiden, to cluster instead) [cell_type]: "
    assert len(asked) == 7


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--new", "mine"], ["--corpus"]),
        (["--new", "mine", "--corpus", "nosuch.h5ad"], ["nosuch.h5ad", "no such file"]),
        (["--new", "mine", "--corpus", "cells.h5ad", "--label", "nosuch"], ["nosuch", "'cell_type'"]),
        (["--new", "mine", "--corpus", "cells.h5ad", "--control", "x"], ["'x'", "'condition'", "ctrl"]),
        (["--new", "a/b", "--corpus", "cells.h5ad"], ["a/b"]),
        (["--new", "quick", "--corpus", "cells.h5ad"], ["quick.yaml", "another name"]),
        (["--check", "mine.yaml"], ["steps", "nosuch"]),
    ],
)
def test_new_and_check_refuse_with_clear_lines(words, named, compendium, capsys):
    before = sorted(Path("params").iterdir())
    study(compendium, steps=0, nosuch=1)
    assert run_all.main(words) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert sorted(Path("params").iterdir()) == before


def study(folder, **values):
    """Write a study file for `cells.h5ad`."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"corpus": "cells.h5ad", "percentages": [10, 100], **values}))
    return path


def test_check_names_the_first_mistake_of_each_data_set(compendium):
    cells(compendium / "cells.h5ad", **{**LABELLED, "cell_type": ["B cell", "T cell", None]})
    again = {"file": "cells.h5ad", "name": "again", "cell_type_key": "type"}
    found = preflight.check(study(compendium, evaluation=["gone.h5ad", again]))
    named = ["'cell_type'", "is missing for 200 cells"], ["gone.h5ad", "no such file"], ["no column 'type'"]
    for line, words in zip(found.errors, named, strict=True):
        assert all(word in line for word in words), line


def test_check_warns_of_what_is_too_small(compendium):
    types = ["B cell"] * 300 + ["T cell"] * 290 + ["rare"] * 10
    cells(compendium / "cells.h5ad", cell_type=types)
    found = preflight.check(study(compendium))
    assert found.errors == []
    assert "cell type: 3 values; the rarest is 'rare' with 10 cells" in found.facts
    assert "subsets of 420 cells: 10 % is 42, 100 % is 420" in found.facts
    assert "work: 2 subsets, 2 models, 2 experiments, 4 baselines" in found.facts
    assert [line for line in found.warnings if "under 50 cells to pretrain on at 10 %" in line]
    assert [line for line in found.warnings if "1 of 3 cell types" in line and "rare" in line]
    found = preflight.check(study(compendium, percentages=[0.1, 100]))
    assert found.errors == ["percentages: 0.1 % is one cell, of which no model learns; give more."]
    found = preflight.check(study(compendium, labels={"rare": "T cell", "Rare": "T cell"}))
    assert "labels: no cell is of the types ['Rare']; correct them, or leave them out." in found.warnings
    found = preflight.check(study(compendium, models=["SSL"], budget_check={"percentages": [5], "seeds": [0]}))
    assert [line for line in found.warnings if line.startswith("no run of the study is one of budget_check: ")]
    found = preflight.check(study(compendium, models=["SSL"], budget_check={"percentages": [10], "seeds": [0, 7]}))
    assert "budget_check: the study has no random subset of 10 % of seed 7: left out." in found.warnings
    Path("chosen.json").write_text("{}")  # no run folder's
    found = preflight.check(study(compendium, adaptive=True, seeds=[0, 1]))
    assert "work: 4 subsets, 4 models, 4 experiments, 4 baselines" in found.facts


def test_check_takes_the_columns_that_a_run_takes(compendium):
    """Any number of donors, and labels that are numbers, as in large corpora; the run's own reader is asked too."""
    donors = [f"donor {i}" for i in range(1_500)]
    cells(compendium / "cells.h5ad", n_cells=3_000, cell_type=["B cell", "T cell"], person=donors, n_counts=[0.0, 1.5])
    path = study(compendium, cell_type_key="n_counts", donor_key="person")
    found = preflight.check(path)
    assert found.errors == []
    assert "donor: 1500 values; the rarest is 'donor 999' with 2 cells" in found.facts
    source = sources.open_source(["cells.h5ad"], {"cell_type": "n_counts", "donor_id": "person"}, sources.Options())
    obs = pd.concat([block.obs for block in source.blocks()])
    assert obs["cell_type"].unique().tolist() == ["0", "1.5"]
    assert obs["donor_id"].nunique() == 1_500
    found = preflight.check(study(compendium, cell_type_key="person"))
    assert found.errors == ["no task is left to judge by; give more cells, types or columns."]  # a type a cell
    assert "'person' has 1,500 cell types; is it the column?" in found.warnings


def test_check_says_when_no_context_is_left(compendium):
    types, values = ["B cell", "T cell"], {"perturbation_key": "condition", "control": "ctrl"}
    values["tasks"] = ["perturbation_response"]
    cells("cells.h5ad", cell_type=types, condition=["ctrl", "stim"])  # one treatment a type
    found = preflight.check(study(compendium, **values))
    assert found.errors == ["no task is left to judge by; give more cells, types or columns."]
    left_out = "left out: perturbation_response on cells_held_out: perturbation response needs two cell types"
    assert [line for line in found.facts if line.startswith(left_out)]
    cells("cells.h5ad", cell_type=types, condition=["ctrl"] * 2 + ["stim"] * 2)
    found = preflight.check(study(compendium, **values, held_out_contexts=["B cell", "moss"]))
    assert [line for line in found.errors if "held_out_contexts" in line and "['moss']" in line]


def test_check_of_simulated_and_census_studies_opens_nothing(compendium):
    for name, n_pretraining in {"tiny": "560", "simulated": "4,200"}.items():
        shutil.copy(ROOT / "params" / f"{name}.yaml", compendium / "params")
        found = preflight.check(Path(f"params/{name}.yaml"))
        assert found.errors == []
        assert "simulated cells" in found.facts[0]
        assert found.facts[1].startswith(f"subsets of {n_pretraining} cells: ")  # the rest is held out
    census = study(compendium, corpus="census", census={"ontology": "cl.obo"})
    assert "Census" in preflight.check(census).facts[0]


def test_real_cells_are_understood(tmp_path):
    kang = real.kang()
    kang.obs["donor"] = np.resize(["101", "107"], kang.n_obs)
    for name, adata in {"kang": kang, "pbmc68k": datasets.load_pbmc68k()}.items():
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    kang, pbmc68k = (starter.propose(starter.look([str(tmp_path / f"{name}.h5ad")])) for name in ("kang", "pbmc68k"))
    assert kang["cell_type"] == pbmc68k["cell_type"] == "cell_type"
    assert (kang["perturbation"], kang["control"], kang["batch"]) == ("condition", "ctrl", "donor")
    assert (pbmc68k["perturbation"], pbmc68k["batch"]) == (None, None)

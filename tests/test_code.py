"""A unit's key names all the code that decides its content: its maker, what this imports, and so on; and no other."""

import ast
from types import SimpleNamespace

import pytest

from datawall import models, tasks
from datawall.engine import store
from datawall.study import evaluation, params, study
from datawall.study.curated import Subset
from datawall.study.units import Run


@pytest.fixture
def library(monkeypatch):
    """What a library of these modules says of a maker."""

    def of(*makers, **sources):
        monkeypatch.setattr(store, "SOURCES", {name.replace("__", "/"): text for name, text in sources.items()})
        store.closure.cache_clear()
        store._imported.cache_clear()
        return store.closure(makers)

    yield of
    monkeypatch.undo()
    store.closure.cache_clear()
    store._imported.cache_clear()


SOURCES = {
    "a": "from datawall import b; from datawall.study import params\nfrom datawall.models.c import C\nimport numpy",
    "b": "def f():\n    from datawall.models import d as renamed\n",
    "models__c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datawall import e\nC = 1",
    "models__d": "from datawall import a",  # in a circle
    **{"e": "", "params": "from datawall import e", "f": ""},
}


def test_closure_is_all_that_is_imported_and_what_that_imports(library):
    assert library("a", **SOURCES) == ["a", "b", "models/c", "models/d"]
    assert library("e", **SOURCES) == ["e"]
    assert library("params", **SOURCES) == ["e", "params"]  # a maker counts, though nobody's import of it does


def test_closure_of_a_function_is_of_what_it_uses(library):
    text = "from datawall import b, e, f as g\ndef one():\n    return b.f\ndef other():\n    return g, e\n"
    assert library("m:one", **SOURCES | {"m": text})[:2] == ["a", "b"]
    assert library("m:other", **SOURCES | {"m": text}) == ["e", "f", "m:other"]


def study_of(folder, **changes):
    values = {
        "study": "mine", "corpus": "pbmc68k", "strategies": ["random", "untrained"], "percentages": [100],
        "seeds": [3], "models": FAMILIES, "steps": 5, "tasks": ["zeroshot_classification"],
    }  # fmt: skip
    return study.Study(params.check({**values, **changes}, "mine"), folder)


def last(names):
    """Names as they are whatever package a module is in."""
    return {name.rpartition("/")[2] for name in names}


def test_units_name_the_code_that_makes_them_and_none_beside_it(tmp_path):
    of = study_of(tmp_path, also=[{"name": "sketch", "strategies": ["geometric_sketching"], "percentages": [10]}])
    run = lambda name: Run(name, Subset("random", 100.0, 3))  # noqa: E731
    code = {name: last(of.model_unit(run(name)).code) for name in FAMILIES}
    code |= {kind: last(getattr(of, f"{kind}_unit").code) for kind in ("corpus", "split", "sketch")}
    code |= {task: last(store.closure(evaluation.makers(task))) for task in tasks.TASKS}
    expected = {
        "PretrainedPCA": {"pca", "base", "expression"},
        "scVI": {"scvi", "sparse", "base", "training", "streaming", "expression", "cellstore"},
        "SSL": {"ssl", "sparse", "training", "streaming"},
        "Geneformer": {"geneformer", "tokenizer", "transformer", "training", "streaming"},
        "SCimilarity": {"scimilarity", "sparse", "ontology", "training"},
        "corpus": {"assembly", "sources", "backed", "duplicates", "simulate", "census", "cellstore", "corpus"},
        "split": {"assembly", "sampling", "study/curated:_make_split"},
        "sketch": {"expression"},
        "zeroshot_classification": {"classification", "uncertainty", "scoring", "sampling", "baselines"},
        "zeroshot_integration": {"integration", "classification", "neighbourhood", "uncertainty"},
        "finetuned_classification": {"finetuning", "classification", "training"},
        "perturbation_response": {"perturbation", "classification", "training", "study/curated:response_genes"},
        "reconstruction": {"pretraining_loss", "scoring"},
    }
    for kind, names in expected.items():
        assert names <= code[kind], kind
        beside = {"plots", "messages", "labels", "report", "results", "saturation", "planning", "cluster", "processes"}
        assert not code[kind] & beside, kind
    for name in FAMILIES:
        assert not code[name] & {"scoring", "classification", "uncertainty", "baselines"}, name
        assert sum(other in code[name] for other in ("pca", "scvi", "ssl", "geneformer", "scimilarity")) == 1


def test_makers_are_there(tmp_path):
    of = study_of(tmp_path)
    units = [of.corpus_unit, of.split_unit, of.sketch_unit, of.contamination_unit(of.held_out_name)]
    units += [of.embedding_unit(source, of.held_out_name) for source in ("PCA", *of.pretraining_runs())]
    makers = {name for unit in units for name in unit.makers}.union(*map(evaluation.makers, tasks.TASKS))
    for name in makers:
        module, _, function = name.partition(":")
        nodes = [node for node in ast.walk(ast.parse(store.SOURCES[module])) if isinstance(node, ast.FunctionDef)]
        assert not function or [node.name for node in nodes].count(function) == 1, name


def test_a_functions_code_is_its_own(monkeypatch):
    def version(text):
        monkeypatch.setitem(store.SOURCES, "a", text)
        return store.code_version.__wrapped__("a:f")

    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert version(text) == version(text.replace("2", "3"))
    assert version(text) != version(text.replace("1", "3"))


FAMILIES = ["PretrainedPCA", "scVI", "SSL", "Geneformer", "SCimilarity"]


def units(folder, **changes):
    """The pretrained models of a study, by family and strategy."""
    of = study_of(folder, **changes)
    return {(run.model, run.subset.strategy): of.model_unit(run).key for run in of.pretraining_runs()}


def test_steps_and_initial_weights_are_in_the_keys_of_the_models_that_have_them(tmp_path):
    before = units(tmp_path)
    for changes, others in (({"steps": 6}, []), ({"init_seed": 7}, [(name, "untrained") for name in FAMILIES[1:]])):
        after = units(tmp_path, **changes)
        changed = {which for which in before if before[which] != after[which]}
        assert changed == {(name, "random") for name in FAMILIES[1:]}.union(others)


def test_an_untrained_control_is_what_training_begins_with(tmp_path, monkeypatch):
    """A network of the initial weights' seed; principal axes begin with nothing, and their control has the run's."""
    given = {
        "study": "mine", "corpus": "pbmc68k", "strategies": ["random", "untrained"], "percentages": [100],
        "seeds": [3], "models": ["scVI", "PretrainedPCA"], "steps": 5, "init_seed": 7,
        "tasks": ["zeroshot_classification"],
    }  # fmt: skip
    of, seeds = study.Study(params.check(given, "mine"), tmp_path), {}
    for name in given["models"]:
        family = models.resolve(name).model_class
        monkeypatch.setattr(
            family, "untrained", lambda model, n, *, seed, name=name: seeds.update({name: seed}) or model
        )
        monkeypatch.setattr(family, "save", lambda model, folder: None)
    monkeypatch.setattr(study.Study, "corpus", SimpleNamespace(n_vars=10))
    for run in [run for run in of.pretraining_runs() if run.subset.strategy == "untrained"]:
        of._make_model(run, tmp_path, tmp_path)
    assert seeds == {"scVI": 7, "PretrainedPCA": 3}

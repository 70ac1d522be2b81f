"""Keys: which code decides what an artifact is, and by which versions of other packages it was made.

What counts is a maker (a module, or one function of it), the modules of `COUNTED` that it imports, what these import,
and so on. Where and when things are made, and how they are planned, told or drawn, decides nothing of what they are.

Not covered: what a maker reaches through `self` or looks up by name (name it as a maker too); and packages from
elsewhere, whose versions are recorded beside each artifact and compared (`differing`), and are in no key.
"""

import ast
import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import datawall
from datawall.engine import paths

COUNTED = ("cells", "models", "tasks")  # packages whose modules decide what is made
# What a module assigns that is in no key, though such modules import it: the records of units have its values.
UNCOUNTED = "IN_NO_KEY"
# Those that compute what is stored.
RECORDED_PACKAGES = ["datawall", "anndata", "igraph", "numba", "numpy", "pandas", "pynndescent", "scanpy"]
RECORDED_PACKAGES += ["scikit-learn", "scipy", "torch", "umap-learn"]


def read_sources(library: Path) -> dict[str, str]:
    """Text of every module of a library, by file name without `.py`."""
    files = {path.relative_to(library).with_suffix("").as_posix(): path for path in library.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


# As they are when a process, or the one that it is a fork of, imports the library: what old code makes must not have
# the key of a file that was edited meanwhile. A module that is first needed later could still be newer, so a run's
# fork server imports all of them at once; without one, do not edit the library while a study runs.
SOURCES = read_sources(paths.LIBRARY)
MODULES = sorted(f"datawall.{name}".replace("/", ".").removesuffix(".__init__") for name in SOURCES)


def module_name(module: str) -> str:
    """How keys name a module of the library, from its `__name__`: `models/pca`."""
    return module.removeprefix("datawall.").replace(".", "/")


def key_of(kind: str, record: dict[str, Any], versions_of_code: dict[str, str]) -> str:
    """Key of a unit, from its kind, its record and the versions of the code that makes it."""
    return json_sha256([kind, record, versions_of_code])[:16]


def json_sha256(value: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@cache
def closure(makers: tuple[str, ...], packages: tuple[str, ...] = COUNTED) -> list[str]:
    """Names of the makers and of all modules in these packages that they import, that those import, and so on."""
    names, waiting = set(), list(makers)
    while waiting:
        if (name := waiting.pop()) not in names:
            names.add(name)
            waiting += [imported for imported in _imports(name) if imported.partition("/")[0] in packages]
    return sorted(names)


@cache
def _imports(name: str) -> set[str]:
    """Library modules that a module imports, also within functions, or that one function of it uses."""
    module, _, function = name.partition(":")
    tree, imported = _running(SOURCES[module]), set()
    used = {node.id for part in _functions(tree, function) for node in ast.walk(part) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "datawall":
            for alias in node.names:
                if not function or (alias.asname or alias.name) in used:
                    # A module of a package, or a name of a module.
                    inner, outer = module_name(f"{node.module}.{alias.name}"), module_name(node.module)
                    imported |= {inner} & SOURCES.keys() or {outer} & SOURCES.keys()
    return {name for name in imported if f"\n{UNCOUNTED} = " not in SOURCES[name]}


@cache
def code_version(name: str) -> str:
    """Hash of a module's code or of one function's (`study/model:make_model`), blind to comments and layout."""
    module, _, function = name.partition(":")
    tree = _running(SOURCES[module])
    if function:
        tree = ast.Module(_functions(tree, function), type_ignores=[])
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


@cache
def _running(source: str) -> ast.Module:
    """What runs of a module, from its text."""
    return _Running().visit(ast.parse(source))


class _Running(ast.NodeTransformer):
    """Leaves of a module what runs: no docstrings, and nothing that is for type checkers alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    def _without_docstring(self, node: ast.Module | ast.ClassDef | ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    visit_Module = visit_ClassDef = visit_FunctionDef = _without_docstring  # noqa: N815


def _functions(tree: ast.Module, name: str) -> list[ast.FunctionDef]:
    """The functions and methods of that name."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]


def notebook_code() -> list[str]:
    """Names of all modules that a notebook can reach: what `import datawall` offers, and what that imports."""
    public = {module_name(place.partition(":")[0]) for place in datawall.PLACES.values()}  # modules and whole packages
    offered = tuple(name for name in SOURCES if {name, name.rpartition("/")[0]} & public)
    return closure(offered, tuple({name.partition("/")[0] for name in SOURCES}))


def code_key() -> str:
    """Key of all the code that a notebook can run, blind as `code_version` is."""
    return json_sha256({name: code_version(name) for name in notebook_code()})[:16]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in RECORDED_PACKAGES}


def differing(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Which packages differ in version, in words; builds of a version (`+cu126`), and Pythons, count as the same."""
    both = {name: [given[name].partition("+")[0] for given in (theirs, ours)] for name in ours if name in theirs}
    return ", ".join(f"{name} {b} in place of {a}" for name, (a, b) in both.items() if a != b and name != "python")


def session() -> dict[str, str]:
    """A notebook's session information: by what code and which versions its outputs were made."""
    return {"code": code_key()} | versions()

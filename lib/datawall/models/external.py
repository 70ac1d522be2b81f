"""What a user brings: a model as a class in a file of its own, and embeddings that were made elsewhere."""

import ast
import hashlib
import importlib.util
import sys
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datawall.cells.backed import CellFile
from datawall.engine import disk, paths

METHODS = ("fit", "untrained", "embed", "save", "load")  # of `models.base.Model`


def source_file(model: str) -> Path:
    """File of a model named `module:Class`: from the working directory, the repository, or an installed package.

    Nothing of it runs, nor of the packages that it is in.
    """
    module = model.partition(":")[0]
    relative = Path(*module.split("."))
    for folder in (Path.cwd(), paths.repository()):
        for file in (folder / relative.with_suffix(".py"), folder / relative / "__init__.py"):
            if file.is_file():
                return file
    if (spec := _spec(module)) is None or spec.origin is None:
        raise ValueError(
            f"{model!r}: no module {module!r}: neither {relative.with_suffix('.py')} from {Path.cwd()} or "
            f"{paths.repository()}, nor an installed package; put the file there, or install it"
        )
    return Path(spec.origin)


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is. `importlib.util.find_spec` would run the packages that it is in; this runs nothing."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # no name, or a module without a place
        return None
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{name}", spec.submodule_search_locations)
    return spec


def version(model: str) -> str:
    """Hash of a model's source files: part of the key of all that the model makes.

    They are every Python file of its package or, where it is in none, its own file and the modules and
    packages beside it that this one imports, and so on. What is found by other means or installed does not count.
    """
    root, files, _ = _sources(model)
    listing = "\n".join(f"{path.relative_to(root).as_posix()} {disk.file_sha256(path)}" for path in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()


def _sources(model: str) -> tuple[Path, set[Path], bool]:
    """Where a model is imported from, its source files, and whether it is the user's own, not an installed one."""
    file = source_file(model)
    depth = len(model.partition(":")[0].split(".")) - (file.name != "__init__.py")
    root = file.parents[depth]
    own = root in (Path.cwd(), paths.repository())
    if depth:
        return root, set(file.parents[depth - 1].rglob("*.py")), own
    return root, _imported(file, root, set()) if own else {file}, own


def _imported(file: Path, root: Path, known: set[Path]) -> set[Path]:
    """A file, with the modules and packages in a folder that it imports, beside those that are known already."""
    known.add(file)
    names: set[str] = set()
    with suppress(SyntaxError):  # will be said when it is imported
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    for top in {name.partition(".")[0] for name in names}:
        for path in (root / f"{top}.py", *(root / top).rglob("*.py")):
            if path not in known and path.is_file():
                _imported(path, root, known)
    return known


def model_class(model: str) -> type[Any]:
    """The class of a model named `module:Class`, as its file is now: an edited file is read again."""
    return _model_class(model, source_file(model), version(model))


@cache
def _model_class(model: str, file: Path, sha256: str) -> type[Any]:
    module_name, _, class_name = model.partition(":")
    _, files, own = _sources(model)
    if own:  # what it imported before may have been edited since
        sources = set(map(str, files))
        for name in [name for name, loaded in sys.modules.items() if getattr(loaded, "__file__", None) in sources]:
            del sys.modules[name]
        spec = importlib.util.spec_from_file_location(module_name, file)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:  # others may hold its classes already
        module = importlib.import_module(module_name)
    own_class = getattr(module, class_name, None)
    if not isinstance(own_class, type):
        raise ValueError(f"{model!r}: {file} defines no class {class_name!r}; name the one that is the model.")
    if missing := [method for method in METHODS if not callable(getattr(own_class, method, None))]:
        raise ValueError(f"{model!r}: {file}: {class_name} lacks {', '.join(missing)}; see datawall.models.Model.")
    return own_class


def embeddings_file(name: str) -> Path:
    """Path of a file of embeddings, from the working directory or else the repository."""
    if not name.endswith(".h5ad"):
        raise ValueError(f"{name}: embeddings are read from .h5ad files; write them with AnnData's write_h5ad")
    if not (path := paths.located(name)).is_file():
        raise ValueError(paths.not_found(name))
    return path


def read_embedding(name: str, key: str, cells: pd.Index, dataset: str) -> np.ndarray:
    """Embedding of a data set's cells, (len(cells), n_latent) float32: those of `obsm[key]` of a file by cell name.

    Raises ValueError if the file has no such key, names a cell twice, or lacks one of these, and if the embedding of
    one of them is not finite. Other cells of the file do not matter.
    """
    with CellFile(embeddings_file(name)) as file:
        names, embedding = pd.Index(file.cell_names(0, file.n_cells)), file.embedding(key)
    if names.has_duplicates:
        twice = names[names.duplicated()][0]
        raise ValueError(f"{name}: cell name {twice} occurs more than once; cells are matched by obs_names.")
    rows = names.get_indexer(cells)
    if (rows < 0).any():
        absent = f"{(rows < 0).sum()} of the {len(cells)} cells of {dataset} (first: {cells[rows < 0][0]})"
        raise ValueError(f"{name}: lacks {absent}; cells are matched by obs_names: embed each under its own name.")
    try:
        embedding = np.asarray(embedding[rows], dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: obsm[{key!r}] holds values that are no numbers; store it as numbers.") from None
    if not np.isfinite(embedding).all():
        raise ValueError(f"{name}: obsm[{key!r}] is NaN or infinite for cells of {dataset}; leave none without values.")
    return embedding

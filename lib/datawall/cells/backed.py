"""`.h5ad` and `.zarr` files read in blocks of rows, and checked as they are read.

Only the counts, the names of genes and cells, and the columns asked for are read, and nothing is ever unpickled (h5py
cannot, and zarr refuses to). Both look alike from here: groups with attributes, and arrays that slice.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from datawall.cells.corpus import CorpusError, check_shape, no_column

log = logging.getLogger(__name__)

# What files of other formats are called, and how to convert them: two lines of Python, or of R.
PYTHON, R = "`adata = {}`, then `adata.write_h5ad('cells.h5ad')`", "convert it in R: `{}`, then `{}`"
TENX = "10x", PYTHON.format("scanpy.read_10x_h5({path!r})")
MTX = "matrix market", PYTHON.format("scanpy.read_10x_mtx(its folder)")
LOOM = "loom", PYTHON.format("anndata.io.read_loom({path!r})")
H5MU = "MuData", PYTHON.format("mudata.read_h5mu({path!r})['rna']")
TEXT = "text", PYTHON.format("scanpy.read_csv({path!r}).T, cells by genes")
SEURAT = "Seurat or other compressed", R.format("x <- readRDS({path!r})", "anndataR::write_h5ad(x, 'cells.h5ad')")
H5SEURAT = "h5Seurat", R.format("library(SeuratDisk)", "Convert({path!r}, dest = 'h5ad')")
ENDINGS = {".rds": SEURAT, ".h5seurat": H5SEURAT, ".loom": LOOM, ".h5mu": H5MU, ".mtx": MTX}
ENDINGS |= dict.fromkeys((".csv", ".tsv", ".txt"), TEXT)
INSIDE = {"mod": H5MU, "row_attrs": LOOM, "assays": H5SEURAT}  # what only these have at the top of their HDF5
PIECE = 2**23  # values read at once from a dense matrix or from one stored by column: 64 MiB as float64
PANEL = 2**26  # counts of a matrix stored by column that are held at once: about 1 GiB


def names_file(name: str) -> bool:
    """Whether a data set's name is that of a file: its ending says so."""
    return Path(name).suffix.lower() in (".h5ad", ".zarr")


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into one clear line that names it."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        if "unable to lock file" in str(error):
            remedy = "close it there, or set HDF5_USE_FILE_LOCKING=FALSE if nothing is being written"
            raise CorpusError(f"{file}: another program has it open for writing; {remedy}.") from error
        what = f"not readable as an AnnData file ({type(error).__name__}: {error})"
        raise CorpusError(f"{file}: {what}; write it again with anndata.") from error


def foreign(path: Path) -> str | None:
    """What a file of another format is, and the lines that convert it; None if it is none that is known."""
    known = ENDINGS.get(path.suffix.lower())
    if path.is_dir() and any(path.glob("*.mtx*")):
        known = MTX
    elif path.is_file() and h5py.is_hdf5(path):
        with reading(str(path)), h5py.File(path, "r") as file:
            if "obs" not in file and any(isinstance(node, h5py.Group) and "barcodes" in node for node in file.values()):
                known = TENX
            known = next((INSIDE[key] for key in INSIDE if key in file), known)
    elif path.is_file() and path.suffix != ".gz":
        with path.open("rb") as file:
            if file.read(2) in (b"\x1f\x8b", b"X\n", b"RD"):  # as R's files begin, which are compressed as a rule
                known = SEURAT
    return known and f"{path}: a {known[0]} file, no AnnData; {known[1].format(path=str(path))}."


class CellFile(AbstractContextManager):
    """A file of cells, open for reading in a `with` block; whatever is wrong with it raises CorpusError."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        if other_format := foreign(path):
            raise CorpusError(other_format)
        with reading(self.name), ExitStack() as if_it_fails:
            is_hdf5 = path.suffix.lower() == ".h5ad"
            self._root = h5py.File(path, "r") if is_hdf5 else zarr.open_group(path, mode="r")
            if_it_fails.push(self)
            for part in ("obs", "var"):
                if part not in self._root or hasattr(self._at(part), "dtype"):
                    raise CorpusError(f"{path}: {part} is no table of anndata 0.7 or newer; write it again.")
            self._obs = self._at("obs")
            self._obs_names = self._at(f"obs/{_index(self._obs)}")
            self.n_cells = _length(self._obs_names)
            if_it_fails.pop_all()

    def __exit__(self, *_: object) -> None:
        # HDF5 would give a file that is left open again, whatever has become of it since.
        if hasattr(self._root, "close"):
            self._root.close()

    def places(self) -> dict[str, str]:
        """Where in the file a matrix lies, by place: `layers['counts']`, `X`, `raw.X`, and the other layers."""
        with reading(self.name):
            held = self._at("layers") if "layers" in self._root else ()
            layers = () if hasattr(held, "dtype") else sorted(held)
            places = {"layers['counts']": "layers/counts", "X": "X", "raw.X": "raw/X"}
            places |= {f"layers['{layer}']": f"layers/{layer}" for layer in layers}
            return {place: key for place, key in places.items() if key in self._root and _kind(self._at(key)) != "null"}

    def _at(self, key: str) -> Any:
        """An element, by its path."""
        return functools.reduce(_in, key.split("/"), self._root)

    def says_logged(self) -> bool:
        """Whether scanpy has noted that `X` was logged."""
        with reading(self.name):
            return "uns" in self._root and "log1p" in self._root["uns"]

    def genes(self, place: str) -> pd.DataFrame:
        """Names and texts that describe the genes of a place, a row each."""
        with reading(self.name):
            var, index = self._var(place)
            texts = {key: self._values(_in(var, key)) for key in sorted(_columns(var)) if self._is_text(var[key])}
            return pd.DataFrame(texts, index=pd.Index(_strings(self._values(_in(var, index)))))

    def counts(self, place: str) -> Callable[[int, int], sp.csr_matrix]:
        """What reads rows of a place, from one to before another: CSR of the values as stored, in any order."""
        with reading(self.name):
            var, index = self._var(place)
            shape = (self.n_cells, _length(var[index]))
            check_shape(shape, self.name)
            matrix = _matrix(self._at(self.places()[place]), shape, f"{self.name}: {place}")
            return reading(self.name)(matrix.rows)

    def columns(self) -> list[str]:
        """Names of the columns of obs, those that a writer has not listed last."""
        with reading(self.name):
            return _columns(self._obs)

    def embedding(self, key: str) -> np.ndarray:
        """An element of obsm as an array, (n_cells, n_latent): dense, sparse or a table in the file."""
        with reading(self.name):
            there = list(self._at("obsm")) if "obsm" in self._root else []
            if key not in there:
                listed = ", ".join(map(repr, there)) or "none"
                raise CorpusError(f"{self.name}: no {key!r} in obsm; it has {listed}. Name one as `key`.")
            node = self._at(f"obsm/{key}")
            if hasattr(node, "dtype"):
                values = _array(node)[:]
            elif _kind(node) == "dataframe":
                values = np.stack([self._values(_in(node, name)) for name in _columns(node)], axis=1)
            else:
                shape = _shape(node)
                values = _matrix(node, shape, f"{self.name}: obsm[{key!r}]").rows(0, shape[0]).toarray()
            if values.ndim != 2 or len(values) != self.n_cells or not values.size:
                raise CorpusError(f"{self.name}: obsm[{key!r}] has the shape {values.shape} for {self.n_cells} cells.")
            return values

    def cell_names(self, start: int, stop: int) -> np.ndarray:
        with reading(self.name):
            return _strings(self._values(self._obs_names, slice(start, stop)))

    def column(self, key: str, role: str, start: int, stop: int) -> np.ndarray:
        """Values of a column of obs for some rows; None or NaN where missing."""
        with reading(self.name):
            if key not in self._obs:
                raise CorpusError(no_column(self.name, key, self.columns(), role))
            node = self._at(f"obs/{key}")
            if (n_values := _length(node)) != self.n_cells:
                told = f"column {key!r} of obs has {n_values} values for {self.n_cells} cells"
                raise CorpusError(f"{self.name}: {told}; write the file again with anndata.")
            return self._values(node, slice(start, stop))

    def _var(self, place: str) -> tuple[Any, str]:
        """The table of the genes of a place, and the name of its index."""
        var = self._at("raw/var" if place == "raw.X" else "var")
        return var, _index(var)

    def _values(self, node: Any, rows: slice = slice(None)) -> np.ndarray:
        """Values of an element that has a row for each cell or gene, whichever of anndata's encodings it has."""
        kind = _kind(node)
        if kind == "categorical" or (not hasattr(node, "dtype") and {"codes", "categories"} <= set(node)):
            return self._decoded(node, _array(_in(node, "codes"))[rows], self._values(_in(node, "categories")))
        if kind.startswith("nullable"):
            values = self._values(_in(node, "values"), rows).astype(object)
            values[_array(_in(node, "mask"))[rows].astype(bool)] = None
            return values
        array, categories = _array(node), self._categories(node)
        if categories is not None:
            return self._decoded(node, array[rows], self._values(categories))
        try:
            if hasattr(array, "asstr") and array.dtype.kind in "OTSU":
                return array.asstr("utf-8")[rows]  # whatever its tag says
            values = np.asarray(array[rows])
            if values.ndim != 1:
                raise CorpusError(f"{self.name}: {node.name} has {values.ndim} dimensions, not one.")
            return np.char.decode(values, "utf-8").astype(object) if values.dtype.kind == "S" else values
        except UnicodeDecodeError as error:
            where = node.name.lstrip("/")
            raise CorpusError(f"{self.name}: {where} holds text that is not UTF-8; write it again.") from error

    def _categories(self, node: Any) -> Any:
        """The categories of an array of codes as anndata 0.7 wrote it, beside its table's columns; None if it is none.

        The array refers to them, by their place in the file or in the table, or does not even that.
        """
        given, parts = node.attrs.get("categories"), node.name.strip("/").split("/")
        if given is not None and (isinstance(given, h5py.Reference) or given in self._root):
            return self._root[given]
        if node.dtype.kind not in "iu":
            return None
        places = ("/".join([*parts[:i], "__categories", *parts[i:]]) for i in range(1, len(parts)))
        return next((self._at(place) for place in places if place in self._root), None)

    def _is_text(self, node: Any) -> bool:
        """Whether an element of a table holds text."""
        if hasattr(node, "dtype"):
            return node.dtype.kind in "OTSU" or self._categories(node) is not None
        return self._is_text(node["categories"]) if "categories" in node else _kind(node) == "nullable-string-array"

    def _decoded(self, node: Any, codes: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """Values of codes among categories, None for -1."""
        wrong = codes if codes.dtype.kind not in "iu" else codes[(codes < -1) | (codes >= len(categories))]
        if len(wrong):
            what = f"{node.name.lstrip('/')} has the code {wrong[0]}, and {len(categories)} categories, numbered from 0"
            raise CorpusError(f"{self.name}: {what} (-1 where missing); write the column again as text.")
        return np.array([*categories, None], dtype=object)[codes]


class Dense:
    """A dense matrix, read in pieces of at most `PIECE` values or one row."""

    def __init__(self, array: Any, shape: tuple[int, int], name: str) -> None:
        self._array = _array(array)
        _check_fit(self._array, self._array.shape, shape, name)
        self._n_rows = max(1, PIECE // shape[1])

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        begins = range(start, stop, self._n_rows)
        pieces = [sp.csr_matrix(_numbers(self._array[i : min(i + self._n_rows, stop)])) for i in begins]
        return sp.vstack(pieces, format="csr")


class Rows:
    """A CSR matrix; `major` is the axis that it is stored by."""

    major = 0

    def __init__(self, group: Any, shape: tuple[int, int], name: str) -> None:
        self._name, self._shape = name, shape
        _check_fit(_in(group, "data"), _shape(group), shape, name)
        # Where a chunk is missing, zarr reads zeros unless told not to; values and indices have none, but of one gene.
        with zarr.config.set({"array.read_missing_chunks": shape[1 - self.major] <= 1}):
            self._data, self._indices = _array(_in(group, "data")), _array(_in(group, "indices"))
        self._indptr = _array(_in(group, "indptr"))
        n_values = int(self._indptr[-1]) if self._indptr.shape == (shape[self.major] + 1,) else -1
        self._demand(self._data.shape == self._indices.shape == (n_values,) and self._indptr[0] == 0)
        self._demand(self._indices.dtype.kind in "iu" and self._indptr.dtype.kind in "iu")

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Some rows (of a CSC matrix: columns), checked."""
        indptr, length = self._indptr[start : stop + 1].astype(np.int64), self._shape[1 - self.major]
        n_values = np.diff(indptr)
        self._demand(indptr[0] >= 0 and n_values.min() >= 0 and indptr[-1] <= self._data.shape[0])
        self._demand(n_values.max() <= length)
        indices = self._indices[indptr[0] : indptr[-1]]
        self._demand(not len(indices) or (indices.min() >= 0 and indices.max() < length))
        values = _numbers(self._data[indptr[0] : indptr[-1]])
        return sp.csr_matrix((values, indices.astype(np.int32), indptr - indptr[0]), (stop - start, length))

    def _demand(self, sound: bool) -> None:
        if not sound:
            told = "is damaged, as data, indices and indptr do not fit together; write the file again with anndata."
            raise CorpusError(f"{self._name} {told}")


class Columns(Rows):
    """A CSC matrix: the whole is read, and as many rows of it kept as `PANEL` counts are, so often as that takes."""

    major = 1

    def __init__(self, group: Any, shape: tuple[int, int], name: str) -> None:
        super().__init__(group, shape, name)
        self._n_values = self._data.shape[0]
        self._n_rows = max(1, shape[0] * PANEL // max(1, self._n_values))
        self._begin, self._panel = 0, sp.csr_matrix((0, shape[1]))
        if self._n_values > PANEL:
            passes = -(-shape[0] // self._n_rows)
            log.warning("%s is stored by column (CSC) and will be read about %d times; CSR is faster.", name, passes)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Some rows; those that follow are kept for the next call."""
        if not (self._begin <= start and stop <= self._begin + self._panel.shape[0]):
            self._begin, self._panel = start, None  # the old panel is freed before the new one is made
            rows = slice(start, min(self._shape[0], max(stop, start + self._n_rows)))
            edges = np.searchsorted(self._indptr[:], np.arange(PIECE, self._n_values, PIECE))
            edges = np.unique([0, *edges, self._shape[1]])
            self._panel = sp.vstack([Rows.rows(self, *some)[:, rows] for some in pairwise(edges)]).T.tocsr()
        return self._panel[start - self._begin : stop - self._begin]


def _in(group: Any, key: str) -> Any:
    """An element of a group, which must be in the group's own file, as its hash is that of this file."""
    node = group[key]
    elsewhere = getattr(node, "is_virtual", False) or getattr(node, "external", None)
    if elsewhere or (isinstance(group, h5py.Group) and node.file.filename != group.file.filename):
        what = f"{group.name}/{key}".lstrip("/")
        raise CorpusError(f"{group.file.filename}: {what} lies in another file; write both as one with anndata.")
    return node


def _columns(table: Any) -> list[str]:
    """Names of the columns of a table, those that a writer has not listed last."""
    listed = [_text(name) for name in np.atleast_1d(table.attrs.get("column-order", ()))]
    arrays = (name for name in table if hasattr(table[name], "dtype") or {"codes", "values"} & set(table[name]))
    none = {_index(table), "__categories"}
    return [name for name in dict.fromkeys([*listed, *arrays]) if name in table and name not in none]


def _strings(values: np.ndarray) -> np.ndarray:
    """Values as Python's strings, of any of numpy's kinds of text."""
    return values.astype(object).astype(str).astype(object)


def _array(node: Any) -> Any:
    """The element, which must be an array, and compressed by what is there to read it."""
    if not hasattr(node, "dtype"):
        raise TypeError(f"{node.name} is a group where an array should be")
    if isinstance(node, h5py.Dataset):
        made = node.id.get_create_plist()
        for code, _, _, name in map(made.get_filter, range(made.get_nfilters())):
            if not h5py.h5z.filter_avail(code):
                with suppress(ImportError):
                    import hdf5plugin  # noqa: F401 - it makes its filters known
            if not h5py.h5z.filter_avail(code):
                raise CorpusError(
                    f"{node.file.filename}: {node.name.lstrip('/')} is compressed by {_text(name)!r} (HDF5 filter "
                    f"{code}); `pip install hdf5plugin`, which reads it, or write the file again with gzip."
                )
    return node


def _kind(node: Any) -> str:
    """How anndata says that an element is stored."""
    return _text(node.attrs.get("encoding-type", ""))


def _index(table: Any) -> str:
    """Name of the index of a table."""
    return _text(table.attrs.get("_index", "_index"))


def _shape(group: Any) -> tuple[int, ...]:
    """Shape of a sparse matrix as its group says, in the old way too."""
    return tuple(int(size) for size in group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))


def _matrix(node: Any, shape: tuple[int, int], name: str) -> Dense | Rows | Columns:
    """What reads a matrix."""
    if hasattr(node, "dtype"):
        return Dense(node, shape, name)
    kind = _text(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    readers = {"csr_matrix": Rows, "csr": Rows, "csc_matrix": Columns, "csc": Columns}
    if kind not in readers:
        what = "neither a dense array nor CSR nor CSC"
        raise CorpusError(f"{name} is stored as {kind!r}, which is {what}; write it again as CSR.")
    return readers[kind](node, shape, name)


def _length(node: Any) -> int:
    """Rows of an element of obs or var."""
    return int((node if hasattr(node, "dtype") else node["codes"] if "codes" in node else node["values"]).shape[0])


def _numbers(values: np.ndarray) -> np.ndarray:
    """Native byte order, and single precision where half would not do for scipy."""
    return values.astype(np.float32) if values.dtype == np.float16 else values.astype(values.dtype.newbyteorder("="))


def _check_fit(values: Any, shape: tuple[int, ...], expected: tuple[int, int], name: str) -> None:
    """Refuse a matrix of another shape than names, or of no numbers."""
    if shape != expected:
        names = f"there are names for {expected[0]} cells x {expected[1]} genes"
        raise CorpusError(f"{name} has the shape {shape}, but {names}; write the file again with anndata.")
    if _array(values).dtype.kind not in "fiub":
        raise CorpusError(f"{name} holds {values.dtype} values, not numbers; store counts as numbers.")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""The corpus on disk: one AnnData zarr store, written block by block and read by rows, at constant memory.

Any tool that reads AnnData opens it (`anndata.io.read_zarr`). Counts lie in few large files (shards) of many
separately compressed chunks, in the smallest unsigned integers that hold them, and are read with annbatch.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from pandas.api.types import union_categoricals
from zarr.codecs import BloscCodec

log = logging.getLogger(__name__)

NAME = "cells.zarr"
CHUNK = 2**14  # counts compressed together, of some ten cells: the least that is read for one
SHARD = 2**25  # counts in a file
NAMES = 2**18  # names of cells in a file
CELLS_AT_ONCE = 4096  # when many are read in turn
NEARBY = 4  # cells at most this far apart are read with those between, so that a chunk is unpacked once
PIPELINE = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}  # several times as fast as zarr's own


def write(folder: Path, blocks: Iterable[ad.AnnData]) -> None:
    """Write cells to `<folder>/cells.zarr`, in a folder that holds no store yet.

    Blocks have raw counts as `corpus.place_columns` makes them; what is written does not depend on how they are cut.
    Columns of `obs` that are no numbers become categorical. In memory are two blocks, two files' worth of counts and,
    for each cell, twelve bytes and its labels. Raises ValueError without cells, or where genes or columns differ.
    """
    root = zarr.create_group(folder / NAME, zarr_format=3, attributes=_encoding("anndata"))
    X, obs = root.create_group("X"), root.create_group("obs")
    data, indices = _Growing(X, "data", np.uint8, SHARD), _Growing(X, "indices", np.int32, SHARD)
    names = _Growing(obs, "_index", object, NAMES)
    lengths: list[np.ndarray] = []  # genes of each cell
    var = None
    for block in blocks:
        if var is None:
            var, columns = block.var, {name: [] for name in block.obs}
        elif not block.var_names.equals(var.index) or list(block.obs) != list(columns):
            raise ValueError(
                f"blocks of a corpus must share genes and columns: after {len(var)} genes and {list(columns)} came "
                f"{block.n_vars} genes and {list(block.obs)}; align them first."
            )
        counts = block.X
        data.append(counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0)))))
        indices.append(counts.indices.astype(np.int32, copy=False))
        lengths.append(np.diff(counts.indptr).astype(np.int32))
        names.append(block.obs_names.to_numpy(object))
        for name, parts in columns.items():
            parts.append(_labels(block.obs[name]))
    if not (n_cells := sum(map(len, lengths))):
        raise ValueError("there are no cells to write; choose a source that has some.")
    for array in (data, indices, names):
        array.close()
    indptr = np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
    indptr = indptr.astype(sp.get_index_dtype(maxval=indptr[-1]))  # that of the indices, which scipy expects
    X.create_array("indptr", data=indptr, chunks=(min(NAMES, n_cells + 1),))
    X.update_attributes({**_encoding("csr_matrix"), "shape": [n_cells, len(var)]})
    for name, parts in columns.items():
        numeric = isinstance(parts[0], np.ndarray)
        # Sorted, so that codes do not depend on the order of cells.
        values = np.concatenate(parts) if numeric else union_categoricals(parts, sort_categories=True)
        ad.io.write_elem(obs, name, values, dataset_kwargs={"chunks": (min(NAMES, n_cells),)})
    obs.update_attributes({**_encoding("dataframe", "0.2.0"), "_index": "_index", "column-order": list(columns)})
    ad.io.write_elem(root, "var", var)
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        ad.io.write_elem(root, name, {})


def _encoding(kind: str, version: str = "0.1.0") -> dict[str, str]:
    """AnnData's mark of what a group or an array is."""
    return {"encoding-type": kind, "encoding-version": version}


def _labels(column: pd.Series) -> np.ndarray | pd.Categorical:
    """A column of a block: numbers as they are, all else as categories that are text."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy()
    labels = pd.Categorical(column).remove_unused_categories()
    return labels.rename_categories(labels.categories.astype(str))


class _Growing:
    """An array on disk that grows by whole files, written once but for values that are too large for its type."""

    def __init__(self, group: zarr.Group, name: str, dtype: Any, file_size: int) -> None:
        self.group, self.name, self.file_size = group, name, file_size
        self.array: zarr.Array | None = None
        self.waiting = np.empty(0, dtype)  # for a file; of the widest type so far

    def append(self, values: np.ndarray) -> None:
        self.waiting = np.concatenate([self.waiting, values])
        while len(self.waiting) >= self.file_size:
            self._write()

    def close(self) -> None:
        if self.array is None:  # all of it fits one file, which then need not have the size of others
            self.file_size = min(self.file_size, max(1, -(-len(self.waiting) // CHUNK)) * CHUNK)
        self._write()

    def _write(self) -> None:
        """Write as much as a file takes."""
        some, self.waiting = self.waiting[: self.file_size], self.waiting[self.file_size :]
        if self.array is None:
            self.array = self._create(self.name)
        elif self.array.dtype.itemsize < some.dtype.itemsize and not some.dtype.hasobject:
            self._widen()
        self.array.append(some)

    def _create(self, name: str) -> zarr.Array:
        dtype = self.waiting.dtype
        if dtype.hasobject:
            kind = {"dtype": "string", "chunks": (self.file_size,), "attributes": _encoding("string-array", "0.2.0")}
            return self.group.create_array(name, shape=(0,), **kind)
        codec = BloscCodec(cname="lz4", clevel=3, shuffle="shuffle")  # annbatch's, because it unpacks fastest
        sizes = {"shape": (0,), "chunks": (CHUNK,), "shards": (self.file_size,)}
        with zarr.config.set({**PIPELINE, "threading.max_workers": 1}):  # more would mix the order of chunks in a shard
            return self.group.create_array(name, dtype=dtype, compressors=[codec], **sizes)

    def _widen(self) -> None:
        narrow, wide = self.array, self._create(f"{self.name}.wide")
        wide.resize(narrow.shape)
        for first in range(0, narrow.size, self.file_size):
            some = slice(first, first + self.file_size)
            wide[some] = narrow[some].astype(wide.dtype)
        folder = Path(self.group.store.root, self.group.path)
        shutil.rmtree(folder / self.name)
        os.replace(folder / wide.basename, folder / self.name)
        self.array = self.group[self.name]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells that stay on disk: all of a store, or some. Rows are positions among them."""

    path: Path
    rows: np.ndarray | None = None  # which of the store's cells; None is all

    @property
    def n_obs(self) -> int:
        return len(self._file.indptr) - 1 if self.rows is None else len(self.rows)

    @property
    def n_vars(self) -> int:
        return self._file.n_vars

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_obs, self.n_vars

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Labels of the cells, which are numbered here: 22 million names would take gigabytes (see `names`)."""
        obs = self._file.obs
        return obs if self.rows is None else obs.iloc[self.rows].reset_index(drop=True)

    @property
    def var(self) -> pd.DataFrame:
        return self._file.var

    def take(self, rows: np.ndarray | None) -> Cells:
        """Some of these cells."""
        return Cells(self.path, self._positions(rows))

    def names(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Names of cells, str objects."""
        return self._file.root["obs/_index"].get_orthogonal_selection(self._positions(rows)).astype(object)

    def within(self, memory_gib: float) -> sp.csr_matrix | Cells:
        """Raw counts of all if they fit in memory, together with a copy that a model prepares; if not, these cells."""
        gib = 2 * self.nbytes() / 2**30  # as `counts` takes, too, while it puts blocks together
        streamed = gib > memory_gib
        how = "streamed from the disk" if streamed else "kept in memory"
        log.info("%d cells take %.1f GiB in training: %s, as %.1f GiB are allowed.", self.n_obs, gib, how, memory_gib)
        return self if streamed else self.counts()

    def counts(self, rows: np.ndarray | None = None) -> sp.csr_matrix:
        """Raw counts of cells in the order given, float32, in memory."""
        none = sp.csr_matrix((0, self.n_vars), dtype=np.float32)
        return sp.vstack([none, *self.take(rows).count_blocks()], format="csr")

    __getitem__ = counts

    def nbytes(self) -> int:
        """Memory that `counts` of all takes."""
        n_values = int(self.genes_detected.sum())
        index = 4 if n_values < 2**31 else 8
        return n_values * (4 + index) + (self.n_obs + 1) * index

    def blocks(self, size: int = CELLS_AT_ONCE) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Rows and raw counts of all cells in turn, float32."""
        for first in range(0, self.n_obs, size):
            rows = np.arange(first, min(first + size, self.n_obs))
            yield rows, floats(next(self._file.read([self._positions(rows)])))

    def count_blocks(self) -> Iterator[sp.csr_matrix]:
        return (counts for _, counts in self.blocks())

    def to_blocks(self, change: Callable[[sp.csr_matrix], sp.csr_matrix]) -> Iterator[ad.AnnData]:
        """All cells in turn, as `write` takes them, with their raw counts changed."""
        for rows, counts in self.blocks():
            obs = self.obs.iloc[rows].set_index(pd.Index(self.names(rows)))
            yield ad.AnnData(change(counts), obs=obs, var=self.var)

    @property
    def genes_detected(self) -> np.ndarray:
        """(n_cells,) of how many genes each cell has counts."""
        return np.diff(self._file.indptr)[self._positions(None)]

    def to_memory(self) -> ad.AnnData:
        """All cells, with their names."""
        return ad.AnnData(self.counts(), obs=self.obs.set_index(pd.Index(self.names())), var=self.var)

    def read(self, batches: list[np.ndarray]) -> Iterator[sp.csr_matrix]:
        """Raw counts of batches of rows, in the store's integers; all are read at once, and each cell once."""
        return self._file.read([self._positions(rows) for rows in batches])

    def _positions(self, rows: np.ndarray | None) -> np.ndarray:
        """Positions of rows in the store."""
        if rows is None:
            return np.arange(self.n_obs) if self.rows is None else self.rows
        return rows if self.rows is None else self.rows[rows]

    @property
    def _file(self) -> _File:
        return _opened(self.path)


def floats(counts: sp.csr_matrix) -> sp.csr_matrix:
    """These counts, made float32 in place: scipy's `astype` would copy their indices too."""
    counts.data = counts.data.astype(np.float32)
    return counts


def add_labels(folder: Path, name: str, labels: pd.Categorical) -> None:
    """Add a column to `obs` of the store in a folder; `Cells` opened before do not see it."""
    obs = zarr.open_group(folder / NAME)["obs"]
    ad.io.write_elem(obs, name, labels, dataset_kwargs={"chunks": (min(NAMES, len(labels)),)})
    obs.update_attributes({"column-order": [*obs.attrs["column-order"], name]})
    _opened.cache_clear()


class _File:
    """What of a store is kept in memory, and how its counts are read; a sampler of annbatch's, for one request."""

    def __init__(self, path: Path) -> None:
        self.root = zarr.open_group(path, mode="r")
        self.indptr = self.root["X/indptr"][:].astype(np.int64)
        self.n_vars = self.root["X"].attrs["shape"][1]
        self.request: dict[str, Any] = {}
        self.one_at_a_time = threading.Lock()

    def sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
        """What annbatch asks of its sampler."""
        yield self.request

    @cached_property
    def loader(self) -> Any:
        """Made when counts are read: annbatch imports torch, and labels are asked for without counts."""
        from annbatch import Loader

        return Loader(batch_sampler=self).add_dataset(ad.io.sparse_dataset(self.root["X"]))

    @cached_property
    def obs(self) -> pd.DataFrame:
        obs = self.root["obs"]
        columns = {name: ad.io.read_elem(obs[name]) for name in obs.attrs["column-order"]}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.indptr) - 1))

    @cached_property
    def var(self) -> pd.DataFrame:
        return ad.io.read_elem(self.root["var"])

    def read(self, batches: list[np.ndarray]) -> Iterator[sp.csr_matrix]:
        positions, place = np.unique(np.concatenate(batches), return_inverse=True)
        gaps = np.diff(positions, prepend=positions[:1])
        gaps[gaps > NEARBY] = 1  # not read, so that what follows comes next in memory
        within = np.cumsum(gaps) - gaps[:1]  # place of each position in what is read
        requests = np.repeat(positions, np.append(np.diff(within), 1))
        requests += np.arange(len(requests)) - np.repeat(within, np.append(np.diff(within), 1))
        splits = np.split(within[place], np.cumsum([len(rows) for rows in batches])[:-1])
        with self.one_at_a_time, zarr.config.set(PIPELINE):
            self.request = {"requests": requests, "splits": splits}
            loaded = iter(self.loader)
            first = next(loaded)  # reads all; the others are cut from it
        for batch in itertools.chain([first], loaded):
            yield batch["X"]


_opened = lru_cache(4)(_File)

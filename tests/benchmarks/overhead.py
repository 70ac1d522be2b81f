"""What handing out a unit of work costs, in milliseconds, and what memory the one who hands them out takes.

    python tests/benchmarks/overhead.py [units, 1000] [executor, local]

Units do nothing, in 2 processes, whose start is counted; memory is that of this process before and after them. Then
as many empty artifacts are stored and found again, in this process, and as many evaluations on a file of 256 MiB given
their keys. On 2 cores of an AMD EPYC that others kept busy:

    6,400 units: handed out in 0.8 ms each, stored in 8.6 ms, found again in 0.9 ms; memory 244 MiB, then 246 MiB
    1,000 units on a Dask cluster of 2 workers: 2.7 ms each
    keys of 1,000 evaluations on the file: 3.1 ms each, the file's hash included
"""

import sys
import tempfile
import time
from pathlib import Path

import psutil

import datawall as dw
from datawall.engine import cluster, store
from datawall.study import evaluation


def memory_mib():
    return psutil.Process().memory_info().rss / 2**20


def seconds(study, n_units):
    """Time by the clock of so many units, each of which looks a name up."""
    begin = time.perf_counter()
    cluster.run_units(study, getattr, ["folder"] * n_units, "empty units")
    return time.perf_counter() - begin


n_units = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
executor = sys.argv[2] if len(sys.argv) > 2 else "local"
with tempfile.TemporaryDirectory() as folder:
    opened = dw.open_study("tiny", workers=2, executor=executor)
    study = dw.Study(opened.params, Path(folder))
    started = seconds(study, 2)
    before = memory_mib()
    took = seconds(study, n_units)
    print(f"memory: {before:.0f} MiB before {n_units} units, {memory_mib():.0f} MiB after")
    print(f"handed out: {1000 * took / n_units:.1f} ms a unit, {started:.1f} s of all to start 2 workers")
    begin = time.perf_counter()
    for i in range(n_units):
        study.store.find_or_make(store.Unit("empty", {"number": i}, ()), lambda folder: None)
    stored = time.perf_counter()
    for i in range(n_units):
        dw.store.Store(study.store.folder).find(store.Unit("empty", {"number": i}, ()))
    found = time.perf_counter()
    print(f"stored: {1000 * (stored - begin) / n_units:.1f} ms a unit")
    print(f"found again: {1000 * (found - stored) / n_units:.1f} ms a unit")
    file = Path(folder) / "cells.h5ad"
    file.write_bytes(bytes(2**28))
    with_file = dw.open_study("tiny", evaluation=[str(file)])
    begin, every = time.perf_counter(), evaluation.evaluations(with_file, with_file.params.tasks[0])
    for i in range(n_units):
        assert evaluation.evaluation_unit(with_file, every[i % len(every)]).key
    print(f"keys: {1000 * (time.perf_counter() - begin) / n_units:.1f} ms a unit")

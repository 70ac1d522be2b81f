"""What curating a simulated corpus takes, for growing numbers of cells over 19,331 genes: time and peak memory.

    python tests/benchmarks/curation.py 200000 1000000

Each size is curated by a process of its own, which does what notebook 1 does: simulated and written, split, compared
with its held-out cells, its components taken, sampled by three strategies at 1, 10, 25 and 100 %, its tables computed,
some cells set beside simulated ones, the cells of all subsets named.
Prints a row for each step, with seconds by the clock and of processors, and the ratios of the last size to the first.
Peak memory is that of the process up to the end of the step, as the kernel counts it; the pages of files that it maps
are among it. On 2 cores of an Intel Xeon, which other processes shared, in seconds of processors:

      200,000 cells   simulate and write 40 s, components 45 s, all 99 s, peak 1,580 MiB, 349 MiB on disk
    1,000,000 cells   simulate and write 175 s, components 218 s, all 458 s, peak 2,007 MiB, 1,738 MiB on disk
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

STUDY = {
    "study": "curation", "corpus": "simulated", "donor_key": "donor_id", "held_out": 0.2, "steps": 1, "seeds": [0],
    "strategies": ["random", "celltype_reweighted", "geometric_sketching"], "percentages": [1, 10, 25, 100],
    "models": ["PretrainedPCA"], "tasks": ["zeroshot_classification"],
}  # fmt: skip


def curate(n_cells):
    """Print seconds and peak memory (MiB) of each step; returns cells and the totals."""
    import datawall as dw
    from datawall.study.study import Study

    parameters = dw.params.check({**STUDY, "simulation": {"n_cells": n_cells, "n_genes": 19_331}}, "benchmark")
    tables = dw.curation
    with tempfile.TemporaryDirectory() as folder:
        study = Study(parameters, Path(folder))
        steps = {
            "simulate and write": lambda: study.corpus_artifact,
            "genes, cells, quality": lambda: (
                tables.gene_matches(study), tables.reports(study), tables.quality(study),
            ),
            "markers": lambda: tables.marker_expression(study),
            "split": lambda: study.split_rows("pretraining"),
            "contamination": lambda: tables.contamination(study),
            "principal components": lambda: study.X_pca,
            "subsets": lambda: [study.rows(subset) for subset in study.subsets()],
            "composition": lambda: tables.composition(study),
            "diversity": lambda: tables.subset_diversity(study),
            "realism": lambda: tables.realism(beside(study)),
            "names of cells": lambda: tables.write_cell_ids(study, Path(folder) / "ids"),
        }  # fmt: skip
        began = clocks()
        for name, step in steps.items():
            before = clocks()
            step()
            print(line(n_cells, name, clocks() - before), flush=True)
        size, seconds = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()), clocks() - began
        print(f"{line(n_cells, 'all', seconds)}, {size / 2**20:,.0f} MiB on disk", flush=True)
        return n_cells, *seconds, peak()


def clocks():
    """Seconds by the clock, and of processors."""
    return np.array([time.perf_counter(), time.process_time()])


def line(n_cells, name, seconds):
    return f"{n_cells:>10,}  {name:<22} {seconds[0]:>8.1f} s {seconds[1]:>8.1f} s of processors {peak():>8,.0f} MiB"


def beside(study):
    """As `curation.beside_simulated`, which sets nothing beside a simulated corpus."""
    from datawall.cells import simulate
    from datawall.study import curation

    held_out = study.held_out_cells
    rows = np.sort(np.random.default_rng(0).permutation(held_out.n_obs)[: curation.COMPARED])
    other = simulate.Atlas(n_cells=len(rows), n_genes=held_out.n_vars, seed=1)
    return {"corpus": held_out.counts(rows), "simulated": simulate.load(other).X}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sizes, fresh = [int(size) for size in sys.argv[1:]] or [20_000, 100_000], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
        totals = list(pool.map(curate, sizes))
    if len(totals) > 1:
        ratios = [last / first for first, last in zip(totals[0], totals[-1], strict=True)]
        print("ratio of cells {:.1f}, of time {:.1f}, of processors {:.1f}, of memory {:.2f}".format(*ratios))

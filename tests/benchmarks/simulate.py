"""Simulated cells a second on one core, and how their counts look beside real cells (Kang et al. 2018).

python tests/benchmarks/simulate.py            cells a second at 2,000 and 19,331 genes, and the table of realism
python tests/benchmarks/simulate.py FOLDER     also the figure of realism, as svg, png and csv
"""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from datawall.cells import corpus, datasets, simulate
from datawall.reading import plots
from datawall.study import curation

BLOOD = {
    "CD4-positive, alpha-beta T cell": 45, "classical monocyte": 28, "B cell": 10, "CD8-positive, alpha-beta T cell": 9,
    "non-classical monocyte": 8, "natural killer cell": 7, "conventional dendritic cell": 3,
    "megakaryocyte-erythroid progenitor cell": 1,
}  # fmt: skip

for n_genes in (2000, 19_331):
    cells = simulate.Cells(simulate.truth(simulate.Atlas(n_genes=n_genes)))
    seconds = []
    for begin in range(0, 3 * 4096, 4096):
        start = time.process_time()
        cells.block(begin, begin + 4096)
        seconds.append(time.process_time() - start)
    print(f"{n_genes:6,} genes: {4096 / min(seconds):8,.0f} cells a second of one core, the best of {len(seconds)}")

kang, _ = corpus.align(datasets.load("kang2018"), "kang2018")
atlas = simulate.Atlas(n_cells=kang.n_obs, n_genes=kang.n_vars, composition=BLOOD)
genes, cells = curation.realism({"Kang et al. 2018": kang.X, "simulated": simulate.load(atlas).X})
genes["fano"] = genes["variance"] / genes["mean"]
genes["mean count"] = pd.cut(genes["mean"], [0.01, 0.1, 0.3, 1, 3, 10, 100])
print("medians over genes, by mean count:")
print(genes.pivot_table(["fano", "zeros"], "mean count", "dataset", aggfunc="median", observed=True).round(2))
print(cells.pivot_table(["library_size", "n_genes"], "dataset", aggfunc="median").round())
if len(sys.argv) > 1:
    shown = genes.iloc[np.random.default_rng(0).permutation(len(genes))[:4000]]  # a table of a size to keep
    plots.save(plots.realism(shown, cells), "realism", shown, Path(sys.argv[1]))

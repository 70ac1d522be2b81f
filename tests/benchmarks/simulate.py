"""Simulated cells a second on one core, at 2,000 and 19,331 genes.

python tests/benchmarks/simulate.py
"""

import time

from datawall.cells import simulate

for n_genes in (2000, 19_331):
    cells = simulate.Cells(simulate.truth(simulate.Atlas(n_genes=n_genes)))
    seconds = []
    for begin in range(0, 3 * 4096, 4096):
        start = time.process_time()
        cells.block(begin, begin + 4096)
        seconds.append(time.process_time() - start)
    print(f"{n_genes:6,} genes: {4096 / min(seconds):8,.0f} cells a second of one core, the best of {len(seconds)}")

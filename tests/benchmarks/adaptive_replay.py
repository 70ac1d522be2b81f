"""The published study, had it been run adaptively: how often the verdict is that of all runs, and what is saved.

python tests/benchmarks/adaptive_replay.py [orders of the seeds, 5]
"""

import sys

import pandas as pd

from datawall import tasks
from datawall.analysis import adaptive, published
from datawall.analysis.results import select

n_orders = int(sys.argv[1]) if len(sys.argv) > 1 else 5
results = published.results()
results = results[~results["strategy"].str.startswith("spikein")]
for margin in (0.01, 0.02, 0.03):
    replayed = pd.concat(
        adaptive.replay(select(results, task=task), metric, adaptive.Plan(margin=margin), seed=seed)
        for task, metric in tasks.HEADLINE.items()
        for seed in range(n_orders)
    )
    agree, share = (replayed["full"] == replayed["adaptive"]).mean(), replayed["share"].mean()
    print(f"margin {margin:g}: {len(replayed)} verdicts, {agree:.1%} as by all runs, {share:.1%} of the runs")
    print(pd.crosstab(replayed["full"], replayed["adaptive"], rownames=["all runs"]).to_string(), end="\n\n")
    if margin == 0.02:
        ratio = 1 / share
print(f"ratio {ratio:.1f}")  # runs of the full grid for one spent, at a margin of 0.02

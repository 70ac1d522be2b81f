"""A whole study from scratch by one worker, and by two: the time of each stage, and whether every number is the same.

    python tests/benchmarks/workers.py [STUDY]

Of the default study, some 25 minutes on two cores. What notebooks do themselves (the corpus, tables, figures) takes as
long either way: so much of the time two workers cannot halve. On 2 cores of an Intel Xeon 466 s by two and 850 s by
one, ratio .55: pretraining .52, tasks .50 to .57, curation and figures 1.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

import datawall as dw

REPOSITORY = Path(__file__).parents[2]
STUDY = sys.argv[1] if len(sys.argv) > 1 else "params/quick.yaml"


def run(folder, n_workers):
    """Seconds of each stage and of the whole."""
    command = [sys.executable, "run_all.py", STUDY, "--out", str(folder), "--set", f"workers={n_workers}"]
    begin = time.perf_counter()
    printed = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    whole = round(time.perf_counter() - begin)
    return {name: int(seconds) for name, seconds in re.findall(r"\] (\S+) done in (\d+) s", printed)} | {"all": whole}


with tempfile.TemporaryDirectory() as scratch:
    folders = {n_workers: Path(scratch) / str(n_workers) for n_workers in (2, 1)}
    times = pd.DataFrame({f"{n_workers} workers, s": run(folder, n_workers) for n_workers, folder in folders.items()})
    two, one = (dw.read_results(folder) for folder in folders.values())
times["ratio"] = (times["2 workers, s"] / times["1 workers, s"]).round(2)
print(times.to_string())
pd.testing.assert_frame_equal(two, one, check_exact=True)
print(f"{len(one):,} values, all the same to the last bit")
print(f"ratio {times['ratio']['all']}")

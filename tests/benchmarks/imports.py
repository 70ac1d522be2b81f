"""Seconds until the library and its command are ready, each in a fresh process: medians of five.

`python tests/benchmarks/imports.py [FOLDER]`: of imports, and of the commands that only look; where a run of the
default study is in a folder, also of all its notebooks again (once), and of a second run after that.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALL = "from importlib import import_module as load; from datawall.engine import code; [*map(load, code.MODULES)]"
IMPORTS = {
    "datawall": "import datawall",
    "a worker, for its first job": "import datawall.engine.processes, datawall.study.evaluation",
    "a worker, to train": "import datawall.engine.processes, datawall.study.evaluation, datawall.models.base",
    "a kernel, all that notebooks name": "import datawall; [getattr(datawall, name) for name in datawall.__all__]",
    "the fork server, all of the library": ALL,
}
COMMANDS = {word: [word] for word in ("--help", "--plan", "--check")}


def seconds(*words, repeats=5):
    """Median time by the clock of a Python process."""
    environment, times = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}, []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


nothing = seconds("-c", "")
for what, code in IMPORTS.items():
    print(f"import {what}: {seconds('-c', code) - nothing:.2f} s")
for what, words in COMMANDS.items():
    print(f"run_all.py {what}: {seconds('run_all.py', *words):.2f} s")
for folder in sys.argv[1:]:
    again = ["run_all.py", "--out", folder]
    print(f"all notebooks again: {seconds(*again, '--from', '1', repeats=1):.1f} s")
    print(f"a second run: {seconds(*again):.1f} s")

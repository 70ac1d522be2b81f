"""Seconds until the library and its command are ready, each in a fresh process: medians of five.

`python tests/benchmarks/imports.py [FOLDER]`: where a run of the default study is in a folder, also of all its
notebooks again (once), and of a second run after that.
"""

import statistics
import subprocess
import sys
import time

IMPORTS = {
    "datawall": "import datawall",
    "a worker, for its first job": "import datawall.engine.processes, datawall.study.evaluation",
    "a worker, to train": "import datawall.engine.processes, datawall.study.evaluation, datawall.models.base",
    "a kernel, all that notebooks name": "import datawall; [getattr(datawall, name) for name in datawall.__all__]",
    "the fork server": "from importlib import import_module as load; from datawall.engine import code; "
    "[*map(load, code.MODULES)]",
}


def seconds(*words, repeats=5):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


for what, code in IMPORTS.items():
    print(f"import {what}: {seconds('-c', code) - seconds('-c', ''):.2f} s")
for word in ("--help", "--plan", "--check"):
    print(f"run_all.py {word}: {seconds('run_all.py', word):.2f} s")
for folder in sys.argv[1:]:
    print(f"all notebooks again: {seconds('run_all.py', '--out', folder, '--from', '1', repeats=1):.0f} s")
    print(f"a second run: {seconds('run_all.py', '--out', folder):.1f} s")

"""A Dask cluster on loopback for tests: a scheduler and workers, processes of their own that can be killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from dask.distributed import Client

TESTS = Path(__file__).parent


class DaskCluster:
    """Started in a folder, which takes the scheduler's address; `close` ends it."""

    def __init__(self, folder, protocol="tcp", n_workers=2):
        self.folder, file = folder, folder / "scheduler.json"
        file.unlink(missing_ok=True)
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", protocol)
        self.workers = []
        for _ in range(n_workers):
            self.add_worker()
        deadline = time.monotonic() + 120
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with Client(scheduler_file=str(file), set_as_default=False, timeout=60) as client:
            n_workers and client.wait_for_workers(n_workers, timeout=120)
            self.address = client.scheduler.address

    def _start(self, *words):
        here = ["--scheduler-file", str(self.folder / "scheduler.json"), "--no-dashboard"]
        own_group = {"start_new_session": True, "cwd": self.folder}  # where workers keep what they spill
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *map(os.path.abspath, sys.path)])}
        with (self.folder / "log.txt").open("a") as log:
            command = [sys.executable, "-m", "dask", *words, *here]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, **own_group)

    def add_worker(self, *words, threads=1):
        """Start another, which comes in some seconds."""
        name = str(len(self.workers))
        loopback = "--nthreads", str(threads), "--host", "127.0.0.1", "--name", name
        self.workers.append(self._start("worker", *loopback, *words))

    def worker_processes(self):
        """What works for each nanny, which starts another if it dies."""
        nannies = [psutil.Process(worker.pid) for worker in self.workers if worker.poll() is None]
        return [child for nanny in nannies for child in nanny.children() if "spawn_main" in " ".join(child.cmdline())]

    def close(self):
        """Kill what is left of it."""
        for process in [*self.workers, self.scheduler]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

"""Killed at any moment, a study ends with the results of one that was not, and does nothing finished again."""

import itertools
import os
import signal
import time

import numpy as np
import pytest
from dask_cluster import DaskCluster
from harness import FULL, SECONDS, artifacts, ended, made, processes, redone, same_results, settings, start

EACH = 5 if FULL else 1  # times that each part is killed: 30 kills in the full form
SOON = 2.0  # seconds at most, from when so many artifacts are there as chance wants to a kill


class Here:
    """A study on this machine."""

    parts = "run_all.py", "kernel", "worker", "server"

    def start(self, folder):
        self.process = start(folder)
        return self.process

    def living(self, part):
        return [self.process] if part == "run_all.py" else processes(self.process)[part]

    def close(self):
        pass


class OnDask:
    """A study on a Dask cluster, which is started again when its scheduler is dead."""

    parts = "scheduler", "Dask worker"

    def __init__(self, folder):
        self.folder = folder
        self.cluster = DaskCluster(folder)

    def start(self, folder):
        if self.cluster.scheduler.poll() is not None:
            self.cluster.close()
            self.cluster = DaskCluster(self.folder)
        return start(folder, *settings(executor=self.cluster.address))

    def living(self, part):
        return [self.cluster.scheduler] if part == "scheduler" else self.cluster.worker_processes()

    def close(self):
        self.cluster.close()


def disturb(place, folder, to_kill, rng, n_artifacts):
    """Start a study and kill parts of it at random moments; says whether it succeeded all the same, and what died."""
    process, killed, family, due = place.start(folder), [], {}, None
    with process:
        while process.poll() is None:
            family |= {each.pid: each for some in processes(process).values() for each in some}
            if due is None:
                due, delay = rng.integers(len(artifacts(folder)), n_artifacts + 1), rng.uniform(0, SOON)
            if to_kill and len(artifacts(folder)) >= due:
                time.sleep(delay)
                delay = 0
                if victims := place.living(to_kill[-1]):
                    os.kill(victims[rng.integers(len(victims))].pid, signal.SIGKILL)
                    killed.append(to_kill.pop())
                    due = None
            time.sleep(0.05)
        errors = process.communicate(timeout=SECONDS)[1]
    assert "Traceback" not in errors
    if process.returncode != 0:
        assert killed, errors
        assert process.returncode == -signal.SIGKILL or "failed: " in errors or "has died" in errors
    assert ended(family.values())  # with the run, whatever it started
    return process.returncode == 0, killed


@pytest.mark.parametrize("place", [Here, pytest.param(OnDask, marks=pytest.mark.more)], ids=["here", "on Dask"])
def test_killed_study_ends_the_same(place, undisturbed, tmp_path, capsys):
    rng = np.random.default_rng(7)
    to_kill = rng.permutation(place.parts * EACH).tolist()
    (tmp_path / "place").mkdir()
    at = place(tmp_path / "place") if place is OnDask else place()
    story, folders = [], (tmp_path / str(n) for n in itertools.count())
    try:
        while to_kill:
            folder, finished = next(folders), False
            while not finished:
                before = artifacts(folder)
                finished, killed = disturb(at, folder, to_kill, rng, len(artifacts(undisturbed)))
                after = artifacts(folder)
                story.append(f"killed: {', '.join(killed) or 'nothing'}; new: {made(before, after)}")
                assert redone(before, after) == []
            assert same_results(folder, undisturbed)
    finally:
        at.close()
        with capsys.disabled():
            print("", *story, sep="\n  ", end=" ")

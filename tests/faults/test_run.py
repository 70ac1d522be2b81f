"""Two runs at once, an interrupted run, a clock that goes backwards, a unit that takes for ever."""

import os
import signal
import time

import pytest
from harness import FULL, artifacts, ended, environment, processes, redone, run, same_results, start, wait_until


def test_second_run_on_a_folder_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    assert wait_until(lambda: artifacts(folder))
    status, _, errors = run(folder)
    assert status == 1
    assert f"{folder}: process {first.pid} on " in errors
    assert "--out" in errors
    with first:
        assert first.communicate()[1] == ""
    assert first.returncode == 0
    assert same_results(folder, undisturbed)


@pytest.mark.parametrize("kind", ["subset", "model"])  # in the notebook's process, and in its workers
def test_interrupted_run_stops_and_resumes(kind, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    assert wait_until(lambda: any(name.startswith(kind) for name in artifacts(folder)))
    family = [each for some in processes(process).values() for each in some]
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    with process:
        errors = process.communicate()[1]
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert "Stopped. What is finished is kept; the same command goes on from there." in errors
    assert "Traceback" not in errors
    assert ended(family)
    before = artifacts(folder)
    status, _, errors = run(folder)
    assert status == 0, errors
    assert redone(before, artifacts(folder)) == []
    assert same_results(folder, undisturbed)


BACKWARDS = """
import time
_clock, _begin = time.time, time.time()
time.time = lambda: 2 * _begin - _clock() - 86_400  # a day ago, and going backwards
time.time_ns = lambda: int(1e9 * time.time())
"""


def test_clock_that_goes_backwards(undisturbed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        BACKWARDS.replace("import time\n", "import time\n_clock = time.time\n", 1)
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    status, _, errors = run(tmp_path / "run", env={**environment(), "PYTHONPATH": path})
    assert status == 0, errors
    assert same_results(tmp_path / "run", undisturbed)


@pytest.mark.skipif(not FULL, reason="units that take too long are among the tests of the cluster")
def test_units_that_take_too_long_are_named(tmp_path):
    status, _, errors = run(tmp_path / "run", "--set", "time_limit=0.1", "--set", "retries=0")
    assert status == 1
    assert "02_pretraining failed: UnitsFailedError" in errors
    assert "stopped after 0.1 seconds, the time limit of a unit" in errors
    assert "The notebook as far as it ran" in errors

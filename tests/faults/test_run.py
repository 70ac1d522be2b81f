"""Two runs at once, an interrupted run, a clock that goes backwards."""

import os
import signal
import time

import pytest
from harness import artifacts, ended, processes, redone, run, same_results, settings, start
from units import wait_until


# In the notebook, in its workers.
@pytest.mark.parametrize("kind", [pytest.param("subset", marks=pytest.mark.more), "model"])
def test_run_refuses_another_stops_when_interrupted_and_resumes_by_whatever_clock(kind, undisturbed, tmp_path):
    folder = tmp_path / "run"
    # What a shell runs in the background ignores SIGINT, and so would this process.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(folder)
    signal.signal(signal.SIGINT, ours)
    assert wait_until(lambda: artifacts(folder))
    status, errors = run(folder)  # by another, at the same time
    assert (status, f"{folder}: process {process.pid} on " in errors, "--out" in errors) == (1, True, True)

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
    assert list((folder / "notebooks").glob("*.ipynb"))  # as far as it ran

    # Its artifacts are now of tomorrow, and while the run goes on the clock goes back.
    for manifest in folder.glob("store/*/*/manifest.json"):
        os.utime(manifest, (time.time() + 86_400,) * 2)
    before = artifacts(folder)
    with start(folder, *settings(workers=1), CLOCK_BACKWARDS="1") as process:
        errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert redone(before, artifacts(folder)) == []
    assert same_results(folder, undisturbed)

"""What the fault tests have in common: a study of every kind of unit, its command, its processes and its artifacts.

`make test-more` is the whole of the tiny study and many faults; `make test` a part of it and few.
"""

import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

import nbformat
import psutil

import datawall as dw
import run_all

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[1]
FULL = os.environ.get("DATAWALL_TESTS") == "more"
TINY = ROOT / "params" / "tiny.yaml"
TASK = "zeroshot_classification"
PART = {} if FULL else {"strategies": ["random"], "percentages": [50, 100], "steps": 10, "tasks": [TASK]}
STAGES = [] if FULL else ["--stages", "3"]  # which makes all that it needs


def settings(**given):
    """The words of a command that set keys."""
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


STUDY = ["run_all.py", str(TINY), *settings(workers=2, **PART)]
SECONDS = 900  # for one command, on a busy machine


def start(folder, *words, **variables):
    """Begin `run_all.py` on a folder, its output to be read when it has ended."""
    command = [sys.executable, *STUDY, *STAGES, "--out", str(folder), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, env=environment() | variables)


def environment():
    """Ours, but for pytest's mark, in whose presence a kernel leaves what its processes print to others."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return ours | {"PYTHONPATH": os.pathsep.join([str(TESTS / "processes"), os.environ.get("PYTHONPATH", "")])}


def run(folder):
    """Do `run_all.py` on a folder, in this process; returns exit status and errors.

    One worker, which takes half of the time: results are the same with two (as `start` has them).
    """
    with redirect_stderr(StringIO()) as errors, mock.patch.dict(os.environ):
        del os.environ["PYTEST_CURRENT_TEST"]
        return run_all.main([*STUDY[1:], *STAGES, "--out", str(folder), *settings(workers=1)]), errors.getvalue()


def make_undisturbed(folder):
    """Make in a folder all that the command leaves in its store, and its results: in a part of a study without it."""
    if FULL:
        status, errors = run(folder)
        assert status == 0, errors
    else:
        study = dw.Study(dw.params.read(TINY, PART), folder)
        study.write_params()
        dw.evaluation.evaluate(study, TASK)
        study.embedding_seconds()


def verify(folder, capsys):
    """Do `run_all.py --verify` on a folder, here; returns exit status and the lines that it printed."""
    capsys.readouterr()
    return run_all.main([*STUDY[1:], "--out", str(folder), "--verify"]), capsys.readouterr().out.splitlines()


def processes(of):
    """Living descendants of a process by their part: kernels, workers, the server they are forks of, and others."""
    parts = {"kernel": [], "worker": [], "server": [], "other": []}
    for process in psutil.Process(of.pid).children(recursive=True) if psutil.pid_exists(of.pid) else ():
        try:
            name, server = process.name(), process.ppid() == of.pid and "forkserver.serve(" in process.cmdline()[-1]
        except (psutil.Error, IndexError):
            continue
        part = "server" if server else name.removeprefix("datawall ") if "datawall " in name else "other"
        parts[part].append(process)
    return parts


def ended(processes, seconds=10):
    """Whether processes end, or have ended, soon."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def artifacts(folder):
    """When each finished artifact was written, by kind and key."""
    return {
        f"{path.parent.parent.name} {path.parent.name}": path.stat().st_mtime_ns
        for path in folder.glob("store/*/[!.]*/manifest.json")
    }


def redone(before, after):
    """Artifacts that were there and are others now."""
    return sorted(name for name, written in before.items() if after.get(name) != written)


def made(before, after):
    """How many of each kind are new, in words."""
    kinds = Counter(name.split()[0] for name in after.keys() - before.keys())
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "nothing"


def same_results(folder, undisturbed):
    """Whether a run has the results of another, to the bit, and nothing half-made beside its artifacts."""
    ours, theirs = (dw.read_results(each) for each in (folder, undisturbed))
    return ours.equals(theirs) and artifacts(folder).keys() == artifacts(undisturbed).keys() and not half_made(folder)


def half_made(folder):
    """Files and folders that a run has not finished."""
    patterns = ("store/*/.*", "checkpoints/*", ".*", "*/.*")
    return [found for pattern in patterns for found in folder.glob(pattern) if found.name != ".lock"]


def told(folder):
    """All that the executed notebooks printed."""
    outputs = []
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            outputs += [output.get("text", "") for output in cell.get("outputs", ())]
    return "".join(outputs)

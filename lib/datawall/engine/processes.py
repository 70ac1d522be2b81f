"""Processes of this machine that do jobs, one at a time each, and may hang or die without harm to the rest.

Not covered: memory is what a job says that it needs and is not enforced; a job that leaves its process group outlives
its worker; and with `workers: 1` a job that hangs outside of Python, or exhausts memory, takes the notebook along.
"""

import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from datawall.engine import forkserver

log = logging.getLogger(__name__)

OUT_OF_TIME = "stopped after {:g} seconds, the time limit of a unit"
# Operations a second that GPUs are capable of, dense and in bfloat16, by what is in their name; by their makers.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
GPU = re.compile(r"\d+|(GPU|MIG)-.+")  # how CUDA_VISIBLE_DEVICES names one


@dataclass(frozen=True)
class Need:
    """What a unit needs of the machine it runs on."""

    gpus: int = 0  # where there are any
    memory_gib: float = 0.0
    seconds: float = 0.0  # about


@dataclass(frozen=True)
class Job:
    """A unit of work to be made: a call of a function of the library, in a process that opens the study for itself."""

    opening: tuple[Callable[..., Any], *tuple[str, ...]]  # by which it does: a function, and its arguments
    make: Callable[[Any, Any], object]
    item: Any
    need: Need
    time_limit: float | None  # seconds
    retries: int


def describe(item: Any) -> str:
    """What a job makes, in words: the values of its record in order."""
    if is_dataclass(item):
        return " ".join(describe(getattr(item, field.name)) for field in fields(item))
    return f"{item:g}" if isinstance(item, float) else str(item)


def on_this_machine(study: Any, jobs: list[Job]) -> Iterator[tuple[Job, str | None]]:
    """Do jobs in a process per core or, where there are GPUs, per as many of them as the jobs want each.

    With each comes what went wrong with it for good, if anything did. One worker asked for is this process itself,
    which spares the seconds that another takes to start.
    """
    from dask.system import CPU_COUNT

    p, gpus = study.params, visible_gpus()
    if p.workers == 1:
        yield from _in_this_process(study, jobs)
        return
    if not gpus:
        yield from _in_processes(jobs, [None] * (p.workers or CPU_COUNT))
        return
    for together in sorted({max(1, job.need.gpus) for job in jobs}, reverse=True):
        devices = [",".join(gpus[i : i + together]) for i in range(0, len(gpus) - together + 1, together)]
        if not devices:
            raise ValueError(f"units ask for {together} GPUs each, and this machine has {len(gpus)}; ask for fewer.")
        slots = [devices[i % len(devices)] for i in range(p.workers or len(devices))]
        yield from _in_processes([job for job in jobs if max(1, job.need.gpus) == together], slots)


def _in_processes(jobs: list[Job], slots: list[str | None]) -> Iterator[tuple[Job, str | None]]:
    """Do jobs in as many processes as there are slots, each with its GPUs, as far as memory goes round."""
    waiting, busy, memory = [*jobs], {}, memory_gib()
    idle = [Worker(devices) for devices in slots[: len(jobs)]]
    try:
        while waiting or busy:
            while idle:
                taken = sum(worker.job.need.memory_gib for worker in busy.values())
                fitting = (job for job in waiting if not busy or taken + job.need.memory_gib <= memory)
                if (job := next(fitting, None)) is None:
                    break
                waiting.remove(job)
                worker = idle.pop()
                worker.begin(job)
                busy[worker.connection] = worker
            for worker in map(busy.pop, wait(list(busy))):
                job, error = worker.job, worker.outcome()
                if not worker.usable:
                    worker.stop()
                idle.append(worker if worker.usable else Worker(worker.devices))
                if error is None or not job.retries:
                    yield job, error
                else:
                    log.warning("%s: %s; it is begun again.", describe(job.item), error)
                    waiting.append(replace(job, retries=job.retries - 1))
    finally:
        for worker in [*idle, *busy.values()]:
            worker.stop()


def _in_this_process(study: Any, jobs: list[Job]) -> Iterator[tuple[Job, str | None]]:
    """Do jobs here, one after the other."""
    use_one_thread()
    for job in jobs:
        for _ in range(1 + job.retries):
            with _time_limit(job.time_limit):
                error = _attempt(lambda job=job: job.make(study, job.item))
            if error is None:
                break
        yield job, error


def _attempt(work: Callable[[], object]) -> str | None:
    """Do something; what went wrong, in one line, if anything did."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError within the block when it takes longer; in the main thread alone, as signals reach no other."""

    def stop(*_: object) -> None:
        raise TimeoutError(OUT_OF_TIME.format(seconds))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Worker:
    """A process that does jobs, one at a time; it ends, with all that it started, when the one that made it does."""

    def __init__(self, devices: str | None = None) -> None:
        self.devices = devices  # GPUs, as CUDA_VISIBLE_DEVICES names them; those of this process if None
        ours, theirs = socket.socketpair()
        environment = dict(os.environ) if devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
        with theirs:
            number = theirs.fileno()
            if forkserver.at_hand():
                files = 1, 2, number
                self.process = forkserver.Forked("datawall worker", f"{__name__}:serve", [], environment, files)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from datawall.engine import processes; processes.serve({number})"],
                    pass_fds=[number],
                    env={**environment, "PYTHONPATH": forkserver.search_path()},
                    start_new_session=True,  # out of reach of Ctrl-C, which is for the notebook; a group to end at once
                )
        self.connection = Connection(ours.detach())

    def begin(self, job: Job) -> None:
        """Start a job."""
        self.job, self.usable = job, False
        with suppress(BrokenPipeError):  # from a process that died, as `outcome` will say
            self.connection.send(job)

    def outcome(self) -> str | None:
        """What went wrong with the job, if anything; waits until it ends or its time is up."""
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            number = -self.process.wait()
            if number == signal.SIGALRM:
                return OUT_OF_TIME.format(self.job.time_limit)
            how = f"signal {signal.Signals(number).name}" if number > 0 else f"status {-number}"
            return f"its process died ({how})" + "; perhaps memory ran out" * (number == signal.SIGKILL)
        self.usable = error is None or self.devices is None  # a GPU may be left in a state that fails all that follow
        return error

    def stop(self) -> None:
        """End the process, whatever it is at, and those that it started."""
        forkserver.end(self.process.pid, self.connection)
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(forkserver.GRACE)


def serve(descriptor: int) -> None:
    """Be the process of a `Worker`: do the jobs that come through a socket, until its other end is closed."""
    connection, waiting = Connection(descriptor), SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                waiting.put(connection.recv_bytes())
        os.killpg(0, signal.SIGTERM)  # who started this process is gone, be it by SIGKILL

    def do_next() -> None:
        job = pickle.loads(waiting.get())  # noqa: S301 - of the process that started this one: nobody else can write here
        signal.setitimer(signal.ITIMER_REAL, job.time_limit or 0)
        try:
            job.make(_opened(*job.opening), job.item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a time limit ends this process, whatever it is at
    threading.Thread(target=listen, daemon=True).start()
    with suppress(OSError):  # not on Linux
        Path("/proc/self/oom_score_adj").write_text("500")  # should memory run out, this process goes, no notebook
    while True:
        connection.send(_attempt(do_next))


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without loading torch."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(GPU.fullmatch, map(str.strip, given.split(","))))  # CUDA sees none from -1 on
    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return list(takewhile(GPU.fullmatch, told))  # a broken driver has its errors printed there


def peak(machine: str) -> float | None:
    """Operations a second that a GPU of that name is capable of (`PEAKS`); None if that is not known."""
    return None if "MIG" in machine else next((peak for name, peak in PEAKS.items() if name in machine), None)


def memory_gib(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> float:
    """Memory of this machine, or the least that a group around this process may take: a container, or a Slurm job."""
    files = {"": (groups, "memory.max"), "memory": (groups / "memory", "memory.limit_in_bytes")}  # Linux has two ways
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in mine.read_text(encoding="utf-8").splitlines() if mine.exists() else []:
        _, controller, path = line.split(":", 2)
        top, name = files.get(controller, (groups, ""))
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # seen from within a container, or "max"
                limits.append(int((folder / name).read_text(encoding="utf-8")))
    return min(limits) / 2**30


def use_one_thread() -> None:
    """Compute on one thread in this process: torch, and the linear algebra under numpy, scipy and scikit-learn."""
    import scipy.linalg  # noqa: F401 - only libraries that are loaded can be limited
    import sklearn.neighbors  # noqa: F401
    from threadpoolctl import threadpool_limits

    # When first used, numba would set torch's number to its own, and small networks that share cores take far longer.
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(1)  # starts its threads, which then leave torch's alone
    else:
        os.environ["NUMBA_NUM_THREADS"] = "1"
    threadpool_limits(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when a job loads it; some seconds that others save


@cache
def _opened(opening: Callable[..., Any], *arguments: str) -> Any:
    """The study, opened once in each process, so that its data is read once."""
    use_one_thread()
    return opening(*arguments)

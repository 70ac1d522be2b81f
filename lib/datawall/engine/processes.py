"""Processes of this machine that do units of work, one at a time each, and may hang or die without harm to the rest."""

from __future__ import annotations

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
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from datawall.engine import forkserver

log = logging.getLogger(__name__)

GPU = re.compile(r"\d+|(GPU|MIG)-.+")  # how CUDA_VISIBLE_DEVICES names one


@dataclass(frozen=True)
class Need:
    """What a unit needs of the machine it runs on."""

    gpus: int = 0  # where there are any
    memory_gib: float = 0.0
    seconds: float = 0.0  # about


class Work(Protocol):
    """What units belong to, a study, as far as it matters to where they run."""

    params: Any  # `executor`, `workers`, `retries`, `time_limit` and `storage`: see `params.Params`
    folder: Path
    opening: tuple[Callable[..., Any], *tuple[str, ...]]  # by which another process opens it: a function, its arguments


@dataclass(frozen=True)
class Unit:
    """A call of a function of the library, in a process that opens the study for itself."""

    opening: tuple[Callable[..., Any], *tuple[str, ...]]  # see `Work`
    make: Callable[[Any, Any], object]
    item: Any
    need: Need


type Ended = tuple[Unit, str | None]  # a unit, and what went wrong with it for good


def describe(item: Any) -> str:
    """A unit in words: the values of its record in order."""
    if is_dataclass(item):
        return " ".join(describe(getattr(item, field.name)) for field in fields(item))
    return f"{item:g}" if isinstance(item, float) else str(item)


def on_this_machine(study: Work, units: list[Unit]) -> Iterator[Ended]:
    """Do units in a process per core or, where there are GPUs, per as many of them as the units want each.

    One worker asked for is this process itself, which spares the seconds that another takes to start.
    """
    from dask.system import CPU_COUNT

    p, gpus = study.params, visible_gpus()
    if p.workers == 1:
        yield from _in_this_process(study, units)
        return
    if not gpus:
        yield from _in_processes(p, units, [None] * (p.workers or CPU_COUNT))
        return
    for together in sorted({max(1, unit.need.gpus) for unit in units}, reverse=True):
        devices = [",".join(gpus[i : i + together]) for i in range(0, len(gpus) - together + 1, together)]
        if not devices:
            raise ValueError(f"units ask for {together} GPUs each, and this machine has {len(gpus)}; ask for fewer.")
        slots = [devices[i % len(devices)] for i in range(p.workers or len(devices))]
        yield from _in_processes(p, [unit for unit in units if max(1, unit.need.gpus) == together], slots)


def _in_processes(p: Any, units: list[Unit], slots: list[str | None]) -> Iterator[Ended]:
    """Do units in as many processes as there are slots, each with its GPUs, as far as memory goes round."""
    waiting, begun = deque(units), Counter()
    empty, idle, busy = slots[: len(units)], [], {}
    memory = memory_gib()
    try:
        while waiting or busy:
            while (empty or idle) and (unit := _next(waiting, busy.values(), memory)):
                worker = idle.pop() if idle else Worker(empty.pop())
                worker.begin(unit, p.time_limit)
                begun[id(unit)] += 1
                busy[worker.connection] = worker
            soonest = min(worker.seconds_left for worker in busy.values())
            ready = wait(list(busy), None if soonest == float("inf") else soonest)
            for connection, worker in list(busy.items()):
                if connection not in ready and worker.seconds_left > 0:
                    continue
                del busy[connection]
                unit, error = worker.unit, worker.outcome()
                if worker.usable:
                    idle.append(worker)
                else:
                    worker.stop()
                    empty.append(worker.devices)
                if error is None or begun[id(unit)] > p.retries:
                    yield unit, error
                else:
                    log.warning("%s: %s; it is begun again.", describe(unit.item), error)
                    waiting.append(unit)
    finally:
        for worker in [*idle, *busy.values()]:
            worker.stop()


def _in_this_process(study: Work, units: list[Unit]) -> Iterator[Ended]:
    """Do units here, one after the other; one that hangs outside of Python, or exhausts memory, takes this along."""
    use_one_thread()
    for unit in units:
        for _ in range(1 + study.params.retries):
            try:
                with _time_limit(study.params.time_limit):
                    unit.make(study, unit.item)
                error = None
                break
            except Exception as raised:
                traceback.print_exc()
                error = _last_line(raised)
        yield unit, error


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError within the block when it takes longer; in the main thread alone, as signals reach no other."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(_out_of_time(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _out_of_time(seconds: float) -> str:
    return f"stopped after {seconds:g} seconds, the time limit of a unit"


def _last_line(raised: Exception) -> str:
    """The last line of a traceback, in one line."""
    return " ".join(f"{type(raised).__name__}: {raised}".split())


def _next(waiting: deque[Unit], busy: Iterable[Worker], memory_gib: float) -> Unit | None:
    """The first unit for which there is memory beside those that run, taken from the waiting."""
    taken = [worker.unit.need.memory_gib for worker in busy]
    for unit in waiting:
        if not taken or sum(taken) + unit.need.memory_gib <= memory_gib:
            waiting.remove(unit)
            return unit
    return None


class Worker:
    """A process that does units, one at a time; it ends, with all that it started, when the one that made it does."""

    def __init__(self, devices: str | None = None) -> None:
        self.devices = devices
        ours, theirs = socket.socketpair()
        environment = dict(os.environ) if devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
        with theirs:
            self.process = _start(theirs.fileno(), environment)
        self.connection = Connection(ours.detach())

    def begin(self, unit: Unit, time_limit: float | None) -> None:
        """Start a unit, which may take so many seconds."""
        self.unit, self.time_limit, self.usable = unit, time_limit, True
        self.deadline = float("inf") if time_limit is None else time.monotonic() + time_limit
        with suppress(BrokenPipeError):  # from a process that died, as `outcome` will say
            self.connection.send(unit)

    @property
    def seconds_left(self) -> float:
        """Until the unit's time is up."""
        return max(0.0, self.deadline - time.monotonic())

    def wait(self, seconds: float) -> bool:
        """Wait so long for the unit to end; says whether it did, or its time is up."""
        return bool(wait([self.connection], min(seconds, self.seconds_left))) or not self.seconds_left

    def outcome(self) -> str | None:
        """What went wrong with the unit, if anything; waits until it ends or its time is up."""
        self.usable = False
        if not wait([self.connection], None if self.time_limit is None else self.seconds_left):
            return _out_of_time(self.time_limit)
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            code = self.process.wait()
            killed = "; perhaps memory ran out" if code == -signal.SIGKILL else ""
            return (
                f"its process died ({f'signal {signal.Signals(-code).name}' if code < 0 else f'status {code}'}){killed}"
            )
        self.usable = error is None or self.devices is None  # a GPU may be left in a state that fails all that follow
        return error

    def stop(self) -> None:
        """End the process, whatever it is at, and those that it started."""
        self.connection.close()
        forkserver.end(self.process.pid, self._ends)

    def _ends(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False


def _start(descriptor: int, environment: dict[str, str]) -> forkserver.Forked | subprocess.Popen:
    """Start a process that serves a socket: a fork in a run, elsewhere one from scratch."""
    if forkserver.at_hand():
        return forkserver.Forked("datawall worker", "datawall.engine.processes:serve", [], [descriptor], environment)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from datawall.engine import processes; processes.serve({descriptor})"],
        pass_fds=[descriptor],
        env={**environment, "PYTHONPATH": forkserver.search_path()},
        start_new_session=True,  # out of reach of Ctrl-C, which is for the notebook; a group to end at once
    )


def serve(descriptor: int) -> None:
    """Be the process of a `Worker`: do the units that come through a socket, until its other end is closed."""
    connection, waiting = Connection(descriptor), SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                waiting.put(connection.recv_bytes())
        os.killpg(0, signal.SIGTERM)  # who started this process is gone, be it by SIGKILL

    threading.Thread(target=listen, daemon=True).start()
    with suppress(OSError):  # not on Linux
        Path("/proc/self/oom_score_adj").write_text("500")  # should memory run out, this process goes, no notebook
    while True:
        try:
            unit = pickle.loads(waiting.get())  # noqa: S301 - of the process that started this one, as nobody else can write here
            unit.make(_opened(*unit.opening), unit.item)
            error = None
        except Exception as raised:
            traceback.print_exc()
            error = _last_line(raised)
        connection.send(error)


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without loading torch."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(GPU.fullmatch, map(str.strip, given.split(","))))  # CUDA sees none from -1 on
    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()


def memory_gib(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> float:
    """Memory of this machine, or the least that a control group around this process may take of it.

    A container is such a group, a Slurm job and a systemd unit are groups within groups.
    """
    files = {"": (groups, "memory.max"), "memory": (groups / "memory", "memory.limit_in_bytes")}  # of Linux' two ways
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
    """Compute on one thread in this process: torch, and the linear algebra under numpy, scipy and scikit-learn.

    numba is held to one thread as well: when first used, it would set torch's number to its own, and small networks
    that share their cores then take many times as long.
    """
    import scipy.linalg  # noqa: F401 - only libraries that are loaded can be limited
    import sklearn.neighbors  # noqa: F401
    from threadpoolctl import threadpool_limits

    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(1)  # starts its threads, which then leave torch's alone
    else:
        os.environ["NUMBA_NUM_THREADS"] = "1"
    threadpool_limits(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when a unit loads it; some seconds that others save


@cache
def _opened(opening: Callable[..., Any], *arguments: str) -> Any:
    """The study, opened once in each process, so that its data is read once."""
    use_one_thread()
    return opening(*arguments)

"""Where units of work are made: in processes of this machine, or on a Dask cluster.

`executor` of the study file says where: `local` (a process per GPU, or per core), `tcp://scheduler:8786` (any Dask
cluster that runs already; `tls://` where others share the network) or `slurm` (jobs of one's own, by dask-jobqueue).

Functions and records travel as pickles between processes of one user: here through sockets that nobody else holds, to
a cluster by Dask's own protocol, by which whoever can reach the scheduler can run code (params/CLUSTER.md). Not
covered: a run whose Dask scheduler is lost ends, and the same command goes on from there.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from datawall.engine import code, disk, paths
from datawall.engine.processes import Job, Need, Worker, describe, on_this_machine, visible_gpus

if TYPE_CHECKING:
    from dask.distributed import Client

log = logging.getLogger(__name__)

SHOWN = 20  # failed units that a message names
WAIT = 300.0  # seconds for the first worker of a Dask cluster
LOOK = 1.0  # seconds between looks for workers, and for whether a unit is still wanted
NONE_LEFT = "no worker is left; waiting for one, what is done is kept"
SLURM_JOBS = 8  # of a Slurm cluster, where the study does not say


class UnitsFailedError(RuntimeError):
    """Some units failed and the others are done; the message has the last line of each one's traceback."""


def run_units(
    study: Any, make: Callable[..., object], items: list, name: str, need_of: Callable[..., Need] = lambda *_: Need()
) -> None:
    """Call `make(study, item)` for every item, with a progress bar of that name, which leaves nothing behind.

    Each runs in a process apart, which opens the study again (`study.opening`) and has one thread; `study.params` has
    `executor`, `workers`, `retries`, `time_limit` and `storage`. What `make` returns is dropped, what it stores stays.
    The longest begin first. A unit that raises, dies (for want of memory, say) or takes longer than `time_limit` is
    begun again `retries` times, while the others go on. Raises UnitsFailedError at the end if units failed every time,
    and ConnectionError if there is no such Dask cluster, or no longer.
    """
    if not items:
        return
    p = study.params
    jobs = [Job(study.opening, make, item, need_of(study, item), p.time_limit, p.retries) for item in items]
    jobs.sort(key=lambda job: -job.need.seconds)
    run = on_this_machine if p.executor == "local" else _on_dask
    failed = []
    with tqdm(total=len(items), desc=name, leave=False) as bar, closing(run(study, jobs)) as ended:
        for job, error in ended:
            bar.update()
            if error is not None:
                failed.append(f"  {describe(job.item)}: {error}")
    if failed:
        times = f" {n} times each" if (n := 1 + p.retries) > 1 else ""
        lines = failed[:SHOWN] + [f"  … and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
        told = f"{len(failed)} of {len(items)} units of {name} failed{times}"
        remedy = "The others are done; the same command again makes only what is missing."
        raise UnitsFailedError("\n".join([f"{told}. {remedy}", *lines]))


def _on_dask(study: Any, jobs: list[Job]) -> Iterator[tuple[Job, str | None]]:
    """Do jobs on a Dask cluster, each in a process beside one of its workers' threads."""
    from dask.distributed import wait

    p = study.params
    # A folder in that of the run, by which workers tell that they see the same one.
    marked = nullcontext() if p.storage else disk.temporary_folder(study.folder)
    with _client(study, len(jobs)) as client, client.as_current(), marked as mark:
        _await_workers(client, p.executor)
        declared = [worker["resources"] for worker in _workers(client)]
        have_gpus, futures = any("GPU" in worker for worker in declared), {}
        for job, resources in [(job, _resources(job, declared)) for job in jobs]:
            options = {"resources": resources, "retries": job.retries, "priority": job.need.seconds, "pure": False}
            n_gpus = resources.get("GPU", 0) if have_gpus else None
            futures[client.submit(_beside, job, mark, _software(), n_gpus, **options)] = job
        there = True
        while futures:
            with suppress(TimeoutError, CancelledError):
                wait(list(futures), LOOK, "FIRST_COMPLETED")
            with suppress(OSError, RuntimeError):  # of a scheduler that has gone, as its futures will say
                if there != bool(_workers(client)):
                    there = not there
                    log.warning("%s: %s.", p.executor, "a worker is there again" if there else NONE_LEFT)
            for future in [future for future in futures if future.done()]:
                if future.status not in ("finished", "error"):
                    remedy = "what it finished is kept. Start it, and run again."
                    raise ConnectionError(f"the Dask cluster {p.executor} was lost; {remedy}")
                raised = future.exception()
                yield futures.pop(future), None if raised is None else " ".join(str(raised).split())


def _workers(client: "Client") -> list[dict[str, Any]]:
    """What is known of each worker; not by `client.scheduler_info`, which another thread empties now and then."""
    return list(client.sync(client.scheduler.identity, n_workers=-1)["workers"].values())


def _await_workers(client: "Client", executor: str) -> None:
    """Wait until there is a worker, of Slurm for as long as its queue takes; a cluster may start one only for work."""
    if _workers(client):
        return
    patience = None if executor == "slurm" else WAIT
    until = "until Slurm starts the first job" if patience is None else f"{patience:g} seconds at most"
    log.warning("%s: no worker is there yet; waiting for one, %s.", executor, until)
    try:
        client.submit(os.getpid, pure=False).result(patience)
    except TimeoutError as error:
        raise ConnectionError(f"executor {executor}: no Dask worker came; start some, and run again.") from error


def _resources(job: Job, declared: list[dict[str, float]]) -> dict[str, float]:
    """What a job takes of a worker; raises ValueError if none declares as much, as Dask would wait for ever."""
    known = {name for resources in declared for name in resources}
    needs = {"GPU": job.need.gpus, "MEMORY": job.need.memory_gib * 2**30}
    wanted = {name: amount for name, amount in needs.items() if name in known and amount}
    if wanted and not any(all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in declared):
        asks = ", ".join(f"{name}={amount:.0f}" for name, amount in wanted.items())
        most = ", ".join(f"{name}={max(has.get(name, 0) for has in declared):.0f}" for name in wanted)
        declares = f"no Dask worker declares as much (the most: {most}); start one that does (`--resources`)"
        raise ValueError(f"{describe(job.item)} asks for {asks}, and {declares}, or ask for less.")
    return wanted


@contextmanager
def _client(study: Any, n_jobs: int) -> Iterator["Client"]:
    """A client of the cluster that the study names; one of Slurm jobs is there as long as it."""
    from dask.distributed import Client

    p = study.params
    if p.executor != "slurm":
        try:
            client = Client(p.executor, set_as_default=False)
        except OSError as error:
            raise ConnectionError(f"executor {p.executor}: no Dask scheduler answers there ({error}).") from error
        with client:
            yield client
        return
    from dask_jobqueue import SLURMCluster

    # Queue, cores, memory and time of a job are the user's own settings of dask-jobqueue. Others share the network.
    private = {"protocol": "tls://", "security": True, "shared_temp_directory": str(study.folder)}
    loopback = {"dashboard_address": "127.0.0.1:0"}
    with SLURMCluster(**private, scheduler_options=loopback) as slurm, Client(slurm, set_as_default=False) as client:
        slurm.scale(jobs=min(n_jobs, p.workers or SLURM_JOBS))
        yield client


_resting: list[Worker] = []  # of a Dask worker
_taken: set[str] = set()  # GPUs of its jobs
_dealing = Lock()


def _beside(job: Job, mark: Path | None, software: dict[str, str], n_gpus: int | None) -> None:
    """Do a job in a process beside this Dask worker, which then outlives a job that hangs or dies.

    It has so many GPUs to itself of those that this Dask worker sees; by default, it sees the same. When who sent it
    has gone, it ends: Dask then forgets, and cancels, the task that this thread is at.
    """
    from dask.distributed import get_worker

    here, dask_worker = socket.gethostname(), get_worker()
    task = dask_worker.state.tasks[dask_worker.get_current_task()]
    if mark and not mark.exists():
        raise RuntimeError(f"{here} does not see {mark.parent}; keep run folders on storage that all workers share.")
    if other := code.differing(software, _software()):
        raise RuntimeError(f"{here} has other code or versions, in {paths.LIBRARY}: {other}; install the same.")
    with _worker(n_gpus) as worker:
        worker.begin(job)
        while not (ended := worker.connection.poll(LOOK)) and task.state != "cancelled":
            pass
        error = worker.outcome() if ended else "nobody waits for it any more"
    if error is not None:
        raise RuntimeError(error)


@contextmanager
def _worker(n_gpus: int | None) -> Iterator[Worker]:
    """A process, one that rests if there is, with so many GPUs of this Dask worker that no other of its jobs has."""
    with _dealing:
        seen = visible_gpus()
        given = [gpu for gpu in seen if gpu not in _taken][: n_gpus or 0]
        if n_gpus and n_gpus > len(given):
            raise RuntimeError(f"a worker on {socket.gethostname()} declares more GPUs than it sees ({len(seen)}).")
        _taken.update(given)
        devices = None if n_gpus is None else ",".join(given)
        same = [worker for worker in _resting if worker.devices == devices][:1]
        apart = [worker for worker in _resting if worker.devices not in (None, devices)]
        others = [worker for worker in apart if {*worker.devices.split(",")} & {*given}]
        for worker in [*same, *others]:
            _resting.remove(worker)
    for worker in others:  # which leaves the memory of its GPUs
        worker.stop()
    worker = same[0] if same else Worker(devices)
    try:
        yield worker
    finally:
        if worker.usable:
            _resting.append(worker)
        else:
            worker.stop()
        _taken.difference_update(given)


@cache
def _software() -> dict[str, str]:
    """What decides results beside the study: a hash of the library's code, and versions of packages."""
    return {**code.versions(), "datawall": code.json_sha256(code.SOURCES)[:8]}

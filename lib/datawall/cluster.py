"""Where work units run: in processes of this machine, or on a Dask cluster.

`executor` of the study file says where: `local` (a process per GPU, or per core), `tcp://scheduler:8786` (any Dask
cluster that runs already; `tls://` where others share the network) or `slurm` (jobs of one's own, by dask-jobqueue).

Nothing is unpickled from a file. Functions and records travel as pickles between processes of one user: on this
machine through a pair of sockets that nobody else holds; to a cluster by Dask's own protocol, by which whoever can
reach the scheduler can run code as its user. Keep it on loopback or a private network, or use TLS (README, "On a
cluster").
"""

from __future__ import annotations

import hashlib
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from datawall import store
from datawall.processes import Ended, Need, Unit, Worker, describe, on_this_machine

if TYPE_CHECKING:
    from dask.distributed import Client

    from datawall.study import Study

SHOWN = 20  # failed units that a message names
JOBS = 8  # of a Slurm cluster, where the study does not say


class UnitsFailedError(RuntimeError):
    """Some units failed and the others are done; the message has the last line of each one's traceback."""


def run_units[Item](
    study: Study,
    make: Callable[[Study, Item], object],
    items: list[Item],
    name: str,
    need_of: Callable[[Study, Item], Need] = lambda study, item: Need(),
) -> None:
    """Call `make(study, item)` for every item, with a progress bar that leaves nothing behind.

    Each runs in a process apart from this one, with one thread: small models gain little from threads, and numbers
    depend neither on how many processes there are nor on what else the cores do. The longest begin first. A unit that
    raises, whose process dies (for want of memory, say) or that takes longer than the study's `time_limit` is begun
    again as often as its `retries` say, while the others go on.

    Parameters
    ----------
    study
        Where to run, and what; opened again by each process.
    make
        A function of the library; what it returns is dropped, what it stores stays.
    items
        What to make.
    name
        Label of the progress bar.
    need_of
        What an item needs.

    Raises
    ------
    UnitsFailedError
        At the end, if units failed every time.
    ConnectionError
        If there is no such Dask cluster, or no longer.
    """
    if not items:
        return
    described = study.params.model_dump_json(), str(study.folder), make
    units = [Unit(*described, item, need_of(study, item)) for item in items]
    units.sort(key=lambda unit: -unit.need.seconds)
    run = on_this_machine if study.params.executor == "local" else _on_dask
    failed = []
    with tqdm(total=len(items), desc=name, leave=False) as bar, closing(run(study, units)) as ended:
        for unit, error in ended:
            bar.update()
            if error is not None:
                failed.append(f"  {describe(unit.item)}: {error}")
    if failed:
        times = f" {n} times each" if (n := 1 + study.params.retries) > 1 else ""
        lines = failed[:SHOWN] + [f"  … and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
        raise UnitsFailedError(
            f"{len(failed)} of {len(items)} units of {name} failed{times}. The others are done; "
            "the same command again makes only what is missing.\n" + "\n".join(lines)
        )


def _on_dask(study: Study, units: list[Unit]) -> Iterator[Ended]:
    """Do units on a Dask cluster, each in a process beside one of its workers' threads."""
    from dask.distributed import as_completed

    p = study.params
    with _client(study, len(units)) as client, client.as_current(), _mark(study) as mark:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        declared = {name for worker in workers for name in worker["resources"]}
        futures = {}
        for unit in units:
            wanted = {"GPU": unit.need.gpus, "MEMORY": unit.need.memory_gib * 2**30}
            resources = {name: amount for name, amount in wanted.items() if name in declared and amount}
            options = {"resources": resources, "retries": p.retries, "priority": unit.need.seconds, "pure": False}
            futures[client.submit(_beside, unit, p.time_limit, mark, _sources(), **options)] = unit
        for future in as_completed(list(futures)):
            if future.status not in ("finished", "error"):
                raise ConnectionError(
                    f"the Dask cluster {p.executor} was lost; what it finished is kept. Start it, and run again."
                )
            raised = future.exception()
            yield futures.pop(future), None if raised is None else " ".join(str(raised).split())


@contextmanager
def _client(study: Study, n_units: int) -> Iterator[Client]:
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
        slurm.scale(jobs=min(n_units, p.workers or JOBS))
        client.wait_for_workers(1)
        yield client


@contextmanager
def _mark(study: Study) -> Iterator[Path | None]:
    """A file in the run folder, by which workers tell that they see the same one; None if they need not."""
    if study.params.storage:
        yield None
        return
    folder = study.folder
    mark = folder / f".shared.{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        with store.held(mark):
            yield mark
    finally:
        mark.unlink(missing_ok=True)


_resting: list[Worker] = []  # of a Dask worker


def _beside(unit: Unit, time_limit: float | None, mark: Path | None, sources: str) -> None:
    """Do a unit in a process beside this Dask worker, which then outlives a unit that hangs or dies."""
    here = socket.gethostname()
    if mark and not mark.exists():
        raise RuntimeError(f"{here} does not see {unit.folder}; keep run folders on storage that all workers share.")
    if _sources() != sources:
        raise RuntimeError(f"{here} has another version of datawall in {Path(__file__).parent}; install the same.")
    try:
        worker = _resting.pop()
    except IndexError:
        worker = Worker()
    worker.begin(unit, time_limit)
    error = worker.outcome()
    if worker.usable:
        _resting.append(worker)
    else:
        worker.stop()
    if error is not None:
        raise RuntimeError(error)


@cache
def _sources() -> str:
    """Hash of the library's code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

"""Units of work that succeed, fail, hang or die, for tests of where they run: each leaves a line in the run folder."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    name: str
    value: float = 0.0


def note(study, item, text=""):
    with (study.folder / f"{item.name}.txt").open("a") as file:
        file.write(f"{os.getpid()} {time.monotonic()} {text}\n")


def lines(folder, item):
    path = folder / f"{item.name}.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_until(condition, seconds=900):
    """Wait for something to be so; says whether it came to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def succeed(study, item):
    note(study, item)


def pause(study, item):
    note(study, item)
    time.sleep(item.value)
    note(study, item)


def misbehave(study, item):
    kind = item.name.partition("_")[0]
    child = subprocess.Popen(["sleep", "1000"]) if kind == "hangs" else None
    note(study, item, child.pid if child else "")
    if kind == "raises":
        raise ValueError("it is\nno good")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("hangs", "sleeps"):
        time.sleep(1000)
    if kind == "exhausts":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
        try:
            bytearray(2**29)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))


def misbehave_once(study, item):
    if lines(study.folder, item):
        note(study, item)
    else:
        misbehave(study, item)


def tell_gpus(study, item):
    note(study, item, os.environ.get("CUDA_VISIBLE_DEVICES"))


def tell_gpus_slowly(study, item):
    tell_gpus(study, item)
    time.sleep(2)


def tell_circumstances(study, item):
    import torch
    from threadpoolctl import threadpool_info

    threads = {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())}
    note(study, item, f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {sorted(threads)} {'ipykernel' in sys.modules}")

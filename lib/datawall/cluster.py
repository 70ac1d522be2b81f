"""Where work units run: side by side on this machine's cores, or one after the other on its GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from datawall.study import Study


def run_units[Item](study: Study, make: Callable[[Study, Item], object], items: list[Item], name: str) -> None:
    """Call `make(study, item)` for every item, with a progress bar that leaves nothing behind.

    Without a GPU each core runs a process of its own, with one thread: small models gain little from threads, and
    the numbers depend neither on how many processes there are nor on what else the cores do.

    Parameters
    ----------
    study
        Opened again by each process.
    make
        A function of the library; what it returns is dropped, what it stores stays.
    items
        What to make.
    name
        Label of the progress bar.

    Raises
    ------
    Exception
        The first that `make` raises; items not yet begun are given up.
    """
    if not items:
        return
    from joblib import Parallel, cpu_count, delayed

    n_workers = study.params.workers or (1 if _has_gpu() else cpu_count())
    bar = tqdm(total=len(items), desc=name, leave=False)
    with bar:
        if n_workers == 1:
            use_one_thread()
            for item in items:
                make(study, item)
                bar.update()
        else:
            described = study.params.model_dump_json(), str(study.folder)
            work = Parallel(n_jobs=n_workers, return_as="generator_unordered", batch_size=1)
            for _ in work(delayed(_work)(*described, make, item) for item in items):
                bar.update()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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


def _work[Item](params_json: str, folder: str, make: Callable[[Study, Item], object], item: Item) -> None:
    """Make one item, in a process of its own."""
    make(_opened(params_json, folder), item)


@cache
def _opened(params_json: str, folder: str) -> Study:
    """The study, opened once in each process, so that its data is read once."""
    use_one_thread()
    from datawall.params import Params
    from datawall.study import Study

    return Study(Params.model_validate_json(params_json), Path(folder))

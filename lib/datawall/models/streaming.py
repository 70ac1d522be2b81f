"""Cells for training: from memory, or read ahead from a store on disk; the same batches, to the bit, either way."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from datawall.models import training

if TYPE_CHECKING:
    from datawall.cells.cellstore import Cells

END = object()
PREPARED = 4  # batches, at most, that wait for training


def loader[Prepared](
    counts: sp.csr_matrix | Cells, prepare: Callable[[sp.csr_matrix], Prepared], batch_size: int
) -> training.Load:
    """What gives `training.train` its batches, as pairs of rows and what a model prepares of their counts.

    Cells in memory are prepared all at once, before training. Those on disk are read by a thread, batches that share
    blocks of cells together (see `training.minibatches`), up to so many batches ahead, so that up to 66,000 cells are
    in memory, in the store's integers. Another thread prepares them, one batch after the other.
    """
    if sp.issparse(counts):
        prepared = prepare(counts)
        return lambda shares: ((rows, prepared[rows]) for _, rows in shares)
    from datawall.cells.cellstore import floats

    together = training.batches_together(batch_size)

    def read(shares: training.Shares) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        for _, group in itertools.groupby(shares, key=lambda share: share[0] // together):
            batches = [rows for _, rows in group]
            yield from zip(batches, counts.read(batches), strict=True)

    def load(shares: training.Shares) -> Iterator[tuple[np.ndarray, Prepared]]:
        return ((rows, prepare(floats(some))) for rows, some in read_ahead(read(shares), together))

    return lambda shares: read_ahead(load(shares), PREPARED)


def read_ahead[Item](items: Iterator[Item], n: int) -> Iterator[Item]:
    """The same items, made by a thread that is up to `n` ahead; an error comes in its item's place."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, END) for _ in range(n))
        while (item := waiting.popleft().result()) is not END:
            waiting.append(pool.submit(next, items, END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)

"""What benchmarks share: cells of a real one's size, a training step, and a peer and ours timed in turn."""

import itertools
import statistics
import time

import numpy as np
import scipy.sparse as sp
import torch

N_GENES, DETECTED = 19_331, 1_660  # of scTab; how many of them a cell expresses


def cells(n_cells, rng, draw, chances=None, n_genes=N_GENES, detected=DETECTED):
    """CSR (n_cells, n_genes) of about so many genes a cell: `draw(n)` gives their values, `chances` favours genes."""
    chances = itertools.repeat(None) if chances is None else chances
    sizes = zip(rng.poisson(detected, n_cells), chances, strict=False)
    genes = [np.sort(rng.choice(n_genes, n, replace=False, p=p)) for n, p in sizes]
    offsets = np.cumsum([0, *map(len, genes)])
    return sp.csr_matrix((draw(offsets[-1]).astype(np.float32), np.concatenate(genes), offsets), (n_cells, n_genes))


def training_step(module, loss_of, optimiser=torch.optim.AdamW, clip_norm=None, **settings):
    """A function that takes one optimiser step and returns its loss."""
    stepper = optimiser(module.parameters(), **settings)
    where = next(module.parameters()).device.type

    def step():
        with torch.autocast(where, torch.bfloat16, enabled=where == "cuda"):  # as `training.train` does
            loss = loss_of()
        stepper.zero_grad()
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        stepper.step()
        return loss.detach()

    return step


def copy_weights(module, peer):
    """A peer's weights are ours: the same in the same order, but for the layout of the first layer."""
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), peer.parameters(), strict=True):
            theirs.copy_(mine if mine.shape == theirs.shape else mine.T)


def seconds_of(run):
    """Seconds that one call takes, with what it leaves to a GPU."""
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shortest(run, repeats=5):
    """Seconds of the fastest call."""
    return min(seconds_of(run) for _ in range(repeats))


def matrix_speed():
    """Operations a second of a product of two 2,048 x 2,048 matrices on the CPU, at best."""
    square = torch.randn(2048, 2048)
    return 2 * 2048**3 / shortest(lambda: square @ square, 10)


def in_turn(peer, ours, repeats=5):
    """Median seconds of each, and the median ratio of a pair, after one of each to warm up (and compile)."""
    peer(), ours()
    pairs = [(seconds_of(peer), seconds_of(ours)) for _ in range(repeats)]
    ratio = statistics.median(peer / ours for peer, ours in pairs)
    return *(statistics.median(column) for column in zip(*pairs, strict=True)), ratio


def report(what, n_items, peer, ours, repeats=5, floor=None):
    """Print items a second of each and, last, `ratio X.Y`: above 1, ours is faster.

    `floor` is the least time, in seconds, in which this machine could do the work; what share of that speed ours
    reaches is printed too.
    """
    *medians, ratio = in_turn(peer, ours, repeats)
    for name, seconds in zip(("peer", "ours"), medians, strict=True):
        print(f"{name}: {n_items / seconds:,.0f} {what} a second")
    if floor is not None:
        print(f"floor: {n_items / floor:,.0f} {what} a second, of which ours reaches {floor / medians[1]:.0%}")
    print(f"ratio {ratio:.1f}")

"""Time a peer and ours in turn, in one process, on the same input."""

import statistics
import time
from collections.abc import Callable


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def report(
    what: str,
    n_items: int,
    peer: Callable[[], object],
    ours: Callable[[], object],
    repeats: int = 5,
    floor: float | None = None,
) -> None:
    """Run both once to warm up, then alternately; print items a second of each and, last, `ratio X.Y`.

    The ratio is the median over the pairs of the peer's time over ours: above 1, ours is faster. `floor` is the least
    time, in seconds, in which this machine could do the work; what share of that speed ours reaches is printed too.
    """
    peer(), ours()
    pairs = [(seconds_of(peer), seconds_of(ours)) for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    for name, seconds in zip(("peer", "ours"), medians, strict=True):
        print(f"{name}: {n_items / seconds:,.0f} {what} a second")
    if floor is not None:
        print(f"floor: {n_items / floor:,.0f} {what} a second, of which ours reaches {floor / medians[1]:.0%}")
    print(f"ratio {statistics.median(peer / ours for peer, ours in pairs):.1f}")

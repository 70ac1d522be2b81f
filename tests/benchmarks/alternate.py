"""Time a peer and ours in turn, in one process, on the same input."""

import statistics
import time
from collections.abc import Callable


def report(what: str, n_items: int, peer: Callable[[], object], ours: Callable[[], object], repeats: int = 5) -> None:
    """Run both once to warm up, then alternately; print items a second of each and, last, `ratio X.Y`.

    The ratio is the median over the pairs of the peer's time over ours: above 1, ours is faster.
    """
    peer(), ours()
    pairs = []
    for _ in range(repeats):
        seconds = []
        for run in (peer, ours):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        pairs.append(seconds)
    for name, column in (("peer", 0), ("ours", 1)):
        print(f"{name}: {n_items / statistics.median(pair[column] for pair in pairs):,.0f} {what} a second")
    print(f"ratio {statistics.median(peer / ours for peer, ours in pairs):.1f}")

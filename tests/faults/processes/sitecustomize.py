"""Found first by every process of a study that is disturbed."""

import os
import time

from datawall.engine import forkserver

forkserver.WHEN_IDLE = ()  # half of what a fork server does, and of use to none of the stages

if "CLOCK_BACKWARDS" in os.environ:
    clock, begin = time.time, time.time()
    time.time = lambda: 2 * begin - clock() - 86_400  # a day ago, and going backwards
    time.time_ns = lambda: int(1e9 * time.time())

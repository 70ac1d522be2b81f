"""Models that never end their training, in their own ways; each attempt leaves a line in a file."""

import os
import resource
import signal
import time


class Hangs:
    def __init__(self, **hyperparameters):
        pass

    def fit(self, counts, obs, **options):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{type(self).__name__}\n")
        self.misbehave()

    def misbehave(self):
        time.sleep(1000)

    untrained = embed = save = load = fit


class Exhausts(Hangs):
    def misbehave(self):
        """Take memory until there is no more, and die of it as by the system's hand."""
        resource.setrlimit(resource.RLIMIT_AS, (2**34, -1))
        taken = []
        try:
            while True:
                taken.append(bytes(2**30))
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)

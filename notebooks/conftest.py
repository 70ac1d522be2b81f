"""For `pytest notebooks`: workers that notebooks start begin with the library imported, as in a run."""

from contextlib import ExitStack

from datawall import forkserver

server = ExitStack()


def pytest_sessionstart():
    server.enter_context(forkserver.server())


def pytest_sessionfinish():
    server.close()

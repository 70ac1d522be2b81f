"""Processes that begin with the library imported: forks of one that has imported it.

It saves each notebook's kernel and each worker the seconds that torch, scanpy and the like take to import. Where there
is none (not on Linux, or `DATAWALL_FORKS=off`), kernels and workers are processes from scratch, with the same results.
Not covered: a process whose guard alone is killed stays until it ends by itself.
"""

import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "DATAWALL_FORKS"  # environment variable of all that a run starts: where its server listens, or "off"
WHEN_IDLE = ("torch._dynamo", "scanpy")  # of no use to the first stage
GRACE = 5.0  # seconds in which a process that is told to end may end by itself
LONGEST = 60  # letters of a folder for sockets, whose own paths may have 107 on Linux


def at_hand() -> bool:
    """Whether there is a fork server."""
    return os.environ.get(ADDRESS, "off") != "off"


@contextmanager
def server(also: Sequence[str] = ()) -> Iterator[None]:
    """A fork server for this process and all that it starts, until the block, or this process, ends; none if `off`.

    It imports the library, and later, while nobody asks for a fork, the modules of `WHEN_IDLE` and those of `also`.
    """
    if sys.platform != "linux" or os.environ.get(ADDRESS) == "off":
        yield
        return
    short = None if len(os.fsencode(tempfile.gettempdir())) <= LONGEST else "/tmp"  # noqa: S108 - the folder is private
    with tempfile.TemporaryDirectory(prefix="datawall-", dir=short) as folder:
        address = f"{folder}/forks"  # in a folder that only this user can enter
        with _socket() as listener:
            listener.bind(address)
            listener.listen()
            number = listener.fileno()
            # The backend is chosen when matplotlib is imported, by which time a kernel would have set this.
            inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            serving = f"from datawall.engine import forkserver; forkserver.serve({number}, {also!r})"
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", serving],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                env={**inline, **os.environ, "PYTHONPATH": search_path()},
            )
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            process.kill()
            process.communicate()


def serve(number: int, also: Sequence[str] = ()) -> None:
    """Be the fork server: import, then fork for whoever connects to a listening socket, until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    import ipykernel.kernelapp  # noqa: F401 - not matplotlib's backend for it, which looks for its shell when imported

    from datawall.engine import code

    # All of the library, so that no fork imports a module that was edited since, under the key of what it was then.
    for name in code.MODULES:
        import_module(name)
    gc.set_threshold(10_000)  # at Python's 700, collections of the young cost a notebook time
    code.code_key()  # hashes that every fork would take a second for
    later = [*WHEN_IDLE, *also]
    with _socket(number) as listener:
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [], 0 if later else None)
            if sys.stdin in ready:  # closed by one that was killed: it would have ended this process first
                shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
                return
            if not ready:
                import_module(later.pop(0))
                continue
            connection, _ = listener.accept()
            with connection:
                gc.freeze()  # a collection in a fork would walk, and so copy, all that is imported here
                if os.fork() == 0:
                    listener.close()
                    _guard(connection)


def _guard(connection: socket.socket) -> NoReturn:
    """Fork the process that is asked for; tell who asked how it ended, or end it when who asked has gone."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, (request, *descriptors), _, _ = socket.recv_fds(connection, 1, 16)
        with open(request, "rb") as file:
            asked = json.load(file)
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(asked, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(OSError):  # who asked has gone already, as is seen next
            connection.send(str(pid).encode())
        process = os.pidfd_open(pid)
        ready, _, _ = select.select([connection, process], [], [])
        if process not in ready:
            end(pid, process)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):  # nobody is there any more
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _become(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Be the process asked for: call its function, in the surroundings of who asked."""
    status = 1
    try:
        os.setsid()  # out of reach of Ctrl-C, and a group to end at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *descriptors[:2])):
            os.dup2(descriptor, number)
        Path("/proc/self/comm").write_text(request["name"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[:] = request["path"]
        module, function = request["function"].split(":")
        getattr(import_module(module), function)(*request["arguments"], *descriptors[2:])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Forked:
    """A process that the fork server started, with the methods of `subprocess.Popen`; it ends when this process does.

    It has a session of its own, a name of at most 15 characters for `ps` and `top`, and calls `package.module:function`
    with these arguments, as JSON carries them, and the numbers that open files have over there; the first two files are
    its standard output and error. Raises ConnectionError if the fork server has died.
    """

    stdin = stdout = stderr = None

    def __init__(
        self, name: str, function: str, arguments: Sequence[Any], environment: dict[str, str], files: Sequence[int]
    ) -> None:
        self.returncode: int | None = None
        self._guard = _socket()
        request = {"name": name, "function": function, "arguments": arguments, "environment": environment}
        request |= {"folder": os.getcwd(), "path": search_path().split(os.pathsep)}
        try:
            self._guard.connect(os.environ[ADDRESS])
            with tempfile.TemporaryFile() as file:  # an environment may be larger than a message
                file.write(json.dumps(request).encode())
                file.seek(0)
                socket.send_fds(self._guard, [b"."], [file.fileno(), *files])
            self.pid = int(self._guard.recv(64))
        except (OSError, ValueError) as error:
            self._guard.close()
            raise ConnectionError("the process that starts kernels and workers has died") from error

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._guard], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("forked process", timeout)
            self.returncode = int(self._guard.recv(64) or -signal.SIGKILL)  # nothing, if its guard was killed
            self._guard.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def end(pid: int, open_file: Any) -> None:
    """End the group that a process leads: told to first, and made to when a file of its is closed, or soon after."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
        select.select([open_file], [], [], GRACE)
        os.killpg(pid, signal.SIGKILL)


def search_path() -> str:
    """Where this process finds modules, also the user's own."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _socket(number: int | None = None) -> socket.socket:
    """A socket that keeps messages apart."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=number)

"""Forks of a process that has imported the library: like `subprocess.Popen`, and gone with who asked for them."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest
from units import wait_until

from datawall.engine import code, forkserver, kernels

TESTS = Path(__file__).parent


# Of a server that imports what kernels need and no more, where what it imports is not what is tested.
SMALL = "from datawall.engine import code, forkserver\ncode.MODULES, forkserver.WHEN_IDLE = (), ()\n"


@pytest.fixture
def server(fork_server, monkeypatch):
    monkeypatch.setenv(forkserver.ADDRESS, fork_server)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Forks find what they do: tests/forked.py."""
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture
def small_server(tmp_path, monkeypatch):
    """What starts a fork server starts one that has little to import."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(SMALL)
    monkeypatch.syspath_prepend(str(tmp_path / "first"))


def fork(function, *arguments, descriptors=(), **environment):
    return forkserver.Forked("some name", function, arguments, {**os.environ, **environment}, (1, 2, *descriptors))


def test_sockets_are_short_and_of_this_machine_alone_and_a_server_that_died_is_named(
    tmp_path, monkeypatch, small_server
):
    """Whatever the temporary folder."""
    long = tmp_path / (90 * "a")
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with forkserver.server():
        with kernels.forked() as kernel:
            process = psutil.Process(kernel.provisioner.process.pid)
            client = kernel.blocking_client()
            client.start_channels()
            client.wait_for_ready(timeout=300)
            sockets = [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN]
            client.stop_channels()
            server = process.parents()[1]
        assert {each.laddr.ip for each in sockets} <= {"127.0.0.1", "::1"}
        assert not list(long.iterdir())
        assert "forkserver.serve" in " ".join(server.cmdline())
        server.kill()
        server.wait(60)
        with pytest.raises(ConnectionError, match="has died"):
            fork("sys:exit")


def test_without_a_server_processes_start_from_scratch(monkeypatch):
    monkeypatch.setenv(forkserver.ADDRESS, "off")
    with forkserver.server(), kernels.forked() as kernel:
        assert not forkserver.at_hand()
        assert kernel is None
    monkeypatch.delenv(forkserver.ADDRESS)
    monkeypatch.setattr(sys, "platform", "darwin")
    with forkserver.server():
        assert not forkserver.at_hand()


@pytest.mark.parametrize("length", [1, 2**18])  # a message on a socket is of some 200 KiB at most
def test_fork_has_the_surroundings_of_who_asked_and_the_library_imported(length, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = {f"DATAWALL_LONG_{i}": length // 4 * "a" for i in range(8)}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = fork("forked:tell", length * "b", descriptors=[theirs.fileno()], DATAWALL_TEST="value", **long)
        theirs.close()
        told = json.load(ours.makefile())
    assert process.wait(60) == 0
    expected = {"argument": length * "b", "folder": str(tmp_path), "variable": "value", "torch": True}
    assert told == {**expected, "pid": process.pid, "session": process.pid}


def test_a_kernel_of_another_command_is_started_as_it_says(server, tmp_path, monkeypatch):
    """Somebody's own `python3` in place of Jupyter's: here a script that starts the same."""
    for name, value in {"JUPYTER_PATH": tmp_path, "JUPYTER_DATA_DIR": tmp_path, "JUPYTER_PREFER_ENV_PATH": 0}.items():
        monkeypatch.setenv(name, str(value))
    (script := tmp_path / "kernel.sh").write_text(f'#!/bin/sh\nexec {sys.executable} -m ipykernel_launcher -f "$1"\n')
    script.chmod(0o755)
    spec = {"argv": [str(script), "{connection_file}"], "display_name": "mine", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))

    async def execute(client):
        await client.wait_for_ready(timeout=300)
        return await client.execute_interactive("1 + 1", timeout=60)

    with kernels.forked() as kernel:
        assert kernel.kernel_spec.display_name == "mine"
        assert "kernel.sh" not in psutil.Process(kernel.provisioner.pid).name()
        client = kernel.client()
        client.start_channels()
        assert asyncio.run(execute(client))["content"]["status"] == "ok"


@pytest.mark.parametrize(
    ("function", "argument", "status"),
    [("sys:exit", 3, 3), ("json:loads", "no JSON", 1), ("signal:raise_signal", signal.SIGKILL, -signal.SIGKILL)],
    ids=["exit", "raise", "kill"],
)
def test_exit_status_is_that_of_popen(server, function, argument, status):
    process = fork(function, argument)
    assert process.wait(60) == process.poll() == status
    process.kill()  # of one that has ended: nothing


def test_terminating_and_killing(server):
    for end, status in ((forkserver.Forked.terminate, -signal.SIGTERM), (forkserver.Forked.kill, -signal.SIGKILL)):
        process = fork("time:sleep", 1000)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        end(process)
        assert process.wait(60) == status


@pytest.fixture
def short_folder():
    """The path of a socket has 107 characters at most."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_fork_and_its_children_end_when_who_asked_is_killed(short_folder, small_server):
    asks = textwrap.dedent("""
        import os, time
        from datawall.engine import forkserver, kernels
        with forkserver.server():
            with kernels.forked():
                process = forkserver.Forked("some name", "forked:hang_with_child", [], dict(os.environ), [1, 2, 1])
                time.sleep(1000)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(short_folder)}
    with subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, env=environment) as asked:
        pids = [int(pid) for pid in asked.stdout.readline().split()]
        processes = [psutil.Process(pid) for pid in pids]
        server = psutil.Process(asked.pid).children()
        assert [process.name() for process in processes[:1]] == ["some name"]
        assert wait_until(lambda: len(list(short_folder.glob("datawall-*/*/kernel*"))) == 5, 60)  # its sockets
        asked.kill()
    assert len(processes) == 2
    assert not psutil.wait_procs([*processes, *server], timeout=60)[1]
    assert not [path for path in short_folder.iterdir() if not path.name.startswith("torchinductor_")]


def test_a_fork_has_all_of_the_library(server, tmp_path):
    """So that none imports a module that was edited since the server began, whose version it has from then."""
    with (tmp_path / "printed").open("w+") as file:
        process = forkserver.Forked("some name", "forked:print_modules", [], dict(os.environ), [file.fileno()] * 2)
        assert process.wait(60) == 0
        file.seek(0)
        assert set(code.MODULES) <= set(file.read().split())

"""What the forks of tests/test_forkserver.py do."""

import json
import os
import socket
import subprocess
import sys
import time


def tell(argument, descriptor):
    facts = {"argument": argument, "folder": os.getcwd(), "variable": os.environ["DATAWALL_TEST"], "pid": os.getpid()}
    with socket.socket(fileno=descriptor) as connection:
        connection.send(json.dumps({**facts, "session": os.getsid(0), "torch": "torch" in sys.modules}).encode())


def print_modules():
    print(*sys.modules)


def hang_with_child(descriptor):
    child = subprocess.Popen(["sleep", "1000"])
    os.write(descriptor, f"{os.getpid()} {child.pid}\n".encode())
    time.sleep(1000)

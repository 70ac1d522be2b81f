"""Jupyter kernels that are ready at once: forks of a process that has imported the library."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jupyter_client import KernelManager
from jupyter_client.provisioning import LocalProvisioner

from datawall.engine import forkserver


class Provisioner(LocalProvisioner):
    """Starts kernels by the fork server, where jupyter_client would start Python."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        """Start the kernel whose command is `python -m ipykernel_launcher`, followed by its arguments, or any other."""
        if "ipykernel_launcher" not in cmd:  # a kernel that somebody has put in place of Jupyter's own `python3`
            return await super().launch_kernel(cmd, **options)
        arguments = [*cmd[cmd.index("ipykernel_launcher") + 1 :], f"--IPKernelApp.parent_handle={os.getpid()}"]
        # pandas, imported before there was a kernel, takes itself to be in a terminal and cuts tables to its width.
        arguments.append('--IPKernelApp.exec_lines=__import__("pandas").set_option("display.max_columns", 20)')
        function = "ipykernel.kernelapp:launch_new_instance"
        output = [options["stdout"].fileno()] * 2
        self.process = forkserver.Forked("datawall kernel", function, [arguments], dict(options["env"]), output)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


@contextmanager
def forked() -> Iterator[KernelManager | None]:
    """A Jupyter kernel for papermill to execute a notebook in, until the block ends; none without a fork server."""
    if not forkserver.at_hand():
        yield None
        return
    with ExitStack() as exits:

        class Kernel(KernelManager):
            def client(self, **options: Any) -> Any:
                """A client that is closed with the kernel: papermill leaves that of a kernel it is given open."""
                client = super().client(**options)
                exits.callback(client.stop_channels)
                return client

        # Unix sockets: no ports to race for when several runs start at once, nothing readable from outside.
        beside = Path(os.environ[forkserver.ADDRESS]).parent  # which the fork server removes if this process is killed
        sockets = exits.enter_context(tempfile.TemporaryDirectory(dir=beside))
        kernel = Kernel(
            kernel_name="python3",
            transport="ipc",
            ip=f"{sockets}/kernel",
            connection_file=f"{sockets}/connection.json",
            # papermill waits for messages and watches over the kernel at once; the default client cannot.
            client_class="jupyter_client.asynchronous.AsyncKernelClient",
        )
        kernel.provisioner = Provisioner(kernel_spec=kernel.kernel_spec, parent=kernel, connection_info={})
        # What it prints is in its notebook; what is printed past it, say when it crashes, waits in a file.
        kernel.printed = Path(sockets, "printed")
        with kernel.printed.open("w", encoding="utf-8") as file:
            kernel.start_kernel(stdout=file)
        exits.callback(kernel.shutdown_kernel, now=True)
        yield kernel

import fcntl
import os

import pytest
from harness import make_undisturbed


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Made once, by whichever of the processes that test comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder := base / "undisturbed").exists():
            make_undisturbed(base / "half-made")
            (base / "half-made").rename(folder)
    return folder

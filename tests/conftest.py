"""What tests share: a thread for each process, a browser, where the machine has one, and what may be left out."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: two processes test, and threads of both collide
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MORE = os.environ.get("DATAWALL_TESTS") == "more"  # make test-more
# In CI any other skip fails, so that nothing goes untested unnoticed; `.ci/run` adds what it could not install.
MAY_SKIP = ["needs a GPU", "needs Slurm", "needs mounts", "needs a processor"]
MAY_SKIP += os.environ.get("DATAWALL_MAY_SKIP", "").split(",")


def pytest_collection_modifyitems(config, items):
    """Leave out what is of `make test-more` alone, and of a GPU where there is none."""
    left_out = [item for item in items if item.get_closest_marker("more") and not MORE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if of_gpu := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        for item in of_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """In CI, fail where something was skipped that is not on the list."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI", "false") == "false" or not reporter or hasattr(session.config, "workerinput"):
        return
    reasons = {report.longrepr[-1].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())}
    if wrong := sorted(reason for reason in reasons if not any(name and name in reason for name in MAY_SKIP)):
        reporter.write_line(f"CI: these skips are not on the list in tests/conftest.py: {'; '.join(wrong)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def fork_server():
    """Where a fork server listens that tests share, since it takes ten seconds to start; they ask for `forks`."""
    from datawall.engine import forkserver

    with forkserver.server():
        address = os.environ.pop(forkserver.ADDRESS)
        yield address
        os.environ[forkserver.ADDRESS] = address


@pytest.fixture(scope="module")
def forks(fork_server):
    """Kernels and workers are forks of the shared server, also those of `run_all.main`, which starts no other."""
    from datawall.engine import forkserver

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forkserver.ADDRESS, fork_server)
        patch.setattr(forkserver, "server", nullcontext)
        yield


@pytest.fixture(scope="module")  # while it is there, its event loop runs, which papermill could not bear
def chromium():
    """A headless Chromium, for pages of this machine only: the system's, or playwright's own."""
    from playwright import sync_api

    with sync_api.sync_playwright() as started:
        path = next(filter(None, map(shutil.which, BROWSERS)), started.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("needs a browser: apt-get install chromium, or .venv/bin/playwright install chromium")
        # Without a sandbox, since CI runs as root; it opens what the tests wrote themselves.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def few_steps():
    """Heads learn for some steps, where how well they do is not asked."""
    from datawall.tasks import finetuning

    with pytest.MonkeyPatch.context() as patch:
        for heads in (finetuning.finetuned_classification, finetuning.fully_finetuned_classification):
            few = {name: replace(of, steps=50) for name, of in heads.__kwdefaults__.items() if "recipe" in name}
            patch.setattr(heads, "__kwdefaults__", heads.__kwdefaults__ | few)
        yield

"""What tests share: a thread for each process, and for tests of pages a browser, where the machine has one."""

import os
import shutil

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: two processes test, and threads of both collide
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")  # while it is there, its event loop runs, which papermill could not bear
def chromium():
    """A headless Chromium, for pages of this machine only."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Without a sandbox, since CI runs as root; it opens what the tests wrote themselves.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()

"""JupyterLab opens a notebook and runs all its cells, as a reader would."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import papermill
import pytest
from small import small_study

from datawall.study import evaluation

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {
    "batch_key": "dataset_id", "strategies": ["random", "celltype_reweighted", "untrained"], "percentages": [50, 100],
    "seeds": [0, 1], "splits": 1,
}  # fmt: skip
NOTEBOOK = "03_zero_shot_classification.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished small study, and a notebook that tells it, not yet executed."""
    folder = tmp_path_factory.mktemp("lab")
    study = small_study(folder / "small", **CHANGES)
    study.write_params()
    evaluation.evaluate(study, "zeroshot_classification")
    source = ROOT / "notebooks" / NOTEBOOK
    values = {**study.params.model_dump(), "study": str(study.folder)}
    declared = papermill.inspect_notebook(str(source))
    given = {key: values[key] for key in declared}
    papermill.execute_notebook(source, folder / NOTEBOOK, given, prepare_only=True, progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """Address of a JupyterLab on loopback, with nobody's settings, that asks nothing of the network."""
    token = secrets.token_hex(16)
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(folder / ".jupyter" / name.lower()) for name in (*places, "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    words = ["--no-browser", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}"]
    words += [f"--ServerApp.root_dir={folder}", "--ServerApp.allow_root=True", "--LabApp.news_url=None"]
    words += ["--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    words += ["--LabApp.extension_manager=readonly"]
    command = [sys.executable, "-m", "jupyterlab", *words]
    with (folder / "lab.log").open("w+") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", (folder / "lab.log").read_text())):
            assert server.poll() is None, (folder / "lab.log").read_text()
            assert time.monotonic() < deadline, (folder / "lab.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{found[1]}", token
    finally:
        server.kill()  # its kernels end with it; asked to end while one of them starts, it may wait for ever
        server.wait()


def states(address, token):
    """States of the running kernels; none while the server, which answers with an error, notes down a new one."""
    try:
        with urllib.request.urlopen(f"{address}/api/kernels?token={token}", timeout=30) as reply:
            return [kernel["execution_state"] for kernel in json.load(reply)]
    except urllib.error.HTTPError as error:
        if error.code != 500:
            raise
        return []


def test_notebook_opens_and_runs_to_its_end(folder, lab, chromium):
    address, token = lab
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/lab/tree/{NOTEBOOK}?token={token}")
    page.locator(".jp-Notebook h1").wait_for(timeout=90_000)
    deadline = time.monotonic() + 180
    while states(address, token) != ["idle"]:
        assert time.monotonic() < deadline, "no kernel"
        page.wait_for_timeout(100)
    page.locator(".jp-NotebookPanel-toolbar [data-status=idle]").wait_for(timeout=90_000)  # the page knows it too
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-item:not(.lm-mod-disabled)").get_by_text("Run All Cells", exact=True).click()
    while True:
        page.wait_for_timeout(1000)
        page.keyboard.press("Control+s")
        code = [cell for cell in nbformat.read(folder / NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
        errors = [output.evalue for cell in code for output in cell.outputs if output.output_type == "error"]
        assert errors == []
        if all(cell.execution_count for cell in code) and states(address, token) == ["idle"]:
            break
        assert time.monotonic() < deadline, [cell.execution_count for cell in code]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell for cell in code if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    ours = (address, address.replace("http", "ws"), "data:", "blob:")
    assert [url for url in asked if not url.startswith(ours)] == []
    context.close()


def test_make_lab_serves_this_machine_alone():
    command = ["make", "-n", "-o", ".venv/ready", "lab"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "jupyter lab" in shown.stdout
    assert "--ip 127.0.0.1" in shown.stdout

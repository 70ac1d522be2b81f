"""A disk that is full or cannot be written stops a run with one clear line, and costs nothing that was finished."""

import shlex
import shutil
import subprocess
import sys

import pytest
from harness import ROOT, SECONDS, STAGES, STUDY, artifacts, environment, redone, run, same_results

# A mount that is this command's own: needs no privileges where the system lets users have name spaces.
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]


@pytest.fixture(scope="module", autouse=True)
def _mounts():
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    if subprocess.run([*OWN_MOUNTS, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets this user mount nothing")


def in_shell(script, **names):
    """Run lines of shell with mounts of their own; `run` in them is the study on the folder `$here`."""
    command = shlex.join([sys.executable, *STUDY, *STAGES])
    names = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in names.items())
    function = f'run() {{ {command} --out "$here" 2>&1; }}\n'
    done = subprocess.run(
        [*OWN_MOUNTS, names + function + script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_folder_that_cannot_be_written(undisturbed, tmp_path):
    shutil.copytree(undisturbed, here := tmp_path / "here", copy_function=shutil.copy2)
    script = """
        mount --bind "$here" "$here"
        mount -o remount,bind,ro "$here"
        if run; then echo "it is written all the same"; exit 1; fi
    """
    printed = in_shell(script, here=here)
    assert "Read-only file system" in printed
    assert "Traceback" not in printed
    status, _, errors = run(here)
    assert status == 0, errors
    assert redone(artifacts(undisturbed), artifacts(here)) == []
    assert same_results(here, undisturbed)

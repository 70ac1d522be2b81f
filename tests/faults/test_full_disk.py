"""A disk that is full or cannot be written stops a run with one clear line, and costs nothing that was finished."""

import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
from harness import ROOT, SECONDS, STAGES, STUDY, artifacts, environment, half_made, made, redone, same_results

from datawall.reading import verify

# A mount that is this command's own: needs no privileges where the system lets users have name spaces.
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]


@pytest.fixture(scope="module", autouse=True)
def _mounts():
    if not shutil.which("unshare"):
        pytest.skip("needs mounts: unshare is not installed")
    if subprocess.run([*OWN_MOUNTS, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode:
        pytest.skip("needs mounts, which this system lets this user not make")


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


@pytest.mark.more
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_full_disk(share, undisturbed, tmp_path, capsys):
    """Full in the midst of a run; then there is room again."""
    size = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    (here := tmp_path / "here").mkdir()
    (kept := tmp_path / "kept").mkdir()
    script = """
        mount -t tmpfs -o size=$small none "$here"
        if run > "$kept/printed"; then echo "the disk is not full"; exit 1; fi
        cp -a "$here/." "$kept/before"
        mount -o remount,size=1g "$here"
        run
        cp -a "$here/." "$kept/after"
    """
    in_shell(script, here=here, kept=kept, small=int(size * share))
    printed = (kept / "printed").read_text()
    named = re.findall(rf"No space left on device: '{here}/(.+?)'", printed)
    assert named, printed
    assert "Traceback" not in printed
    assert not [problem for problem in verify.problems(kept / "before") if problem.startswith("store")]
    assert not half_made(kept / "before")
    for notebook in kept.glob("before/notebooks/*"):
        nbformat.read(notebook, as_version=4)
    before, after = artifacts(kept / "before"), artifacts(kept / "after")
    assert redone(before, after) == []
    assert same_results(kept / "after", undisturbed)
    with capsys.disabled():
        print(f"\n  full at {named[-1]}; made once there was room: {made(before, after)}", end=" ")


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
    assert artifacts(here) == artifacts(undisturbed)
    assert same_results(here, undisturbed)

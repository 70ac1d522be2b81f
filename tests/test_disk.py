"""What is written is there as a whole or not at all; what is half made is removed, and nothing else."""

import json
import resource

import pytest
from test_store import UNIT, write_two_files

from datawall.engine import disk
from datawall.engine.disk import MANIFEST, write_atomically, write_json
from datawall.engine.store import Store


def test_writing_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")

    def fail(scratch):
        scratch.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_the_disk_does_not_take_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^\[Errno 27\] File too large: '{tmp_path}/a\.json'$"):
            write_json(tmp_path / "a.json", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_writing_replaces_the_content_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "results.csv"
    write_atomically(path, lambda scratch: scratch.write_text("old"))
    seen = []
    write_atomically(path, lambda scratch: (scratch.write_text("new"), seen.append(path.read_text())))
    assert seen == ["old"]
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_json_keeps_key_order_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"z": 1, "a": [0.5, None]})
    assert list(json.loads((tmp_path / "a.json").read_text()).items()) == [("z", 1), ("a", [0.5, None])]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"z": float("nan")})


A, B = 32 * "a", 16 * "b"
LEFT = [f"{place}.making-{A}" for place in ("", "notebooks/", "checkpoints/", "store/model/")]
LEFT += [f"store/model/.making-{A}-damaged"]
OF_OTHERS = (
    *(".zenodo.json", ".pre-commit-config.yaml", ".github/workflows/.a.yml", f".a.{A}", f"docs/.making-{A}"),
    *("study.yaml", ".making-plans", ".env.local", "notebooks/.ipynb_checkpoints/a", f"store/model/{B}/.zattrs.{A}"),
)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in (*LEFT, *OF_OTHERS):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if ".making-a" in name else path.touch()
    with disk.reserve(tmp_path):
        there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert not there & set(LEFT)
    assert there >= set(OF_OTHERS)


def test_what_is_in_use_or_finished_is_not_removed(tmp_path):
    with disk.temporary_folder(tmp_path) as scratch, disk.reserve(tmp_path):
        assert scratch.exists()
    write_json(tmp_path / "a.json", {})
    made = Store(tmp_path / "store").find_or_make(UNIT, write_two_files)
    with disk.reserve(tmp_path):
        assert (tmp_path / "a.json").exists()
        assert made.folder.exists()


@pytest.mark.parametrize(
    "names", [[], [".lock"], [".lock", LEFT[0]], ["study.yaml", "more"], [f"store/a/b/{MANIFEST}"]]
)
def test_folder_of_a_run_is_taken_however_early_it_was_killed(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    disk.check_run_folder(tmp_path)
    disk.check_run_folder(tmp_path / "absent")


@pytest.mark.parametrize("name", ["run/a.txt", "run/.git", "run/store/b", "run"])
def test_what_is_no_folder_of_a_run_is_refused(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if name == "run" else path.mkdir()
    with pytest.raises(FileExistsError, match=rf"^{tmp_path}/run: neither empty nor the folder of a run .* --out"):
        disk.check_run_folder(tmp_path / "run")

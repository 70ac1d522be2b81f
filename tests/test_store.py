import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from datawall.engine import paths, store
from datawall.engine.store import MANIFEST, Store, Unit, write_atomically, write_json

UNIT = Unit("subset", {"strategy": "random", "percentage": 1, "seed": 0}, ("cells/sampling",))


def write_two_files(folder):
    (folder / "rows.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "note.txt").write_text("first\n")


def refuse_to_make(folder):
    raise AssertionError("made again")


def test_made_once_and_found_again(tmp_path):
    made = Store(tmp_path).find_or_make(UNIT, write_two_files)
    found = Store(tmp_path).find_or_make(UNIT, refuse_to_make)
    assert found == made
    assert found.folder == tmp_path / "subset" / UNIT.key
    assert (found.folder / "note.txt").read_text() == "first\n"


def test_never_made_is_not_found(tmp_path):
    assert Store(tmp_path).find(UNIT) is None
    assert not list(tmp_path.iterdir())


def test_manifest_records_what_made_it(tmp_path):
    artifact = Store(tmp_path).find_or_make(UNIT, lambda folder: write_two_files(folder) or {"device": "H100"})
    manifest = json.loads((artifact.folder / MANIFEST).read_text())
    assert (manifest["kind"], manifest["key"], manifest["record"]) == ("subset", UNIT.key, UNIT.record)
    assert set(manifest["files"]) == {"rows.bin", "note.txt"}
    assert manifest["made"] == artifact.made
    assert artifact.made["device"] == "H100"
    assert artifact.made["seconds"] >= 0
    assert artifact.made["peak_memory_mib"] > 10
    assert {"python", "datawall", "torch"} <= set(artifact.made["versions"])


def test_units_do_not_share_artifacts(tmp_path):
    other = Unit("subset", UNIT.record | {"seed": 1}, UNIT.makers)
    study = Store(tmp_path)
    study.find_or_make(UNIT, write_two_files)
    assert study.find(other) is None
    assert study.find_or_make(other, write_two_files).folder != study.find(UNIT).folder


def test_key_follows_kind_record_and_makers():
    others = [
        Unit("model", UNIT.record, UNIT.makers),
        Unit("subset", UNIT.record | {"percentage": 10}, UNIT.makers),
        Unit("subset", UNIT.record | {"more": None}, UNIT.makers),
        Unit("subset", UNIT.record, ("cells/diversity",)),
        Unit("subset", UNIT.record, (*UNIT.makers, "cells/diversity")),
    ]
    assert len({UNIT.key, *(unit.key for unit in others)}) == 6
    assert Unit("subset", dict(reversed(UNIT.record.items())), UNIT.makers).key == UNIT.key
    assert len(UNIT.key) == 16
    assert set(UNIT.key) <= set("0123456789abcdef")


def test_key_follows_code(monkeypatch):
    monkeypatch.setattr(store, "code_version", lambda name: "changed")
    assert Unit(UNIT.kind, UNIT.record, UNIT.makers).key != UNIT.key


def test_key_refuses_nan():
    with pytest.raises(ValueError, match="JSON"):
        _ = Unit("subset", {"percentage": float("nan")}, ()).key


CODE = '''"""About."""

class Adder:
    """Adds."""

    def add(self, a, b=1):
        """Sum."""
        return a + b  # together
'''


def version_of(code, folder, monkeypatch):
    (folder / "adder.py").write_text(code)
    monkeypatch.setattr(store, "SOURCES", store.read_sources(folder))
    return store.code_version.__wrapped__("adder")  # past the cache


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# together", "# as one"),
        ("Sum.", "Both."),
        ('    """Adds."""\n', ""),
        ("About.", "On."),
        ("a + b", "a  +  (b)"),
    ],
)
def test_comments_docstrings_and_layout_leave_the_code_version(old, new, tmp_path, monkeypatch):
    assert old in CODE
    before = version_of(CODE, tmp_path, monkeypatch)
    assert version_of(CODE.replace(old, new), tmp_path, monkeypatch) == before


@pytest.mark.parametrize(
    ("old", "new"), [("a + b", "a - b"), ("b=1", "b=2"), ("return a + b", 'return "Sum."'), ("Adder", "A")]
)
def test_code_changes_the_code_version(old, new, tmp_path, monkeypatch):
    before = version_of(CODE, tmp_path, monkeypatch)
    assert version_of(CODE.replace(old, new), tmp_path, monkeypatch) != before


def test_a_function_that_is_only_a_docstring_has_a_version(tmp_path, monkeypatch):
    code = 'def nothing():\n    """Later."""\n'
    assert version_of(code, tmp_path, monkeypatch) == version_of("def nothing():\n    pass\n", tmp_path, monkeypatch)


def test_module_edited_after_import_keeps_the_version_of_the_code_that_runs(tmp_path):
    """Also in a fork, which has neither imported nor hashed the module itself before the edit."""
    shutil.copytree(paths.LIBRARY, tmp_path / "datawall", ignore=shutil.ignore_patterns("__pycache__"))
    edit_and_fork = f"""
import os
from datawall.engine import store
path = {str(tmp_path / "datawall" / "cells" / "diversity.py")!r}
with open(path, "a") as file:
    file.write("EDITED = True\\n")
if os.fork() == 0:
    print(store.code_version("cells/diversity"), flush=True)
    os._exit(0)
os.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", edit_and_fork]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == store.code_version("cells/diversity")
    edited = store.read_sources(tmp_path / "datawall")["cells/diversity"]
    assert edited == store.SOURCES["cells/diversity"] + "EDITED = True\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_making_that_fails_leaves_nothing(error, tmp_path):
    def fail(folder):
        write_two_files(folder)
        raise error("half way")

    study = Store(tmp_path)
    with pytest.raises(error, match="half way"):
        study.find_or_make(UNIT, fail)
    assert not list((tmp_path / "subset").iterdir())
    assert study.find(UNIT) is None
    study.find_or_make(UNIT, write_two_files)


def test_provenance_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        Store(tmp_path).find_or_make(UNIT, lambda folder: {"device": object()})
    assert not list((tmp_path / "subset").iterdir())


def flip_a_byte(folder):
    content = bytearray((folder / "rows.bin").read_bytes())
    content[1_000] ^= 1
    (folder / "rows.bin").write_bytes(content)


def truncate(folder):
    content = (folder / "rows.bin").read_bytes()
    (folder / "rows.bin").write_bytes(content[:-1])


def keep_of_the_manifest(*names):
    def keep(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({name: manifest[name] for name in names}))

    return keep


def other_provenance(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"device": "cpu"', '"device": "gpu"'))


damages = {
    "flipped byte": (flip_a_byte, "rows.bin"),
    "truncated file": (truncate, "rows.bin"),
    "missing file": (lambda folder: (folder / "note.txt").unlink(), "note.txt"),
    "file of another": (lambda folder: (folder / "0").write_text("more"), "0 does not belong there"),
    "manifest with other provenance": (lambda folder: other_provenance(folder), "manifest.json is not"),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "truncated manifest": (lambda folder: (folder / MANIFEST).write_text('{"kind": "subset", "fi'), ""),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00\xfe"), ""),
    "manifest without files": (keep_of_the_manifest("kind", "key", "record", "made"), "manifest.json is not"),
    "manifest without provenance": (keep_of_the_manifest("kind", "key", "record", "files"), "manifest.json is not"),
    "manifest that is null": (lambda folder: (folder / MANIFEST).write_text("null"), ""),
    "manifest that is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
}


@pytest.mark.parametrize(("damage", "named"), damages.values(), ids=damages)
def test_a_damaged_artifact_is_named_and_made_again(damage, named, tmp_path, caplog):
    folder = Store(tmp_path).find_or_make(UNIT, write_two_files).folder
    damage(folder)
    caplog.set_level(logging.WARNING)
    fresh = Store(tmp_path)  # a process trusts what it verified itself
    assert fresh.find(UNIT) is None
    (warning,) = caplog.messages
    assert f"subset {UNIT.key} is damaged" in warning
    assert named in warning
    fresh.find_or_make(UNIT, write_two_files)
    assert (folder / "rows.bin").read_bytes() == bytes(range(256)) * 20
    assert Store(tmp_path).find_or_make(UNIT, refuse_to_make).folder == folder
    assert {path.name for path in folder.parent.iterdir()} == {UNIT.key, store.LOCK}


def test_what_another_has_just_mended_is_not_removed(tmp_path, monkeypatch):
    """One process has found an artifact damaged, and another mends it before the first can put its own in place."""
    folder = Store(tmp_path).find_or_make(UNIT, write_two_files).folder
    flip_a_byte(folder)
    damage, mended = store.damage, []

    def mend():
        Store(tmp_path).find_or_make(UNIT, write_two_files)
        mended.append(folder.stat().st_ino)

    other = threading.Thread(target=mend)

    def look(path):
        found = damage(path)
        if found and made and other.ident is None:
            other.start()
            other.join(0.5)
        return found

    made = []
    monkeypatch.setattr(store, "damage", look)
    Store(tmp_path).find_or_make(UNIT, lambda scratch: made.append(write_two_files(scratch)))
    other.join()
    assert [folder.stat().st_ino] == mended
    assert not damage(folder)


def test_a_folder_of_another_process_half_way_is_not_an_artifact(tmp_path):
    with store.temporary_folder(tmp_path) as scratch:
        write_two_files(scratch)
        assert Store(tmp_path.parent).find(Unit(tmp_path.name, {}, ())) is None
        assert scratch.parent == tmp_path
    assert not scratch.exists()


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


@pytest.mark.parametrize(
    ("error", "free"),
    [  # by libraries that have errors of their own, or count bytes
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9),
        (OSError("2000 requested and 1000 written"), 0),
    ],
)
def test_full_disk_is_said_whoever_finds_it_so(error, free, tmp_path, monkeypatch):
    def fail(folder):
        raise error

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/subset/{UNIT.key}'$"):
        Store(tmp_path).find_or_make(UNIT, fail)
    assert not list((tmp_path / "subset").iterdir())


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
    assert json.loads((tmp_path / "a.json").read_text()) == {"z": 1, "a": [0.5, None]}
    assert (tmp_path / "a.json").read_text().index("z") < (tmp_path / "a.json").read_text().index("a")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"z": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["z"] == 1


A, B = 32 * "a", 16 * "b"
LEFT = (
    *(f".making-{A}", f".study.yaml.{A}", f".shared.{A}", f"notebooks/.01_curation.ipynb.{A}"),
    *(f"store/model/.making-{A}", f"store/model/.making-{A}-damaged", f"checkpoints/.a.npz.{A}"),
)
OF_OTHERS = (
    *(".zenodo.json", ".pre-commit-config.yaml", ".github/workflows/.a.yml", "docs/.a.b", f"docs/.a.{A}"),
    *("study.yaml", ".making-plans", ".env.local", "notebooks/.ipynb_checkpoints/a", f"store/model/{B}/.zattrs.{A}"),
)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in (*LEFT, *OF_OTHERS):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if ".making-a" in name else path.touch()
    with store.reserved(tmp_path):
        there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert not there & set(LEFT)
    assert there >= set(OF_OTHERS)


def test_what_is_in_use_or_finished_is_not_removed(tmp_path):
    with store.temporary_folder(tmp_path) as scratch, store.reserved(tmp_path):
        assert store.half_made(tmp_path) == [scratch]
    write_json(tmp_path / "a.json", {})
    Store(tmp_path / "store").find_or_make(UNIT, write_two_files)
    assert store.half_made(tmp_path) == []


@pytest.mark.parametrize(
    "names", [[], [".lock"], [".lock", LEFT[1]], ["study.yaml", "more"], [f"store/a/b/{MANIFEST}"]]
)
def test_folder_of_a_run_is_taken_however_early_it_was_killed(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    store.check_run_folder(tmp_path)
    store.check_run_folder(tmp_path / "absent")


@pytest.mark.parametrize("name", ["a.txt", ".git", "store/b"])
def test_folder_of_other_things_is_refused(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=rf"^{tmp_path}: neither empty nor the folder of a run .* --out"):
        store.check_run_folder(tmp_path)


def test_file_is_no_run_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError, match="/a: neither"):
        store.check_run_folder(tmp_path / "a")

import json
import logging
import shutil
import threading
from types import SimpleNamespace

import pytest

from datawall.engine import code, disk, store
from datawall.engine.disk import MANIFEST
from datawall.engine.store import Store, Unit

UNIT = Unit("subset", {"strategy": "random", "percentage": 1, "seed": 0}, ("cells/sampling",))


def write_two_files(folder):
    (folder / "rows.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "note.txt").write_text("first\n")


def refuse_to_make(folder):
    raise AssertionError("made again")


def test_made_once_and_found_again(tmp_path):
    assert Store(tmp_path).find(UNIT) is None
    assert not list(tmp_path.iterdir())
    made = Store(tmp_path).find_or_make(UNIT, write_two_files)
    found = Store(tmp_path).find_or_make(UNIT, refuse_to_make)
    assert found == made
    assert found.folder == tmp_path / "subset" / UNIT.key
    assert Store(tmp_path).find(Unit("subset", UNIT.record | {"seed": 1}, UNIT.makers)) is None
    assert (found.folder / "note.txt").read_text() == "first\n"


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


def test_key_follows_kind_record_makers_and_their_code(monkeypatch):
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
    with pytest.raises(ValueError, match="JSON"):
        _ = Unit("subset", {"percentage": float("nan")}, ()).key
    monkeypatch.setattr(code, "code_version", lambda name: "changed")
    assert Unit(UNIT.kind, UNIT.record, UNIT.makers).key not in (UNIT.key, *(unit.key for unit in others))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, TypeError])
def test_making_that_fails_leaves_nothing(error, tmp_path):
    def fail(folder):
        write_two_files(folder)
        if error is TypeError:
            return {"device": object()}  # provenance that is not JSON
        raise error("half way")

    study = Store(tmp_path)
    with pytest.raises(error):
        study.find_or_make(UNIT, fail)
    assert not list((tmp_path / "subset").iterdir())
    assert study.find(UNIT) is None
    study.find_or_make(UNIT, write_two_files)


def edit(name, change):
    """A damage by which a file has other bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


flip_a_byte = edit("rows.bin", lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1_000:])


def keep_of_the_manifest(*names):
    def keep(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({name: manifest[name] for name in names}))

    return keep


damages = {
    "flipped byte": (flip_a_byte, "rows.bin"),
    "truncated file": (edit("rows.bin", lambda content: content[:-1]), "rows.bin"),
    "missing file": (lambda folder: (folder / "note.txt").unlink(), "note.txt"),
    "file of another": (lambda folder: (folder / "0").write_text("more"), "0 does not belong there"),
    "other provenance": (edit(MANIFEST, lambda text: text.replace(b': "cpu"', b': "gpu"')), "manifest.json is not"),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "truncated manifest": (edit(MANIFEST, lambda _: b'{"kind": "subset", "fi'), ""),
    "binary manifest": (edit(MANIFEST, lambda _: b"\xff\x00\xfe"), ""),
    "manifest without files": (keep_of_the_manifest("kind", "key", "record", "made"), "manifest.json is not"),
    "manifest without provenance": (keep_of_the_manifest("kind", "key", "record", "files"), "manifest.json is not"),
    "manifest that is null": (edit(MANIFEST, lambda _: b"null"), ""),
    "manifest that is a list": (edit(MANIFEST, lambda _: b"[]"), ""),
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
    assert {path.name for path in folder.parent.iterdir()} == {UNIT.key, disk.LOCK}


def test_what_another_has_just_mended_is_not_removed(tmp_path, monkeypatch):
    """One process has found an artifact damaged, and another mends it before the first can put its own in place."""
    folder = Store(tmp_path).find_or_make(UNIT, write_two_files).folder
    flip_a_byte(folder)
    check, mended = store.check, []

    def mend():
        Store(tmp_path).find_or_make(UNIT, write_two_files)
        mended.append(folder.stat().st_ino)

    other = threading.Thread(target=mend)

    def look(*place):
        found = check(*place)
        if found[1] and made and other.ident is None:
            other.start()
            other.join(0.5)
        return found

    made = []
    monkeypatch.setattr(store, "check", look)
    Store(tmp_path).find_or_make(UNIT, lambda scratch: made.append(write_two_files(scratch)))
    other.join()
    assert [folder.stat().st_ino] == mended
    assert not check(folder)[1]


def test_a_folder_of_another_process_half_way_is_not_an_artifact(tmp_path):
    with disk.temporary_folder(tmp_path) as scratch:
        write_two_files(scratch)
        assert Store(tmp_path.parent).find(Unit(tmp_path.name, {}, ())) is None
        assert scratch.parent == tmp_path
    assert not scratch.exists()


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

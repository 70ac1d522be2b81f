"""What `--verify` names and `--why` tells, of a store made up here."""

import json
import shutil

import pandas as pd
import pytest

from datawall.analysis import results
from datawall.engine import code, disk
from datawall.engine.store import MANIFEST, Store, Unit
from datawall.reading import verify


@pytest.fixture
def run(tmp_path):
    """A run folder, and its artifacts by kind: a chain, and results of its end."""
    folder, keys, record = tmp_path / "run", {}, {"corpus_size": 10}
    for kind in ("corpus", "split", "embedding", "evaluation"):
        unit = Unit(kind, record, ("cells/diversity", "cells/sampling") if kind == "split" else ())
        made = Store(folder / "store").find_or_make(unit, lambda scratch: disk.write_json(scratch / "a.json", [1]))
        keys[kind], record = made.key, {kind: made.key, "seed": 0}
    row = dict.fromkeys(results.COLUMNS, 0) | {"run_id": keys["evaluation"]}
    results.write_tables({"results": pd.DataFrame([row])}, folder, {})
    return folder, keys


def place(run, kind):
    folder, keys = run
    return folder / "store" / kind / keys[kind]


def test_sound_run_has_no_problems(run):
    assert (verify.problems(run[0]), verify.absent(run[0]), len(verify.artifacts(run[0]))) == ([], [], 4)


def test_artifact_in_the_place_of_another_is_named(run):
    folder, keys = run
    moved = place(run, "split").with_name(16 * "0")
    place(run, "split").rename(moved)
    assert verify.problems(folder) == [f"store/split/{16 * '0'}: it is split {keys['split']}, in the place of another"]
    assert "in the place of another), and will be made again" in verify.why(folder, "000")


def test_key_that_is_not_of_the_record_is_named(run):
    folder, keys = run
    path = place(run, "split") / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["record"]["seed"] = 1  # by somebody who hashes the manifest again
    disk.write_json(path, {**manifest, "sha256": code.json_sha256(manifest)})
    assert verify.problems(folder) == [f"store/split/{keys['split']}: its key is not that of its record"]


def test_removed_artifact_that_others_were_made_from_is_told(run):
    folder, keys = run
    shutil.rmtree(place(run, "split"))
    assert verify.problems(folder) == []
    (said,) = verify.absent(folder)
    assert said.startswith(f"not here: split {keys['split']}, from which 1 embedding was made;")


def test_what_a_split_drops_is_looked_for_and_told(run):
    folder, keys = run
    unit = Unit("split", {"corpus": keys["corpus"], "drop": [keys["embedding"], 16 * "e"]}, ())
    made = Store(folder / "store").find_or_make(unit, lambda scratch: disk.write_json(scratch / "a.json", [1]))
    (said,) = verify.absent(folder)
    assert said.startswith(f"not here: drop {16 * 'e'}, from which 1 split was made;")
    assert f"  drop: embedding {keys['embedding']}" in verify.why(folder, made.key).splitlines()


def test_removed_checksums_are_named(run):
    (run[0] / results.CHECKSUMS).unlink()
    assert verify.problems(run[0]) == ["results.sha256 is missing"]


def test_why_tells_origin_and_fate(run, monkeypatch):
    folder, keys = run
    said = verify.why(folder, keys["split"][:10]).splitlines()
    assert said[0] == f"split {keys['split']}"
    at = said.index("from")
    assert said[at + 1 : at + 4] == [f"  corpus: corpus {keys['corpus']}", "    corpus_size: 10", "  seed: 0"]
    assert said[-2].startswith("A run that asks for it finds it")
    assert said[-1] == "Made from it: 1 embedding, 1 evaluation."
    assert verify.why(folder, keys["evaluation"]).endswith("Nothing was made from it.")

    monkeypatch.setattr(code, "code_version", lambda name: "edited")
    said = verify.why(folder, keys["evaluation"]).splitlines()
    assert said[-3:-1] == [
        "changed since, so that a run makes it again, under another key:",
        f"  the code of cells/diversity, cells/sampling, which made split {keys['split']}",
    ]
    monkeypatch.setattr(code, "SOURCES", {})  # the module has gone
    assert verify.why(folder, keys["evaluation"]).splitlines() == said
    assert "finds it" in verify.why(folder, keys["corpus"])


def test_why_of_a_damaged_artifact_and_of_an_unclear_key(run):
    folder, keys = run
    (place(run, "split") / "a.json").write_text("[2]")
    assert verify.why(folder, keys["split"]) == f"{keys['split']} is damaged (a.json), and will be made again."
    with pytest.raises(ValueError, match=r"--why : 4 artifacts of .* have a key that begins so"):
        verify.why(folder, "")

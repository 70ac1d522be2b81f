"""Damaged files are named and made again, and nothing else is; a damaged table of results is refused."""

import shutil

import pytest
from harness import artifacts, redone, run, same_results, told, verify

import datawall as dw


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [  # of a file of the first or the last artifact of a kind
    ("model", 0, "model.safetensors", flip_a_byte),
    ("model", -1, "manifest.json", flip_a_byte),
    ("corpus", 0, "cells.zarr/X/data/c/0", flip_a_byte),
    ("split", 0, "held_out.npy", lambda path: path.unlink()),
    ("subset", 0, "rows.npy", truncate),
    ("evaluation", 0, "metrics.json", flip_a_byte),
]


@pytest.fixture
def folder(undisturbed, tmp_path, forks):
    return shutil.copytree(undisturbed, tmp_path / "run", copy_function=shutil.copy2)


def test_damaged_artifacts_are_named_and_made_again(folder, undisturbed, capsys):
    before, damaged = artifacts(folder), []
    for kind, which, name, damage in DAMAGES:
        artifact = sorted((folder / "store" / kind).iterdir())[which]
        damage(artifact / name)
        damaged.append(f"{kind} {artifact.name}")
    lost = sorted((folder / "store" / "evaluation").iterdir())[-1]
    shutil.rmtree(lost)
    for parent in (folder, folder / "store" / "model"):  # of a process that was killed
        (parent / f".making-{32 * 'a'}").mkdir()

    status, printed = verify(folder, capsys)
    assert status == 1
    named = [f"store/{name.replace(' ', '/')}" for name in (*damaged, f"evaluation {lost.name}")]
    assert sorted(line.partition(": ")[0] for line in printed) == sorted(named)
    assert f"store/evaluation/{lost.name}: is missing, and results.csv has numbers of it" in printed

    status, errors = run(folder)
    assert status == 0, errors
    again = redone(before, artifacts(folder))
    assert again == sorted([*damaged, f"evaluation {lost.name}"])
    assert same_results(folder, undisturbed)
    notebooks = told(folder)
    assert all(f"{name} is damaged" in notebooks for name in damaged)
    with capsys.disabled():
        print(f"\n  damaged or lost, and made again: {', '.join(again)}", end=" ")


@pytest.mark.parametrize("name", ["results.parquet", "results.csv"])
def test_damaged_results_are_named_and_refused(name, folder, undisturbed, capsys):
    flip_a_byte(folder / name)
    assert verify(folder, capsys) == (1, [f"{name} is missing, or not as it was written"])
    if name == "results.parquet":
        with pytest.raises(ValueError, match=r"results\.parquet is missing, or not as it was written; run the study"):
            dw.read_results(folder)
    study = dw.open_study(str(folder))
    dw.evaluation.evaluate(study, "zeroshot_classification")
    assert dw.read_results(folder).equals(dw.read_results(undisturbed))

"""CONTRIBUTING's recipes, followed to the letter in a copy of the library, make a study that runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import small
import yaml

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
PLACE = r"(?P<path>lib/\S+?)(?:, (?P<where>at the end|after|before|in place of)(?: `(?P<text>[^`]+)`)?)?"
STEP = rf"^```\w+\n# {PLACE}\n(?P<code>.*?)^```$"
STUDY = small.STUDY | {
    "study": "recipes", "evaluation": ["pbmc68k_t"], "models": ["RandomProjection"], "percentages": [50, 100],
    "strategies": ["random", "contiguous"], "seeds": [0, 1], "splits": 1,
    "tasks": ["zeroshot_classification", "type_separation"],
}  # fmt: skip
SCRIPT = """
import datawall as dw

study = dw.open_study("params/recipes.yaml")
study.write_params()
for task in study.params.tasks:
    table = dw.evaluation.evaluate(study, task)
rows = dw.results.select(dw.read_results(study.folder), task="zeroshot_classification")
for name, figure in {"seeds": dw.plots.seeds(rows, "kappa"), "curves": dw.plots.learning_curves(rows, "kappa")}.items():
    dw.plots.save(figure, name, rows, study.folder / "figures")
from datawall.reading import report
report.write(study.folder)
"""


def recipes():
    """Steps by recipe: path, where, text and code of each block."""
    parts = re.split(r"^### (.*)$", SECTION, flags=re.M)
    return {
        name: [m.groupdict() for m in re.finditer(STEP, part, re.M | re.S)]
        for name, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def follow(step, folder):
    """Do what a block says, in a copy of the repository."""
    path, text, code = folder / step["path"], (step["text"] or "").replace("\\n", "\n"), step["code"]
    if step["where"] is None:
        assert not path.exists(), f"{step['path']} is there already"
        path.write_text(code)
        return
    given = path.read_text()
    if step["where"] == "at the end":
        path.write_text(given + code)
        return
    assert given.count(text) == 1, f"{step['path']} has {text!r} {given.count(text)} times"
    if step["where"] == "in place of":
        path.write_text(given.replace(text, code.rstrip("\n")))
        return
    place = given.index(text)
    if step["where"] == "after":
        place = given.index("\n", place) + 1
    path.write_text(given[:place] + code + given[place:])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A study with all that the recipes add, made by a copy of the library."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lib", "params"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "notebooks").mkdir()
    for steps in recipes().values():
        for step in steps:
            follow(step, folder)
    (folder / "params" / "recipes.yaml").write_text(yaml.safe_dump(STUDY))
    environment = {**os.environ, "PYTHONPATH": str(folder / "lib")}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "recipes"


def test_recipes_are_read_whole():
    found = recipes()
    assert list(found) == ["A model family", "A strategy", "A metric", "A task", "A data set", "A figure"]
    assert sum(map(len, found.values())) == SECTION.count("```") // 2


def test_family_and_strategy_are_pretrained_and_scored(run):
    table = pd.read_parquet(run / "results.parquet")
    trained = table[table["strategy"] != "baseline"]
    assert set(trained["model"]) == {"RandomProjection"}
    assert {("contiguous", 50.0), ("random", 50.0), ("random", 100.0)} == set(
        trained[["strategy", "percentage"]].itertuples(index=False, name=None)
    )


def test_task_data_set_and_metric_are_in_the_results(run):
    table = pd.read_parquet(run / "results.parquet")
    assert "pbmc68k_t" in set(table["dataset"])
    assert {"zeroshot_classification", "type_separation"} == set(table["task"])
    assert {"kappa", "silhouette"} <= set(table["metric"])
    assert {"HVG", "PCA", "PCA-10", "PCA-20"} < set(table.loc[table["metric"] == "silhouette", "model"])
    kappa = pd.read_parquet(run / "intervals.parquet").query("metric == 'kappa' and model == 'PCA'")
    assert len(kappa) >= 1
    assert (kappa["low"] < kappa["value"]).all()
    assert (kappa["value"] < kappa["high"]).all()


def test_figure_is_saved_and_shown_in_the_report(run):
    for suffix in ("svg", "png", "csv"):
        assert (run / "figures" / f"seeds.{suffix}").stat().st_size > 1000
    assert 'src="files/seeds.svg"' in (run / "report" / "figures.html").read_text()
    assert "contiguous" in (run / "figures" / "curves.svg").read_text()

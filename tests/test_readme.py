"""What README and the pages that it names tell a reader to do can be done: commands, names, keys, links; all agrees."""

import importlib
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import papermill
import pytest
import yaml

import datawall
import run_all
from datawall.engine import paths
from datawall.study import params
from datawall.study.records import Run, Subset
from datawall.study.study import open_study

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "params/README.md", "params/CLUSTER.md", "tests/benchmarks/README.md")]
README = "\n".join(path.read_text() for path in PAGES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))


def settings():
    """Every setting of a study file, from YAML blocks and from prose, as a mapping."""
    of_dask = "jobqueue:", "distributed:"
    texts = [text for kind, text in FENCES if kind == "yaml" and not text.startswith(of_dask)]
    texts += [text for text in INLINE if re.match(r"[a-z_]+: \S", text)]
    return list(dict.fromkeys(texts))


def names():
    """Every name of the library, `datawall.x` or `module.X`."""
    known = "datawall", "dw", *datawall.__all__
    found = [text for text in INLINE if re.match(rf"({'|'.join(known)})\.\w+", text) and not text.endswith(".py")]
    return list(dict.fromkeys(text.removeprefix("datawall.").removeprefix("dw.") for text in found))


def check_make(words, **_):
    subprocess.run(["make", "-n", "-o", ".venv/ready", words[0]], cwd=ROOT, check=True, capture_output=True)


def check_run_all(words, tmp_path, capsys):
    """The command shows its plan; of a study file that is the reader's own, its words are only read."""
    run_all._options(words)
    if {"--new", "--verify", "--why"} & set(words):
        return
    if any(re.fullmatch(r"params/(my|your)\w*\.yaml", word) for word in words):
        return
    words = [word for word in words if word not in ("--check", "--calibrate")]
    words = [str(tmp_path / "run") if word == "DIR" else word for word in words]
    assert run_all.main([*words, "--plan"]) == 0, capsys.readouterr().err


def check_python(words, tmp_path, capsys):
    if words[0] == "run_all.py":
        check_run_all(words[1:], tmp_path, capsys)
    elif words[0] == "-m":
        module = importlib.import_module(words[1])
        assert '__name__ == "__main__"' in Path(module.__file__).read_text(), words[1]
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def check_papermill(words, **_):
    assert words[words.index("-p") + 1] in papermill.inspect_notebook(str(ROOT / words[0]))


def check_torchrun(words, **_):
    _, study, model, strategy, percentage, seed = words[words.index("-m") + 1 :]
    runs = open_study(str(ROOT / study)).pretraining_runs()
    assert Run(model, Subset(strategy, float(percentage), int(seed))) in runs


def check_pip(words, **_):
    assert words[:2] == ["install", "-e"]  # from the clone: the name on PyPI may be another's
    assert re.fullmatch(r"\.\[(\w+)\]", words[2])[1] in PROJECT["optional-dependencies"]


def check_conda(words, **_):
    if words[0] == "activate":
        assert words[1:] == [yaml.safe_load((ROOT / "environment.yml").read_text())["name"]]
    else:
        assert (ROOT / words[words.index("-f") + 1]).is_file()


PROGRAMS = {
    "make": check_make, "python": check_python, "papermill": check_papermill, "torchrun": check_torchrun,
    "pip": check_pip, "conda": check_conda, "dask": None, "apt-get": None,  # another's, with nothing of ours in them
}  # fmt: skip


def commands():
    """Every command, from code blocks and from prose."""
    blocks = [text for kind, text in FENCES if kind in ("", "bash", "sh")]
    lines = [line.partition(" #")[0] for text in blocks for line in text.splitlines()]
    texts = [text.strip() for text in [*lines, *INLINE]]
    return list(dict.fromkeys(text for text in texts if text.split(" ")[0] in PROGRAMS and " " in text))


@pytest.mark.parametrize("command", commands())
def test_command_can_be_given(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if check := PROGRAMS[program]:
        check(words, tmp_path=tmp_path, capsys=capsys)


def test_there_are_commands_settings_and_names_to_test():
    assert len(commands()) > 10
    assert len(settings()) > 5
    assert len(names()) > 2


@pytest.mark.parametrize("text", settings())
def test_setting_is_a_key_of_study_files(text):
    given = yaml.safe_load(text)
    assert isinstance(given, dict)
    assert set(given) <= set(params.Params.model_fields)


@pytest.mark.parametrize("text", names())
def test_name_is_in_the_library(text):
    dotted = re.match(r"\w+(\.\w+)*", text)[0].split(".")
    thing = datawall
    for part in dotted:
        thing = getattr(thing, part)


@pytest.mark.parametrize("code", [text for kind, text in FENCES if kind == "python"])
def test_code_compiles(code):
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("https://", "../../actions/", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_badges_say_what_the_project_says():
    badges = dict(re.findall(r"^\[!\[(.*?)\]\((.*?)\)\]", README, re.M))
    assert (ROOT / ".github" / re.search(r"workflows/\w+\.yml", badges["tests"])[0]).is_file()
    assert f"licence: {PROJECT['license']}" in badges
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or later" in badges


def test_study_files_that_are_named_exist():
    for name in re.findall(r"params/(\w+)\.yaml", README):
        assert (ROOT / "params" / f"{name}.yaml").is_file() or name.startswith(("my", "your")), name


def test_tables_list_every_notebook_and_result_column():
    there = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"\]\(notebooks/(\w+)\.ipynb\)", README)) == there
    listed = re.search(r"`(study, model, [^`]+)`", README)[1].split(", ")
    assert listed == datawall.analysis.results.COLUMNS


# What is published agrees


def test_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert "bash .ci/run" in commands
    assert (ROOT / ".ci" / "run").is_file()
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML reads `on` as true


def test_release_takes_its_notes_from_the_changelog():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    script = workflow["jobs"]["release"]["steps"][1]["run"]
    changelog = "# Changelog\n\n## Unreleased\n\n- New.\n\n## 0.2.0\n\n- Second.\n\n## 0.1.0 (2026)\n\n- First.\n"
    script = f"cd $(mktemp -d); printf '%s' {shlex.quote(changelog)} > CHANGELOG.md\n{script}\ncat notes.md"
    for version, expected in {"0.2.0": "- Second.", "0.1.0": "- First."}.items():
        environment = {"GITHUB_REF_NAME": f"v{version}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    assert (ROOT / "CHANGELOG.md").read_text().startswith("# Changelog\n\n## ")


def test_version_title_and_licence_are_the_same_everywhere():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert zenodo["title"] == citation["title"]
    assert [each["name"] for each in zenodo["creators"]] == [each["name"] for each in citation["authors"]]
    assert zenodo["license"].upper() == citation["license"] == PROJECT["license"]
    assert citation["version"] == zenodo["version"] == PROJECT["version"] == datawall.__version__
    assert f"\n## {citation['version']} ({citation['date-released']})\n" in (ROOT / "CHANGELOG.md").read_text()
    assert zenodo["related_identifiers"][0]["identifier"] == citation["preferred-citation"]["doi"]


def test_binder_installs_the_lock_and_the_library():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().split("\n")
    assert (ROOT / ".binder" / lines[0].removeprefix("-r ")).resolve() == ROOT / "requirements.lock"
    assert lines[1] == "--editable ."
    runtime = (ROOT / ".binder" / "runtime.txt").read_text().strip()
    assert runtime == f"python-{(ROOT / '.python-version').read_text().strip()}"
    assert "python -m datawall.cells.datasets" in (ROOT / ".binder" / "postBuild").read_text()


def test_nothing_names_a_place_outside_the_repository():
    for path in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert str(paths.repository()) not in path.read_text()

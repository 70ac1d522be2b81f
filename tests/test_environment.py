"""What a user installs is what the project declares."""

import tomllib
from importlib import metadata
from pathlib import Path

import licences
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked_versions():
    lines = [line.partition(";")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    return dict(line.strip().lower().replace("_", "-").split("==") for line in lines if line.strip())


def test_lock_holds_every_dependency_at_a_version_that_is_allowed():
    locked = locked_versions()
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), text


def test_conda_environment_adds_nothing_to_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, of_pip = environment["dependencies"]
    assert python == f"python={(ROOT / '.python-version').read_text().strip()}"
    assert pip == "pip"
    assert of_pip == {"pip": ["-r requirements.lock", "--editable .[test]"]}


def test_python_is_at_least_the_one_declared():
    assert PROJECT["requires-python"] == f">={(ROOT / '.python-version').read_text().strip()}"


def test_licences_are_listed_as_packages_state_them():
    rows = (ROOT / "LICENSES.md").read_text().partition("|---|---|\n")[2].splitlines()
    listed = dict(row.strip("| ").split(" | ") for row in rows)
    assert list(listed) == licences.locked()
    installed = {each.name for each in metadata.distributions()} & listed.keys()  # some are of one system alone
    assert {name: licences.licence(name) for name in installed} == {name: listed[name] for name in installed}

"""The study file: what is allowed, and one line for each mistake."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from datawall.engine import paths
from datawall.study import params
from datawall.study.records import Subset
from datawall.study.study import open_study

REPOSITORY = Path(__file__).resolve().parents[1]
MINIMAL = {
    "study": "mine", "strategies": ["random"], "percentages": [10, 100], "seeds": [0], "steps": 5,
    "models": ["PretrainedPCA", "Geneformer"], "tasks": ["zeroshot_classification"],
}  # fmt: skip


@pytest.fixture
def refused(tmp_path):
    """Lines of the error that a study file's text, or changes to a good study, bring about."""

    def lines(given):
        path = tmp_path / "mine.yaml"
        path.write_text(given if isinstance(given, str) else yaml.safe_dump(MINIMAL | given))
        with pytest.raises(params.ParamsError) as error:
            params.read(path)
        return str(error.value).splitlines()

    return lines


def test_every_study_of_the_repository_is_valid():
    files = {path.stem: path for path in (REPOSITORY / "params").glob("*.yaml")}
    assert {"quick", "tiny"} <= set(files)
    for name, path in files.items():
        assert params.read(path).study == name


def test_minimal_study_is_filled_with_defaults_and_frozen():
    study = params.check(MINIMAL, "mine.yaml")
    assert (study.corpus, study.k, study.held_out, study.evaluation) == ("kang2018", 5, 0.3, [])
    with pytest.raises(ValidationError, match="frozen"):
        study.steps = 6


def simulated(**values):
    return {"corpus": "simulated", "simulation": {"composition": {"naive B cell": 1}, **values}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"also": [{"name": "more", "sedes": [1]}]}, ["also.0.sedes", "no such key", "did you mean 'seeds'?"]),
        ({"also": [{"seeds": [1]}]}, ["also.0.name", "missing"]),
        ({"also": [{"name": "more", "models": ["GPT"]}]}, ["also.0.models.0: 'GPT'", "PretrainedPCA"]),
        ({"also": [{"name": "more", "strategies": ["spikein_10"]}]}, ["spike_in", "leave the strategy out"]),
        ({"steps_by_model": {"GPT": 5}}, ["steps_by_model.GPT: 'GPT'", "PretrainedPCA"]),
        ({"steps_by_model": {"SSL": 0}}, ["steps_by_model.SSL: 0 ", "greater than or equal to 1"]),
        ({"evaluation": ["simulated:9-12"]}, ["simulated:9-12", "simulated corpus"]),
        (  # values of several forms, without names of the code
            {"corpus": 5},
            ["mine.yaml: corpus: 5 is not allowed: input should be a valid string, or: input should be a valid list;"],
        ),
        ({"cell_type_key": 1}, ["mine.yaml: cell_type_key: 1 is not allowed: input should be a valid string, or: inp"]),
        (
            {"budget_check": {"percentages": [1], "seeds": [0], "budgets": [0.5]}},
            ["mine.yaml: budget_check.budgets: [0.5] is not allowed: 2.0 is not among them"],
        ),
        ({"budget_check": {"percentages": [1], "seeds": [0], "budgets": [1, 2]}}, ["1.0 is the budget of the study's"]),
        ({"budget_check": {"percentages": [1, 1], "seeds": [0]}}, ["budget_check.percentages: [1, 1] ", "twice"]),
        (
            {"batch_key": "b", "tasks": ["zeroshot_integration"], "held_out_tasks": ["zeroshot_classification"]},
            ["zeroshot_integration has no data set: let one take it"],
        ),
        ({"corpus": ["a.h5ad", 5]}, ["mine.yaml: corpus.1: 5 is not allowed: input should be a valid string;"]),
        ({"batch_key": {"a": 1}}, ["mine.yaml: batch_key.a: 1 is not allowed: input should be a valid string;"]),
        ({"sedes": [1]}, ["sedes", "no such key", "did you mean 'seeds'?"]),
        ({"zzz": 1}, ["zzz", "no such key", "strategies, percentages, seeds"]),
        ({1: 2}, ["mine.yaml: 1: no such key"]),
        ({"percentages": [0, 10]}, ["percentages.0: 0 ", "greater than 0", "change it"]),
        ({"percentages": [10, 140]}, ["percentages.1: 140 ", "less than or equal to 100", "change it"]),
        ({"percentages": []}, ["percentages: [] ", "at least 1 item"]),
        ({"percentages": [float("nan")]}, ["percentages.0: nan "]),
        ({"seeds": [-1]}, ["seeds.0: -1 ", "greater than or equal to 0"]),
        ({"seeds": [3, 1, 3]}, ["seeds: [3, 1, 3] ", "3 is listed twice; list it once"]),
        ({"seeds": 3}, ["seeds: 3 ", "valid list"]),
        ({"percentages": [1, 1.0]}, ["percentages: [1, 1.0] ", "listed twice"]),
        ({"strategies": ["randon"]}, ["strategies.0: 'randon' ", "'random'", "'geometric_sketching'"]),
        ({"tasks": ["clustering"]}, ["tasks.0: 'clustering' ", "'zeroshot_classification'"]),
        ({"models": ["Geneforma"]}, ["models.0: 'Geneforma' ", "PretrainedPCA, scVI"]),
        ({"hyperparameters": {"Geneformer": {"n_layer": 2}}}, ["Geneformer: n_layer 2", "not permitted"]),
        ({"hyperparameters": {"Geneformer": {"n_layers": 1}}}, ["Geneformer", "n_layers 1", "than or equal to 2"]),
        ({"hyperparameters": {"Genformer": {}}}, ["'Genformer'", "no model", "PretrainedPCA, scVI"]),
        ({"steps": 0}, ["steps: 0 ", "greater than or equal to 1"]),
        ({"held_out": 1}, ["held_out: 1 ", "less than 1"]),
        *(({"study": name}, [f"study: {name!r} ", "match pattern"]) for name in ("../mine", "..", "a/b", "/tmp/a")),
        *(({"study": name}, ["study: "]) for name in (".hidden", "", "a\n", "~", "a\0")),
        # Artifacts go to no other place of this machine.
        *(({"storage": url}, ["storage: "]) for url in ("file:///tmp/a", "/tmp/a", "s3:", "http://a/b")),
        (simulated(n_cells=0), ["n_cells", "greater than 0"]),
        (simulated(n_genes=20_000), ["n_genes", "19331"]),
        (simulated(treated=1.5), ["treated", "1.5"]),
        (simulated(n_cell=5), ["n_cell", "did you mean 'n_cells'?"]),
        (simulated(composition={"naive B cels": 1}), ["composition", "'naive B cels'", "'naive B cell'"]),
        (simulated(composition={"naive B cell": 0}), ["composition", "greater than 0"]),
        (simulated(responsive=["neural cell"]), ["responsive", "neural cell", "treated to 0"]),
        ({"corpus": "kang2018", "simulation": {}}, ["simulation", "'kang2018'", "corpus: simulated"]),
        ({"corpus": "simulated", "evaluation": ["simulated"]}, ["simulated", "corpus only"]),
        *(
            (
                {"adaptive": True, "seeds": [0, 1], **given},
                ["adaptive needs the strategy random, two percentages and two seeds"],
            )
            for given in ({"seeds": [0]}, {"percentages": [100]}, {"strategies": ["celltype_reweighted"]})
        ),
        ({"tasks": ["zeroshot_integration"]}, ["zeroshot_integration", "batch_key", "leave the task out"]),
        ({"tasks": ["perturbation_response"], "control": "ctrl"}, ["perturbation_key", "leave the task out"]),
        ({"tasks": ["perturbation_response"], "perturbation_key": "drug"}, ["control", "leave the task out"]),
        (
            {"percentages": [100], "strategies": ["celltype_reweighted"]},
            ["no subset", "`random`", "100 %", "smaller percentage"],
        ),
        ({"strategies": ["untrained"]}, ["no subset", "`untrained` draws none", "add `random`"]),
        ("- 1\n- 2\n", ["holds a list", "mapping", "`key: value`"]),
        ("", ["holds a NoneType", "mapping"]),
        ("seeds: [1, 2\nsteps: 3\n", ["not readable as YAML", "line 2"]),
    ],
)
def test_one_mistake_is_one_line_that_says_what_to_do(refused, changes, parts):
    [line] = refused(changes)
    assert line.startswith("mine.yaml: ")
    for part in parts:
        assert part in line
    assert not line.endswith("..")


def test_each_missing_key_is_named(refused):
    keys = ["study", "strategies", "percentages", "seeds", "models", "steps"]
    assert refused("k: 3\n") == [f"mine.yaml: {key}: missing; every study needs it." for key in keys]


def test_each_mistake_has_its_line(refused):
    lines = refused({"percentages": [0, 140], "seeds": [-1], "sede": 1})
    assert len(lines) == 4
    for key in ("percentages.0", "percentages.1", "seeds.0", "sede"):
        assert sum(line.startswith(f"mine.yaml: {key}: ") for line in lines) == 1


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+10e-4"])
def test_numbers_are_those_of_yaml_1_2(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + f"hyperparameters: {{Geneformer: {{learning_rate: {text}}}}}\n")
    assert params.read(path).specs["Geneformer"].hyperparameters.learning_rate == 1e-3
    given = params.read(path, {"hyperparameters": f"{{scVI: {{learning_rate: {text}}}}}"})
    assert given.specs["scVI"].hyperparameters.learning_rate == 1e-3


@pytest.mark.parametrize("value", ["1e-3", "12e4", "e5", "1e", "0.1", "a1e3", 1e-3, 12, "12"])
def test_what_is_written_is_read_as_it_was(value):
    assert params.from_yaml(params.to_yaml({"control": value})) == {"control": value}


def test_overrides_replace_and_are_checked(tmp_path, caplog):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    study = params.read(path, {"seeds": [7], "k": 3})
    assert (study.seeds, study.k, study.steps) == ([7], 3, 5)
    assert params.read(path).seeds == [0]
    assert open_study(str(path), seeds=[7], steps=5).params.seeds == [7]
    assert f"{path}: the values of seeds are not those of the study file" in caplog.text
    with pytest.raises(params.ParamsError, match="did you mean 'seeds'"):
        params.read(path, {"sedes": [7]})


def test_whole_corpus_is_drawn_once_and_untrained_once_a_seed():
    values = {"strategies": ["random", "celltype_reweighted", "untrained"], "percentages": [100, 10], "seeds": [4, 2]}
    sizes = [("random", 10.0), ("random", 100.0), ("celltype_reweighted", 10.0), ("untrained", 0.0)]
    expected = [Subset(strategy, percentage, seed) for strategy, percentage in sizes for seed in (4, 2)]
    assert params.check(MINIMAL | values, "mine.yaml").subsets() == expected


@pytest.fixture
def compendium(tmp_path, monkeypatch):
    """A checkout of its own, with two studies and a run, and the working directory in its notebooks."""
    for folder in ("params", "notebooks", "runs/done"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("params/alpha.yaml", "params/beta.yaml", "runs/done/study.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path.resolve()


@pytest.mark.parametrize(
    ("study", "found"),
    [
        ("alpha", "params/alpha.yaml"),
        ("params/beta.yaml", "params/beta.yaml"),
        ("../params/beta.yaml", "params/beta.yaml"),
        ("runs/done", "runs/done/study.yaml"),
        ("../runs/done", "runs/done/study.yaml"),
        ("runs/done/study.yaml", "runs/done/study.yaml"),
    ],
)
def test_study_file_is_found_by_name_path_and_run_folder(compendium, study, found):
    assert paths.study_file(study) == compendium / found
    assert paths.study_file(str(compendium / found)) == compendium / found


def test_a_column_is_named_for_files_as_the_reader_names_them():
    files, key = ["p/cells.h5ad", "q/cells.h5ad"], {"p_cells": "one", "q_cells": "two"}
    study = params.check(MINIMAL | {"corpus": files, "cell_type_key": key}, "mine.yaml")
    assert [study.key("cell_type", file) for file in files] == ["one", "two"]


def test_unknown_study_lists_the_known_ones(compendium):
    with pytest.raises(FileNotFoundError, match=r"^gamma: no such study file; .*: alpha, beta\.$"):
        paths.study_file("gamma")


def test_run_folder_is_where_the_study_was_written(compendium):
    assert paths.run_folder(compendium / "runs/done/study.yaml", "mine") == compendium / "runs/done"
    for name in ("alpha", "study"):
        assert paths.run_folder(compendium / f"params/{name}.yaml", "mine") == compendium / "runs/mine"


def test_a_models_values_are_the_studys_for_its_family_then_its_variants_then_the_studys_for_itself():
    given = {"scVI": {"n_latent": 3, "dropout": 0.3}, "scvi_2x": {"dropout": 0.4}}
    study = params.check(MINIMAL | {"models": ["scVI", "scvi_2x"], "hyperparameters": given}, "mine.yaml")
    values = [study.specs[model].hyperparameters for model in study.models]
    assert [(h.n_hidden, h.n_latent, h.dropout) for h in values] == [(128, 3, 0.3), (256, 20, 0.4)]


def test_steps_and_gpus_are_a_models_own_or_those_without_its_label_or_of_its_family_or_of_all():
    given = {"models": ["SSL", "scVI", "scvi_4x", "scvi_2x@b", "scvi_2x@a"]}
    steps = {"scVI": 9, "scvi_2x": 8, "scvi_2x@a": 7}
    study = params.check(MINIMAL | given | {"steps_by_model": steps, "gpus": {"scVI": 3, "scvi_2x": 2}}, "mine.yaml")
    assert [study.steps_of(model) for model in study.models] == [5, 9, 9, 8, 7]
    assert [study.gpus_of(model) for model in study.models] == [1, 3, 3, 2, 2]


def test_budget_says_how_schedules_are_counted_unless_a_model_says_otherwise():
    given = {
        "budget": "epochs",
        "models": ["scVI", "SSL", "Geneformer"],
        "hyperparameters": {"SSL": {"schedule": "steps"}},
    }
    specs = params.check(MINIMAL | given, "mine.yaml").specs
    schedules = {name: getattr(spec.hyperparameters, "schedule", None) for name, spec in specs.items()}
    assert schedules == {"scVI": "epochs", "SSL": "steps", "Geneformer": None}
    specs = params.check(MINIMAL | {"models": ["scVI"]}, "mine.yaml").specs
    assert specs["scVI"].hyperparameters.schedule == "steps"

"""What studies come to: counts, and costs against closed forms, from calibrations made up here."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from small import small_study

from datawall import models
from datawall.cells import simulate
from datawall.engine import cluster, code, processes
from datawall.engine.processes import Need
from datawall.models import training
from datawall.planning import calibration
from datawall.planning import plan as planning
from datawall.study import costs, evaluation, params
from datawall.study.records import Evaluation, Run, Subset
from datawall.study.study import Study

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"once": 1.0, "cell": 0.01, "step": 0.5, "step_cell": 0.002, "n_latent": 8, "bytes": 400}
MODEL["embedding"] = [0.5, 0.02]
KNOWN = {
    "machine": "an abacus", "study": "made up", "genes_per_cell": 100.0, "start": 3.0, "evaluated": 100,
    "data": {"corpus": [1.0, 0.1], "dataset": [1.0, 0.1], "read": [0.0, 0.25],
             "bytes": {"corpus": 50.0, "dataset": 70.0}},
    "named": {},
    "models": [{**MODEL, "family": name, "work": 1.0} for name in ("SSL", "Geneformer")]
    + [{**MODEL, "family": "PretrainedPCA", "work": 1.0, "step": 0, "step_cell": 0}],
    "tasks": {
        "zeroshot_classification": {"HVG": [8.0, 2.0], "PCA": [2.0, 1.0], "model": [1.0, 0.5]},
        "perturbation_response": {"NoChange": [0.5, 0.0], "model": [1.0, 1.0]},
    },
}  # fmt: skip
GIVEN = {
    "study": "mine", "corpus": "simulated", "held_out": 0.2, "perturbation_key": "condition", "control": "ctrl",
    "simulation": {"n_cells": 1000, "n_genes": 60, "composition": {"naive B cell": 2, "classical monocyte": 1}},
    "strategies": ["random", "untrained"], "percentages": [10, 100], "models": ["SSL", "PretrainedPCA"], "steps": 40,
    "hyperparameters": {"SSL": {"n_hidden": [16], "n_latent": 4, "batch_size": 32}}, "splits": 3, "workers": 2,
    "tasks": ["zeroshot_classification", "perturbation_response"],
}  # fmt: skip


def study_of(folder=Path(), **changes):
    return small_study(folder, **GIVEN | changes)


def costs_of(study, *, work=None):
    """Costs by a calibration of just this study's cells and, without `work`, of just its models."""
    n_genes, genes_per_cell = costs.size_of(study.params)
    known = []
    for model in KNOWN["models"]:
        spec = models.resolve(model["family"], study.params.hyperparameters)
        known.append(model | {"work": work or costs.work(spec, n_genes, genes_per_cell)})
    return costs.Costs(study.params, KNOWN | {"genes_per_cell": genes_per_cell, "models": known})


def shipped(name):
    return Study(params.read(ROOT / "params" / f"{name}.yaml"), Path())


# Counts


def test_the_published_study_is_80_subsets_400_models_and_6400_experiments():
    grid, *besides = planning.counts(shipped("paper"))
    subsets = (6 + 5 + 5) * 5  # sizes of the three strategies, seeds
    experiments = 80 * 5 * 4 * 4  # subsets, families, tasks, data sets
    assert grid == ("paper", {"subsets": subsets, "models": 400, "experiments": experiments, "baselines": 52})
    counted = {name: (of["subsets"], of["models"]) for name, of in besides}
    assert counted == {
        "untrained controls": (0, 5 * 5),
        "spike-ins of 10 %": (6 * 5, 6 * 5 * 3),
        "spike-ins of 50 %": (3 * 5, 3 * 5 * 3),
        "model sizes": (0, 6 * 5 * 6),  # on random subsets, which are there already
        "weight decay": (0, 6 * 5 * 2),
        "loss of a variational autoencoder": (0, 6 * 5),
    }
    assert all(of["experiments"] == 16 * of["models"] for _, of in besides)


def test_the_rehearsal_has_the_published_grid():
    grids = {
        name: [
            (run.model, *vars(run.subset).values())
            for run in shipped(name).pretraining_runs()
            if run.model in models.hyperparameters.FAMILIES and not run.subset.strategy.startswith("spikein")
        ]
        for name in ("paper", "paper_rehearsal")
    }
    assert grids["paper"] == grids["paper_rehearsal"]
    (_, paper), (_, rehearsal) = (planning.counts(shipped(name))[0] for name in grids)
    assert paper == rehearsal


@pytest.mark.parametrize("name", ["quick", "tiny", "model_size"])
def test_counts_add_up_to_the_whole_study(name):
    study = shipped(name)
    of, _ = planning.counts(study)[0]
    counts = sum((Counter(counted) for _, counted in planning.counts(study)), Counter())
    every = [one for task in study.params.tasks for one in evaluation.evaluations(study, task)]
    baselines = sum(isinstance(one.source, str) for one in every)
    assert of == name
    n_models = len(study.pretraining_runs()) + len(study.budget_runs())
    assert (counts["subsets"], counts["models"]) == (len(study.subsets()), n_models)
    assert (counts["experiments"], counts["baselines"]) == (len(every) - baselines, baselines)


def test_a_run_of_two_grids_is_counted_once():
    also = [{"name": "more", "percentages": [1, 10]}, {"name": "again", "percentages": [10]}]
    (_, grid), (_, more), (_, again) = planning.counts(study_of(also=also))
    assert (grid["subsets"], grid["models"], grid["experiments"]) == (2, 6, 12)
    assert more == {"subsets": 1, "models": 2, "experiments": 4}
    assert again == {"subsets": 0, "models": 0, "experiments": 0}


# Costs of units


def test_a_run_costs_once_each_cell_each_step_and_each_cell_of_a_step():
    of = costs_of(study_of())
    need = of.run(Run("SSL", Subset("random", 10.0, 0)))
    assert need.seconds == pytest.approx(1.0 + 0.01 * 80 + 40 * (0.5 + 0.002 * 32))
    assert need.gpus == 1
    assert of.run(Run("PretrainedPCA", Subset("random", 10.0, 0))).seconds == pytest.approx(1.0 + 0.01 * 80)
    memory_gib = costs.BASE_GIB + 4 * 400 / 2**30
    assert of.run(Run("SSL", Subset("untrained", 0.0, 0))) == Need(0, pytest.approx(memory_gib), 1.0)


def test_a_subset_that_is_streamed_is_read_in_every_step():
    run = Run("SSL", Subset("random", 100.0, 0))
    in_memory, streamed = (costs_of(study_of(memory_gib=gib)).run(run) for gib in (4.0, 0.0))
    assert streamed.seconds - in_memory.seconds == pytest.approx(40 * 32 * 0.25)
    assert streamed.memory_gib < in_memory.memory_gib


def test_steps_cost_in_proportion_to_a_models_work():
    study, run = study_of(), Run("SSL", Subset("random", 10.0, 0))
    work = costs.work(study.params.specs["SSL"], *costs.size_of(study.params))
    seconds = costs_of(study, work=work / 3).run(run).seconds
    assert seconds == pytest.approx(1.0 + 0.01 * 80 + 3 * 40 * (0.5 + 0.002 * 32))


def test_an_evaluation_costs_a_power_of_its_cells_each_split_and_its_embedding():
    of, run = costs_of(study_of()), Run("SSL", Subset("random", 10.0, 0))
    embedding = 0.5 + 0.02 * 200
    one = Evaluation("zeroshot_classification", "simulated_held_out", run)
    assert of.evaluation(one).seconds == pytest.approx(3 * 2**0.5 + embedding)
    assert of.evaluation(one, embedded=True).seconds == pytest.approx(3 * 2**0.5)
    baseline = Evaluation("zeroshot_classification", "simulated_held_out", "HVG")
    assert of.evaluation(baseline) == Need(0, of.evaluation(one).memory_gib, pytest.approx(3 * 8.0 * 2**2))
    by_donor = costs_of(study_of(donor_key="donor_id"))
    assert by_donor.evaluation(baseline).seconds == pytest.approx(2 * 3 * 8.0 * 2**2)


def test_perturbation_response_costs_each_treatment_and_context(tmp_path):
    def seconds(dataset, **changes):
        one = Evaluation("perturbation_response", dataset, "NoChange")
        return costs_of(study_of(**changes)).evaluation(one).seconds

    one = {"held_out_contexts": ["naive B cell"]}
    assert seconds("simulated_held_out", **one) == pytest.approx(0.5)
    assert seconds("simulated_held_out") == pytest.approx(0.5 * costs.CONTEXTS)
    assert seconds("simulated_held_out", treatments=["a", "b"], **one) == pytest.approx(0.5 * 2)
    obs = pd.DataFrame({"drug": np.resize(["ctrl", "a", "b", "c"], 100)}, index=map(str, range(100)))
    ad.AnnData(np.ones((100, 1), np.float32), obs=obs).write_h5ad(tmp_path / "drug.h5ad")
    drug = {"file": str(tmp_path / "drug.h5ad"), "perturbation_key": "drug", "control": "ctrl"} | one
    for treatments, n_judged in ((5, 3), (2, 2), (["c"], 1)):
        found = seconds("drug", evaluation=[drug | {"treatments": treatments}])
        assert found == pytest.approx(0.5 * n_judged)


def test_reconstruction_is_of_a_thousand_cells_at_most():
    study = study_of(tasks=["reconstruction"], simulation={"n_cells": 9000, "n_genes": 60})
    one = Evaluation("reconstruction", "simulated_held_out", Run("SSL", Subset("random", 10.0, 0)))
    assert costs_of(study).evaluation(one).seconds == pytest.approx(costs.RECONSTRUCTION * (0.5 + 0.02 * 1000))


def test_work_is_the_weights_that_a_cell_meets():
    n_genes, n_weights = 500, {}
    for name in ("SSL", "Geneformer"):
        weights = models.create(name).untrained(n_genes, seed=0).module.named_parameters()
        n_weights[name] = {part: weight.numel() for part, weight in weights if weight.ndim == 2}
    work = costs.work(models.resolve("SSL"), n_genes, n_genes)  # of a cell that has all genes
    assert work * 1e6 == pytest.approx(sum(n_weights["SSL"].values()))
    layers = sum(n for part, n in n_weights["Geneformer"].items() if part.startswith("layers"))
    attention, output = 6 * 2 * 100 * 256, 0.15 * n_genes * 256
    work = costs.work(models.resolve("Geneformer"), n_genes, 100)
    assert work * 1e6 == pytest.approx(100 * (layers + attention + output))


def test_speed_of_training_is_that_of_the_tokens_that_were_seen():
    spec, nothing = models.resolve("Geneformer"), [np.empty(0)] * 4
    history = training.History(*nothing, 80, 40, seconds=2.0, n_timed=50, n_averaged=750)
    told = costs.speed(spec, 500, 7.0, history)
    assert (told["tokens"], told["cells"]) == (5000, 50)
    assert told["operations"] == pytest.approx(6e6 * costs.work(spec, 500, 100) * 50)
    assert (processes.peak("NVIDIA H200"), processes.peak("NVIDIA H200 MIG 1g.18gb")) == (989e12, None)


def test_a_model_of_ones_own_may_have_hyperparameters_of_any_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, **given): ...\n")
    strange = {"mine:Mine": {"max_length": "long", "n_hidden": None, "batch_size": "auto"}}
    study = study_of(models=["mine:Mine"], hyperparameters=strange)
    need = costs.Costs(study.params, KNOWN).run(Run("mine:Mine", Subset("random", 10.0, 0)))
    assert (need.gpus, need.seconds) == (0, 0)


# Stages


def test_makespan_is_that_of_the_longest_first():
    assert [planning.makespan([3.0, 1.0, 2.0], n_workers) for n_workers in (1, 5)] == [6, 3]
    assert planning.makespan([], 2) == 0
    rng = np.random.default_rng(0)
    for seconds in rng.integers(1, 10, size=(20, 6)):
        ends = [0, 0]
        for each in sorted(seconds, reverse=True):
            ends[ends.index(min(ends))] += each
        parts = (sum(part) for n in range(4) for part in itertools.combinations(seconds, n))
        best = min(max(part, sum(seconds) - part) for part in parts)
        assert planning.makespan(seconds, 2) == max(ends) <= 7 / 6 * best  # Graham's bound for two


def test_stages_take_their_units_and_what_is_around_them():
    study = study_of()
    of = study.costs = costs_of(study)
    curation, pretraining, *tasks, figures = planning.stages(study)
    assert curation.computing_seconds(2) == pytest.approx(1.0 + 0.1 * 1000)
    assert [len(stage.units) for stage in (pretraining, *tasks)] == [6, 6 + 4, 6 + 4]
    trained = sum(of.run(run).seconds for run in study.pretraining_runs())
    assert pretraining.computing_seconds(1) == pytest.approx(trained)
    # The first task embeds, so that the second finds the embeddings there.
    embedded = 6 * (0.5 + 0.02 * 200)
    others = 2 * 3 * 2**0.5  # baselines that were not calibrated count as a model
    classified = 3 * 2**0.5 * 6 + embedded + 3 * 8.0 * 4 + 3 * 2.0 * 2 + others
    assert tasks[0].computing_seconds(1) == pytest.approx(classified)
    assert tasks[1].computing_seconds(1) == pytest.approx(costs.CONTEXTS * (6 * 1.0 * 2 + 4 * 0.5), rel=0.5)
    assert figures.wall_seconds(2) == pytest.approx(planning.NOTEBOOK * 3.0)


def test_what_is_made_is_not_left_to_do_and_counted_if_other_versions_made_it(tmp_path, monkeypatch):
    study = study_of(tmp_path, models=["PretrainedPCA"], tasks=["zeroshot_classification"], workers=1)
    before, _ = planning.seconds_left(study)
    assert set(before) == {"pretraining", "zeroshot_classification"}
    study.pretrain()
    assert set(planning.seconds_left(study)[0]) == {"zeroshot_classification"}
    n_models, here = len(study.pretraining_runs()), code.versions()
    for name, version, told in [
        ("numpy", "0.1", {f"numpy 0.1 in place of {here['numpy']}": n_models}),
        ("numpy", here["numpy"] + "+other.build", {}),
        ("datawall", "0.0.1", {}),  # whose code is in the keys
    ]:
        monkeypatch.setattr(code, "versions", lambda name=name, version=version: {**here, name: version})
        assert planning.seconds_left(study)[1] == told
    monkeypatch.undo()
    evaluation.evaluate(study, "zeroshot_classification")
    assert planning.seconds_left(study) == ({}, {})


def test_units_declare_what_they_need(tmp_path, monkeypatch):
    study, declared = study_of(tmp_path, models=["PretrainedPCA"], workers=1), {}

    def run_units(study, make, items, name, need_of):
        declared[name] = [need_of(study, item) for item in items]
        for item in items:
            make(study, item)

    monkeypatch.setattr("datawall.engine.cluster.run_units", run_units)
    evaluation.evaluate(study, "zeroshot_classification")
    assert {name: len(needs) for name, needs in declared.items()} == {"pretraining": 3, "zeroshot_classification": 7}
    assert min(sum(need.seconds for need in needs) for needs in declared.values()) > 0
    for need in itertools.chain(*declared.values()):
        assert costs.BASE_GIB < need.memory_gib < costs.BASE_GIB + 0.1
        assert need.gpus == 0  # principal components take none


# Calibrations


def test_a_users_calibration_goes_before_that_which_comes_along(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAWALL_CACHE", str(tmp_path))
    assert costs.calibration_of("quick")["study"] == costs.calibration_of("nothing like it")["study"] == "quick"
    path = costs.calibration_file("quick")
    path.parent.mkdir()
    path.write_text(json.dumps(KNOWN))
    assert costs.calibration_of("quick")["machine"] == "an abacus"
    assert costs.calibration_of("paper")["machine"] != "an abacus"


@pytest.mark.parametrize("path", sorted(costs.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_calibrations_that_come_along_are_of_studies_as_they_are(path):
    known, p = json.loads(path.read_text()), shipped(path.stem).params
    assert known["study"] == path.stem
    n_genes, _ = costs.size_of(p)
    works = [costs.work(p.specs[name], n_genes, known["genes_per_cell"]) for name in p.models]
    assert [each["work"] for each in known["models"]] == pytest.approx(works)
    assert set(known["tasks"]) == set(p.tasks) - {"reconstruction"}
    assert re.search(r"core of|GPU", known["machine"])


def test_a_miniature_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAWALL_CACHE", str(tmp_path))
    small = {"CELLS": (200, 400), "EVALUATED": (100, 200)}
    for name, sizes in (small | {"EMBEDDED": ((100, 200), (2, 4)), "STEPS": ((1, 3), (1, 3))}).items():
        monkeypatch.setattr(calibration, name, sizes)
    begun = []  # what a process of its own would import is imported here
    monkeypatch.setattr(subprocess, "run", lambda command, check: begun.append(exec(command[-1])))
    own = {"treatments": ["stim"], "labels": {"naive B cell": "other"}, "storage": "s3://none/such"}
    study = study_of(tasks=["zeroshot_classification", "perturbation_response", "reconstruction"])
    known = json.loads(calibration.calibrate(study.params.model_copy(update=own)).read_text())
    assert len(begun) == 1
    assert costs.calibration_of("mine") == known
    assert [each["family"] for each in known["models"]] == study.params.models
    assert {task: set(of) for task, of in known["tasks"].items()} == {
        "zeroshot_classification": {"HVG", "PCA", "PCA-10", "PCA-20", "model"},
        "perturbation_response": {"NoChange", "MeanShift", "TreatedMean", "Oracle", "model"},
    }
    for each in known["models"]:
        parts = [each[name] for name in ("once", "cell", "step", "step_cell")]
        assert min(parts) >= 0 < max(parts)
    shown = planning.table(study_of(tasks=study.params.tasks))
    assert f"calibrated for mine on {calibration.machine()}" in shown
    assert not re.search("--calibrate|GPU-hours", shown)
    assert re.fullmatch(r"SSL: \S+ s a step, \S+ GFLOP/s \(the peak is not known\)", planning.speeds(study.costs))


def test_a_line_through_two_measurements_never_falls():
    assert calibration._line((100, 300), [1.0, 2.0]) == pytest.approx([0.5, 0.005])
    assert calibration._line((100, 300), [2.0, 1.0]) == [1.0, 0.0]


@pytest.mark.parametrize(("executor", "expected"), [("slurm", cluster.SLURM_JOBS), ("local", 5), ("tcp://there:1", 5)])
def test_plan_counts_the_workers_of_where_units_run(executor, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(planning, "CPU_COUNT", 5)
    shown = planning.table(study_of(executor=executor, workers=None))
    assert f"time: {expected} side by side" in shown
    assert ("tcp://there:1 has is not known" in shown) == (executor == "tcp://there:1")


# The command

PLAN = """
import socket, sys
def refuse(*_): raise OSError("no network here")
socket.socket.connect = refuse
import run_all
sys.exit(run_all.main([sys.argv[1], "--plan", *sys.argv[2:]]))
"""


def test_plan_of_the_published_study_needs_no_network(tmp_path):
    command = [sys.executable, "-c", PLAN, "params/paper.yaml", "--set", "workers=8"]
    environment = os.environ | {"DATAWALL_CACHE": str(tmp_path)}
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    assert "paper: 80 subsets, 400 models, 6,400 experiments, 52 baselines\n" in shown
    assert "besides, spike-ins of 50 %: 15 subsets, 45 models, 720 experiments\n" in shown
    stages = ["curation", "pretraining", *shipped("paper").params.tasks, "figures", "all"]
    rows = dict.fromkeys(stages, r"[\d,]+ +[\d,.]+\s(s|min|h|days)")
    rows |= {"Geneformer": r"280 +[\d,]+", "scVI": r"220 +[\d,]+"}
    for name, amounts in rows.items():
        assert re.search(rf"^{name} +{amounts}( +[\d,]+\.\d\d){{4}}$", shown, re.M), name
    assert "8 side by side" in shown
    assert json.loads((costs.SHIPPED / "paper.json").read_text())["machine"] in shown
    assert "--calibrate" in shown
    assert not (ROOT / "runs" / "paper").exists()


# Evaluation on cells beyond the simulated corpus


def test_simulated_cells_beyond_the_corpus_are_a_data_set(tmp_path):
    beyond = {"file": "simulated:1000-1150", "name": "beyond"}
    study = study_of(tmp_path, evaluation=[beyond], held_out_tasks=[], tasks=["zeroshot_classification"])
    cells = simulate.Cells(simulate.truth(study.params.simulation)).block(1000, 1150)
    dataset = study.dataset("beyond")
    assert (dataset.X != cells[:, dataset.var_names].X).nnz == 0
    assert dataset.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    assert {one.dataset for one in evaluation.evaluations(study, "zeroshot_classification")} == {"beyond"}
    assert study.first_dataset("zeroshot_classification") == "beyond"


@pytest.mark.parametrize("file", ["simulated:900-1100", "simulated:1200-1100", "simulated:1000"])
def test_simulated_cells_of_the_corpus_or_of_none_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="simulated:"):
        study_of(tmp_path, evaluation=[{"file": file, "name": "beyond"}]).dataset("beyond")

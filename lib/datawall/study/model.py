"""Pretrained models of a study: the runs that it has, the key of each, how it is trained, and what came of all."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datawall.analysis import results
from datawall.engine import cluster, code, disk, paths, processes
from datawall.engine.store import Artifact, Unit
from datawall.models import external, hyperparameters
from datawall.study import params
from datawall.study.costs import Costs, speed
from datawall.study.records import Run, Source, Subset
from datawall.study.subset import WithSubsets

CHOSEN = "chosen.json"  # of an adaptive study: percentages and seeds by model


def makers_of(spec: hyperparameters.ModelSpec) -> Iterable[str]:
    """Modules that make a model and its embeddings; a user's own may build on any family."""
    families = map(hyperparameters.resolve, hyperparameters.FAMILIES)
    modules = ["models/external", *(family.module for family in families)] if spec.is_external else [spec.module]
    return map(code.module_name, modules)


class WithModels(WithSubsets):
    """A study with its pretrained models."""

    def pretraining_runs(self) -> list[Run]:
        """Every model on every subset, of an adaptive study that has begun on those chosen; and the runs of `also`."""
        runs, path = self.params.runs(), self.folder / CHOSEN
        if not self.params.adaptive or not path.exists():
            return runs
        chosen = json.loads(path.read_text(encoding="utf-8"))
        kept = {run for grid in self.params.also for run in self.params.runs_of(grid)}
        sizes = [(run, [run.subset.percentage, run.subset.seed]) for run in runs]
        kept |= {run for run, size in sizes if run.subset.untrained or size in chosen.get(run.model, ())}
        return [run for run in runs if run in kept]

    def budget_runs(self) -> list[Run]:
        """The runs of `budget_check`: some of `pretraining_runs`, by models that take steps, with other budgets."""
        if (check := self.params.budget_check) is None:
            return []
        subsets = [Subset("random", percentage, seed) for percentage in check.percentages for seed in check.seeds]
        models = [name for name in self.params.models if self.params.specs[name].takes_steps]
        wanted, runs = [Run(model, subset) for model in models for subset in subsets], self.pretraining_runs()
        return [replace(run, budget=share) for run in wanted if run in runs for share in check.budgets]

    def all_runs(self) -> list[Run]:
        """Every run: `pretraining_runs`, then `budget_runs`."""
        return [*self.pretraining_runs(), *self.budget_runs()]

    @cached_property
    def costs(self) -> Costs:
        """What its units cost, about."""
        return Costs(self.params)

    def model_unit(self, run: Run) -> Unit:
        """A pretrained model."""
        spec = self.params.specs[run.model]
        makers = "study/model:make_model", *makers_of(spec)
        values = spec.hyperparameters.model_dump()  # with defaults, so that a changed one is another model
        record = {"model": spec.family, "hyperparameters": values, "seed": run.subset.seed}
        if ontology := values.get("ontology"):
            record["ontology"] = disk.file_sha256(paths.located(ontology))
        if spec.is_external:
            record["source"] = external.version(run.model)
        if run.subset.untrained:
            # That of the weights which the runs of its own seed begin with.
            own = self.params.init_seed if spec.takes_steps else None
            record |= {"seed": run.subset.seed if own is None else own, "corpus": self.corpus_unit.key}
            return Unit("model", record, makers)
        record["subset"] = self.subset_unit(run.subset).key
        if spec.takes_steps:
            record |= {"steps": self.params.steps_of(run.model, run.budget), "init_seed": self.params.init_seed}
        return Unit("model", record, makers)

    def make_model(self, run: Run, folder: Path) -> dict[str, Any]:
        """Write a pretrained model, and its history, into a folder; returns what it took."""
        from datawall.models import training

        p, subset, model = self.params, run.subset, self.params.specs[run.model].create()
        if subset.untrained:
            model.untrained(self.corpus.n_vars, seed=self.model_unit(run).record["seed"]).save(folder)
            return {}
        cells = self.cells(subset)
        options = {"seed": subset.seed, "init_seed": p.init_seed, "checkpoint": self._checkpoint(run)}
        history = model.fit(cells.within(p.memory_gib), cells.obs, steps=p.steps_of(run.model, run.budget), **options)
        model.save(folder)
        if not isinstance(history, training.History):  # no steps; scikit-learn's habit is to return the model itself
            return {}
        curve = {"loss": history.loss, "learning_rate": history.learning_rate}
        steps = np.arange(1, len(history.loss) + 1)
        looks = pd.Series(history.validation_loss, history.validation_step, dtype=float).reindex(steps)
        table = pd.DataFrame({"step": steps, **curve, "validation_loss": looks.to_numpy()})
        table.to_parquet(folder / "history.parquet", index=False)
        spent = {"steps": len(steps), "samples_seen": history.samples_seen, "unique_cells": history.unique_cells}
        size = self.corpus.n_vars, float(cells.genes_detected.mean())
        timed = speed(p.specs[run.model], *size, history)
        return {"device": training.device().type, **spent, "training": timed}

    def model_artifact(self, run: Run, *, together: bool = True) -> Artifact:
        """A pretrained model on disk, with its training history if it took steps; made by several GPUs `together`.

        While it trains, its checkpoint lies beside the artifacts; a killed run takes it up.
        """
        unit = self.model_unit(run)
        # Of none: one process, on the processor.
        n_gpus = min(self.params.gpus_of(run.model), len(processes.visible_gpus()))
        if together and n_gpus > 1 and not run.subset.untrained and not self.store.find(unit):
            self._launch(run, n_gpus)
        artifact = self.store.find_or_make(unit, partial(self.make_model, run))
        self._checkpoint(run).unlink(missing_ok=True)
        return artifact

    def _checkpoint(self, run: Run) -> Path:
        return self.folder / "checkpoints" / f"{self.model_unit(run).key}.npz"

    def _launch(self, run: Run, n_processes: int) -> None:
        """Pretrain a model in processes of `torchrun`, one per GPU; raises RuntimeError if they fail."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        wanted = [run.model, *asdict(run.subset).values(), "--budget", run.budget, "--out", self.folder]
        with tempfile.TemporaryDirectory() as scratch:
            given = Path(scratch) / "given.yaml"
            given.write_text(params.to_yaml(self.params.model_dump()), encoding="utf-8")
            command = [sys.executable, *torchrun, "-m", "datawall.study.together", given, *wanted]
            ended = subprocess.run(list(map(str, command)), check=False)
        if ended.returncode:
            raise RuntimeError(f"torchrun with {n_processes} processes ended with status {ended.returncode}")

    def model(self, run: Run) -> Any:
        """A pretrained model (see `models.Model`)."""
        return self.params.specs[run.model].model_class.load(self.model_artifact(run).folder)

    def pretrain(self) -> pd.DataFrame:
        """Pretrain, or find, every model: a row for each of `pretraining_runs`, with its budget as spent.

        Columns: model, strategy, percentage, seed, n_cells, steps, samples_seen, unique_cells (different ones among
        them), passes (samples seen, for each of the n_cells), seconds, device; NaN for a model that takes no steps.
        """
        missing = self.store.missing((self.model_unit(run), run) for run in self.all_runs())
        for run in missing:
            self.rows(run.subset)  # once, here, rather than by every process that needs it
        make = WithModels.model_artifact
        cluster.run_units(self, make, missing, "pretraining", lambda study, run: study.costs.run(run))
        spent = ("steps", "samples_seen", "unique_cells", "seconds", "device")
        runs = [(run, self.model_artifact(run).made) for run in self.pretraining_runs()]
        table = pd.DataFrame([self.columns_of(run) | {name: made.get(name) for name in spent} for run, made in runs])
        return table.assign(passes=table["samples_seen"].astype(float) / table["n_cells"])

    def histories(self) -> pd.DataFrame:
        """Training loss of every run that took steps, and where looked at that of the cells which choose the weights.

        Columns: model, strategy, percentage, seed, step, loss, learning_rate, validation_loss.
        """
        names = ["step", "loss", "learning_rate", "validation_loss", "model", "strategy", "percentage", "seed"]
        tables = [pd.DataFrame(columns=names)]
        for run in self.pretraining_runs():
            if (path := self.model_artifact(run).folder / "history.parquet").exists():
                tables.append(pd.read_parquet(path).assign(model=run.model, **asdict(run.subset)))
        return pd.concat(tables[1:] or tables, ignore_index=True)

    def columns_of(self, source: Source) -> dict[str, Any]:
        """Model, strategy, percentage, seed and n_cells, of its subset if it has one."""
        if subset := getattr(source, "subset", None):
            return {"model": source.model, **asdict(subset), "n_cells": len(self.rows(subset))}
        name, strategy = (source, results.BASELINE) if isinstance(source, str) else (source.model, results.CHECKPOINT)
        return {"model": name, "strategy": strategy, "percentage": 0.0, "seed": -1, "n_cells": 0}

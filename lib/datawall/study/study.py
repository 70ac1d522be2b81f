"""A study: its models and embeddings, on its curated data, each made once and found again.

Every unit of work is described by a record of its parameters and of the keys of what it is made from, so that its
key is known before anything is made. `Study` turns the study file into units and knows how to make each; notebooks
ask it for them and tell what came back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from datawall.engine import cluster, code, disk, paths
from datawall.engine.processes import visible_gpus
from datawall.engine.store import Artifact, Unit
from datawall.models import external, hyperparameters
from datawall.study import params
from datawall.study.costs import Costs
from datawall.study.curated import Curated, Subset
from datawall.study.params import Embedding
from datawall.study.units import Layout, Run, Source
from datawall.tasks import baselines

HERE = code.module_name(__name__)
FILES = {
    "PretrainedPCA": "models/pca",
    "scVI": "models/scvi",
    "SSL": "models/ssl",
    "Geneformer": "models/geneformer",
    "SCimilarity": "models/scimilarity",
}  # of the families, whose code decides their models


def _makers(family: str) -> tuple[str, ...]:
    """Modules that make a family's models and embeddings; a user's own model may build on any family."""
    own = code.module_name(external.__name__), *FILES.values()
    return own if external.is_external(family) else (FILES[family],)


@cache
def _file_sha256(path: Path, mtime_ns: int) -> str:
    """Hash of a file of embeddings, which many units name, as last modified."""
    return disk.file_sha256(path)


def open_study(study: str, **overrides: Any) -> Study:
    """Open a study by name (`quick`), by the path of its file, or by the folder of an earlier run.

    Parameters
    ----------
    study
        See `paths.study_file`.
    overrides
        Values that replace those of the study file, by key: a notebook's own parameters.

    Raises
    ------
    FileNotFoundError
        If there is no such study.
    datawall.study.params.ParamsError
        If the study file or an override is wrong.
    """
    path = paths.study_file(study)
    checked = params.read(path, overrides)
    return Study(checked, paths.run_folder(path, checked.study))


def _reopen(params_json: str, folder: str) -> Study:
    return Study(params.Params.model_validate_json(params_json), Path(folder))


class Study(Curated):
    """A study and its run folder (see `Curated` for its data)."""

    tabulated: tuple[list[str], pd.DataFrame] | None = None  # keys of evaluations, and their results, as last written

    @property
    def opening(self) -> tuple[Callable[[str, str], Study], str, str]:
        """By which another process opens it: a function, and its arguments."""
        return _reopen, self.params.model_dump_json(), str(self.folder)

    def write_params(self) -> None:
        """Write the study, complete with defaults, into its run folder, where it can be opened again."""
        text = params.to_yaml(self.params.model_dump())
        disk.write_text(self.folder / "study.yaml", text)

    @cached_property
    def costs(self) -> Costs:
        """What its units cost, about."""
        return Costs(self.params)

    def pretraining_runs(self) -> list[Run]:
        """Every model on every subset, and the runs of `also`; of an adaptive study, what it has chosen so far.

        An adaptive study that has not begun has the whole grid: the most that it may come to.
        """
        runs = [Run(model, Subset(*subset)) for model, subset in self.params.runs()]
        if not self.params.adaptive or not self.chosen_path.exists():
            return runs
        chosen = {
            (model, *run)
            for model, of_model in json.loads(self.chosen_path.read_text(encoding="utf-8")).items()
            for run in of_model
        }
        return [
            run
            for run in runs
            if run.subset.strategy == "untrained" or (run.model, run.subset.percentage, run.subset.seed) in chosen
        ]

    def budget_runs(self) -> list[Run]:
        """The runs of `budget_check`: those of `pretraining_runs`, with other budgets."""
        runs = [Run(model, Subset(*subset), share) for model, subset, share in self.params.budget_runs()]
        main = set(self.pretraining_runs())
        return [run for run in runs if Run(run.model, run.subset) in main]

    def steps_of(self, run: Run) -> int:
        """Optimiser steps of a run."""
        return max(1, round(self.params.steps_of(run.model) * run.budget))

    @property
    def chosen_path(self) -> Path:
        """Where an adaptive study keeps which runs it has chosen: percentages and seeds by model."""
        return self.folder / "chosen.json"

    def model_unit(self, run: Run) -> Unit:
        """A pretrained model."""
        family = hyperparameters.family(run.model)
        record = {
            "model": family,
            # Complete with defaults, so that a changed default is another model.
            "hyperparameters": self.params.hyperparameters_of(run.model).model_dump(),
            "seed": run.subset.seed,
        }
        if ontology := record["hyperparameters"].get("ontology"):
            record["ontology"] = disk.file_sha256(paths.located(ontology))
        if external.is_external(run.model):
            record["source"] = external.version(run.model)
        if run.subset.strategy == "untrained":
            record |= {"seed": self._control_seed(run), "corpus": self.corpus_unit.key}
        else:
            record["subset"] = self.subset_unit(run.subset).key
            if hyperparameters.of_family(family).takes_steps:
                record |= {"steps": self.steps_of(run), "init_seed": self.params.init_seed}
        return Unit("model", record, (f"{HERE}:_make_model", *_makers(family)))

    def _control_seed(self, run: Run) -> int:
        """Seed of an untrained control: that of the weights which the runs of its own seed begin with."""
        begins = hyperparameters.of_family(hyperparameters.family(run.model)).takes_steps
        own = self.params.init_seed if begins else None
        return run.subset.seed if own is None else own

    def model_artifact(self, run: Run) -> Artifact:
        """A pretrained model on disk, with its training history if it took steps.

        While it trains, its checkpoint lies beside the artifacts; a killed run takes it up.
        """
        unit = self.model_unit(run)
        n_gpus = min(self.params.gpus.get(run.model, 1), len(visible_gpus()))  # none: one process, on the processor
        if n_gpus > 1 and run.subset.strategy != "untrained" and not self.store.find(unit):
            self._launch(run, n_gpus)
        return self._model_artifact(run, unit)

    def _model_artifact(self, run: Run, unit: Unit) -> Artifact:
        checkpoint = self.folder / "checkpoints" / f"{unit.key}.npz"
        artifact = self.store.find_or_make(unit, lambda folder: self._make_model(run, folder, checkpoint))
        checkpoint.unlink(missing_ok=True)
        return artifact

    def _launch(self, run: Run, n_processes: int) -> None:
        """Pretrain a model in processes of `torchrun`, one per GPU.

        Raises
        ------
        RuntimeError
            If they fail; what they wrote is in the output of this process.
        """
        s = run.subset
        with tempfile.TemporaryDirectory() as scratch:
            given = Path(scratch) / "given.yaml"
            given.write_text(params.to_yaml(self.params.model_dump()), encoding="utf-8")
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
            of_run = [run.model, s.strategy, str(s.percentage), str(s.seed), "--budget", str(run.budget)]
            of_run += ["--out", str(self.folder)]
            ended = subprocess.run(
                [sys.executable, "-m", *torchrun, "-m", "datawall.study.together", str(given), *of_run], check=False
            )
        if ended.returncode:
            raise RuntimeError(f"torchrun with {n_processes} processes ended with status {ended.returncode}")

    def pretrain_together(self, run: Run) -> None:
        """Pretrain one model in the processes that `torchrun` started; the first of them stores it."""
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank > 0:
            dist.barrier()  # the first process makes the corpus and the subset
        self.rows(run.subset)
        found = self.store.find(self.model_unit(run))
        if rank == 0 and dist.is_initialized():
            dist.barrier()
        if found:
            return
        if rank == 0:
            self._model_artifact(run, self.model_unit(run))
        else:
            checkpoint = self.folder / "checkpoints" / f"{self.model_unit(run).key}.npz"
            with tempfile.TemporaryDirectory() as folder:
                self._make_model(run, Path(folder), checkpoint)

    def model(self, run: Run) -> Any:
        """A pretrained model (see `models.Model`)."""
        from datawall import models

        return models.model_class(run.model).load(self.model_artifact(run).folder)

    def pretrain(self) -> pd.DataFrame:
        """Pretrain, or find, every model: a row for each of `pretraining_runs`, with its budget as spent.

        Columns: model, strategy, percentage, seed, n_cells, steps, samples_seen, unique_cells (different ones among
        them), passes (samples seen, for each of the n_cells), seconds, device; NaN for a model that takes no steps.
        """
        runs = [*self.pretraining_runs(), *self.budget_runs()]
        missing = [run for run in runs if not self.store.find(self.model_unit(run))]
        for run in missing:
            self.rows(run.subset)  # once, here, rather than by every process that needs it
        cluster.run_units(self, Study.model_artifact, missing, "pretraining", lambda study, run: study.costs.run(run))
        table = []
        for run in self.pretraining_runs():
            made = self.model_artifact(run).made
            spent = {name: made.get(name) for name in ("steps", "samples_seen", "unique_cells", "seconds", "device")}
            n_cells = len(self.rows(run.subset))
            table.append({"model": run.model, **asdict(run.subset), "n_cells": n_cells, **spent})
        table = pd.DataFrame(table)
        return table.assign(passes=table["samples_seen"].astype(float) / table["n_cells"])

    def histories(self) -> pd.DataFrame:
        """Training loss of every run that took steps, and that of the cells which choose the weights, where looked at.

        Columns: model, strategy, percentage, seed, step, loss, learning_rate, validation_loss.
        """
        tables = []
        for run in self.pretraining_runs():
            path = self.model_artifact(run).folder / "history.parquet"
            if path.exists():
                tables.append(pd.read_parquet(path).assign(model=run.model, **asdict(run.subset)))
        if not tables:
            of_run = ["model", "strategy", "percentage", "seed"]
            return pd.DataFrame(columns=["step", "loss", "learning_rate", "validation_loss", *of_run])
        return pd.concat(tables, ignore_index=True)

    def _make_model(self, run: Run, folder: Path, checkpoint: Path) -> dict[str, Any]:
        from datawall import models
        from datawall.models import training

        p, subset = self.params, run.subset
        model = models.create(run.model, **p.hyperparameters_of(run.model).model_dump())
        if subset.strategy == "untrained":
            model.untrained(self.corpus.n_vars, seed=self._control_seed(run)).save(folder)
            return {}
        cells = self.corpus.take(self.rows(subset))
        history = model.fit(
            cells.within(p.memory_gib),
            cells.obs,
            steps=self.steps_of(run),
            seed=subset.seed,
            init_seed=p.init_seed,
            checkpoint=checkpoint,
        )
        model.save(folder)
        if not isinstance(history, training.History):  # no steps; scikit-learn's habit is to return the model itself
            return {}
        curve = {"loss": history.loss, "learning_rate": history.learning_rate}
        steps = np.arange(1, len(history.loss) + 1)
        looks = pd.Series(history.validation_loss, history.validation_step, dtype=float).reindex(steps)
        table = pd.DataFrame({"step": steps, **curve, "validation_loss": looks.to_numpy()})
        table.to_parquet(folder / "history.parquet", index=False)
        spent = {"steps": len(steps), "samples_seen": history.samples_seen, "unique_cells": history.unique_cells}
        return {"device": training.device().type, **spent}

    def embedding_unit(self, source: Source, dataset: str) -> Unit:
        """Embedding of a data set: by a pretrained model, from a file, or by a baseline fitted to the data set."""
        data = {"dataset": self.dataset_unit(dataset).key}
        if isinstance(source, Run):
            record, makers = {"model": self.model_unit(source).key}, _makers(hyperparameters.family(source.model))
            return Unit("embedding", {**record, **data}, (f"{HERE}:embedding", *makers))
        if isinstance(source, Embedding):
            path = external.embeddings_file(source.file)
            file = {"file": _file_sha256(path, path.stat().st_mtime_ns), "key": source.obsm_key}
            makers = f"{HERE}:embedding", code.module_name(external.__name__)
            return Unit("embedding", {**file, **data}, makers)
        return Unit("embedding", {"baseline": source, **data}, (f"{HERE}:embedding",))

    def embedding(self, source: Source, dataset: str) -> np.ndarray:
        """Embedding of a data set, (n_cells, n_latent): by a run, from a file, or by one of `baselines.EMBEDDINGS`.

        Raises
        ------
        ValueError
            If what a model of the user's own gives is not that, or a file of embeddings breaks a rule.
        """

        def make(folder: Path) -> None:
            cells = self.dataset(dataset)
            if isinstance(source, Run):
                embedding = np.asarray(self.model(source).embed(cells.X), dtype=np.float32)
                if embedding.ndim != 2 or len(embedding) != cells.n_obs:
                    raise ValueError(
                        f"{source.model}: embed gave an array of shape {embedding.shape} for {cells.n_obs} cells; it "
                        "must give a row a cell."
                    )
            elif isinstance(source, Embedding):
                embedding = external.read_embedding(source.file, source.obsm_key, cells.obs_names, dataset)
            elif (n_components := baselines.EMBEDDINGS[source]) is None:
                embedding = baselines.variable_gene_embedding(cells.X)
            else:
                embedding = baselines.pca_embedding(cells.X, n_components)
            np.save(folder / "embedding.npy", embedding)

        artifact = self.store.find_or_make(self.embedding_unit(source, dataset), make)
        return np.load(artifact.folder / "embedding.npy")

    def embedding_seconds(self, *, n_cells: int = 1000, n_repeats: int = 5) -> pd.DataFrame:
        """How long each model takes to embed 1,000 cells, from raw counts in memory to an array in memory.

        The first `n_cells` held-out cells, by the largest subset's model, once to warm up and then `n_repeats` times,
        whose median counts. On the device that the models are on, one process; seconds differ between machines, and
        are those of the machine that first measured them.

        Returns
        -------
        table with the columns model, n_cells (embedded), seconds (per 1,000 cells), device.
        """

        def measure(run: Run, folder: Path) -> dict[str, Any]:
            from datawall.models import training

            counts = self.corpus.counts(self.split_rows("held_out")[:n_cells])
            model, seconds = self.model(run), []
            model.embed(counts)
            for _ in range(n_repeats):
                begin = time.perf_counter()
                model.embed(counts)
                seconds.append(time.perf_counter() - begin)
            per_thousand = float(np.median(seconds)) * 1000 / counts.shape[0]
            disk.write_json(folder / "seconds.json", {"n_cells": counts.shape[0], "seconds": per_thousand})
            return {"device": training.device().type}

        table = []
        for name in self.params.models:
            runs = [run for run in self.pretraining_runs() if run.model == name]
            run = max(runs, key=lambda run: run.subset.percentage)
            of = {"dataset": self.dataset_unit(self.held_out_name).key, "n_cells": n_cells, "n_repeats": n_repeats}
            unit = Unit("timing", {"model": self.model_unit(run).key, **of}, (f"{HERE}:embedding_seconds",))
            artifact = self.store.find_or_make(unit, lambda folder, run=run: measure(run, folder))
            measured = json.loads((artifact.folder / "seconds.json").read_text(encoding="utf-8"))
            table.append({"model": name, **measured, "device": artifact.made["device"]})
        return pd.DataFrame(table)

    def layouts(self, sources: dict[str, Source], dataset: str, *, n_cells: int = 2000) -> dict[str, pd.DataFrame]:
        """UMAPs of at most `n_cells` cells of embeddings, by title: x, y, and the labels of the cells."""
        titled = {title: Layout(source, dataset, n_cells) for title, source in sources.items()}
        missing = [one for one in titled.values() if not self.store.find(self._layout_unit(one))]
        cluster.run_units(self, Study.layout_artifact, missing, "layouts")
        return {title: self._layout(one) for title, one in titled.items()}

    def layout_artifact(self, one: Layout) -> Artifact:
        """A layout on disk: the rows of its cells, and their places."""

        def make(folder: Path) -> None:
            import scanpy as sc

            embedding = self.embedding(one.source, one.dataset)
            rows = np.sort(np.random.default_rng(0).permutation(len(embedding))[: one.n_cells])
            cells = ad.AnnData(embedding[rows])
            sc.pp.neighbors(cells, use_rep="X", random_state=0)
            sc.tl.umap(cells, random_state=0)
            np.savez(folder / "layout.npz", rows=rows, xy=cells.obsm["X_umap"])

        return self.store.find_or_make(self._layout_unit(one), make)

    def _layout_unit(self, one: Layout) -> Unit:
        record = {"embedding": self.embedding_unit(one.source, one.dataset).key, "n_cells": one.n_cells}
        return Unit("layout", record, (f"{HERE}:layout_artifact",))

    def _layout(self, one: Layout) -> pd.DataFrame:
        with np.load(self.layout_artifact(one).folder / "layout.npz", allow_pickle=False) as layout:
            obs = self.dataset(one.dataset).obs.iloc[layout["rows"]]
            return obs.assign(x=layout["xy"][:, 0], y=layout["xy"][:, 1]).reset_index(drop=True)

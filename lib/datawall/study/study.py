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
from datawall.models.hyperparameters import ModelSpec
from datawall.study import params
from datawall.study.costs import Costs
from datawall.study.curated import Curated
from datawall.study.units import Embedding, Layout, Run, Source
from datawall.tasks import baselines

HERE = code.module_name(__name__)


def _makers(spec: ModelSpec) -> tuple[str, ...]:
    """Modules that make a model and its embeddings; a user's own may build on any family."""
    families = map(hyperparameters.resolve, hyperparameters.FAMILIES)
    modules = [external.__name__, *(family.module for family in families)] if spec.is_external else [spec.module]
    return tuple(map(code.module_name, modules))


@cache
def _file_sha256(path: Path, mtime_ns: int) -> str:
    """Hash of a file of embeddings, which many units name, as last modified."""
    return disk.file_sha256(path)


def open_study(study: str, **overrides: Any) -> Study:
    """Open a study by name (`quick`), by the path of its file, or by the folder of an earlier run.

    Overrides, such as a notebook's own parameters, replace values of the study file. Raises FileNotFoundError if there
    is no such study. Raises ParamsError if the study file or an override is wrong.
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
        disk.write_text(self.folder / "study.yaml", params.to_yaml(self.params.model_dump()))

    @cached_property
    def costs(self) -> Costs:
        """What its units cost, about."""
        return Costs(self.params)

    def pretraining_runs(self) -> list[Run]:
        """Every model on every subset, and the runs of `also`; of an adaptive study, what it has chosen so far.

        An adaptive study that has not begun has the whole grid: the most that it may come to.
        """
        runs = self.params.runs()
        if not self.params.adaptive or not self.chosen_path.exists():
            return runs
        by_model = json.loads(self.chosen_path.read_text(encoding="utf-8"))
        chosen = {(model, *size_and_seed) for model, sizes in by_model.items() for size_and_seed in sizes}
        wanted = [(run.model, run.subset.percentage, run.subset.seed) in chosen for run in runs]
        return [run for run, chosen in zip(runs, wanted, strict=True) if chosen or run.subset.untrained]

    def budget_runs(self) -> list[Run]:
        """The runs of `budget_check`: those of `pretraining_runs`, with other budgets."""
        main = {(run.model, run.subset) for run in self.pretraining_runs()}
        return [run for run in self.params.budget_runs() if (run.model, run.subset) in main]

    def all_runs(self) -> list[Run]:
        """Every run: `pretraining_runs`, then `budget_runs`."""
        return [*self.pretraining_runs(), *self.budget_runs()]

    @property
    def chosen_path(self) -> Path:
        """Where an adaptive study keeps which runs it has chosen: percentages and seeds by model."""
        return self.folder / "chosen.json"

    # Models

    def model_unit(self, run: Run) -> Unit:
        """A pretrained model."""
        spec = self.params.specs[run.model]
        # Complete with defaults, so that a changed default is another model.
        values = spec.hyperparameters.model_dump()
        record = {"model": spec.family, "hyperparameters": values, "seed": run.subset.seed}
        if ontology := values.get("ontology"):
            record["ontology"] = disk.file_sha256(paths.located(ontology))
        if spec.is_external:
            record["source"] = external.version(run.model)
        if run.subset.untrained:
            record |= {"seed": self._control_seed(run), "corpus": self.corpus_unit.key}
        else:
            record["subset"] = self.subset_unit(run.subset).key
            if spec.takes_steps:
                steps = self.params.steps_of(run.model, run.budget)
                record |= {"steps": steps, "init_seed": self.params.init_seed}
        return Unit("model", record, (f"{HERE}:_make_model", *_makers(spec)))

    def _control_seed(self, run: Run) -> int:
        """Seed of an untrained control: that of the weights which the runs of its own seed begin with."""
        own = self.params.init_seed if self.params.specs[run.model].takes_steps else None
        return run.subset.seed if own is None else own

    def model_artifact(self, run: Run) -> Artifact:
        """A pretrained model on disk, with its training history if it took steps.

        While it trains, its checkpoint lies beside the artifacts; a killed run takes it up.
        """
        unit = self.model_unit(run)
        n_gpus = min(self.params.gpus.get(run.model, 1), len(visible_gpus()))  # none: one process, on the processor
        if n_gpus > 1 and not run.subset.untrained and not self.store.find(unit):
            self._launch(run, n_gpus)
        return self._model_artifact(run, unit)

    def _checkpoint(self, unit: Unit) -> Path:
        return self.folder / "checkpoints" / f"{unit.key}.npz"

    def _model_artifact(self, run: Run, unit: Unit) -> Artifact:
        artifact = self.store.find_or_make(unit, lambda folder: self._make_model(run, folder, self._checkpoint(unit)))
        self._checkpoint(unit).unlink(missing_ok=True)
        return artifact

    def _launch(self, run: Run, n_processes: int) -> None:
        """Pretrain a model in processes of `torchrun`, one per GPU; raises RuntimeError if they fail."""
        subset = run.subset
        with tempfile.TemporaryDirectory() as scratch:
            given = Path(scratch) / "given.yaml"
            given.write_text(params.to_yaml(self.params.model_dump()), encoding="utf-8")
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
            wanted = [run.model, subset.strategy, str(subset.percentage), str(subset.seed)]
            wanted += ["--budget", str(run.budget), "--out", str(self.folder)]
            command = [sys.executable, "-m", *torchrun, "-m", "datawall.study.together", str(given), *wanted]
            ended = subprocess.run(command, check=False)
        if ended.returncode:
            raise RuntimeError(f"torchrun with {n_processes} processes ended with status {ended.returncode}")

    def pretrain_together(self, run: Run) -> None:
        """Pretrain one model in the processes that `torchrun` started; the first of them stores it."""
        import torch.distributed as dist

        rank, unit = dist.get_rank() if dist.is_initialized() else 0, self.model_unit(run)
        if rank > 0:
            dist.barrier()  # the first process makes the corpus and the subset
        self.rows(run.subset)
        made = self.store.find(unit)
        if rank == 0 and dist.is_initialized():
            dist.barrier()
        if rank == 0:
            self._model_artifact(run, unit)
        elif not made:
            with tempfile.TemporaryDirectory() as folder:
                self._make_model(run, Path(folder), self._checkpoint(unit))

    def model(self, run: Run) -> Any:
        """A pretrained model (see `models.Model`)."""
        return self.params.specs[run.model].model_class.load(self.model_artifact(run).folder)

    def pretrain(self) -> pd.DataFrame:
        """Pretrain, or find, every model: a row for each of `pretraining_runs`, with its budget as spent.

        Columns: model, strategy, percentage, seed, n_cells, steps, samples_seen, unique_cells (different ones among
        them), passes (samples seen, for each of the n_cells), seconds, device; NaN for a model that takes no steps.
        """
        missing = [run for run in self.all_runs() if not self.store.find(self.model_unit(run))]
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
        names = ["step", "loss", "learning_rate", "validation_loss", "model", "strategy", "percentage", "seed"]
        paths = {run: self.model_artifact(run).folder / "history.parquet" for run in self.pretraining_runs()}
        paths = {run: path for run, path in paths.items() if path.exists()}
        tables = [pd.read_parquet(path).assign(model=run.model, **asdict(run.subset)) for run, path in paths.items()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names)

    def _make_model(self, run: Run, folder: Path, checkpoint: Path) -> dict[str, Any]:
        from datawall.models import training

        p, subset, model = self.params, run.subset, self.params.specs[run.model].create()
        if subset.untrained:
            model.untrained(self.corpus.n_vars, seed=self._control_seed(run)).save(folder)
            return {}
        cells = self.corpus.take(self.rows(subset))
        history = model.fit(
            cells.within(p.memory_gib),
            cells.obs,
            steps=p.steps_of(run.model, run.budget),
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
        makers = ()
        if isinstance(source, Run):
            record, makers = {"model": self.model_unit(source).key}, _makers(self.params.specs[source.model])
        elif isinstance(source, Embedding):
            path, makers = external.embeddings_file(source.file), (code.module_name(external.__name__),)
            record = {"file": _file_sha256(path, path.stat().st_mtime_ns), "key": source.obsm_key}
        else:
            record = {"baseline": source}
        record["dataset"] = self.dataset_unit(dataset).key
        return Unit("embedding", record, (f"{HERE}:embedding", *makers))

    def embedding(self, source: Source, dataset: str) -> np.ndarray:
        """Embedding of a data set, (n_cells, n_latent): by a run, from a file, or by one of `baselines.EMBEDDINGS`.

        Raises ValueError if what a model of the user's own gives is not that, or a file of embeddings breaks a rule.
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
        are those of the machine that first measured them. Columns: model, n_cells (embedded), seconds (per 1,000
        cells), device.
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
            record = {"model": self.model_unit(run).key, "dataset": self.dataset_unit(self.held_out_name).key}
            record |= {"n_cells": n_cells, "n_repeats": n_repeats}
            unit = Unit("timing", record, (f"{HERE}:embedding_seconds",))
            artifact = self.store.find_or_make(unit, lambda folder, run=run: measure(run, folder))
            measured = json.loads((artifact.folder / "seconds.json").read_text(encoding="utf-8"))
            table.append({"model": name, **measured, "device": artifact.made["device"]})
        return pd.DataFrame(table)

    def layouts(self, sources: dict[str, Source], dataset: str, *, n_cells: int = 2000) -> dict[str, pd.DataFrame]:
        """UMAPs of at most `n_cells` cells of embeddings, by title: x, y, and the labels of the cells."""
        titled = {title: Layout(source, dataset, n_cells) for title, source in sources.items()}
        missing = [layout for layout in titled.values() if not self.store.find(self._layout_unit(layout))]
        cluster.run_units(self, Study.layout_artifact, missing, "layouts")
        tables, obs = {}, self.dataset(dataset).obs
        for title, layout in titled.items():
            with np.load(self.layout_artifact(layout).folder / "layout.npz", allow_pickle=False) as made:
                table = obs.iloc[made["rows"]].assign(x=made["xy"][:, 0], y=made["xy"][:, 1])
            tables[title] = table.reset_index(drop=True)
        return tables

    def layout_artifact(self, layout: Layout) -> Artifact:
        """A layout on disk: the rows of its cells, and their places."""

        def make(folder: Path) -> None:
            import scanpy as sc

            embedding = self.embedding(layout.source, layout.dataset)
            rows = np.sort(np.random.default_rng(0).permutation(len(embedding))[: layout.n_cells])
            cells = ad.AnnData(embedding[rows])
            sc.pp.neighbors(cells, use_rep="X", random_state=0)
            sc.tl.umap(cells, random_state=0)
            np.savez(folder / "layout.npz", rows=rows, xy=cells.obsm["X_umap"])

        return self.store.find_or_make(self._layout_unit(layout), make)

    def _layout_unit(self, layout: Layout) -> Unit:
        record = {"embedding": self.embedding_unit(layout.source, layout.dataset).key, "n_cells": layout.n_cells}
        return Unit("layout", record, (f"{HERE}:layout_artifact",))

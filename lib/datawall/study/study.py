"""A study: its models and embeddings, on its curated data, each made once and found again.

A unit of work is a record of its parameters and of the keys of what it is made from, so that its key is known before
anything is made. `Study` turns the study file into units and knows how to make each; notebooks ask for what came back.
"""

import json
import operator
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd

from datawall.analysis import results
from datawall.cells import datasets
from datawall.engine import cluster, code, disk, paths
from datawall.engine.processes import visible_gpus
from datawall.engine.store import Artifact, Unit
from datawall.models import external, hyperparameters
from datawall.models.hyperparameters import ModelSpec
from datawall.study import params
from datawall.study.costs import Costs, speed
from datawall.study.curated import Curated
from datawall.study.units import Embedding, Layout, Run, Source
from datawall.tasks import baselines

CHOSEN = "chosen.json"  # of an adaptive study: percentages and seeds by model
LAID_OUT = 2000  # cells of a layout


def _makers(spec: ModelSpec) -> tuple[str, ...]:
    """Modules that make a model and its embeddings; a user's own may build on any family."""
    families = map(hyperparameters.resolve, hyperparameters.FAMILIES)
    modules = ["models/external", *(family.module for family in families)] if spec.is_external else [spec.module]
    return tuple(map(code.module_name, modules))


class Study(Curated):
    """A study and its run folder (see `Curated` for its data)."""

    tabulated: tuple[list[str], pd.DataFrame] | None = None  # keys of evaluations, and their results, as last written

    @property
    def opening(self) -> tuple[Callable[[str, str], Self], str, str]:
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
        """Every model on every subset, and the runs of `also`; of an adaptive study that has begun, those chosen."""
        runs, path = self.params.runs(), self.folder / CHOSEN
        if not self.params.adaptive or not path.exists():
            return runs
        by_model = json.loads(path.read_text(encoding="utf-8"))
        chosen = {(model, *size_and_seed) for model, sizes in by_model.items() for size_and_seed in sizes}
        key_of = operator.attrgetter("model", "subset.percentage", "subset.seed")
        return [run for run in runs if key_of(run) in chosen or run.subset.untrained]

    def budget_runs(self) -> list[Run]:
        """The runs of `budget_check`: those of `pretraining_runs`, with other budgets."""
        main = {(run.model, run.subset) for run in self.pretraining_runs()}
        return [run for run in self.params.budget_runs() if (run.model, run.subset) in main]

    def all_runs(self) -> list[Run]:
        """Every run: `pretraining_runs`, then `budget_runs`."""
        return [*self.pretraining_runs(), *self.budget_runs()]

    def columns_of(self, source: Source) -> dict[str, Any]:
        """Model, strategy, percentage, seed and n_cells, of its subset if it has one."""
        if subset := getattr(source, "subset", None):
            return {"model": source.model, **asdict(subset), "n_cells": len(self.rows(subset))}
        name, strategy = (source, results.BASELINE) if isinstance(source, str) else (source.model, results.CHECKPOINT)
        return {"model": name, "strategy": strategy, "percentage": 0.0, "seed": -1, "n_cells": 0}

    # Models

    def model_unit(self, run: Run) -> Unit:
        """A pretrained model."""
        spec = self.params.specs[run.model]
        makers = "study/study:make_model", *_makers(spec)
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

    def model_artifact(self, run: Run, *, together: bool = True) -> Artifact:
        """A pretrained model on disk, with its training history if it took steps; made by several GPUs `together`.

        While it trains, its checkpoint lies beside the artifacts; a killed run takes it up.
        """
        unit = self.model_unit(run)
        n_gpus = min(self.params.gpus.get(run.model, 1), len(visible_gpus()))  # none: one process, on the processor
        if together and n_gpus > 1 and not run.subset.untrained and not self.store.find(unit):
            self._launch(run, n_gpus)
        artifact = self.store.find_or_make(unit, lambda folder: self.make_model(run, folder))
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
        missing = [run for run in self.all_runs() if not self.store.find(self.model_unit(run))]
        for run in missing:
            self.rows(run.subset)  # once, here, rather than by every process that needs it
        cluster.run_units(self, Study.model_artifact, missing, "pretraining", lambda study, run: study.costs.run(run))
        table = []
        for run in self.pretraining_runs():
            made = self.model_artifact(run).made
            spent = {name: made.get(name) for name in ("steps", "samples_seen", "unique_cells", "seconds", "device")}
            table.append(self.columns_of(run) | spent)
        table = pd.DataFrame(table)
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

    def make_model(self, run: Run, folder: Path) -> dict[str, Any]:
        """Write a pretrained model, and its history, into a folder; returns what it took."""
        from datawall.models import training

        p, subset, model = self.params, run.subset, self.params.specs[run.model].create()
        if subset.untrained:
            model.untrained(self.corpus.n_vars, seed=self.model_unit(run).record["seed"]).save(folder)
            return {}
        cells = self.cells(subset)
        history = model.fit(
            cells.within(p.memory_gib),
            cells.obs,
            steps=p.steps_of(run.model, run.budget),
            seed=subset.seed,
            init_seed=p.init_seed,
            checkpoint=self._checkpoint(run),
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
        size = self.corpus.n_vars, float(cells.genes_detected.mean())
        timed = speed(self.params.specs[run.model], *size, history, training.device_name())
        return {"device": training.device().type, **spent, "training": timed}

    def embedding_unit(self, source: Source, dataset: str) -> Unit:
        """Embedding of a data set: by a pretrained model, from a file, or by a baseline fitted to the data set."""
        makers = ()
        if isinstance(source, Run):
            record, makers = {"model": self.model_unit(source).key}, _makers(self.params.specs[source.model])
        elif isinstance(source, Embedding):
            record = {"file": datasets.identity(source.file), "key": source.obsm_key}
            makers = ("models/external",)
        else:
            record = {"baseline": source}
        record["dataset"] = self.dataset_unit(dataset).key
        return Unit("embedding", record, ("study/study:embedding", *makers))

    def embedding(self, source: Source, dataset: str) -> np.ndarray:
        """Embedding of a data set, (n_cells, n_latent): by a run, from a file, or by one of `baselines.EMBEDDINGS`.

        Raises ValueError if what a model of the user's own gives is not that, or a file of embeddings breaks a rule.
        """

        def make(folder: Path) -> None:
            cells = self.dataset(dataset)
            if isinstance(source, Run):
                embedding = np.asarray(self.model(source).embed(cells.X), dtype=np.float32)
                if embedding.ndim != 2 or len(embedding) != cells.n_obs:
                    told = f"embed gave an array of shape {embedding.shape} for {cells.n_obs} cells"
                    raise ValueError(f"{source.model}: {told}; it must give a row a cell.")
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

        The largest subset's model embeds the first held-out cells, once to warm up and then `n_repeats` times, whose
        median counts. Columns: model, n_cells (embedded), seconds (per 1,000 cells, when first measured), device.
        """

        def measure(run: Run) -> dict[str, Any]:
            from datawall.models import training

            counts = self.corpus.counts(self.split_rows("held_out")[:n_cells])
            model = self.model(run)
            seconds = timeit.repeat(lambda: model.embed(counts), number=1, repeat=1 + n_repeats)[1:]
            per_thousand = float(np.median(seconds)) * 1000 / counts.shape[0]
            return {"device": training.device().type, "n_cells": counts.shape[0], "per_thousand": per_thousand}

        table = []
        for name in self.params.models:
            runs = [run for run in self.pretraining_runs() if run.model == name]
            run = max(runs, key=lambda run: run.subset.percentage)
            record = {"model": self.model_unit(run).key, "dataset": self.dataset_unit(self.held_out_name).key}
            record |= {"n_cells": n_cells, "n_repeats": n_repeats}
            unit = Unit("timing", record, ("study/study:embedding_seconds",))
            made = self.store.find_or_make(unit, lambda _, run=run: measure(run)).made
            table.append((name, made["n_cells"], made["per_thousand"], made["device"]))
        return pd.DataFrame(table, columns=["model", "n_cells", "seconds", "device"])

    def layouts(self, sources: dict[str, Source], dataset: str) -> dict[str, pd.DataFrame]:
        """UMAPs of at most `LAID_OUT` cells of embeddings, by title: x, y, and the labels of the cells."""
        titled = {title: Layout(source, dataset) for title, source in sources.items()}
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
            rows = np.sort(np.random.default_rng(0).permutation(len(embedding))[:LAID_OUT])
            cells = ad.AnnData(embedding[rows])
            sc.pp.neighbors(cells, use_rep="X", random_state=0)
            sc.tl.umap(cells, random_state=0)
            np.savez(folder / "layout.npz", rows=rows, xy=cells.obsm["X_umap"])

        return self.store.find_or_make(self._layout_unit(layout), make)

    def _layout_unit(self, layout: Layout) -> Unit:
        record = {"embedding": self.embedding_unit(layout.source, layout.dataset).key, "n_cells": LAID_OUT}
        return Unit("layout", record, ("study/study:layout_artifact",))


def open_study(study: str, **overrides: Any) -> Study:
    """Open a study by name (`quick`), by the path of its file, or by the folder of an earlier run.

    Overrides, such as a notebook's own parameters, replace values of the study file. Raises FileNotFoundError if there
    is no such study, ParamsError if the study file or an override is wrong.
    """
    path = paths.study_file(study)
    checked = params.read(path, overrides)
    return Study(checked, paths.run_folder(path, checked.study))


def _reopen(params_json: str, folder: str) -> Study:
    return Study(params.Params.model_validate_json(params_json), Path(folder))

"""A study: its data, subsets, models and embeddings, each made once and found again.

Every unit of work is described by a record of its parameters and of the keys of what it is made from, so that its
key is known before anything is made. `Study` turns the study file into units and knows how to make each; notebooks
ask it for them and tell what came back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import yaml

from datawall import (
    baselines,
    cluster,
    corpus,
    datasets,
    expression,
    hyperparameters,
    params,
    paths,
    sampling,
    simulate,
    store,
)
from datawall.store import Artifact, Unit

# The modules whose code decides the content of each kind of unit.
_DATA = ("datasets", "annotation", "corpus", "expression")
CODE = {
    "corpus": _DATA,
    "dataset": _DATA,
    "sketch": ("expression",),
    "subset": ("sampling",),
    "PretrainedPCA": ("models/pca", "models/base", "expression"),
    "scVI": ("models/scvi", "models/base", "training"),
    "SSL": ("models/ssl", "models/sparse", "models/base", "training", "expression"),
    "Geneformer": ("models/geneformer", "models/base", "tokenizer", "transformer", "training", "expression"),
    "SCimilarity": ("models/scimilarity", "models/sparse", "models/base", "training", "expression"),
    "baseline": ("baselines", "expression"),
    "layout": (),
}


@dataclass(frozen=True)
class Subset:
    """Cells chosen from the corpus by a strategy; `untrained` chooses none."""

    strategy: str
    percentage: float
    seed: int


@dataclass(frozen=True)
class Run:
    """A model to pretrain on a subset; its seed is the subset's."""

    model: str
    subset: Subset


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
    datawall.params.ParamsError
        If the study file or an override is wrong.
    """
    path = paths.study_file(study)
    checked = params.read(path, overrides)
    return Study(checked, paths.run_folder(path, checked.study))


class Study:
    """A study and its run folder.

    Parameters
    ----------
    parameters
        The checked study file.
    folder
        Where all that it makes goes.
    """

    def __init__(self, parameters: params.Params, folder: Path) -> None:
        self.params = parameters
        self.folder = folder
        self.store = store.Store(folder / "store")

    def write_params(self) -> None:
        """Write the study, complete with defaults, into its run folder, where it can be opened again."""
        text = yaml.safe_dump(self.params.model_dump(), sort_keys=False)
        store.write_atomically(self.folder / "study.yaml", lambda path: path.write_text(text))

    def subsets(self) -> list[Subset]:
        """Every subset of the corpus."""
        return [Subset(*subset) for subset in self.params.subsets() if subset[0] != "untrained"]

    def pretraining_runs(self) -> list[Run]:
        """Every model on every subset, and its untrained controls."""
        return [Run(model, Subset(*subset)) for model in self.params.models for subset in self.params.subsets()]

    def evaluation_datasets(self) -> list[str]:
        """Names of all evaluation data sets, the corpus's held-out cells first."""
        return [self.held_out_name, *self.params.evaluation]

    @property
    def held_out_name(self) -> str:
        """Name of the data set made of the corpus's held-out cells."""
        return f"{Path(self.params.corpus).stem}_held_out"

    # Data

    @cached_property
    def corpus_unit(self) -> Unit:
        """The aligned corpus, with its labels and its split."""
        p = self.params
        record = {
            "corpus": datasets.identity(p.corpus, p.simulation),
            "columns": self._columns(),
            "min_matched_genes": p.min_matched_genes,
            "held_out": p.held_out,
        }
        return Unit("corpus", record, CODE["corpus"])

    def dataset_unit(self, name: str) -> Unit:
        """An evaluation data set, its genes in the corpus's order."""
        if name == self.held_out_name:
            return self.corpus_unit
        p = self.params
        record = {
            "dataset": datasets.identity(name),
            "corpus": self.corpus_unit.key,
            "min_matched_genes": p.min_matched_genes,
            "cell_type_key": p.cell_type_key,
        }
        return Unit("dataset", record, CODE["dataset"])

    def dataset_artifact(self, name: str) -> Artifact:
        """A data set on disk: `cells.h5ad`, and `genes.json` on how its genes were matched."""
        if name == self.held_out_name:
            return self.store.find_or_make(self.corpus_unit, self._make_corpus)
        return self.store.find_or_make(self.dataset_unit(name), lambda folder: self._make_dataset(name, folder))

    @cached_property
    def corpus(self) -> ad.AnnData:
        """The corpus: counts in `X`, Ensembl ids as `var_names`, `obs` with cell_type, split and what else is known.

        Raises
        ------
        datawall.corpus.CorpusError
            If the data set breaks a rule of `corpus.align`, or lacks a column that the study names.
        """
        adata = ad.read_h5ad(self.dataset_artifact(self.held_out_name).folder / "cells.h5ad")
        self._check_contexts(adata.obs["cell_type"])
        return adata

    @cached_property
    def pretraining_cells(self) -> ad.AnnData:
        """The cells that models may be pretrained on; rows of a subset count among these."""
        return self.corpus[self.corpus.obs["split"] == "pretraining"].copy()

    @cache  # noqa: B019 - a study lives as long as its notebook
    def dataset(self, name: str) -> ad.AnnData:
        """An evaluation data set: counts in the corpus's gene order, `obs["cell_type"]` and what else is known."""
        if name == self.held_out_name:
            return self.corpus[self.corpus.obs["split"] == "held out"].copy()
        return ad.read_h5ad(self.dataset_artifact(name).folder / "cells.h5ad")

    @cached_property
    def response_genes(self) -> np.ndarray:
        """(n_genes,) bool: the genes whose response is predicted, the most variable among the pretraining cells."""
        X = expression.lognormalise(self.pretraining_cells.X)
        return expression.variable_genes(X, self.params.perturbation_genes)

    def _columns(self) -> dict[str, str]:
        """Columns of the corpus by role."""
        p = self.params
        columns = {"cell_type": p.cell_type_key, "batch": p.batch_key, "perturbation": p.perturbation_key}
        return {role: key for role, key in columns.items() if key}

    def _check_contexts(self, cell_type: Iterable[str]) -> None:
        """Refuse contexts to hold out that are no cell types, before anything is trained for them."""
        if "perturbation_response" not in self.params.tasks:
            return
        types = sorted(set(cell_type))
        if unknown := set(self.params.held_out_contexts or ()).difference(types):
            raise corpus.CorpusError(
                f"{self.params.corpus}: held_out_contexts names {sorted(unknown)}, but the types in "
                f"{self.params.cell_type_key!r} are {types}; name some of these."
            )

    def _make_corpus(self, folder: Path) -> None:
        p = self.params
        source = datasets.load(p.corpus, p.simulation)
        columns = {role: corpus.column(source, p.corpus, key, role) for role, key in self._columns().items()}
        self._check_contexts(columns["cell_type"])
        adata, match = corpus.align(source, p.corpus, min_matched=p.min_matched_genes)
        adata.obs = pd.DataFrame(columns, index=adata.obs_names)
        strata = adata.obs.astype(str).agg(" / ".join, axis=1).to_numpy()
        held_out = corpus.stratified_split(strata, [1 - p.held_out, p.held_out], seed=0) == 1
        adata.obs["split"] = pd.Categorical(np.where(held_out, "held out", "pretraining"))
        adata.write_h5ad(folder / "cells.h5ad", compression="lzf")
        if p.simulation is not None:
            simulate.truth(p.simulation).write(folder)
        store.write_json(folder / "genes.json", {**asdict(match), "in_corpus": match.matched})

    def _make_dataset(self, name: str, folder: Path) -> None:
        p = self.params
        source = datasets.load(name)
        labels = corpus.column(source, name, p.cell_type_key, "cell_type")
        adata, match = corpus.align(source, name, min_matched=p.min_matched_genes)
        in_corpus = int(adata.var_names.isin(self.corpus.var_names).sum())
        if not in_corpus:
            raise corpus.CorpusError(f"{name}: shares no gene with the corpus {p.corpus}; evaluate on other cells.")
        counts = corpus.to_genes(adata, self.corpus.var_names)
        obs = pd.DataFrame({"cell_type": labels}, index=adata.obs_names)
        ad.AnnData(counts, obs=obs, var=self.corpus.var).write_h5ad(folder / "cells.h5ad", compression="lzf")
        store.write_json(folder / "genes.json", {**asdict(match), "in_corpus": in_corpus})

    # Subsets

    @cached_property
    def sketch_unit(self) -> Unit:
        """Principal components of the pretraining cells, for geometric sketching and for diversity."""
        return Unit("sketch", {"corpus": self.corpus_unit.key}, CODE["sketch"])

    @cached_property
    def X_pca(self) -> np.ndarray:  # noqa: N802 - AnnData's name for it
        """Principal component scores of the pretraining cells' variable genes, (n_cells, 50)."""

        def make(folder: Path) -> None:
            X = expression.lognormalise(self.pretraining_cells.X)
            np.save(folder / "X_pca.npy", expression.pca_scores(X[:, expression.variable_genes(X)]))

        return np.load(self.store.find_or_make(self.sketch_unit, make).folder / "X_pca.npy")

    def subset_unit(self, subset: Subset) -> Unit:
        """Rows of a subset."""
        sketch = {"sketch": self.sketch_unit.key} if subset.strategy == "geometric_sketching" else {}
        return Unit("subset", {**asdict(subset), "corpus": self.corpus_unit.key, **sketch}, CODE["subset"])

    @cache  # noqa: B019
    def rows(self, subset: Subset) -> np.ndarray:
        """Sorted rows of a subset among the pretraining cells; none for `untrained`."""
        if subset.strategy == "untrained":
            return np.empty(0, np.int64)
        artifact = self.store.find_or_make(self.subset_unit(subset), lambda folder: self._make_subset(subset, folder))
        return np.load(artifact.folder / "rows.npy")

    def _make_subset(self, subset: Subset, folder: Path) -> None:
        percentage, seed = subset.percentage, subset.seed
        if subset.strategy == "random":
            rows = sampling.random(self.pretraining_cells.n_obs, percentage, seed=seed)
        elif subset.strategy == "celltype_reweighted":
            cell_type = self.pretraining_cells.obs["cell_type"].to_numpy().astype(str)
            rows = sampling.celltype_reweighted(cell_type, percentage, seed=seed)
        else:
            rows = sampling.geometric_sketching(self.X_pca, percentage, seed=seed)
        np.save(folder / "rows.npy", rows)

    # Models and embeddings

    def model_unit(self, run: Run) -> Unit:
        """A pretrained model."""
        family = hyperparameters.family(run.model)
        record = {
            "model": family,
            # Complete with defaults, so that a changed default is another model.
            "hyperparameters": self.params.hyperparameters_of(run.model).model_dump(),
            "seed": run.subset.seed,
        }
        if run.subset.strategy == "untrained":
            record["corpus"] = self.corpus_unit.key
        else:
            budget = {"steps": self.params.steps, "init_seed": self.params.init_seed}
            record |= {"subset": self.subset_unit(run.subset).key, **budget}
        return Unit("model", record, CODE[family])

    def model_artifact(self, run: Run) -> Artifact:
        """A pretrained model on disk, with its training history if it took steps.

        While it trains, its checkpoint lies beside the artifacts; a killed run takes it up.
        """
        unit = self.model_unit(run)
        checkpoint = self.folder / "checkpoints" / f"{unit.key}.npz"
        artifact = self.store.find_or_make(unit, lambda folder: self._make_model(run, folder, checkpoint))
        checkpoint.unlink(missing_ok=True)
        return artifact

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
            self.model_artifact(run)
        else:
            checkpoint = self.folder / "checkpoints" / f"{self.model_unit(run).key}.npz"
            with tempfile.TemporaryDirectory() as folder:
                self._make_model(run, Path(folder), checkpoint)

    def model(self, run: Run) -> Any:
        """A pretrained model (see `models.Model`)."""
        from datawall import models

        return models.load(self.model_artifact(run).folder)

    def pretrain(self) -> pd.DataFrame:
        """Pretrain, or find, every model: a row each with the run's parameters and its budget as spent.

        Columns: model, strategy, percentage, seed, n_cells, steps, samples_seen, unique_cells, passes (NaN for a model
        that takes no steps), seconds, device.
        """
        missing = [run for run in self.pretraining_runs() if not self.store.find(self.model_unit(run))]
        for run in missing:
            self.rows(run.subset)  # once, here, rather than by every process that needs it
        cluster.run_units(self, Study.model_artifact, missing, "pretraining")
        table = []
        for run in self.pretraining_runs():
            made = self.model_artifact(run).made
            spent = {
                name: made.get(name)
                for name in ("steps", "samples_seen", "unique_cells", "passes", "seconds", "device")
            }
            n_cells = len(self.rows(run.subset))
            table.append({"model": run.model, **asdict(run.subset), "n_cells": n_cells, **spent})
        return pd.DataFrame(table)

    def histories(self) -> pd.DataFrame:
        """Training loss of every run that took steps: model, strategy, percentage, seed, step, loss, learning_rate."""
        tables = []
        for run in self.pretraining_runs():
            path = self.model_artifact(run).folder / "history.parquet"
            if path.exists():
                tables.append(pd.read_parquet(path).assign(model=run.model, **asdict(run.subset)))
        if not tables:
            return pd.DataFrame(columns=["step", "loss", "learning_rate", "model", "strategy", "percentage", "seed"])
        return pd.concat(tables, ignore_index=True)

    def _make_model(self, run: Run, folder: Path, checkpoint: Path) -> dict[str, Any]:
        from datawall import models, training

        p, subset = self.params, run.subset
        model = models.create(run.model, **p.hyperparameters_of(run.model).model_dump())
        if subset.strategy == "untrained":
            model.untrained(self.corpus.n_vars, seed=subset.seed).save(folder)
            return {}
        cells = self.pretraining_cells[self.rows(subset)]
        history = model.fit(
            cells.X, cells.obs, steps=p.steps, seed=subset.seed, init_seed=p.init_seed, checkpoint=checkpoint
        )
        model.save(folder)
        if history is None:
            return {}
        curve = {"loss": history.loss, "learning_rate": history.learning_rate}
        steps = np.arange(1, len(history.loss) + 1)
        pd.DataFrame({"step": steps, **curve}).to_parquet(folder / "history.parquet", index=False)
        spent = {"steps": len(steps), "samples_seen": history.samples_seen, "unique_cells": history.unique_cells}
        return {"device": training.device().type, **spent, "passes": history.passes}

    def embedding_unit(self, source: Run | str, dataset: str) -> Unit:
        """Embedding of a data set by a pretrained model, or by a baseline fitted to the data set itself."""
        data = {"dataset": self.dataset_unit(dataset).key}
        if isinstance(source, Run):
            return Unit(
                "embedding", {"model": self.model_unit(source).key, **data}, CODE[hyperparameters.family(source.model)]
            )
        return Unit("embedding", {"baseline": source, **data}, CODE["baseline"])

    def embedding(self, source: Run | str, dataset: str) -> np.ndarray:
        """Embedding of a data set by a pretraining run, or by the baseline `HVG` or `PCA`, (n_cells, n_latent)."""

        def make(folder: Path) -> None:
            counts = self.dataset(dataset).X
            if isinstance(source, Run):
                embedding = self.model(source).embed(counts)
            elif source == "HVG":
                embedding = baselines.variable_gene_embedding(counts)
            else:
                embedding = baselines.pca_embedding(counts)
            np.save(folder / "embedding.npy", embedding)

        artifact = self.store.find_or_make(self.embedding_unit(source, dataset), make)
        return np.load(artifact.folder / "embedding.npy")

    def layout(self, source: Run | str, dataset: str, *, n_cells: int = 2000) -> pd.DataFrame:
        """UMAP of at most `n_cells` cells of an embedding: x, y, and the labels of the cells."""

        def make(folder: Path) -> None:
            import scanpy as sc

            embedding = self.embedding(source, dataset)
            rows = np.sort(np.random.default_rng(0).permutation(len(embedding))[:n_cells])
            cells = ad.AnnData(embedding[rows])
            sc.pp.neighbors(cells, use_rep="X", random_state=0)
            sc.tl.umap(cells, random_state=0)
            np.savez(folder / "layout.npz", rows=rows, xy=cells.obsm["X_umap"])

        unit = Unit(
            "layout", {"embedding": self.embedding_unit(source, dataset).key, "n_cells": n_cells}, CODE["layout"]
        )
        with np.load(self.store.find_or_make(unit, make).folder / "layout.npz", allow_pickle=False) as layout:
            obs = self.dataset(dataset).obs.iloc[layout["rows"]]
            return obs.assign(x=layout["xy"][:, 0], y=layout["xy"][:, 1]).reset_index(drop=True)

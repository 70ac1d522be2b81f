"""Embeddings of a study's data sets, and what is made of them at once: keys, making and reading.

A layout is a picture of an embedding, a timing says how long a model takes to embed; neither is an input of more.
"""

import timeit
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from datawall.cells import datasets, sampling
from datawall.engine import cluster
from datawall.engine.store import Artifact, Unit
from datawall.models import external
from datawall.study.model import WithModels, makers_of
from datawall.study.records import Embedding, Run, Source
from datawall.tasks import baselines

TIMED, TIMES = 1000, 5  # cells that a timing embeds at most, and how often
LAID_OUT = 2000  # cells of a layout


class WithEmbeddings(WithModels):
    """A study with its embeddings: by a run, from a file, or by one of `baselines.EMBEDDINGS`."""

    def embedding_unit(self, source: Source, dataset: str) -> Unit:
        """Embedding of a data set: by a pretrained model, from a file, or by a baseline fitted to the data set."""
        if isinstance(source, Run):
            record, makers = {"model": self.model_unit(source).key}, makers_of(self.params.specs[source.model])
        elif isinstance(source, Embedding):
            record, makers = {"file": datasets.identity(source.file), "key": source.obsm_key}, ["models/external"]
        else:
            record, makers = {"baseline": source}, []
        record["dataset"] = self.dataset_unit(dataset).key
        return Unit("embedding", record, ("study/embedding:make_embedding", *makers))

    def make_embedding(self, source: Source, dataset: str, folder: Path) -> None:
        """Write an embedding; raises ValueError if a model of the user's own gives none, or a file breaks a rule."""
        if isinstance(source, Run):
            model = self.model(source)
            parts = [np.asarray(model.embed(counts), dtype=np.float32) for counts in self.count_blocks(dataset)]
            embedding, n_cells = np.concatenate(parts), len(self.labels(dataset))
            if embedding.ndim != 2 or len(embedding) != n_cells:
                told = f"embed gave an array of shape {embedding.shape} for {n_cells} cells"
                raise ValueError(f"{source.model}: {told}; it must give a row a cell.")
        elif isinstance(source, Embedding):
            embedding = external.read_embedding(source.file, source.obsm_key, self.dataset(dataset).obs_names, dataset)
        elif (n_components := baselines.EMBEDDINGS[source]) is None:
            embedding = baselines.variable_gene_embedding(self.dataset(dataset).X)
        else:
            embedding = baselines.pca_embedding(self.dataset(dataset).X, n_components)
        np.save(folder / "embedding.npy", embedding)

    def embedding(self, source: Source, dataset: str) -> np.ndarray:
        """Embedding of a data set, (n_cells, n_latent); raises ValueError as `make_embedding` does."""
        make = partial(self.make_embedding, source, dataset)
        return np.load(self.store.find_or_make(self.embedding_unit(source, dataset), make).folder / "embedding.npy")

    def embedding_seconds(self) -> pd.DataFrame:
        """How long each model takes to embed 1,000 cells, from raw counts in memory to an array in memory.

        The largest subset's model embeds the first held-out cells, once to warm up and then `TIMES` times, whose median
        counts. Columns: model, n_cells (embedded), seconds (per 1,000 cells, when first measured), device.
        """
        table = []
        for name in self.params.models:
            runs = [run for run in self.pretraining_runs() if run.model == name]
            run = max(runs, key=lambda run: run.subset.percentage)
            record = {"model": self.model_unit(run).key, "dataset": self.dataset_unit(self.params.held_out_name).key}
            unit = Unit("timing", record | {"n_cells": TIMED, "n_repeats": TIMES}, ("study/embedding:time_embedding",))
            made = self.store.find_or_make(unit, partial(self.time_embedding, run)).made
            table.append((name, made["n_cells"], made["per_thousand"], made["device"]))
        return pd.DataFrame(table, columns=["model", "n_cells", "seconds", "device"])

    def time_embedding(self, run: Run, _: Path) -> dict[str, Any]:
        """Seconds that a model takes to embed 1,000 cells; of how many held-out cells, and where."""
        from datawall.models import training

        counts, model = self.corpus.counts(self.split_rows("held_out")[:TIMED]), self.model(run)
        seconds = timeit.repeat(lambda: model.embed(counts), number=1, repeat=1 + TIMES)[1:]
        per_thousand = float(np.median(seconds)) * 1000 / counts.shape[0]
        return {"device": training.device().type, "n_cells": counts.shape[0], "per_thousand": per_thousand}

    def layout_unit(self, embedded: tuple[Source, str]) -> Unit:
        """Some cells of an embedding, of a source on a data set, in two dimensions."""
        record = {"embedding": self.embedding_unit(*embedded).key, "n_cells": LAID_OUT}
        return Unit("layout", record, ("study/embedding:make_layout",))

    def make_layout(self, embedded: tuple[Source, str], folder: Path) -> None:
        """Write the rows of the cells, and their places, into a folder."""
        import scanpy as sc

        embedding = self.embedding(*embedded)
        rows = sampling.fixed(len(embedding), LAID_OUT)
        cells = ad.AnnData(embedding[rows])
        sc.pp.neighbors(cells, use_rep="X", random_state=0)
        sc.tl.umap(cells, random_state=0)
        np.savez(folder / "layout.npz", rows=rows, xy=cells.obsm["X_umap"])

    def layout_artifact(self, embedded: tuple[Source, str]) -> Artifact:
        """A layout on disk."""
        return self.store.find_or_make(self.layout_unit(embedded), partial(self.make_layout, embedded))

    def layouts(self, sources: dict[str, Source], dataset: str) -> dict[str, pd.DataFrame]:
        """UMAPs of at most `LAID_OUT` cells of embeddings, by title: x, y, and the labels of the cells."""
        titled = {title: (source, dataset) for title, source in sources.items()}
        missing = self.store.missing((self.layout_unit(embedded), embedded) for embedded in titled.values())
        cluster.run_units(self, WithEmbeddings.layout_artifact, missing, "layouts")
        tables, obs = {}, self.dataset(dataset).obs
        for title, embedded in titled.items():
            with np.load(self.layout_artifact(embedded).folder / "layout.npz") as made:
                table = obs.iloc[made["rows"]].assign(x=made["xy"][:, 0], y=made["xy"][:, 1])
            tables[title] = table.reset_index(drop=True)
        return tables

"""Tables that describe a study's data and subsets, for the curation notebook."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall import annotation, diversity, expression, simulate
from datawall.study import Study


def gene_matches(study: Study) -> pd.DataFrame:
    """How the genes of each data set met the gene table, a row each (see `corpus.GeneMatch`).

    `in_corpus` is the number of genes shared with the corpus, which is all that a model can see of a data set.
    """
    rows = [
        json.loads((study.dataset_artifact(name).folder / "genes.json").read_text())
        for name in study.evaluation_datasets()
    ]
    return pd.DataFrame(rows).set_index("dataset")


def realism(counts: dict[str, sp.csr_matrix]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What counts look like, to set simulated cells beside real ones: a table of genes and a table of cells.

    Parameters
    ----------
    counts
        By name of the data set, (n_cells, n_genes) raw counts.

    Returns
    -------
    genes that have a count (dataset, mean, variance, zeros: the share of cells without it) and cells (dataset,
    library_size, n_genes).
    """
    genes, cells = [], []
    for name, matrix in counts.items():
        X = matrix.astype(np.float64)
        mean = np.asarray(X.mean(axis=0)).ravel()
        variance = np.asarray(X.multiply(X).mean(axis=0)).ravel() - mean**2
        zeros = 1 - X.getnnz(axis=0) / X.shape[0]
        genes.append(pd.DataFrame({"dataset": name, "mean": mean, "variance": variance, "zeros": zeros})[mean > 0])
        library_size = np.asarray(X.sum(axis=1)).ravel()
        cells.append(pd.DataFrame({"dataset": name, "library_size": library_size, "n_genes": X.getnnz(axis=1)}))
    return pd.concat(genes, ignore_index=True), pd.concat(cells, ignore_index=True)


def composition(study: Study) -> pd.DataFrame:
    """Cells of each type in every subset: strategy, percentage, seed, cell_type, n_cells, share (0 to 1)."""
    cell_type = study.pretraining_cells.obs["cell_type"]
    tables = []
    for subset in study.subsets():
        n_cells = (
            cell_type.iloc[study.rows(subset)].value_counts().rename("n_cells").rename_axis("cell_type").reset_index()
        )
        tables.append(n_cells.assign(**asdict(subset), share=n_cells["n_cells"] / n_cells["n_cells"].sum()))
    return pd.concat(tables, ignore_index=True)


def subset_diversity(study: Study, *, vendi_cells: int = 500) -> pd.DataFrame:
    """Diversity of every subset: n_cells, shannon (bits), inverse_simpson, vendi.

    Vendi grows with the number of cells, so it is taken of `vendi_cells` cells of each subset, drawn by its seed;
    where a subset has fewer it is NaN, as the number would not compare.
    """
    cell_type = study.pretraining_cells.obs["cell_type"].to_numpy().astype(str)
    table = []
    for subset in study.subsets():
        rows = study.rows(subset)
        drawn = np.random.default_rng(subset.seed).permutation(rows)[:vendi_cells]
        measures = {
            "n_cells": len(rows),
            "shannon": diversity.shannon(cell_type[rows]),
            "inverse_simpson": diversity.inverse_simpson(cell_type[rows]),
            "vendi": diversity.vendi(study.X_pca[drawn]) if len(drawn) == vendi_cells else np.nan,
        }
        table.append({**asdict(subset), **measures})
    return pd.DataFrame(table)


def markers(study: Study) -> dict[str, list[str]]:
    """Marker genes (symbols) of cell types: canonical ones of blood, or those planted in a simulated corpus."""
    simulation = study.params.simulation
    return annotation.PBMC_MARKERS if simulation is None else simulate.truth(simulation).markers()


def marker_expression(study: Study) -> pd.DataFrame:
    """Mean expression of the marker genes in each cell type of the corpus: types by genes, z-scores over types."""
    marker_genes = markers(study)
    symbols = pd.Index(study.corpus.var["feature_name"])
    types = study.corpus.obs["cell_type"].astype(str)
    named = [name for name in marker_genes if (types == name).any()]
    order = named + sorted(set(types) - set(named))
    given = dict.fromkeys(gene for genes in marker_genes.values() for gene in genes)
    genes = [gene for gene in given if gene in symbols]
    X = expression.lognormalise(study.corpus.X)[:, symbols.get_indexer(genes)].toarray()
    means = pd.DataFrame(X, columns=genes).groupby(types.to_numpy()).mean().loc[order]
    return ((means - means.mean()) / means.std()).rename_axis(index="cell_type", columns="gene")

"""Tables that describe a study's data and subsets, for the curation notebook."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall import annotation, diversity, expression, simulate, sources
from datawall.study import Study


def gene_matches(study: Study) -> pd.DataFrame:
    """How the genes of each data set met the gene table, a row each (see `corpus.GeneMatch`).

    `in_corpus` is the number of genes shared with the corpus, which is all that a model can see of a data set.
    """
    of_corpus = json.loads((study.corpus_artifact.folder / "genes.json").read_text())
    rows = [{**match, "in_corpus": match["matched"]} for match in of_corpus]
    for one in study.params.evaluation:
        rows.append(json.loads((study.dataset_artifact(one.dataset).folder / "genes.json").read_text()))
    return pd.DataFrame(rows).set_index("dataset")


def reports(study: Study) -> dict[str, pd.DataFrame]:
    """What became of the corpus's cells on the way to it, by name of the table.

    For files: `cells` (read, empty, filtered, duplicate and kept, a row per file), `duplicates` and `quality` (see
    `sources.Report`). For the Census: `census` and `types` (see `census.Selection`). Else none.
    """
    folder = study.corpus_artifact.folder
    return {path.stem.removeprefix("report_"): pd.read_parquet(path) for path in sorted(folder.glob("report_*"))}


def quality(study: Study) -> pd.DataFrame:
    """Genes, counts and mitochondrial share (0 to 1) of the corpus's cells, a row each: 5 to 95 % quantiles."""
    var = study.corpus.var
    blocks = [pd.DataFrame(sources.quality(counts, var)) for _, counts in study.corpus.blocks()]
    return pd.concat(blocks).quantile([0.05, 0.25, 0.5, 0.75, 0.95]).T.rename_axis(index="metric", columns="quantile")


def contamination(study: Study) -> pd.DataFrame:
    """What each evaluation data set shares with the cells that models are pretrained on, or would be.

    Columns: see `duplicates.Contamination.row`. With `drop_contaminated` in the study, the rows counted here are left
    out of pretraining.
    """
    rows = {name: study.contamination(name).row() for name in study.evaluation_datasets()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("dataset")


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
    cell_type = study.corpus.obs["cell_type"]
    tables = []
    for subset in study.subsets():
        counted = cell_type.iloc[study.rows(subset)].value_counts()
        n_cells = counted[counted > 0].rename("n_cells").rename_axis("cell_type").reset_index()
        tables.append(n_cells.assign(**asdict(subset), share=n_cells["n_cells"] / n_cells["n_cells"].sum()))
    return pd.concat(tables, ignore_index=True)


def subset_diversity(study: Study, *, vendi_cells: int = 500) -> pd.DataFrame:
    """Diversity of every subset: n_cells, shannon (bits), inverse_simpson, vendi and vendi_sd.

    Vendi grows with the number of cells, so it is the mean over ten draws of `vendi_cells` cells of each subset, and
    `vendi_sd` their standard deviation; both are NaN where a subset has fewer, as the number would not compare.
    """
    cell_type = study.corpus.obs["cell_type"].array
    table = []
    for subset in study.subsets():
        rows = study.rows(subset)
        measures = {
            "n_cells": len(rows),
            "shannon": diversity.shannon(cell_type[rows]),
            "inverse_simpson": diversity.inverse_simpson(cell_type[rows]),
            "vendi": np.nan,
            "vendi_sd": np.nan,
        }
        if len(rows) >= vendi_cells:
            scores = study.pca_scores(rows)
            measures["vendi"], measures["vendi_sd"] = diversity.at_equal_n(
                diversity.vendi, scores, vendi_cells, seed=subset.seed
            )
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
    types = pd.Categorical(study.corpus.obs["cell_type"]).remove_unused_categories()
    named = [name for name in marker_genes if name in types.categories]
    order = named + sorted(set(types.categories) - set(named))
    given = dict.fromkeys(gene for genes in marker_genes.values() for gene in genes)
    genes = [gene for gene in given if gene in symbols]
    columns = symbols.get_indexer(genes)
    sums = np.zeros((len(types.categories), len(genes)))
    for rows, counts in study.corpus.blocks():
        np.add.at(sums, types.codes[rows], expression.lognormalise(counts)[:, columns].toarray())
    means = pd.DataFrame(sums / types.value_counts().to_numpy()[:, None], types.categories, genes).loc[order]
    return ((means - means.mean()) / means.std()).rename_axis(index="cell_type", columns="gene")

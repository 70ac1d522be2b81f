"""Tables that describe a study's data and subsets, for the curation notebook."""

import itertools
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells import annotation, cellstore, corpus, diversity, expression, sampling, simulate, sources
from datawall.engine import disk, paths
from datawall.study.study import Study

# The authors' labels of 973 cells of Kang et al., those that muscat's data set has labels of.
KANG_LABELS = paths.PACKAGE_DATA / "kang2018_labels.csv"
VENDI_CELLS = 500  # drawn of each subset
COMPARED = 5000  # held-out cells that simulated ones are set beside


def gene_matches(study: Study) -> pd.DataFrame:
    """How the genes of each data set met the gene table, a row each (see `corpus.GeneMatch`).

    `in_corpus` counts the genes that the corpus has too, which are all that a model can see of a data set.
    """
    return pd.DataFrame(_told(study, "genes")).set_index("dataset")


def remarks(study: Study) -> list[str]:
    """What a reader should know of the data sets, a line each: where counts and genes were found, then what is odd."""
    return [match_in_words(row) for row in _told(study, "genes")] + _told(study, "notes")


def match_in_words(row: dict[str, Any]) -> str:
    """A row of `gene_matches` as a line."""
    return f"{row['dataset']}: {corpus.GeneMatch(**{name: row[name] for name in row if name != 'in_corpus'})}"


def _told(study: Study, what: str) -> list[Any]:
    """What was written of `genes`, or as `notes`, when the corpus and the other evaluation data sets were made."""
    datasets = [study.dataset_artifact(dataset.dataset) for dataset in study.params.evaluation]
    texts = [(each.folder / f"{what}.json").read_text("utf-8") for each in (study.corpus_artifact, *datasets)]
    return [row for text in texts for row in json.loads(text)]


def reports(study: Study) -> dict[str, pd.DataFrame]:
    """What became of the corpus's cells, by table: `cells` has how many were read, empty, filtered, duplicate, kept."""
    folder = study.corpus_artifact.folder
    return {path.stem.removeprefix("report_"): pd.read_parquet(path) for path in sorted(folder.glob("report_*"))}


def quality(study: Study) -> pd.DataFrame:
    """Genes, counts and mitochondrial share (0 to 1) of the corpus's cells, a row each: 5 to 95 % quantiles."""
    values = np.empty((len(sources.QUALITY), study.corpus.n_obs), np.float32)  # 12 bytes a cell, and exact
    for rows, counts in study.corpus.blocks():
        values[:, rows] = [*sources.quality(counts, study.corpus.var).values()]
    quantiles = pd.Index([0.05, 0.25, 0.5, 0.75, 0.95], name="quantile")
    table = [np.quantile(row, quantiles, overwrite_input=True).astype(float) for row in values]
    return pd.DataFrame(table, pd.Index(sources.QUALITY, name="metric"), quantiles)


def contamination(study: Study) -> pd.DataFrame:
    """What each evaluation data set shares with the corpus, and held-out cells with those pretrained on.

    A row each; columns are those of `duplicates.Contamination`.
    """
    rows = {name: study.contamination(name).row() for name in study.params.evaluation_sets()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("dataset")


def beside_simulated(study: Study) -> dict[str, sp.csr_matrix]:
    """Counts of held-out cells and of as many simulated ones, for `realism`; none if all are, or genes are too few."""
    held_out = study.held_out_cells
    if study.params.simulation is not None or held_out.n_vars < simulate.MIN_GENES:
        return {}
    rows = sampling.fixed(held_out.n_obs, COMPARED)
    atlas = simulate.Atlas(n_cells=len(rows), n_genes=held_out.n_vars)
    return {study.params.held_out_name: held_out.counts(rows), "simulated": simulate.load(atlas).X}


def realism(counts: dict[str, sp.csr_matrix]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What raw counts look like, (n_cells, n_genes) by data set: a table of genes that have any, and one of cells.

    Columns: dataset, mean, variance and zeros (share of cells without it); and dataset, library_size and n_genes.
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
    cell_type = study.corpus.obs["cell_type"].array
    tables = []
    for subset in study.subsets():
        counted = pd.Series(cell_type[study.rows(subset)]).value_counts()
        n_cells = counted[counted > 0].rename("n_cells").rename_axis("cell_type").reset_index()
        tables.append(n_cells.assign(**asdict(subset), share=n_cells["n_cells"] / n_cells["n_cells"].sum()))
    return pd.concat(tables, ignore_index=True)


def write_cell_ids(study: Study, folder: Path) -> pd.DataFrame:
    """Write the names of the cells of every subset, to publish them: a text file each, a cell a line.

    Names are those of the sources, after the file's name where there are several; of the Census, `soma_joinid`. The
    table (file, strategy, percentage, seed, n_cells) is written too, as `subsets.csv`.
    """
    table = []
    for subset in study.subsets():
        rows = study.rows(subset)
        name = f"{subset.strategy}_{subset.percentage:g}_{subset.seed}.txt"
        disk.write_atomically(folder / name, partial(_write_names, study, rows))
        table.append({"file": name, **asdict(subset), "n_cells": len(rows)})
    table = pd.DataFrame(table)
    disk.write_atomically(folder / "subsets.csv", partial(table.to_csv, index=False))
    return table


def _write_names(study: Study, rows: np.ndarray, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, len(rows), cellstore.NAMES):
            file.writelines(f"{cell}\n" for cell in study.corpus.names(rows[first : first + cellstore.NAMES]))


def subset_diversity(study: Study) -> pd.DataFrame:
    """Diversity of every subset: n_cells, shannon (bits), inverse_simpson, vendi and vendi_sd.

    Vendi grows with the number of cells, so it is the mean over ten draws of `VENDI_CELLS` cells of each subset, and
    `vendi_sd` their standard deviation; both are NaN where a subset has fewer, as the number would not compare.
    """
    cell_type = study.corpus.obs["cell_type"].array
    table = []
    for subset in study.subsets():
        rows = study.rows(subset)
        row = {**asdict(subset), "n_cells": len(rows), "shannon": diversity.shannon(cell_type[rows])}
        row |= {"inverse_simpson": diversity.inverse_simpson(cell_type[rows]), "vendi": np.nan, "vendi_sd": np.nan}
        if len(rows) >= VENDI_CELLS:
            row["vendi"], row["vendi_sd"] = diversity.at_equal_n(
                lambda drawn: diversity.vendi(study.pca_scores(drawn)), rows, VENDI_CELLS, seed=subset.seed
            )
        table.append(row)
    return pd.DataFrame(table)


def markers(study: Study) -> dict[str, list[str]]:
    """Marker genes (symbols) of cell types: canonical ones of blood, or those planted in a simulated corpus."""
    simulation = study.params.simulation
    return annotation.PBMC_MARKERS if simulation is None else simulate.truth(simulation).markers()


def authors_labels(study: Study, cells: pd.Index | None = None) -> pd.Series:
    """The authors' labels of those cells, of the corpus or of those given, that have one, by name of the cell.

    Of Kang et al., 973 do, by muscat's data set (Crowell et al. 2020, doi 10.1038/s41467-020-19894-4); of others none.
    """
    labels = pd.read_csv(KANG_LABELS, index_col="cell")["authors"]
    cells = pd.Index(study.corpus.names()) if cells is None else cells
    return labels[labels.index.isin(cells) & (study.params.corpus == "kang2018")]


def both_labels(study: Study) -> pd.DataFrame:
    """How many cells have a type by the authors' labels (rows) and by those that we gave (columns)."""
    theirs = authors_labels(study)
    ours = pd.Series(study.corpus.obs["cell_type"].to_numpy(str), study.corpus.names())
    return pd.crosstab(theirs, ours.reindex(theirs.index).rename("ours"))


def marker_expression(study: Study) -> pd.DataFrame:
    """Mean expression of marker genes that differ by type in the corpus: types by genes, z-scores over types."""
    marker_genes = markers(study)
    symbols = pd.Index(study.corpus.var["feature_name"])
    types = pd.Categorical(study.corpus.obs["cell_type"]).remove_unused_categories()
    named = [name for name in marker_genes if name in types.categories]
    order = named + sorted(set(types.categories) - set(named))
    genes = [gene for gene in dict.fromkeys(itertools.chain(*marker_genes.values())) if gene in symbols]
    columns = symbols.get_indexer(genes)
    sums = np.zeros((len(types.categories), len(genes)))
    for rows, counts in study.corpus.blocks():
        of_type = sp.csr_array((np.ones(len(rows)), (types.codes[rows], np.arange(len(rows)))), (len(sums), len(rows)))
        sums += (of_type @ expression.lognormalise(counts)[:, columns]).toarray()
    means = pd.DataFrame(sums / types.value_counts().to_numpy()[:, None], types.categories, genes).loc[order]
    deviation = means.std()
    means = means.loc[:, deviation > 0]  # none where all cells are of one type
    return ((means - means.mean()) / deviation[means.columns]).rename_axis(index="cell_type", columns="gene")

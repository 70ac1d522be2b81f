"""Corpora and evaluation sets: find the counts, join the genes by Ensembl id, check, split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall import paths


class CorpusError(ValueError):
    """A data set breaks a rule; the message names the data set, the value, the rule and the remedy."""


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of a data set meet the gene table: the guard against a silent mismatch."""

    dataset: str
    counts_from: str  # where in the file the raw counts were found
    named_by: str  # "Ensembl id" or "symbol"
    n_genes: int  # in the data set
    matched: int
    missing: int  # in the data set, but not in the gene table
    duplicated: int  # names that occur more than once

    def row(self) -> dict[str, str | int]:
        """The record as a table's row."""
        return asdict(self)


@cache
def gene_table() -> pd.DataFrame:
    """The 19,331 protein-coding genes of scTab: symbol (`feature_name`) by Ensembl id, in scTab's order.

    Source: Fischer et al. 2024 (doi 10.1038/s41467-024-51059-5), the gene space of the original study.
    """
    return pd.read_csv(paths.PACKAGE_DATA / "sctab_genes.csv", index_col="feature_id")


def raw_counts(adata: ad.AnnData, dataset: str) -> tuple[sp.csr_matrix, pd.DataFrame, str]:
    """Find the raw counts: `layers["counts"]`, else `X`, else `raw.X`, the first that holds integers only.

    Returns
    -------
    counts as float32 CSR, the table of their genes, and the name of the place.

    Raises
    ------
    CorpusError
        If there are no cells or genes, or no place holds finite, non-negative integers.
    """
    if not adata.n_obs or not adata.n_vars:
        raise CorpusError(f"{dataset}: {adata.n_obs} cells x {adata.n_vars} genes; it must have some of both.")
    places = {"layers['counts']": (adata.layers.get("counts"), adata.var), "X": (adata.X, adata.var)}
    if adata.raw is not None:
        places["raw.X"] = (adata.raw.X, adata.raw.var)
    faults = []
    for place, (matrix, var) in places.items():
        if matrix is None:
            continue
        if fault := _count_fault(matrix):
            faults.append(f"{place} {fault}")
        else:
            counts = sp.csr_matrix(matrix, dtype=np.float32, copy=True)
            counts.sum_duplicates()
            return counts, var, place
    raise CorpusError(
        f"{dataset}: no raw counts found ({'; '.join(faults) or 'X is empty'}); counts must be finite, non-negative "
        'integers. Put them into layers["counts"].'
    )


def _count_fault(matrix: sp.spmatrix | np.ndarray) -> str | None:
    """Why a matrix cannot be raw counts, or None."""
    values = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    if values.dtype.kind not in "fiub":
        return f"holds {values.dtype} values, not numbers"
    if not np.isfinite(values).all():
        return "holds NaN or infinite values"
    if (values < 0).any():
        return f"holds negative values (as low as {values.min():g})"
    if (values != np.rint(values)).any():
        return f"holds fractions (such as {values[values != np.rint(values)].flat[0]:g})"
    return None


def align(adata: ad.AnnData, dataset: str, *, min_matched: float = 0.5) -> tuple[ad.AnnData, GeneMatch]:
    """Keep the genes of the gene table, named by Ensembl id and in its order; counts in `X`.

    Genes are joined by Ensembl id (version suffixes dropped) where `var_names` are ids, else by symbol, from
    `var["feature_name"]` or `var_names`.

    Parameters
    ----------
    adata
        Any data set; left as it is.
    dataset
        Its name, for messages.
    min_matched
        Least share of the data set's genes that must be in the table, 0 to 1.

    Returns
    -------
    an AnnData with `var["feature_name"]`, and the count of matched, missing and duplicated genes.

    Raises
    ------
    CorpusError
        If there are no raw counts, genes or cells are named twice, too few genes match, or a cell has no count.
    """
    counts, var, place = raw_counts(adata, dataset)
    table = gene_table()
    names = pd.Index(var.index.astype(str))
    by_id = names.str.match(r"ENSG\d{11}").mean() > 0.5
    if by_id:
        ids = names.str.replace(r"\.\d+$", "", regex=True)
    else:
        symbols = pd.Index(var["feature_name"].astype(str)) if "feature_name" in var else names
        ids = pd.Index(symbols.map(dict(zip(table["feature_name"], table.index, strict=True))))
        names = symbols
    if names.has_duplicates:
        twice = names[names.duplicated()].unique()
        raise CorpusError(
            f"{dataset}: {len(twice)} gene names occur more than once (such as {twice[0]}); each gene must be one "
            "column. Sum or drop the duplicates."
        )
    column_of = pd.Series(np.arange(len(ids)), index=ids)
    column_of = column_of[column_of.index.notna()]
    if column_of.index.has_duplicates:
        twice = column_of.index[column_of.index.duplicated()].unique()
        raise CorpusError(
            f"{dataset}: {len(twice)} Ensembl ids occur more than once (such as {twice[0]}). Sum or drop them."
        )
    if adata.obs_names.has_duplicates:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise CorpusError(f"{dataset}: cell name {twice} occurs more than once; make obs_names unique.")
    present = table.index[table.index.isin(column_of.index)]
    matched = len(present)
    match = GeneMatch(
        dataset=dataset,
        counts_from=place,
        named_by="Ensembl id" if by_id else "symbol",
        n_genes=len(names),
        matched=matched,
        missing=len(names) - matched,
        duplicated=0,
    )
    if matched < min_matched * len(names) or matched == 0:
        raise CorpusError(
            f"{dataset}: only {matched} of {len(names)} genes ({names[0]}, …) are among the {len(table)} human genes "
            f"of the gene table; at least {min_matched:.0%} must be. Name genes by Ensembl id (ENSG…) or human symbol."
        )
    columns = column_of[present].to_numpy()
    aligned = ad.AnnData(counts[:, columns], obs=adata.obs.copy(), var=table.loc[present, ["feature_name"]])
    empty = np.asarray(aligned.X.sum(axis=1)).ravel() == 0
    if empty.any():
        raise CorpusError(
            f"{dataset}: {int(empty.sum())} cells (such as {aligned.obs_names[empty][0]}) have no count in any matched "
            "gene; drop them."
        )
    return aligned, match


def column(adata: ad.AnnData, dataset: str, key: str, role: str) -> pd.Categorical:
    """A column of labels, complete and categorical.

    Raises
    ------
    CorpusError
        If the column is absent or has missing values.
    """
    if key not in adata.obs:
        raise CorpusError(
            f"{dataset}: no column {key!r} in obs for the {role}; it has {', '.join(map(repr, adata.obs)) or 'none'}. "
            f"Name the right column in the study file."
        )
    if adata.obs[key].isna().any():
        raise CorpusError(
            f"{dataset}: column {key!r} ({role}) is missing for {int(adata.obs[key].isna().sum())} cells; "
            "label or drop them."
        )
    return pd.Categorical(adata.obs[key].astype(str))


def to_genes(adata: ad.AnnData, genes: pd.Index) -> sp.csr_matrix:
    """Counts of a data set in another gene order; genes that it lacks are zero.

    Parameters
    ----------
    adata
        Aligned, so that `var_names` are Ensembl ids.
    genes
        Ensembl ids wanted.

    Returns
    -------
    (n_cells, len(genes)) float32 CSR.
    """
    position = adata.var_names.get_indexer(genes)
    present = np.flatnonzero(position >= 0)
    place = sp.csr_matrix(
        (np.ones(len(present), np.float32), (position[present], present)), shape=(adata.n_vars, len(genes))
    )
    moved = sp.csr_matrix(adata.X @ place)
    moved.sort_indices()
    return moved


def stratified_split(labels: np.ndarray, shares: list[float], *, seed: int) -> np.ndarray:
    """Divide cells into parts of exact size that each hold every label in proportion.

    Cells are laid out label by label, in random order within each, and a part takes every so-manyth of them, so it
    has each label in proportion to within one cell. The next part takes from what is left, so with more than two
    parts it is two cells. Rare labels are no obstacle: where there are fewer cells than parts, chance decides.

    Parameters
    ----------
    labels
        (n_cells,) the label of each cell.
    shares
        Sizes of the parts; they must add up to 1.
    seed
        Of the order and of where each part begins to count.

    Returns
    -------
    (n_cells,) int64, the part of each cell.

    Raises
    ------
    ValueError
        If the shares are negative or do not add up to 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares {shares} must be positive and add up to 1.")
    rng = np.random.default_rng(seed)
    part = np.full(len(labels), len(shares) - 1, dtype=np.int64)
    left = np.lexsort((rng.permutation(len(labels)), np.asarray(labels)))
    sizes = np.diff(np.rint(np.cumsum([0, *shares]) * len(labels)).astype(int))
    for number, size in enumerate(sizes[:-1]):
        chosen = np.floor((np.arange(size) + rng.random()) * len(left) / max(1, size)).astype(int)
        part[left[chosen]] = number
        left = np.delete(left, chosen)
    return part

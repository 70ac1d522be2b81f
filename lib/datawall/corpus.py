"""Corpora and evaluation sets: find the counts, join the genes by Ensembl id, check, split."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall import paths

log = logging.getLogger(__name__)

MAX_COUNT = 2**24  # float32 holds every integer up to here
ENSEMBL_ID = r"ENSG\d{11}(?:\.\d+)?"


class CorpusError(ValueError):
    """A data set breaks a rule; the message names the data set, the value, the rule and the remedy.

    The message is one line, cut in the middle where names from a file would make it endless.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= 1000 else f"{line[:700]} … {line[-250:]}")


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of a data set meet the gene table: the guard against a silent mismatch."""

    dataset: str
    counts_from: str  # where in the file the raw counts were found
    named_by: str  # "Ensembl id", "symbol", or both
    n_genes: int  # columns of the data set: matched + missing + duplicated
    matched: int  # genes of the gene table that it has
    missing: int  # columns that are no gene of the gene table
    duplicated: int  # columns that were summed into another column of the same gene

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
    check_shape(adata.shape, dataset)
    places = {"layers['counts']": (adata.layers.get("counts"), adata.var), "X": (adata.X, adata.var)}
    if adata.raw is not None:
        places["raw.X"] = (adata.raw.X, adata.raw.var)
    places = {place: held for place, held in places.items() if held[0] is not None}
    place = choose_place(
        ((place, _damage(matrix) or count_fault(matrix)) for place, (matrix, _) in places.items()), dataset
    )
    matrix, var = places[place]
    counts = sp.csr_matrix(matrix, dtype=np.float32, copy=True)
    counts.sum_duplicates()
    return counts, var, place


def check_shape(shape: tuple[int, int], dataset: str) -> None:
    """Refuse a data set without cells or genes."""
    if not all(shape):
        raise CorpusError(f"{dataset}: {shape[0]} cells x {shape[1]} genes; it must have some of both.")


def choose_place(faults: Iterable[tuple[str, str | None]], dataset: str) -> str:
    """The first place without a fault, of pairs of place and fault; later ones are not looked at.

    Raises
    ------
    CorpusError
        If every place has a fault: all are named.
    """
    found = []
    for place, fault in faults:
        if fault is None:
            return place
        found.append(f"{place} {fault}")
    raise CorpusError(
        f"{dataset}: no raw counts found ({'; '.join(found) or 'X is empty'}); counts must be finite, non-negative "
        'integers. Put them into layers["counts"].'
    )


def _damage(matrix: sp.spmatrix | np.ndarray) -> str | None:
    """Why a sparse matrix cannot be computed with, or None: scipy trusts indices, and crashes on wrong ones."""
    try:
        if sp.issparse(matrix):
            matrix.check_format(full_check=True)
    except ValueError as error:
        return f"is damaged ({error})"
    return None


def count_fault(matrix: sp.spmatrix | np.ndarray) -> str | None:
    """Why a matrix cannot be raw counts, or None."""
    values = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    if values.dtype.kind not in "fiub":
        return f"holds {values.dtype} values, not numbers"
    if not np.isfinite(values).all():
        return "holds NaN or infinite values"
    if (values < 0).any():
        return f"holds negative values (as low as {values.min():g})"
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        return f"holds fractions (such as {values[values != np.rint(values)].flat[0]:g})"
    if values.size and values.max() > MAX_COUNT:
        return f"holds counts above {MAX_COUNT:,} (up to {values.max():g}), which float32 cannot hold exactly"
    return None


def match_genes(
    var: pd.DataFrame, dataset: str, counts_from: str, *, min_matched: float = 0.5
) -> tuple[np.ndarray, GeneMatch]:
    """Join genes with the gene table, each by Ensembl id where it has one, else by symbol.

    Ids (version suffixes dropped) are looked for in the index, then in the first column of which more than half are
    ids, as 10x's `gene_ids`. Symbols are those of `var["feature_name"]`, or else the index. So names of both kinds may
    be mixed. An id is trusted: a gene whose id is not in the table is missing, whatever its symbol.

    Parameters
    ----------
    var
        A row for each gene.
    dataset
        Name for messages.
    counts_from
        Where the counts were found, for the record.
    min_matched
        Least share of the genes that must be in the table, 0 to 1.

    Returns
    -------
    (n_genes,) int64 row of each gene in the gene table, -1 where it is not there, and the record.

    Raises
    ------
    CorpusError
        If too few genes match.
    """
    table = gene_table()
    names = pd.Series(var.index.astype(str), dtype=object)
    ids = names.where(names.str.fullmatch(ENSEMBL_ID))
    for key in var.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in var.dtypes]]:
        other = pd.Series(var[key].astype(str).to_numpy(), dtype=object)
        is_id = other.str.fullmatch(ENSEMBL_ID).fillna(False).astype(bool)
        if is_id.mean() > 0.5:
            ids = ids.fillna(other.where(is_id))
            break
    symbols = var["feature_name"].astype(str).to_numpy(dtype=object) if "feature_name" in var else names.to_numpy()
    has_id = ids.notna().to_numpy()
    position = pd.Index(table["feature_name"]).get_indexer(symbols)
    position[has_id] = table.index.get_indexer(ids[has_id].str.replace(r"\.\d+$", "", regex=True))
    found = position >= 0
    matched = len(np.unique(position[found]))
    kinds = {"Ensembl id": has_id, "symbol": ~has_id}
    match = GeneMatch(
        dataset=dataset,
        counts_from=counts_from,
        named_by=" and ".join(kind for kind, named in kinds.items() if (named & found).any()),
        n_genes=len(names),
        matched=matched,
        missing=int((~found).sum()),
        duplicated=int(found.sum()) - matched,
    )
    if found.mean() < min_matched or not matched:
        raise CorpusError(
            f"{dataset}: only {found.sum()} of {len(names)} genes ({names[0][:50]}, …) are among the {len(table)} "
            f"human genes of the gene table; at least {min_matched:.0%} must be. Name genes by Ensembl id (ENSG…) or "
            "human symbol."
        )
    return position, match


def compacted(positions: list[np.ndarray]) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """The genes of the gene table that any of some data sets has, and the columns of each among them.

    Parameters
    ----------
    positions
        For each data set, the row of each of its genes in the gene table, or -1 (see `match_genes`).
    """
    table = gene_table()
    present = np.unique(np.concatenate([position[position >= 0] for position in positions]))
    column_of = np.full(len(table) + 1, -1)  # the last is for genes that are not in the table
    column_of[present] = np.arange(len(present))
    return table.iloc[present][["feature_name"]], [column_of[position] for position in positions]


def place_columns(counts: sp.csr_matrix, position: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Counts in other columns; those with the same position are summed, those with -1 left out.

    Parameters
    ----------
    counts
        (n_cells, len(position)).
    position
        New column of each column.
    n_genes
        Columns wanted.

    Returns
    -------
    (n_cells, n_genes) float32 CSR with sorted indices and no stored zeros.
    """
    counts = sp.csr_matrix(counts)
    column = position[counts.indices]
    kept = (column >= 0) & (counts.data != 0)
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    moved = sp.csr_matrix((counts.data[kept].astype(np.float32), column[kept], indptr), (counts.shape[0], n_genes))
    moved.sum_duplicates()
    return moved


def align(adata: ad.AnnData, dataset: str, *, min_matched: float = 0.5) -> tuple[ad.AnnData, GeneMatch]:
    """Keep the genes of the gene table, named by Ensembl id and in its order; counts in `X`.

    For what fits in memory; `sources.open_source` does the same to files of any size. Columns of the same gene are
    summed (`match_genes` joins them), and cells without a count in any matched gene are dropped, with a warning: take
    labels from the `obs` that comes back.

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
        If there are no raw counts, too few genes match, cells are named twice, or no cell has a count.
    """
    counts, var, place = raw_counts(adata, dataset)
    position, match = match_genes(var, dataset, place, min_matched=min_matched)
    if adata.obs_names.has_duplicates:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise CorpusError(f"{dataset}: cell name {twice} occurs more than once; make obs_names unique.")
    var, (column,) = compacted([position])
    moved = place_columns(counts, column, len(var))
    full = np.flatnonzero(moved.getnnz(axis=1))
    if not len(full):
        raise CorpusError(f"{dataset}: no cell has a count in any matched gene; give it cells that were sequenced.")
    if len(full) < adata.n_obs:
        log.warning(
            "%s: %d of %d cells have no count in any matched gene and are dropped.",
            dataset,
            adata.n_obs - len(full),
            adata.n_obs,
        )
    return ad.AnnData(moved[full], obs=adata.obs.iloc[full].copy(), var=var), match


def label_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of labels, -1 where a label is missing or blank, and the labels as text in order of appearance."""
    codes, labels = pd.factorize(pd.Series(values, dtype=object))
    labels = np.array([str(label) for label in labels], dtype=object)
    blank = np.array([not label.strip() for label in labels] + [True])
    return np.where(blank[codes], -1, codes), labels


def no_column(dataset: str, key: str, columns: Iterable[str], role: str = "") -> str:
    """What to say of a column that a data set lacks; `role` is what it was wanted for."""
    there = ", ".join(map(repr, columns)) or "none"
    return f"{dataset}: no column {key!r} in obs{role and f' for the {role}'}; it has {there}."


def column(adata: ad.AnnData, dataset: str, key: str, role: str) -> pd.Categorical:
    """A column of labels, complete and categorical.

    Raises
    ------
    CorpusError
        If the column is absent, or has missing or blank values.
    """
    if key not in adata.obs:
        raise CorpusError(f"{no_column(dataset, key, adata.obs, role)} Name the right column in the study file.")
    codes, labels = label_codes(adata.obs[key].to_numpy(dtype=object))
    check_labels(int((codes < 0).sum()), dataset, key, role)
    return pd.Categorical(labels[codes])


def check_labels(n_missing: int, dataset: str, key: str, role: str) -> None:
    """Refuse a column with missing labels."""
    if n_missing:
        raise CorpusError(f"{dataset}: column {key!r} ({role}) is missing for {n_missing} cells; label or drop them.")


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
    return place_columns(adata.X, pd.Index(genes).get_indexer(adata.var_names), len(genes))

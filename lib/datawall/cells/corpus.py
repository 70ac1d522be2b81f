"""Corpora and evaluation sets: find the counts, join the genes by Ensembl id, check, split."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.engine import paths

log = logging.getLogger(__name__)

MAX_COUNT = 2**24  # float32 holds every integer up to here
ENSEMBL_ID = r"ENSG\d{11}(?:\.\d+)?"
NAME_COLUMNS = ("gene_ids", "ensembl_id", "feature_id", None, "feature_name")  # of var, as asked; None: the index
SILENT, NO_GENE = -1, -2  # of a name: it says nothing that is known, or it is an id that the table lacks
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "none", "null", "nat", "missing"}  # texts that spell it
NAMELESS = MISSING | {"unknown", "unassigned", "undefined"}  # labels that do
NO_INTEGER = -(2**31)  # what R writes where one is missing
# Columns of var with the type of a feature, types that are no genes', and names of regions and of control probes.
TYPE_COLUMN = r"(?:feature|gene|library)?[_. ]?(?:types?|biotypes?|modality|class)|assay"
OTHER_TYPE = (
    r"antibod|abseq|\bcite|protein(?!.?coding)|\bprot\b|\badt\b|peak|atac|chromatin|guide|crispr|sgrna|multiplex|hashtag|\bhto\b|spike|"
    r"custom|control|probe|codeword"
)
OTHER_NAME = (
    r"(?:chr\w+|\d{1,2}|[XYM]|MT|(?:GL|KI)\d+)(?:\.\d)?[:_-]\d+[-_]\d+|"
    r"(?:NegControl|NegPrb|UnassignedCodeword|DeprecatedCodeword|SystemControl|Intergenic|BLANK|Blank)[-_\w]*"
)
FAMILIES, MANY_GENES = ("MT-", "HLA-"), 8_000  # whose names tools change; data sets with so many genes have some
EQUAL = 0.05  # standard deviation of cell sums, as a share of their mean, below which they are alike


class CorpusError(ValueError):
    """A data set breaks a rule; the message, one line, names the data set, the value, the rule and the remedy."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())  # names from a file would make it endless
        super().__init__(line if len(line) <= 1000 else f"{line[:700]} … {line[-250:]}")


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of a data set meet the gene table: the guard against a silent mismatch."""

    dataset: str
    counts_from: str  # where in the file the raw counts were found
    named_by: str  # "Ensembl id", "symbol", or both
    n_genes: int  # columns of the data set: matched + missing + duplicated + other_features
    matched: int  # genes of the gene table that it has
    missing: int  # columns that are no gene of the gene table
    duplicated: int  # columns that were summed into another column of the same gene
    other_features: int  # columns that are no genes at all: antibodies, peaks, guides, …
    counts_found: float  # share of the counts in genes, of some cells, that the matched genes have
    notes: tuple[str, ...] = ()  # what a reader should know: what else could be counts, columns that disagree, …

    def row(self) -> dict[str, str | int | float]:
        """The record as a table's row, without its notes."""
        return {key: value for key, value in asdict(self).items() if key != "notes"}

    def __str__(self) -> str:
        apart = f", {self.other_features:,} other features left out" if self.other_features else ""
        genes = f"{self.matched:,} of {self.n_genes - self.other_features:,} genes known by {self.named_by}"
        return f"counts in {self.counts_from}, {genes}, with {self.counts_found:.0%} of the counts{apart}"


@cache
def gene_table() -> pd.DataFrame:
    """The 19,331 protein-coding genes, in scTab's order (doi 10.1038/s41467-024-51059-5): symbol by Ensembl id."""
    return pd.read_csv(paths.PACKAGE_DATA / "sctab_genes.csv", index_col="feature_id")


def check_shape(shape: tuple[int, int], dataset: str) -> None:
    """Refuse a data set without cells or genes."""
    if 0 in shape:
        raise CorpusError(f"{dataset}: {shape[0]} cells x {shape[1]} genes; it must have some of both.")


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
        return f"holds fractions (such as {values[values != np.rint(values)].flat[0]:.12g})"
    if values.size and values.max() > MAX_COUNT:
        return f"holds counts above {MAX_COUNT:,} (up to {values.max():.12g}), which float32 cannot hold exactly"
    return None


def doubt(sums: np.ndarray, greatest: float) -> str | None:
    """What counts look like if they are perhaps no raw ones, by the sums of some cells and the greatest count."""
    sums = sums[sums > 0]
    if len(sums) < 10:
        return None
    if greatest <= 1:
        return "holds only 0 and 1, which looks like presence, not counts"
    if _alike(sums):
        return f"has nearly the same sum in every cell ({sums.mean():,.0f}), which looks scaled or drawn down"
    return None


def likeness(values: sp.csr_matrix) -> str:
    """What values that are no counts look like."""
    if not len(values.data) or not np.isfinite(values.data).all():
        return ""
    if values.data.min() < 0:
        return ", which looks like scaled values"
    values = values.astype(np.float64)
    if values.data.max() < 20 and _alike(np.asarray(values.expm1().sum(axis=1))):
        return ", which looks like log-normalised values"
    if values.shape[0] > 1 and _alike(np.asarray(values.sum(axis=1))):
        return ", which looks like counts scaled to equal sums"
    if 0.3 < (values.data == np.rint(values.data)).mean() < 1:
        return ", which looks like counts corrected for ambient RNA, or estimated"
    return ""


def _alike(sums: np.ndarray) -> bool:
    return sums.std() < EQUAL * sums.mean()


def _texts(values: pd.Series) -> pd.Series:
    """Values of a column as text, empty where they are missing or spell it."""
    texts = values.astype(object).where(values.notna(), "").astype(str).str.strip().reset_index(drop=True)
    return texts.mask(texts.str.casefold().isin(MISSING), "")


def _positions(texts: pd.Series, *, ids_alone: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row of the gene table that each text names, by id or symbol, and whether it is an id."""
    table = gene_table()
    symbols = pd.Index(table["feature_name"])
    is_id = texts.str.fullmatch(ENSEMBL_ID).to_numpy(bool)
    position = symbols.get_indexer(texts)
    changed = (position < 0) & texts.str.contains(r"[._]").to_numpy(bool)  # by R: `HLA.A` for `HLA-A`
    here, there = (names.str.replace(r"[-_]", ".", regex=True) for names in (texts[changed], symbols))
    position[changed] = there.get_indexer(here)
    position[position < 0] = SILENT
    of_id = table.index.get_indexer(texts[is_id].str.replace(r"\.\d+$", "", regex=True))
    position[is_id] = np.where(of_id < 0, NO_GENE, of_id)
    if ids_alone and is_id.sum() > 0.5 * (texts != "").sum():
        position[~is_id] = np.where(texts[~is_id] == "", SILENT, NO_GENE)
    return position, is_id


def other_features(var: pd.DataFrame) -> np.ndarray:
    """(n_genes,) bool: rows that are no genes, as a column of types or their names say: antibodies, peaks, guides."""
    apart = pd.Series(var.index.astype(str)).str.fullmatch(OTHER_NAME).to_numpy(bool, copy=True)
    for key in var.columns[var.columns.astype(str).str.fullmatch(TYPE_COLUMN, case=False)]:
        apart |= _texts(var[key]).str.contains(OTHER_TYPE, case=False).to_numpy(bool)
    return apart


def find_genes(var: pd.DataFrame, dataset: str, counts_from: str, weights: np.ndarray) -> tuple[np.ndarray, GeneMatch]:
    """Row of each gene in the gene table, (n_genes,) int64, -1 where it is not there; and the record of the match.

    Columns of `var` are asked in one order, whatever their order in the file: `NAME_COLUMNS`, then others of which more
    than half of the values name genes. A gene has the first name that is given to it, an id or a symbol: an id, without
    its version, is trusted, and a gene whose id is not in the table is missing, whatever its symbol. In a column of
    ids, what is no id is no gene. Once a quarter of the rows is named, other columns add ids alone, as one of nearest
    genes would name the rest wrongly. `weights` are counts in some cells. CorpusError if `NAME_COLUMNS` mostly differ.
    """
    table, notes, apart = gene_table(), [], other_features(var)
    names = pd.Series(var.index.astype(str), dtype=object)
    texts = {None: _texts(names)}
    texts |= {key: _texts(var[key]) for key in var if not pd.api.types.is_numeric_dtype(var[key].dtype)}
    known = [key for key in NAME_COLUMNS if key in texts]
    position, by_id, first = np.full(len(var), SILENT), np.zeros(len(var), bool), ""
    for key in [*known, *sorted(set(texts).difference(known), key=str)]:
        text, name = texts[key].mask(apart, ""), key or "the index"
        own, is_id = _positions(text, ids_alone=key not in (None, "feature_name"))
        if key not in known and ((own >= 0) | is_id).sum() <= 0.5 * (text != "").sum():
            continue
        both = (position >= 0) & (own >= 0)
        differ = np.flatnonzero(both & (position != own))
        if len(differ) > 0.01 * both.sum():
            pairs = ((names[i], table["feature_name"].iloc[[position[i], own[i]]]) for i in differ[:3])
            examples = "; ".join(f"{row[:50]}: {' or '.join(genes)}" for row, genes in pairs)
            share = f"{len(differ):,} of {both.sum():,} rows"
            what = f"{first} and {name} of var name different genes in {share} ({examples})"
            most = len(differ) > 0.5 * both.sum()
            if most and key in known:
                raise CorpusError(f"{dataset}: {what}; take the wrong column out of the file.")
            notes.append(f"{what}; {first} is taken")
            if most:
                continue
        new = (position == SILENT) & (own != SILENT)
        if key not in known and (position >= 0).mean() > 0.25:
            new &= is_id
        if text.str.match(r"ENS(?!G\d)[A-Z]+G\d").mean() > 0.5:
            notes.append(f"{name} of var has ids of another species ({text.iloc[0][:50]}, …): are these human genes?")
        position[new], by_id[new] = own[new], is_id[new]
        first = first or (name if (own >= 0).any() else "")
    found = position >= 0
    weights = weights if weights.any() else np.ones(len(var))
    # A symbol beside the same gene's id is an antibody's name more often than the gene's.
    mostly_ids = (found & by_id).sum() > 0.5 * found.sum()
    twice = found & ~by_id & np.isin(position, position[found & by_id]) & mostly_ids
    reasons = {"no id in a column of ids": (position == NO_GENE) & ~by_id, "the symbol of another row's id": twice}
    for why, rows in reasons.items():
        if rows.any():
            some, share = ", ".join(names[rows].str[:50][:3]), weights[rows].sum() / weights.sum()
            notes.append(f"{rows.sum():,} rows with {why} ({some}; {share:.0%} of the counts) are left out as no genes")
            apart, found = apart | rows, found & ~rows
    position = np.where(found, position, -1)
    matched = np.unique(position[found])
    if len(matched) >= MANY_GENES:
        symbols = table["feature_name"].iloc[matched]
        absent = [family for family in FAMILIES if not symbols.str.startswith(family).any()]
        notes += [f"no gene of the family {family} is found; are their names changed?" for family in absent]
    kinds = {"Ensembl id": by_id, "symbol": ~by_id}
    return position, GeneMatch(
        dataset=dataset,
        counts_from=counts_from,
        named_by=" and ".join(kind for kind, named in kinds.items() if (named & found).any()) or "nothing",
        n_genes=len(names),
        matched=len(matched),
        missing=int((~found & ~apart).sum()),
        duplicated=int(found.sum()) - len(matched),
        other_features=int(apart.sum()),
        counts_found=round(float(weights[found].sum() / max(weights[~apart].sum(), 1e-9)), 4),
        notes=tuple(notes),
    )


def check_match(match: GeneMatch, var: pd.DataFrame, min_matched: float) -> None:
    """Refuse a data set of which neither `min_matched` of its counts, nor of the table's genes, are known."""
    n_table, n_genes = len(gene_table()), match.n_genes - match.other_features
    if match.matched and max(match.counts_found, match.matched / n_table) >= min_matched:
        return
    apart = ""
    if match.other_features:
        some = var.index[other_features(var)][:1]
        apart = f" {match.other_features:,} rows are other features, such as peaks or antibodies ({', '.join(some)})."
    raise CorpusError(
        f"{match.dataset}: only {match.matched + match.duplicated} of {n_genes} genes ({str(var.index[0])[:50]}, …), "
        f"with {match.counts_found:.0%} of the counts, are among the {n_table} human genes of the gene table; at least "
        f"{min_matched:.0%} of the counts or of the table must be (min_matched_genes).{apart} Name genes by Ensembl id "
        "(ENSG…) or human symbol; say in var['feature_types'] which rows are no genes."
    )


def compacted(positions: list[np.ndarray]) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """The genes that any of some data sets has, by their `positions` (see `find_genes`); their columns among them."""
    present = np.unique(np.concatenate([position[position >= 0] for position in positions]))
    columns = [np.where(position < 0, -1, np.searchsorted(present, position)) for position in positions]
    return gene_table().iloc[present][["feature_name"]], columns


def place_columns(counts: sp.csr_matrix, position: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Counts, columns moved to positions, summed where the same, left out at -1: sorted float32 CSR without zeros."""
    counts = sp.csr_matrix(counts)
    column = position[counts.indices]
    kept = (column >= 0) & (counts.data != 0)
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    moved = sp.csr_matrix((counts.data[kept].astype(np.float32), column[kept], indptr), (counts.shape[0], n_genes))
    moved.sum_duplicates()
    return moved


def align(adata: ad.AnnData, dataset: str, *, min_matched: float = 0.5) -> tuple[ad.AnnData, GeneMatch]:
    """Keep the genes of the gene table, named by Ensembl id and in its order; counts are in `X`, before and after.

    For cells in memory; `sources.open_source` reads files. Columns of the same gene are summed (`find_genes`), and
    cells without a count in any matched gene are dropped, with a warning: take labels from the `obs` that comes back.
    Raises CorpusError if counts are not raw or all zero, too few genes match (`check_match`), or a name occurs twice.
    """
    check_shape(adata.shape, dataset)
    if fault := count_fault(adata.X):
        raise CorpusError(f"{dataset}: X {fault}; counts must be finite, non-negative integers.")
    weights = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    position, match = find_genes(adata.var, dataset, "X", weights)
    check_match(match, adata.var, min_matched)
    if adata.obs_names.has_duplicates:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise CorpusError(f"{dataset}: cell name {twice} occurs more than once; make obs_names unique.")
    var, (column,) = compacted([position])
    moved = place_columns(sp.csr_matrix(adata.X, dtype=np.float32), column, len(var))
    full = np.flatnonzero(moved.getnnz(axis=1))
    if not len(full):
        raise CorpusError(f"{dataset}: no cell has a count in any matched gene; give it cells that were sequenced.")
    if len(full) < adata.n_obs:
        told = "%s: %d of %d cells have no count in any matched gene and are dropped."
        log.warning(told, dataset, adata.n_obs - len(full), adata.n_obs)
    return ad.AnnData(moved[full], obs=adata.obs.iloc[full].copy(), var=var), match


def label_codes(values: np.ndarray, renamed: Mapping[str, str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes of labels, -1 where missing or blank, and the labels as text: each once, 3.0 as 3, `renamed` as asked."""
    # A float32 remains one, as its text is 0.1 and not 0.10000000149011612.
    codes, labels = pd.factorize(values if values.dtype.kind == "f" else pd.Series(values, dtype=object))
    texts = [(renamed or {}).get(text, text) for text in map(_label, labels)]
    places, texts = pd.factorize(np.array(texts, dtype=object))
    blank = np.array([not _visible(text) for text in texts], bool)
    of_label = np.append(np.where(blank[places], -1, places), -1).astype(np.intp)
    return of_label[codes], texts


def _label(value: Any) -> str:
    """A value as text: 3.0 as 3, and nothing where R has no integer."""
    if isinstance(value, float | np.floating):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else str(value)
    return "" if isinstance(value, int | np.integer) and value == NO_INTEGER else str(value)


def _visible(text: str) -> str:
    """A text without what no reader sees: spaces and Unicode's format characters."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def label_notes(n_cells: Mapping[str, int], where: str, role: str) -> list[str]:
    """What is odd about labels: several spellings of one, and labels that spell "missing"."""
    alike: dict[str, list[str]] = {}
    for label in sorted(n_cells):
        folded = _visible(unicodedata.normalize("NFKC", label).casefold())
        alike.setdefault(re.sub(r"^(\d+)\.0+$", r"\1", folded), []).append(label)
    # A label is spelled letter by letter where it looks like another.
    told = {
        label: f"{repr(label) if unicodedata.is_normalized('NFC', label) else ascii(label)} ({n:,})"
        for label, n in n_cells.items()
    }
    groups = [", ".join(map(told.get, spellings)) for spellings in alike.values() if len(spellings) > 1]
    missing = [told[label] for label in n_cells if label.strip().casefold() in NAMELESS]
    remedy = "`labels: {old: new}` in the study file joins them" if role == "cell_type" else "make them alike"
    notes = []
    if groups:
        some = "; ".join(groups[:5]) + ("; …" if len(groups) > 5 else "")
        notes.append(f"{where}: labels differ only by case, spaces, Unicode form or .0 (cells): {some}: {remedy}")
    if missing and role != "perturbation":
        notes.append(f'{where}: labels spell "missing" (cells): {", ".join(missing)}; they are taken as names')
    return notes


def no_column(dataset: str, key: str, columns: Iterable[str], role: str = "") -> str:
    """What to say of a column that a data set lacks; `role` is what it was wanted for."""
    there = ", ".join(map(repr, columns)) or "none"
    remedy = role and " Name the right column in the study file."
    return f"{dataset}: no column {key!r} in obs{role and f' for the {role}'}; it has {there}.{remedy}"


def column(
    adata: ad.AnnData, dataset: str, key: str, role: str, renamed: Mapping[str, str] | None = None
) -> pd.Categorical:
    """A column of labels, complete and categorical; refused if it is absent or has missing or blank values."""
    if key not in adata.obs:
        raise CorpusError(no_column(dataset, key, adata.obs, role))
    codes, labels = label_codes(adata.obs[key].to_numpy(dtype=object), renamed)
    check_labels(int((codes < 0).sum()), dataset, key, role)
    return pd.Categorical(labels[codes])


def check_labels(n_missing: int, dataset: str, key: str, role: str) -> None:
    """Refuse a column with missing labels."""
    if n_missing:
        raise CorpusError(f"{dataset}: column {key!r} ({role}) is missing for {n_missing} cells; label or drop them.")


def to_genes(adata: ad.AnnData, genes: pd.Index) -> sp.csr_matrix:
    """Counts of an aligned data set in the order of other genes, Ensembl ids; genes that it lacks are zero."""
    return place_columns(adata.X, pd.Index(genes).get_indexer(adata.var_names), len(genes))

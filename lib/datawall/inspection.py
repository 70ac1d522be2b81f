"""A look into data sets before a study: cells, genes, and the columns that could label cells, in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from datawall import backed, corpus, datasets, sources
from datawall.backed import CellFile
from datawall.corpus import GeneMatch

MANY = 1000  # distinct values; a column with more labels no cells


@dataclass(frozen=True)
class Looked:
    """What is in a data set."""

    name: str
    n_cells: int
    match: GeneMatch
    columns: list[str]  # of obs, all of them
    obs: pd.DataFrame  # columns asked for, or else those likely to label cells; categorical, NaN where missing

    def __str__(self) -> str:
        m = self.match
        genes = f"{m.matched:,} of {m.n_genes:,} genes known by {m.named_by}"
        return f"{self.name}: {self.n_cells:,} cells, counts in {m.counts_from}, {genes}"

    def faults(self, keys: Iterable[str]) -> list[str]:
        """What is wrong with columns that a study names."""
        found = []
        for key in keys:
            if key not in self.columns:
                found.append(corpus.no_column(self.name, key, self.columns))
            elif key not in self.obs:
                found.append(f"{self.name}: column {key!r} has over {MANY:,} values; labels have fewer.")
            elif missing := int(self.obs[key].isna().sum()):
                found.append(f"{self.name}: column {key!r} is missing for {missing:,} cells; label or drop them.")
        return found


def look(name: str, keys: Iterable[str] | None = None, *, min_matched: float = 0.5) -> Looked:
    """Look into a data set. Of a file counts are sampled and labels read, whatever its size; others are loaded.

    Parameters
    ----------
    name
        A named data set, or the path of an `.h5ad` or `.zarr` file.
    keys
        Columns to look at, if they are there, whatever is in them, as a run takes them; by default all that are likely
        to label cells, with few values and no fractions.
    min_matched
        See `corpus.match_genes`.

    Raises
    ------
    datawall.corpus.CorpusError, datawall.datasets.DatasetError
        If the data set breaks a rule, columns apart.
    """
    keys = None if keys is None else set(keys)
    if not name.endswith(backed.SUFFIXES):
        adata, match = corpus.align(datasets.load(name), name, min_matched=min_matched)
        wanted = adata.obs[[key for key in adata.obs if keys is None or key in keys]]
        return Looked(name, adata.n_obs, match, list(adata.obs), wanted.astype("category").reset_index(drop=True))
    path = datasets.file(name)
    source = sources.open_source([path], {}, sources.Options(min_matched=min_matched))
    with CellFile(path) as cells:
        columns = cells.columns()
        most = MANY if keys is None else None
        read = {key: _labels(cells, key, most) for key in columns if keys is None or key in keys}
    obs = pd.DataFrame({key: labels for key, labels in read.items() if labels is not None})
    return Looked(name, source.n_cells, source.matches[0], columns, obs)


def _labels(cells: CellFile, key: str, most: int | None) -> pd.Categorical | None:
    """A column as labels; None if there is a limit, and it has more values, or fractions."""
    parts, seen = [], set()
    for start in range(0, cells.n_cells, sources.SCAN):
        values = cells.column(key, "label", start, start + sources.SCAN)
        if most and values.dtype.kind == "f":
            return None
        codes, labels = corpus.label_codes(values)
        seen.update(labels)
        if most and len(seen) > most:
            return None
        parts.append(pd.Categorical.from_codes(codes, labels))
    return pd.api.types.union_categoricals(parts)

"""A look into data sets before a study: cells, genes, and the columns that could label cells, in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from datawall.cells import corpus, datasets, sources
from datawall.cells.backed import CellFile
from datawall.cells.corpus import CorpusError, GeneMatch

MANY = 1000  # distinct values; a column with more labels no cells


@dataclass(frozen=True)
class Looked:
    """What is in a data set."""

    name: str
    n_cells: int
    match: GeneMatch
    columns: list[str]  # of obs, all of them
    obs: pd.DataFrame  # columns asked for, and those likely to label cells; categorical, NaN where missing
    unreadable: dict[str, str]  # columns that cannot be read, and why

    def __str__(self) -> str:
        return f"{self.name}: {self.n_cells:,} cells, {self.match}"

    def faults(self, keys: Iterable[str]) -> list[str]:
        """What is wrong with columns that a study names."""
        faults = []
        for key in keys:
            if key not in self.columns:
                faults.append(corpus.no_column(self.name, key, self.columns))
            elif key in self.unreadable:
                faults.append(self.unreadable[key])
            elif key in self.obs and (missing := int(self.obs[key].isna().sum())):
                faults.append(f"{self.name}: column {key!r} is missing for {missing:,} cells; label or drop them.")
        return faults

    def notes(self, roles: dict[str, str]) -> list[str]:
        """What a reader should know: of the counts, the genes, and the labels of roles, by name of the column."""
        notes = [f"{self.name}: {note}" for note in self.match.notes]
        for role, key in roles.items():
            if key in self.obs:
                counts = self.obs[key].value_counts().to_dict()
                notes += corpus.label_notes(counts, f"{self.name}: {key!r}", role)
        return notes


def look(name: str, keys: Iterable[str] = (), *, others: bool = True, min_matched: float = 0.5) -> Looked:
    """Look into a named data set, which is loaded, or a file, of which counts are sampled and labels read.

    Columns named by `keys` are looked at if they are there, whatever is in them, as a run takes them; `others` if they
    are likely to label cells, with few values and no fractions. For `min_matched` see `corpus.check_match`. Raises
    CorpusError or DatasetError if the data set breaks a rule, columns apart.
    """
    keys = set(keys)
    if name in datasets.DATASETS:
        adata, match = corpus.align(datasets.load(name), name, min_matched=min_matched)
        obs = adata.obs[[key for key in adata.obs if others or key in keys]].astype("category")
        return Looked(name, adata.n_obs, match, list(adata.obs), obs.reset_index(drop=True), unreadable={})
    path = datasets.file(name)
    source = sources.open_source([path], {}, sources.Options(min_matched=min_matched))
    read, unreadable = {}, {}
    with CellFile(path) as cells:
        columns = cells.columns()
        for key in columns:
            try:
                if others or key in keys:
                    read[key] = _labels(cells, key, None if key in keys else MANY)
            except CorpusError as error:
                unreadable[key] = str(error)
    obs = pd.DataFrame({key: labels for key, labels in read.items() if labels is not None})
    return Looked(name, source.n_cells, source.matches[0], columns, obs, unreadable)


def _labels(cells: CellFile, key: str, most: int | None) -> pd.Categorical | None:
    """A column as labels; None if there is a limit, and it has more values, or fractions."""
    parts, seen = [], set()
    for start in range(0, cells.n_cells, sources.SCAN):
        values = cells.column(key, "label", start, start + sources.SCAN)
        if most and values.dtype.kind == "f" and (values % 1 != 0).any():
            return None
        codes, labels = corpus.label_codes(values)
        seen.update(labels)
        if most and len(seen) > most:
            return None
        parts.append(pd.Categorical.from_codes(codes, labels))
    return pd.api.types.union_categoricals(parts)

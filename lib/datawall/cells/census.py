"""The CELLxGENE Census as a corpus: which cells and genes a recipe takes, and their counts in blocks.

A Census is a SOMA experiment, on a disk or in a bucket, and is read by tiledbsoma; nothing is downloaded as a whole.
The default recipe is scTab's (Fischer et al. 2024, doi 10.1038/s41467-024-51059-5), the original study's corpus. There
it keeps 22,190,622 of the 28,169,974 cells that pass the filters of rows, in 164 types.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from tqdm import tqdm

from datawall.cells import corpus, ontology
from datawall.cells.cellstore import CELLS_AT_ONCE
from datawall.cells.corpus import CorpusError
from datawall.cells.datasets import DatasetError
from datawall.engine import disk, paths, store

type Step = tuple[str, int, int | None]  # of the report: what is removed or left, its cells and its types

CELL, TYPE, SAMPLE = "soma_joinid", "cell_type", ("dataset_id", "donor_id")
PROTOCOLS_10X = [*(f"10x 3' v{version}" for version in (1, 2, 3)), *(f"10x 5' v{version}" for version in (1, 2))]
PROTOCOLS_10X += ["10x 3' transcription profiling", "10x 5' transcription profiling"]
LABELS = ["development_stage", "disease", "tissue", "tissue_general"]
# Of a column while it is read; tiledbsoma's default, 1 GiB, would take many times that for the columns of obs.
BUFFER_BYTES = 8 * 2**20


class Recipe(BaseModel):
    """Which cells of a Census make the corpus; defaults are scTab's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    ontology: str | None  # path of the Cell Ontology (OBO; scTab: cl-simple of 2023-05-22); null: no filter by it
    uri: str | None = None  # a Census, or one SOMA experiment: a folder, s3://…; null: the public release
    release: str = "2023-05-15"  # of the public Census
    organism: str = "homo_sapiens"
    primary: bool = True  # one copy of each cell: some are in several data sets
    assay: Annotated[list[str], Field(min_length=1)] | None = PROTOCOLS_10X  # null: any
    where: dict[str, Annotated[list[str], Field(min_length=1)]] = {}  # more columns of obs, and the values to keep
    root: str = "native cell"  # a type must descend from this term, by is_a alone,
    min_ancestors: NonNegativeInt = 8  # have so many terms above it, or its label says too little,
    min_cells: NonNegativeInt = 5000  # so many cells
    min_tech_samples: NonNegativeInt = 31  # and so many donors, those of each data set apart
    columns: list[str] = ["is_primary_data", *SAMPLE, "assay", TYPE, *LABELS]  # of obs, that the corpus keeps
    min_matched_genes: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of the gene table that the Census must have


@dataclass(frozen=True)
class Selection:
    """The cells and genes that a recipe takes, and what became of the others."""

    obs: pd.DataFrame  # a row a cell, by soma_joinid: that, the columns, tech_sample; text as categories
    var: pd.DataFrame  # by Ensembl id, in the order of the gene table: feature_name, soma_joinid
    types: pd.DataFrame  # every type met: n_cells, n_tech_samples, n_ancestors, removed (why, or empty)
    report: pd.DataFrame  # step, n_cells, n_types: what each filter removes by itself, and what is left


def select(recipe: Recipe) -> Selection:
    """Choose cells and genes; reads `obs` and `var` of the Census, and no counts.

    As in scTab, cells are filtered by their own columns first; each filter of types then judges all cells that are
    left, and the types that any of them refuses are removed together. Unlike there, a type that is no term of the
    ontology is removed. Raises DatasetError if the Census cannot be opened or lacks the organism, CorpusError if a
    column or too many genes are missing or no cell passes, and as `ontology.read`.
    """
    terms = None if recipe.ontology is None else ontology.read(paths.located(recipe.ontology), relations=("is_a",))
    with _experiment(recipe) as experiment:
        var = _genes(experiment, recipe)
        obs, steps = _passing_rows(experiment, recipe)
    if obs.empty:
        raise _nothing_left(recipe, steps)
    types, fails = judge_types(obs, recipe, terms)
    steps += [(f"removed: {name}", types.loc[row, "n_cells"].sum(), row.sum()) for name, row in fails.items()]
    kept = types.index[~fails.any(axis=1)]
    steps.append(("kept", types.loc[kept, "n_cells"].sum(), len(kept)))
    if not len(kept):
        raise _nothing_left(recipe, steps)
    obs = _sorted_labels(obs[obs[TYPE].isin(kept)].reset_index(drop=True))
    report = pd.DataFrame(steps, columns=["step", "n_cells", "n_types"]).astype({"n_cells": int, "n_types": "Int64"})
    return Selection(obs, var, types, report)


def judge_types(
    obs: pd.DataFrame, recipe: Recipe, terms: ontology.Ontology | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Count what each cell type has, and name the filters that it fails: `Selection.types`, and types by filters, bool.

    Without `terms`, read by is_a, none is by ontology. CorpusError if they lack the root, are circular, know no type.
    """
    pairs = obs[[TYPE, "tech_sample"]].drop_duplicates()
    columns = {"n_cells": obs[TYPE].value_counts(), "n_tech_samples": pairs[TYPE].value_counts()}
    types = pd.DataFrame(columns).rename_axis(TYPE)
    types = types.set_axis(types.index.astype(str)).sort_index()
    fails = {}
    if terms is not None:
        lines = _lineages(types.index, recipe, terms)
        types["n_ancestors"] = pd.Series({name: len(line) for name, line in lines.items()}, dtype="Int64")
        known, root = types.index.isin(list(lines)), terms.identifiers[recipe.root]
        native = np.array([root in lines.get(name, ()) for name in types.index], dtype=bool)
        fails[f"no term of {Path(terms.file).name}"] = ~known
        fails[f"not below {recipe.root!r}"] = known & ~native
        fails[f"fewer than {recipe.min_ancestors} ancestors"] = types["n_ancestors"].lt(recipe.min_ancestors)
    fails[f"fewer than {recipe.min_cells:,} cells"] = types["n_cells"] < recipe.min_cells
    fails[f"fewer than {recipe.min_tech_samples} tech_samples"] = types["n_tech_samples"] < recipe.min_tech_samples
    table = pd.DataFrame(fails, index=types.index).fillna(False).astype(bool)
    types["removed"] = ["; ".join(table.columns[row]) for row in table.to_numpy()]
    return types, table


def blocks(recipe: Recipe, selection: Selection, *, block_size: int = CELLS_AT_ONCE) -> Iterator[ad.AnnData]:
    """The selected cells, in order, in blocks at constant memory; DatasetError if the Census cannot be opened.

    Counts are float32, not checked; `obs_names` are the cells' soma_joinid, their names for good within a release.
    """
    obs, var = selection.obs, selection.var
    coordinates = obs[CELL].to_numpy(), var[CELL].to_numpy()
    with _experiment(recipe) as experiment, tqdm(total=len(obs), desc="census", unit="cells", leave=False) as bar:
        reads, start = experiment.ms["RNA"].X["raw"].read(coordinates).blockwise(axis=0, size=block_size), 0
        for counts, _ in reads.scipy():
            rows = obs.iloc[start : start + counts.shape[0]]
            names = rows[CELL].astype(str).to_numpy()
            labels = rows.drop(columns=CELL).set_axis(names)
            yield ad.AnnData(counts.astype(np.float32, copy=False), obs=labels, var=var[["feature_name"]])
            start += len(rows)
            bar.update(len(rows))


def identity(recipe: Recipe) -> store.Record:
    """What fixes the content of the corpus: the recipe as JSON values, the ontology by the hash of its file."""
    values = recipe.model_dump()
    if recipe.ontology is not None:
        values["ontology"] = f"sha256:{disk.file_sha256(paths.located(recipe.ontology))}"
    return values


def _name(recipe: Recipe) -> str:
    return f"census {recipe.uri or recipe.release}"


def _nothing_left(recipe: Recipe, steps: list[Step]) -> CorpusError:
    lines = "; ".join(f"{step}: {n_cells:,}" for step, n_cells, _ in steps)
    return CorpusError(f"{_name(recipe)}: no cell passes ({lines}); loosen the recipe.")


@contextmanager
def _experiment(recipe: Recipe) -> Iterator[Any]:
    """The organism's `tiledbsoma.Experiment`, open for reading."""
    try:
        import tiledbsoma

        if recipe.uri is None:
            import cellxgene_census
    except ImportError as error:
        missing = f"{error.name} is not installed; `pip install datawall[census]` (with a `uri`, tiledbsoma is enough)"
        raise DatasetError(f"{_name(recipe)}: {missing}.") from error
    config: dict[str, Any] = {"soma.init_buffer_bytes": BUFFER_BYTES}
    try:
        if recipe.uri is None:
            opened = cellxgene_census.open_soma(census_version=recipe.release, tiledb_config=config)
        else:
            uri = recipe.uri if "://" in recipe.uri else str(paths.located(recipe.uri).resolve())
            opened = tiledbsoma.open(uri, context=tiledbsoma.SOMATileDBContext(tiledb_config=config))
    except Exception as error:
        remedy = "check the address and the network, or give the `uri` of a copy"
        raise DatasetError(f"{_name(recipe)}: cannot be opened ({error}); {remedy}.") from error
    with opened:
        experiment = opened
        if not isinstance(opened, tiledbsoma.Experiment):
            there = list(opened["census_data"]) if isinstance(opened, Mapping) and "census_data" in opened else []
            if recipe.organism not in there:
                has = f"has no organism {recipe.organism!r}; it has {', '.join(there) or 'none'}"
                raise DatasetError(f"{_name(recipe)}: {has}.")
            experiment = opened["census_data"][recipe.organism]
        try:
            _ = experiment.ms["RNA"].X["raw"]
        except (AttributeError, KeyError) as error:
            told = f"{_name(recipe)}: has no raw counts, ms['RNA'].X['raw']; give a Census or one like it."
            raise DatasetError(told) from error
        yield experiment


def _genes(experiment: Any, recipe: Recipe) -> pd.DataFrame:
    """The genes of the gene table that the Census has, in the table's order."""
    table = corpus.gene_table()
    var = experiment.ms["RNA"].var.read(column_names=[CELL, "feature_id"]).concat().to_pandas()
    here = var.astype({"feature_id": str}).set_index("feature_id")
    if here.index.has_duplicates:
        twice = here.index[here.index.duplicated()][0]
        raise CorpusError(f"{_name(recipe)}: gene {twice} occurs more than once in var.")
    found = table.loc[table.index.isin(here.index), ["feature_name"]].join(here)
    if len(found) < max(1, recipe.min_matched_genes * len(table)):
        few = f"only {len(found)} of the {len(table)} human genes of the gene table are among its {len(here)}"
        rule = f"at least {recipe.min_matched_genes:.0%} must be (min_matched_genes)"
        raise CorpusError(f"{_name(recipe)}: {few}; {rule}. Check the organism.")
    return found


def _passing_rows(experiment: Any, recipe: Recipe) -> tuple[pd.DataFrame, list[Step]]:
    """Cells that pass the filters of rows, in the order of soma_joinid, and the first steps of the report."""
    keep = {"is_primary_data": ["true"]} if recipe.primary else {}
    keep |= ({} if recipe.assay is None else {"assay": recipe.assay}) | recipe.where
    wanted = list(dict.fromkeys([CELL, TYPE, *SAMPLE, *recipe.columns]))
    schema = experiment.obs.schema
    if missing := set(wanted).union(keep).difference(schema.names):
        absent, there = (", ".join(map(repr, names)) for names in (sorted(missing), schema.names))
        raise CorpusError(f"{_name(recipe)}: obs has no column {absent}; it has {there}. Name some of these.")
    n_cells, removed, tables = 0, dict.fromkeys(keep, 0), []
    with tqdm(total=experiment.obs.count, desc="census cells", leave=False) as bar:
        for table in experiment.obs.read(column_names=[*wanted, *set(keep).difference(wanted)]):
            passes = np.ones(len(table), bool)
            for column, values in keep.items():
                text = table[column].cast(pa.string())
                passing = pc.is_in(text, value_set=pa.array(values, pa.string())).to_numpy()
                removed[column] += int((~passing).sum())
                passes &= passing
            tables.append(_encoded(table.select(wanted).filter(passes)))
            n_cells += len(table)
            bar.update(len(table))
    obs = pa.concat_tables(tables).unify_dictionaries().to_pandas(split_blocks=True, self_destruct=True)
    del tables
    if not obs[CELL].is_monotonic_increasing:
        obs = obs.sort_values(CELL, ignore_index=True)
    for column in (TYPE, *SAMPLE):
        if n_missing := int(obs[column].isna().sum()):
            raise CorpusError(f"{_name(recipe)}: {column} is missing for {n_missing} cells; filter them out (`where`).")
    obs = _sorted_labels(obs)
    samples = obs.groupby(list(SAMPLE), observed=True)
    names = pd.Categorical([f"{dataset}_{donor}" for dataset, donor in samples.size().index])
    obs["tech_sample"] = names.take(samples.ngroup().to_numpy())
    steps: list[Step] = [("in the Census", n_cells, None)]
    steps += [(f"removed: other {column}", count, None) for column, count in removed.items()]
    return obs, [*steps, ("left for the filters of types", len(obs), obs[TYPE].nunique())]


def _encoded(table: pa.Table) -> pa.Table:
    """Text as categories: old releases of the Census spell it out, new ones do not."""
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            table = table.set_column(number, field.name, table[field.name].dictionary_encode())
    return table


def _sorted_labels(obs: pd.DataFrame) -> pd.DataFrame:
    """The columns that are categories with those that occur, in order."""
    for column in obs.columns[obs.dtypes == "category"]:
        obs[column] = obs[column].cat.set_categories(sorted(obs[column].cat.remove_unused_categories().cat.categories))
    return obs


def _lineages(names: pd.Index, recipe: Recipe, terms: ontology.Ontology) -> dict[str, set[str]]:
    """Ancestors of each type that is a term."""
    file = terms.file
    if recipe.root not in terms.identifiers:
        raise CorpusError(f"{file}: has no term named {recipe.root!r} that is not obsolete; name another `root`.")
    lines = {name: terms.ancestors(name) for name in names if name in terms.identifiers}
    if not lines:
        raise CorpusError(f"{file}: none of the {len(names)} cell types ({', '.join(names[:3])}, …) is a term of it.")
    for name, line in lines.items():
        if terms.identifiers[name] in line:
            raise CorpusError(f"{file}: {name!r} is its own ancestor by is_a; the file is damaged.")
    return lines

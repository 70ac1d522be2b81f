"""Simulated atlases with a known answer: cells streamed in blocks, and the truth that was planted in them.

A cell's molecules come from gene programmes: one that all cells share, those of its cell type's lineage, at most one
state, and in treated cells a response. Each gene of a programme is transcribed in bursts, Poisson in number and
logarithmic in size, so that a gene's counts in a cell are negative binomial (a Gamma-Poisson mixture; Quenouille 1949,
Biometrics 5:162), with variance = mean (1 + theta). A programme sets how often a gene bursts, the gene how much comes
of a burst, as in living cells (Larsson et al. 2019, Nature 565:251). So the cost follows the molecules of a cell, not
its genes: a burst's gene is looked up in a table of its programme, and a technical effect is a chance to lose it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Self

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from datawall.cells import corpus, ontology
from datawall.cells.cellstore import CELLS_AT_ONCE
from datawall.engine import disk, paths, store

ONTOLOGY = paths.PACKAGE_DATA / "cell_types.obo"  # a tree over scTab's cell types, also for SCimilarity's `ontology`
COMPOSITION = paths.PACKAGE_DATA / "sctab_cell_types.csv"  # cells of each type in scTab's test split
CONTROL, TREATED = "ctrl", "treated"
MIN_GENES = 50  # fewer could not hold programmes apart
CHUNK = 128  # cells that share a random generator, seeded by atlas and number of the chunk
GAMMA_SHAPE = 4.0  # of a programme's activity over the cells that carry it: a spread of half its mean
PROGRAMME_GENES = 0.03  # share of the genes that make up a programme, the shared one apart
BASELINE_ENTRIES, PROGRAMME_ENTRIES = 2**20, 2**15  # of the tables in which a molecule's gene is looked up


class Atlas(BaseModel):
    """Settings of a simulated atlas. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)

    n_cells: PositiveInt = 10_000  # the first cells of a larger atlas are those of a smaller one
    n_genes: Annotated[int, Field(ge=MIN_GENES, le=19_331)] = 2000  # drawn from the gene table
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the truth and of the cells
    composition: dict[str, PositiveFloat] | None = None  # cell types by weight; by default scTab's 164, as common
    n_datasets: PositiveInt = 4  # a type is common in some and rare in others
    donors_per_dataset: PositiveInt = 4
    assays: Annotated[list[str], Field(min_length=1)] = ["10x 3' v2", "10x 3' v3"]  # of the data sets in turn
    counts_per_cell: Annotated[float, Field(gt=0, le=100_000)] = 1500.0  # median library size, in molecules
    counts_spread: NonNegativeFloat = 0.4  # standard deviation of its natural logarithm
    dispersion: NonNegativeFloat = 0.3  # squared coefficient of variation of an average gene beyond Poisson's
    activity: PositiveFloat = 0.12  # median weight of a lineage's or state's programme; that of the shared one is 1
    n_states: Annotated[int, Field(ge=0, le=40)] = 8  # carried by a quarter of all cells, an eighth, and so on
    assay_effect: NonNegativeFloat = 0.2  # standard deviation over genes of the logarithm of the capture rate,
    dataset_effect: NonNegativeFloat = 0.2  # between assays, data sets
    donor_effect: NonNegativeFloat = 0.1  # and donors
    treated: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of cells that got the drug
    response: NonNegativeFloat = 0.2  # median weight of the drug's programme
    responsive: list[str] = ["myeloid leukocyte", "lymphocyte", "endothelial cell"]  # lineages that respond to it

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = _lineages()
        for key, names in (("composition", self.composition or ()), ("responsive", self.responsive)):
            if unknown := [name for name in names if name not in known]:
                near = ", ".join(map(repr, get_close_matches(unknown[0], known, n=3))) or "see its names"
                raise ValueError(f"{key}: {unknown[0]!r} is no cell type of {ONTOLOGY.name}; did you mean {near}?")
        there = set().union(*(known[name] for name in self.composition or known))
        if self.treated and self.response and not there.intersection(self.responsive):
            what = f"no cell type of the composition is of a lineage among {self.responsive}"
            raise ValueError(f"responsive: {what}; name lineages that it has, or set treated to 0")
        return self


@dataclass(frozen=True)
class Truth:
    """What is planted in an atlas.

    A programme spreads cells by `signal`: its variance over cells, along its direction, in Pearson residuals of the
    counts, whose noise is 1 in every gene. With n cells of G genes, principal components find that direction with a
    squared cosine of (1 - G/n/signal²) / (1 + G/n/signal) (Johnstone and Lu 2009, J Am Stat Assoc 104:682).
    `cells_needed` is the n at which it is one half, as much signal as noise in what was learned, and a carrier is among
    the cells with 95 % probability (3 are expected): an order of magnitude, more if genes are shared or hardly counted.
    """

    atlas: Atlas
    genes: pd.DataFrame  # feature_name by Ensembl id, and theta: variance = mean (1 + theta)
    types: pd.DataFrame  # by cell type: share of cells, response
    programmes: pd.DataFrame  # by name: kind, prevalence, activity, carriers, signal, cells_needed, …
    loadings: np.ndarray  # (n_programmes, n_genes) of a programme's molecules, the share of each gene; rows add up to 1
    weights: np.ndarray  # (n_types, n_programmes) mean weight in a cell that carries it, before they are made shares
    donors: pd.DataFrame  # by donor: dataset_id, assay, log_size (its effect on the library size)
    donor_share: np.ndarray  # (n_types, n_donors) where the cells of a type come from; rows add up to 1
    capture: np.ndarray  # (n_donors, n_genes) uint8: a burst is kept with probability (capture + 1) / 256

    def markers(self) -> dict[str, list[str]]:
        """Symbols of the four genes with the largest loadings in each type's own programme, by cell type."""
        own = [name if name in self.programmes.index else "shared" for name in self.types.index]
        loadings = self.loadings[self.programmes.index.get_indexer(own)]
        best = np.argsort(-loadings, axis=1)[:, :4]
        symbols = self.genes["feature_name"].to_numpy()[best]
        return dict(zip(self.types.index, symbols.tolist(), strict=True))

    def write(self, folder: Path) -> None:
        """Write `truth.json` (settings, types, programmes, donors) into a folder; `truth` of the settings has all."""
        tables = {}
        for name in ("types", "programmes", "donors"):
            table = getattr(self, name).reset_index().astype(object)
            tables[name] = table.where(table.notna(), None).to_dict("list")
        disk.write_json(folder / "truth.json", {"atlas": self.atlas.model_dump(), **tables})


@cache
def _lineages() -> dict[str, set[str]]:
    """Every term of the ontology that comes along, by name, with its ancestors."""
    terms = ontology.read(ONTOLOGY, relations=("is_a",))
    names = {identifier: name for name, identifier in terms.identifiers.items()}
    return {name: {name, *map(names.get, terms.ancestors(name))} for name in terms.identifiers}


def _belongs(types: pd.Index, terms: Iterable[str]) -> pd.DataFrame:
    """Which types are of which lineages, (n_types, n_terms) bool."""
    return pd.DataFrame({term: [term in _lineages()[name] for name in types] for term in terms}, index=types)


def truth(atlas: Atlas) -> Truth:
    """Plant the truth of an atlas; of `n_cells` it depends only in what is counted in cells."""
    rng = np.random.default_rng([atlas.seed, 0])
    chosen = np.sort(rng.permutation(len(corpus.gene_table()))[: atlas.n_genes])
    genes = corpus.gene_table().iloc[chosen][["feature_name"]].copy()
    weight = pd.Series(atlas.composition or pd.read_csv(COMPOSITION, index_col="cell_type")["n_cells"], dtype=float)
    share = (weight / weight.sum()).rename_axis("cell_type")
    carried = _belongs(share.index, _lineages())
    # A programme for every set of types that a term tells apart, named after the last such term.
    carried = carried.loc[:, carried.any() & ~carried.all() & ~carried.T.duplicated(keep="last")]
    responds = _belongs(share.index, atlas.responsive if atlas.treated and atlas.response else [])
    responds = responds.loc[:, responds.any()].add_prefix("response of ")

    states = [f"state {number + 1}" for number in range(atlas.n_states)]
    own = responds if responds.shape[1] > 1 else responds.iloc[:, :0]  # one lineage's response is the drug's
    responses = ["response", *own] if responds.shape[1] else []
    parts = {"shared": ["shared"], "lineage": list(carried), "state": states, "response": responses}
    names = [name for part in parts.values() for name in part]
    kinds = np.repeat(list(parts), [len(part) for part in parts.values()])
    weight = pd.Series(atlas.activity * rng.lognormal(0, 0.5, len(names)), names)
    weight[states] /= np.resize([1, 4, 12], len(states))  # strong and faint ones, common and rare
    strength = atlas.response * rng.lognormal(0, 0.5, len(share)) * responds.any(axis=1).to_numpy()
    weights = pd.DataFrame(1.0, share.index, names)
    for name in (*carried, *states):
        weights[name] = weight[name] * carried.get(name, 1)
    for name in responses:
        weights[name] = strength / (2 if len(own.columns) else 1) * own.get(name, 1)

    prevalence = np.ones(len(names))  # among the cells of a type that can carry it at all
    prevalence[kinds == "state"] = 0.5 ** (2 + np.arange(len(states)))
    prevalence[kinds == "response"] = atlas.treated
    mean = weights.to_numpy() / (weights.to_numpy() @ prevalence)[:, None]  # share of a carrying cell's molecules
    loadings = _random_loadings(len(names), atlas.n_genes, rng)
    profile = share.to_numpy() @ (mean * prevalence) @ loadings
    theta = np.maximum(atlas.dispersion * atlas.counts_per_cell * profile, 1e-6)
    # Logarithmic bursts of this mean have Poisson sums that are negative binomial; their tables round the loadings.
    per_burst = theta / np.log1p(theta)
    molecules = _tables(loadings, per_burst)[0] * per_burst
    loadings = molecules / molecules.sum(axis=1, keepdims=True)

    programmes = _needs(atlas, share.to_numpy()[:, None] * (weights.to_numpy() > 0) * prevalence, mean, loadings, theta)
    programmes.insert(0, "kind", kinds)
    programmes.index = pd.Index(names, name="programme")
    types = pd.DataFrame({"share": share, "response": strength})
    of_donors = _donors(atlas, len(share), rng)
    return Truth(atlas, genes.assign(theta=theta), types, programmes, loadings, weights.to_numpy(), *of_donors)


def _random_loadings(n_programmes: int, n_genes: int, rng: np.random.Generator) -> np.ndarray:
    """Share of each gene in a programme's molecules, spread as to make counts like those of real blood cells."""
    loadings = np.zeros((n_programmes, n_genes))
    loadings[0] = rng.lognormal(0, 2.4, n_genes)
    for row in loadings[1:]:
        n_own = max(8, round(PROGRAMME_GENES * n_genes))
        row[rng.choice(n_genes, n_own, replace=False)] = rng.lognormal(0, 2, n_own)
    return loadings / loadings.sum(axis=1, keepdims=True)


def _tables(loadings: np.ndarray, per_burst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of each gene in each programme's table of bursts (int64), and the bursts that give a molecule."""
    bursts = loadings / per_burst
    entries = np.full(len(loadings), PROGRAMME_ENTRIES)
    entries[0] = BASELINE_ENTRIES
    per_molecule = bursts.sum(axis=1)
    edges = np.rint(np.cumsum(bursts, axis=1) * (entries / per_molecule)[:, None])
    return np.diff(edges, axis=1, prepend=0).astype(np.int64), per_molecule


def _needs(
    atlas: Atlas, carriers: np.ndarray, mean: np.ndarray, loadings: np.ndarray, theta: np.ndarray
) -> pd.DataFrame:
    """How common, active and hard to learn programmes are (`Truth`), from shares of cells and of their molecules."""
    prevalence = carriers.sum(axis=0)
    share = (carriers * mean).sum(axis=0)  # of an average cell's molecules
    spread = (carriers * mean**2).sum(axis=0) * (1 + 1 / GAMMA_SHAPE) - share**2
    profile = share @ loadings
    seen = profile > 0
    distance = ((loadings - profile)[:, seen] ** 2 / (profile * (1 + theta))[seen]).sum(axis=1)
    size = atlas.counts_per_cell * np.exp(atlas.counts_spread**2 / 2)
    signal = size * spread * distance
    signal[0] = np.nan  # all cells carry it: there is no direction to find
    needed = np.maximum(atlas.n_genes * (signal + 2) / signal**2, 3 / prevalence)
    columns = {
        "prevalence": prevalence,  # share of all cells that carry it
        "activity": share / prevalence,  # share of a carrier's molecules
        "carriers": prevalence * atlas.n_cells,  # expected in the whole atlas; of a random subset, its percentage
        "signal": signal,
        "cells_needed": needed,
        "percentage_needed": 100 * needed / atlas.n_cells,  # above 100: more than the atlas has
    }
    return pd.DataFrame(columns)


def _donors(atlas: Atlas, n_types: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Donors nested in data sets, where each type's cells come from, and what each donor's library catches."""
    n_donors = atlas.n_datasets * atlas.donors_per_dataset
    dataset = np.repeat(np.arange(atlas.n_datasets), atlas.donors_per_dataset)
    assay = dataset % len(atlas.assays)
    of_dataset = rng.dirichlet(np.full(atlas.n_datasets, 2.0), n_types)
    of_donor = rng.dirichlet(np.full(atlas.donors_per_dataset, 10.0), (n_types, atlas.n_datasets))
    levels = (atlas.assay_effect, len(atlas.assays), assay), (atlas.dataset_effect, atlas.n_datasets, dataset)
    effect, log_size = np.zeros((n_donors, atlas.n_genes)), np.zeros(n_donors)
    for scale, number, level in (*levels, (atlas.donor_effect, n_donors, np.arange(n_donors))):
        effect += scale * rng.standard_normal((number, atlas.n_genes))[level]
        log_size += scale * rng.standard_normal(number)[level]
    capture = 256 * np.exp(effect - 1.5 * effect.std()) - 1  # the best caught are all caught, none more than once
    names = pd.Index([f"donor_{number + 1}" for number in range(n_donors)], name="donor_id")
    table = pd.DataFrame({"dataset_id": [f"dataset_{number + 1}" for number in dataset]}, names)
    table = table.assign(assay=np.array(atlas.assays)[assay], log_size=log_size - log_size.mean())
    donor_share = (of_dataset[:, :, None] * of_donor).reshape(n_types, n_donors)
    return table, donor_share, np.clip(np.rint(capture), 0, 255).astype(np.uint8)


def blocks(atlas: Atlas, block_size: int = CELLS_AT_ONCE) -> Iterator[ad.AnnData]:
    """All cells in blocks, however cut, at constant memory: int32 counts; labels (`Cells.block`); Ensembl ids."""
    cells = Cells(truth(atlas))
    for begin in range(0, atlas.n_cells, block_size):
        yield cells.block(begin, min(begin + block_size, atlas.n_cells))


def identity(atlas: Atlas) -> store.Record:
    """What fixes the content of an atlas, as JSON values: its settings and the facts that it is made from."""
    files = {path.name: disk.file_sha256(path) for path in (COMPOSITION, ONTOLOGY)}
    return {"simulated": atlas.model_dump(), **files}


def load(atlas: Atlas) -> ad.AnnData:
    """A whole atlas in memory."""
    return Cells(truth(atlas)).block(0, atlas.n_cells)


def cells_named(name: str) -> range | None:
    """Which cells of an atlas a name such as `simulated:6000-7000` means, the last one not; None for other names."""
    match = re.fullmatch(r"simulated:(\d{1,12})-(\d{1,12})", name)
    return (range(int(match[1]), int(match[2])) or None) if match else None


class Cells:
    """The cells that follow from a truth; any of them can be made alone."""

    def __init__(self, planted: Truth) -> None:
        atlas, kind = planted.atlas, planted.programmes["kind"].to_numpy()
        self.truth, self.n_genes = planted, len(planted.genes)
        theta = planted.genes["theta"].to_numpy()
        entries, self.bursts_per_molecule = _tables(planted.loadings, theta / np.log1p(theta))
        genes = np.arange(self.n_genes, dtype=np.int32)
        self.table = np.concatenate([np.repeat(genes, row) for row in entries])  # gene of a burst, by programme
        self.mask = entries.sum(axis=1).astype(np.uint32) - 1  # sizes are powers of two
        self.begin = np.cumsum([0, *entries.sum(axis=1)[:-1]]).astype(np.uint32)
        self.log1p_theta = np.log1p(theta).astype(np.float32)
        # What a cell may carry: columns are the shared programme, its lineage's, a state, responses to the drug.
        rows = np.arange(len(planted.types))[:, None]
        lineage = np.flatnonzero(kind == "lineage")
        depth = (planted.weights[:, lineage] > 0).sum(axis=1).max(initial=0)
        lineage = lineage[np.argsort(planted.weights[:, lineage] == 0, axis=1, kind="stable")[:, :depth]]
        response = np.broadcast_to(np.flatnonzero(kind == "response"), (len(rows), (kind == "response").sum()))
        self.programmes = np.hstack([np.zeros_like(rows), lineage, np.zeros_like(rows), response])
        self.weights = planted.weights[rows, self.programmes]
        self.states, self.state, self.response = np.flatnonzero(kind == "state"), 1 + depth, slice(2 + depth, None)
        self.weights[:, self.state] = 0
        # Molecules are lost to capture, so that many more must be drawn.
        kept = (planted.capture.astype(float) + 1) @ planted.loadings[0] / 256
        self.size = atlas.counts_per_cell * np.exp(planted.donors["log_size"].to_numpy()) / kept
        self.type_edges = np.cumsum(planted.types["share"].to_numpy())[:-1]
        self.donor_edges = np.cumsum(planted.donor_share, axis=1)[:, :-1]
        self.state_edges = np.cumsum(planted.programmes["prevalence"].to_numpy()[self.states])

    def block(self, begin: int, end: int) -> ad.AnnData:
        """Cells `begin` to `end` of the atlas (see `blocks`)."""
        chunks = [self._chunk(number) for number in range(begin // CHUNK, -(-end // CHUNK))]
        within = slice(begin % CHUNK, begin % CHUNK + end - begin)
        type_, donor, treated = np.hstack([codes for codes, _ in chunks])[:, within]
        counts = sp.vstack([counts for _, counts in chunks], format="csr", dtype=np.int32)[within]
        donors = self.truth.donors
        values = {
            "cell_type": pd.Categorical.from_codes(type_, self.truth.types.index),
            "donor_id": pd.Categorical.from_codes(donor, donors.index),
            "dataset_id": pd.Categorical(donors["dataset_id"].iloc[donor], donors["dataset_id"].unique()),
            "assay": pd.Categorical(donors["assay"].iloc[donor], donors["assay"].unique()),
            "condition": pd.Categorical.from_codes(treated, [CONTROL, TREATED]),
        }
        obs = pd.DataFrame(values, index=[f"cell_{row}" for row in range(begin, end)])
        return ad.AnnData(counts, obs=obs, var=self.truth.genes[["feature_name"]])

    def _chunk(self, number: int) -> tuple[np.ndarray, sp.csr_matrix]:
        """Type, donor and treatment of the cells of a chunk, (3, n_cells), and their counts."""
        planted, atlas = self.truth, self.truth.atlas
        rng = np.random.Generator(np.random.SFC64([atlas.seed, 1, number]))
        type_ = np.searchsorted(self.type_edges, rng.random(CHUNK), side="right")
        donor = (self.donor_edges[type_] <= rng.random((CHUNK, 1))).sum(axis=1)
        treated = rng.random(CHUNK) < atlas.treated
        state = np.searchsorted(self.state_edges, rng.random(CHUNK), side="right")  # past the last: none

        programmes, weights = self.programmes[type_], self.weights[type_]
        carries = state < len(self.states)
        programmes[carries, self.state] = self.states[state[carries]]
        weights[carries, self.state] = planted.weights[0, self.states[state[carries]]]
        weights[~treated, self.response] = 0
        weights[:, 1:] *= rng.gamma(GAMMA_SHAPE, 1 / GAMMA_SHAPE, weights[:, 1:].shape)
        size = self.size[donor] * np.exp(atlas.counts_spread * rng.standard_normal(CHUNK))
        molecules = (size / weights.sum(axis=1))[:, None] * weights
        n_bursts = rng.poisson(molecules * self.bursts_per_molecule[programmes])
        return np.stack([type_, donor, treated]), self._counts(programmes, n_bursts, donor, rng)

    def _counts(
        self, programmes: np.ndarray, n_bursts: np.ndarray, donor: np.ndarray, rng: np.random.Generator
    ) -> sp.csr_matrix:
        """Counts of cells, given how many bursts of which programmes each has, (n_cells, n_slots) both."""
        n_of_slot, per_cell = n_bursts.ravel(), n_bursts.sum(axis=1)
        begin, mask = (np.repeat(table[programmes].ravel(), n_of_slot) for table in (self.begin, self.mask))
        draw = rng.integers(0, 2**32, len(begin), dtype=np.uint32)
        gene = self.table.take(begin + (draw & mask))
        captured = self.truth.capture.ravel().take(np.repeat(donor * self.n_genes, per_cell) + gene)
        kept = np.flatnonzero((draw >> 24) <= captured)  # bits that the mask leaves out
        gene = gene.take(kept)
        # Logarithmic burst sizes by Kemp's second accelerated generator (1981, Applied Statistics 30:249).
        below = 1 - np.exp(-rng.random(len(gene), np.float32) * self.log1p_theta.take(gene))
        uniform = 1 - rng.random(len(gene), np.float32)
        more = np.flatnonzero(uniform < below)
        size = np.ones(len(gene), np.int32)
        size[more] += (np.log(uniform[more]) / np.log(below[more])).astype(np.int32)
        cells = np.searchsorted(kept, np.cumsum([0, *per_cell]))
        # Through a dense matrix, as scipy's own sum of duplicates sorts each row, which takes longer than all the rest.
        dense = sp.csr_matrix((size, gene, cells), (len(per_cell), self.n_genes)).toarray()
        place = np.flatnonzero(dense.ravel() != 0)
        indptr = np.searchsorted(place, np.arange(len(dense) + 1) * self.n_genes)
        column = place - np.repeat(np.arange(len(dense)) * self.n_genes, np.diff(indptr))
        return sp.csr_matrix((dense.ravel()[place], column.astype(np.int32), indptr), dense.shape)

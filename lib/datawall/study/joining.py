"""Which tasks a data set joins, by its cells and their labels, and how it is divided: known before any training."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

import numpy as np
import pandas as pd

from datawall.cells import sampling
from datawall.cells.corpus import CorpusError
from datawall.study.params import Params
from datawall.study.records import EvaluationSet

FEWEST = 20  # cells of a data set to judge on
FEWEST_OF_TYPE = 5  # cells of a type: with fewer, one of three folds may have none to train on
HELD_OUT_CELLS = 10  # of each treatment, at least, in a context that is held out unless contexts are named
SMALL = 5_000  # cells; of a data set with fewer, one division would leave the score to chance
FOLDS = 3  # of fine-tuning on a small data set, so that every cell is tested
RECONSTRUCTED = 1_000  # cells at most
# By labels: reconstruction needs none, and what a task of the user's own needs nobody knows.
JUDGED = ("zeroshot_classification", "zeroshot_integration", "finetuned_classification", "perturbation_response")


def n_splits(p: Params, task: str, n_cells: int) -> int:
    """How often a data set is divided for a task: a large one once."""
    splits = (p.finetuned_splits or p.splits) if task == "finetuned_classification" else p.splits
    return splits if n_cells < SMALL else 1


def unfit(task: str, obs: pd.DataFrame, dataset: EvaluationSet, p: Params) -> str | None:
    """Why a task cannot be judged on a data set that has its columns, by the labels of its cells; None if it can.

    Integration is judged by the labels of its sample. Raises CorpusError as `check_control` does.
    """
    if obs.empty or task not in JUDGED:
        return "it has no cells" if obs.empty else None
    of_votes = 2 * max([p.k, *p.more_k]) if task == "zeroshot_classification" else 0  # half of the cells vote
    if len(obs) < max(FEWEST, of_votes):
        why = ", twice the neighbours that vote" if of_votes > FEWEST else ""
        return f"it has {len(obs):,} cells, and needs {max(FEWEST, of_votes)}{why}"
    if task == "zeroshot_integration":
        obs = obs.iloc[integration_rows(p, len(obs))]
    n_cells = obs["cell_type"].value_counts().loc[lambda counts: counts > 0]
    if (n_cells >= FEWEST_OF_TYPE).sum() < 2:
        listed = ", ".join(f"{name!r} ({n})" for name, n in n_cells.head(5).items())
        return f"it has no two types with {FEWEST_OF_TYPE} cells or more: {listed}{', …' if len(n_cells) > 5 else ''}"
    if task == "zeroshot_integration":
        batches = pd.crosstab(obs["cell_type"], obs["batch"]) > 0
        if batches.shape[1] < 2:
            return "its cells are all of one batch"
        if batches.sum(axis=1).max() < 2:
            return "no type has cells of two batches, so that batches and types cannot be told apart"
    if task == "perturbation_response":
        check_control(p, dataset, obs)
        try:
            treatments(obs, dataset)
        except CorpusError as error:
            return str(error).removesuffix(".")
    return None


def integration_rows(p: Params, n_cells: int) -> np.ndarray:
    """Sorted rows of the cells that integration is judged on: all, or a sample that is the same for every model."""
    return sampling.fixed(n_cells, p.integration_cells)


def treatments(obs: pd.DataFrame, dataset: EvaluationSet) -> dict[str, list[str]]:
    """Treatments that perturbation response judges, each against the control, and the contexts held out in turn.

    Raises CorpusError if there is no control or nothing else, or no cells or contexts (see `contexts_held_out`) of a
    treatment that is named or, where none are, of any.
    """
    n_cells = pd.crosstab(obs["cell_type"].astype(str), obs["perturbation"].astype(str))
    wanted, values = dataset.treatments, list(n_cells)
    if dataset.control not in values or len(values) < 2:
        needs = f"perturbation response needs the control {dataset.control!r} and another"
        raise CorpusError(f"the treatments are {_listed(values)}; {needs}.")
    if absent := [] if isinstance(wanted, int) else sorted(set(wanted).difference(values)):
        raise CorpusError(f"treatments: {absent} are none; they are {_listed(values)}.")
    pairs = n_cells.drop(columns=dataset.control).clip(upper=n_cells[dataset.control], axis=0)
    named = not isinstance(wanted, int)
    judged, why = {}, None
    for name in wanted if named else pairs.sum().sort_values(ascending=False, kind="stable").index:
        try:
            judged[name] = contexts_held_out(pairs[name], dataset.held_out_contexts)
        except CorpusError as error:
            if named:
                raise CorpusError(f"{name}: {error}") from None
            why = why or error
        if not named and len(judged) == wanted:
            break
    if not judged:
        raise why
    return judged


def check_contexts(p: Params, types: Iterable[str]) -> None:
    """Raise a CorpusError if contexts to hold out of the corpus are no cell types."""
    if "perturbation_response" in p.tasks and (unknown := set(p.held_out_contexts or ()).difference(types)):
        there = f"the types in {p.cell_type_key!r} are {sorted(types)}"
        raise CorpusError(f"{p.corpus}: held_out_contexts names {sorted(unknown)}, but {there}; name some of these.")


def check_control(p: Params, dataset: EvaluationSet, obs: pd.DataFrame) -> None:
    """Raise a CorpusError if a data set is to join perturbation response, and its source has no such control."""
    if "perturbation_response" not in p.tasks or not dataset.joins("perturbation_response"):
        return
    values = sorted(obs["perturbation"].astype("category").cat.categories)
    if values and dataset.control not in values:
        held_out = dataset.dataset == p.held_out_name
        file, column = (p.corpus, p.perturbation_key) if held_out else (dataset.file, dataset.perturbation_key)
        (nearest,) = get_close_matches(dataset.control, values, n=1, cutoff=0)
        there = f"no value of {column!r}; they are {_listed(values)}; is it {nearest!r}?"
        raise CorpusError(f"{file}: control {dataset.control!r} is {there}")


def _listed(values: list[str]) -> str:
    return f"{values[:20]}{' and more' if len(values) > 20 else ''}"


def contexts_held_out(n_cells: pd.Series, named: list[str] | None) -> list[str]:
    """Contexts to hold out in turn: those named, or all with `HELD_OUT_CELLS` of either treatment.

    `n_cells` are, by context, those of the treatment that has fewer. Raises CorpusError if fewer than two contexts have
    any, there is none to hold out, or one that is named has fewer than two, which tell no ceiling.
    """
    usable = sorted(n_cells.index[n_cells > 0])
    if len(usable) < 2:
        raise CorpusError(f"perturbation response needs two cell types with control and treated cells, not {usable}.")
    if few := [name for name in named or () if n_cells.get(name, 0) < 2]:
        raise CorpusError(f"held_out_contexts: {few} have fewer than two control or treated cells; leave them out.")
    contexts = named or sorted(n_cells.index[n_cells >= HELD_OUT_CELLS])
    if not contexts:
        remedy = "name some in held_out_contexts, or leave perturbation_response out"
        raise CorpusError(f"no cell type has {HELD_OUT_CELLS} control and treated cells each to hold out; {remedy}.")
    return contexts


def halves(p: Params, obs: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Divisions in two, the same for every model: by cell in proportion to types, and by donor where there are two.

    Yields the name of each (`cells 0`, `donors 0`, …), and (n_cells,) the half of each cell, 0 or 1.
    """
    labels, times = obs["cell_type"].to_numpy().astype(str), n_splits(p, "zeroshot_classification", len(obs))
    for seed in range(times):
        yield f"cells {seed}", sampling.stratified_split(labels, [0.5, 0.5], seed=seed)
    for seed, part in donor_splits(obs, [0.5, 0.5], times, fewest=max(p.k, *p.more_k, 0), in_turn=True):
        yield f"donors {seed}", part


def three_parts(p: Params, obs: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Divisions into training, validation and test cells, the same for every model.

    Of a small data set every cell is tested: each third in turn, with a tenth of the others to stop by. A larger one
    has 80, 10 and 10 %. By donor, about a fifth of the cells are tested, those of whole donors. Yields the name of each
    division, and (n_folds, n_cells) or (n_cells,) the part of each cell: 0, 1 or 2.
    """
    labels, times = obs["cell_type"].to_numpy().astype(str), n_splits(p, "finetuned_classification", len(obs))

    def divided(tested: np.ndarray, validation: float, seed: int) -> np.ndarray:
        part = np.full(len(labels), 2)
        part[~tested] = sampling.stratified_split(labels[~tested], [1 - validation, validation], seed=seed)
        return part

    for seed in range(times):
        if len(obs) < SMALL:
            fold = sampling.stratified_split(labels, [1 / FOLDS] * FOLDS, seed=seed)
            yield f"cells {seed}", np.stack([divided(fold == number, 1 / 10, seed) for number in range(FOLDS)])
        else:
            yield f"cells {seed}", sampling.stratified_split(labels, [0.8, 0.1, 0.1], seed=seed)
    for seed, held_out in donor_splits(obs, [0.8, 0.2], times):
        yield f"donors {seed}", divided(held_out == 1, 1 / 9, seed)


def donor_splits(
    obs: pd.DataFrame, shares: list[float], times: int, *, fewest: int = 10, in_turn: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Seeds and parts of splits by whole donors, each split once; none where fewer than two donors are known.

    There are `fewest` training cells at least, of two types: in the first part or, `in_turn`, in each.
    """
    if "donor_id" not in obs or obs["donor_id"].nunique() < 2:
        return
    seen = set()
    for seed in range(times):
        part = sampling.split_by_group(obs["donor_id"].array, shares, seed=seed)
        trained_on = [obs["cell_type"].array[part == number] for number in range(2 if in_turn else 1)]
        enough = all(len(types) >= fewest and len(types.unique()) > 1 for types in trained_on)
        if enough and part.tobytes() not in seen:  # few donors leave few ways to part them
            seen.add(part.tobytes())
            yield seed, part

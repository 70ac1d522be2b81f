"""The positive control: a simulated atlas with a wall where one is planted, and what each rule makes of it.

Three pairs of sibling cell types differ by gene programmes of their own; T cells are common, B cells rare. So
PretrainedPCA learns those of T cells from the first per cent of a corpus, those of monocytes from some hundreds of
cells, and those of B cells only as half of the corpus becomes all: two plateaus and one improvement, as studies find.
"""

import numpy as np
import pandas as pd

from datawall.analysis.results import COLUMNS
from datawall.cells import simulate
from datawall.engine import paths

# Made by tests/benchmarks/known_answer.py: the scores of a hundred corpora, and what each rule says of them.
TABLE = paths.PACKAGE_DATA / "known_answer.csv.gz"
RATES = paths.PACKAGE_DATA / "known_answer_rates.csv"
PAIRS = {
    "T cells": ("CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"),
    "monocytes": ("classical monocyte", "non-classical monocyte"),
    "B cells": ("naive B cell", "memory B cell"),
}
WEIGHTS = {"T cells": 2.0, "monocytes": 1.0, "B cells": 0.37}  # how common the cells of a type are in a corpus
CORPUS = 6000  # cells
PERCENTAGES = (1, 10, 25, 50, 75, 100)
MARGIN = 0.02  # micro-F1: of 100 cells, two more that are named right


def atlas(n_cells: int, weights: dict[str, float]) -> simulate.Atlas:
    """Settings; the programmes do not depend on how common the types are."""
    return simulate.Atlas(
        n_cells=n_cells, n_genes=4000, counts_per_cell=300.0, activity=0.03, seed=23,
        composition={name: weights[pair] for pair, names in PAIRS.items() for name in names},
        n_states=0, treated=0.0, n_datasets=1, donors_per_dataset=1,
    )  # fmt: skip


def percentage_needed() -> pd.Series:
    """Per cent of a corpus that it takes to learn the easier of a pair's two programmes, as planted (`Truth`)."""
    needed = simulate.truth(atlas(CORPUS, WEIGHTS)).programmes["percentage_needed"]
    return pd.Series({pair: needed.reindex(names).min() for pair, names in PAIRS.items()})


def results() -> pd.DataFrame:
    """The packaged scores, with the columns of `read_results`; a pair is a data set."""
    table = pd.read_csv(TABLE).astype({"percentage": float})
    table = table.assign(n_cells=(table["percentage"] * CORPUS / 100).round().astype(int), run_id="", split="")
    of_all = {"study": "known answer", "model": "PretrainedPCA", "strategy": "random", "metric": "micro_f1"}
    return table.assign(task="zeroshot_classification", **of_all)[COLUMNS]


def plateaus(results: pd.DataFrame) -> pd.Series:
    """Where each pair's plateau begins: the size from which on the mean over all seeds is within `MARGIN` of the end's.

    Infinite where the mean at half of the corpus is not. It takes the hundred seeds; rules are asked with ten at most.
    """
    means = results.pivot_table(index="dataset", columns="percentage", values="value")[list(map(float, PERCENTAGES))]
    beyond = means.sub(means[100.0], axis=0).abs() > MARGIN
    begins = {pair: means.columns[np.flatnonzero(off)[-1] + 1 if off.any() else 0] for pair, off in beyond.iterrows()}
    return pd.Series(begins, dtype=float).where(lambda size: size <= 50, np.inf)

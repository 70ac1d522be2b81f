"""A wall whose place is known: PretrainedPCA on subsets of a simulated atlas, and what each rule says of it.

The atlas says how many cells each gene programme takes to be learned. Three pairs of sibling types are told apart, each
by programmes of its own, of which one takes a small part of the corpus and one half of it. Every seed has a corpus of
its own, drawn from one atlas.

python tests/benchmarks/known_answer.py [seeds, 20]    some minutes
"""

import sys

import numpy as np
import pandas as pd

from datawall import models, sampling, saturation, scaling, simulate, tasks

PAIRS = {
    "T cells": ("CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"),
    "monocytes": ("classical monocyte", "non-classical monocyte"),
    "B cells": ("naive B cell", "memory B cell"),
}
CORPUS, EVALUATED = 6000, 9000  # cells
PERCENTAGES = (1, 10, 25, 50, 75, 100)
COUNTS = 150.0  # molecules of a cell
MARGIN = 0.02


def atlas(n_seeds: int) -> simulate.Atlas:
    """Settings; the cells after those of the corpora are for evaluation."""
    return simulate.Atlas(
        n_cells=n_seeds * CORPUS + EVALUATED, n_genes=1000, counts_per_cell=COUNTS, activity=0.02, seed=23,
        composition={name: 1.0 for names in PAIRS.values() for name in names},
        n_states=0, treated=0.0, n_datasets=1, donors_per_dataset=1,
    )  # fmt: skip


def percentage_needed(n_seeds: int) -> dict[str, float]:
    """Per cent of a corpus that takes to learn the easier of a pair's two programmes."""
    needed = simulate.truth(atlas(n_seeds)).programmes["cells_needed"]
    return {pair: round(float(100 * needed.reindex(names).min() / CORPUS), 1) for pair, names in PAIRS.items()}


def learning_curves(n_seeds: int) -> pd.DataFrame:
    """Results of PretrainedPCA at every size and seed: zero-shot classification of each pair."""
    cells = simulate.Cells(simulate.truth(atlas(n_seeds)))
    evaluated = cells.block(n_seeds * CORPUS, n_seeds * CORPUS + EVALUATED)
    types = evaluated.obs["cell_type"].to_numpy(str)
    rows = []
    for seed in range(n_seeds):
        corpus = cells.block(seed * CORPUS, (seed + 1) * CORPUS)
        train = np.random.default_rng(seed).random(EVALUATED) < 0.5
        for percentage in PERCENTAGES:
            subset = corpus[sampling.random(CORPUS, percentage, seed=seed)]
            model = models.create("PretrainedPCA")
            model.fit(subset.X, subset.obs, steps=0, seed=seed)
            Z = model.embed(evaluated.X)
            for pair, names in PAIRS.items():
                own = np.isin(types, names)
                a, b = own & train, own & ~train
                score = tasks.zeroshot_classification(Z[a], types[a], Z[b], types[b])["micro_f1"]
                rows.append((float(percentage), seed, len(subset), pair, score))
    results = pd.DataFrame(rows, columns=["percentage", "seed", "n_cells", "dataset", "value"])
    of_all = {"study": "known answer", "model": "PretrainedPCA", "strategy": "random", "metric": "micro_f1"}
    return results.assign(task="zeroshot_classification", split="", **of_all)


def answers(results: pd.DataFrame) -> pd.DataFrame:
    """What each rule says of each pair."""
    settings = {"published": {}, "mean": {}, "error": {}, "equivalence": {"margin": MARGIN}}
    found = {
        rule: saturation.saturation_points(results, "micro_f1", rule=rule, n_resamples=0, **more)
        for rule, more in settings.items()
    }
    table = pd.DataFrame({rule: of.set_index("dataset")["percentage"] for rule, of in found.items()})
    table["equivalence verdict"] = found["equivalence"].set_index("dataset")["verdict"]
    table["next doubling"] = scaling.scaling_curves(results, "micro_f1").set_index("dataset")["verdict"]
    return table


if __name__ == "__main__":
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("% of a corpus that it takes, by the planted truth:", percentage_needed(n_seeds))
    results = learning_curves(n_seeds)
    for statistic in ("mean", "std"):
        table = results.pivot_table(index="dataset", columns="percentage", values="value", aggfunc=statistic)
        print(f"\nmicro-F1, {statistic} over seeds\n{table.round(3).to_string()}")
    for number in sorted({3, 5, 10, n_seeds}):
        if number <= n_seeds:
            print(f"\n{number} seeds\n{answers(results[results['seed'] < number]).to_string()}")

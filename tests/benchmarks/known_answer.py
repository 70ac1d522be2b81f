"""A wall whose place is known: what PretrainedPCA learns of a simulated atlas, and what each rule says of it.

PYTHONPATH=tests python tests/benchmarks/known_answer.py [seeds, 100]

Three minutes; with all 100, it writes the packaged tables.
"""

import logging
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from benchmarks.power import judged

from datawall import models, tasks
from datawall.analysis import known_answer
from datawall.analysis.known_answer import CORPUS, MARGIN, PAIRS, PERCENTAGES, WEIGHTS, atlas, plateaus
from datawall.cells import sampling, simulate

SEEDS = range(100)
EVALUATED = 6000  # cells, of all types alike


def learn(seeds: Iterable[int]) -> pd.DataFrame:
    """Pretrain PretrainedPCA at every size of a corpus a seed; the micro-F1 with which each pair is told apart."""
    seeds = list(seeds)
    cells = simulate.Cells(simulate.truth(atlas((max(seeds) + 1) * CORPUS, WEIGHTS)))
    evaluated = simulate.load(atlas(EVALUATED, dict.fromkeys(PAIRS, 1.0)))
    types = evaluated.obs["cell_type"].to_numpy(str)
    rows = []
    for seed in seeds:
        corpus = cells.block(seed * CORPUS, (seed + 1) * CORPUS)
        train = np.random.default_rng(seed).random(EVALUATED) < 0.5
        for percentage in PERCENTAGES:
            subset = corpus[sampling.random(CORPUS, percentage, seed=seed)]
            model = models.create("PretrainedPCA")
            model.fit(subset.X, subset.obs, seed=seed)
            Z = model.embed(evaluated.X)
            for pair, names in PAIRS.items():
                own = np.isin(types, names)
                rows.append((percentage, seed, pair, _score(Z, types, own & train, own & ~train)))
    return pd.DataFrame(rows, columns=["percentage", "seed", "dataset", "value"])


def _score(Z: np.ndarray, types: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Micro-F1 of zero-shot classification; it need not warn of cells that coincide, with hardly a molecule."""
    log = logging.getLogger(tasks.classification.__name__)
    log.disabled = True
    try:
        return tasks.zeroshot_classification(Z[train], types[train], Z[test], types[test], probe=False)["micro_f1"]
    finally:
        log.disabled = False


def rates(results: pd.DataFrame, n_seeds: Sequence[int] = (3, 5, 10), *, n_draws: int = 100) -> pd.DataFrame:
    """`judged` of each pair from a few of the seeds, drawn time and again, by pair and seeds.

    Draws share the hundred seeds, so that ten of them are not as many studies as `error` takes them for.
    """
    rng, sizes = np.random.default_rng(0), np.array(PERCENTAGES, float)
    runs = results.pivot_table(index="dataset", columns=["percentage", "seed"], values="value")
    tables = {}
    for number in n_seeds:
        drawn = np.array([rng.choice(results["seed"].nunique(), number, replace=False) for _ in range(n_draws)])
        for pair, begins in plateaus(results).items():
            scores = runs.loc[pair].to_numpy().reshape(len(sizes), -1)[:, drawn]
            tables[pair, number] = judged(np.moveaxis(scores, 1, 0), sizes, begins, MARGIN).drop(columns="covered")
    return pd.concat(tables, names=["pair", "seeds", None]).droplevel(2).reset_index()


if __name__ == "__main__":
    print("% of a corpus that it takes, as planted:", known_answer.percentage_needed().round(1).to_dict())
    if len(sys.argv) > 1 and (n_seeds := int(sys.argv[1])) < len(SEEDS):
        print(learn(range(n_seeds)).pivot_table("value", "dataset", "percentage").round(3).to_string())
        sys.exit()
    # Without a time in the archive, the same numbers make the same file.
    compression = {"method": "gzip", "mtime": 0}
    learn(SEEDS).to_csv(known_answer.TABLE, index=False, float_format="%.6f", compression=compression)
    results = known_answer.results()
    for statistic in ("mean", "std"):
        table = results.pivot_table("value", "dataset", "percentage", aggfunc=statistic)
        print(f"\nmicro-F1, {statistic} over seeds\n{table.round(3).to_string()}")
    print("\nplateaus begin at", plateaus(results).to_dict())
    found = rates(results)
    found.to_csv(known_answer.RATES, index=False, float_format="%.3f")
    print(found.round(2).to_string(index=False, na_rep=""))

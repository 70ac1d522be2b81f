"""The original study's published results, as tidy tables.

DenAdel et al. 2026, Evaluating the role of pretraining dataset size and diversity on single-cell foundation model
performance, Nature Methods 23:1447, doi 10.1038/s41592-026-03120-y. The numbers are those of the result tables in its
repository, github.com/microsoft/scFM-dataselection (MIT licence), with this project's names for models, tasks and
strategies; values are cut at six decimals. Its R2 of perturbation response is Pearson's r of gene means: `pearson_r`.
"""

import pandas as pd

from datawall.analysis.results import COLUMNS, mean_over_splits, select
from datawall.engine import paths

TABLES = paths.PACKAGE_DATA / "published"
CELLS_PER_PERCENT = 177_525  # pretraining cells: 80 % of one per cent of scTab, the rest validates and tests
UNPUBLISHED = {"dataset": "ocular", "strategy": "coresets"}  # in the tables, in none of the figures
# Names of strategies in the diversity tables.
SUBSETS = {"cluster_adaptive": "celltype_reweighted", "spikein10pct": "spikein_10", "spikein50pct": "spikein_50"}


def results(*, in_figures: bool = True) -> pd.DataFrame:
    """The published results as `read_results` gives a study's, cleaned.

    Rows that repeat another's run are dropped: one of SSL, 10 % spike-in (fine-tuned periodontitis, 100 %), and the
    second five of the ten untrained SSL models on placenta (zero-shot), which probably are Geneformer's, whose own are
    missing. SCimilarity on placenta at 75 % geometric sketch is missing too. What one may stumble over stays in:
    Geneformer, fine-tuned on intestine, often names the commonest type for every cell (micro-F1 0.561041). What the
    figures do not show (`UNPUBLISHED`) is left out unless it is asked for. `n_cells` is the size in whole per cents, to
    within one per cent of what a strategy took; `split` and `run_id` are empty.
    """
    table = pd.read_csv(TABLES / "results.csv.gz")
    # Of two rows for a run, the first is the one that belongs there.
    table = table.drop_duplicates(["model", "strategy", "percentage", "seed", "task", "dataset", "metric"])
    if in_figures:
        for column, name in UNPUBLISHED.items():
            table = table[table[column] != name]
    n_cells = table["percentage"] * CELLS_PER_PERCENT
    table = table.assign(study="published", n_cells=n_cells, split="", run_id="")
    return table.astype({"percentage": float})[COLUMNS].reset_index(drop=True)


def diversity() -> pd.DataFrame:
    """Diversity of each published subset: strategy, percentage, seed, shannon (bits), inverse_simpson, vendi.

    The first two are of cell types, and NaN for the spike-ins; `vendi` is of cells.
    """
    types = pd.read_csv(TABLES / "diversity.csv").rename(columns={"downsampling_method": "strategy"})
    types = types.rename(columns=lambda name: name.removesuffix("_index")).drop(columns="gini_simpson")
    cells = pd.read_csv(TABLES / "vendi.csv").rename(columns={"method": "strategy", "vendi_score": "vendi"})
    types, cells = types.replace({"strategy": SUBSETS}), cells.replace({"strategy": SUBSETS})
    return types.merge(cells, how="outer", on=["strategy", "percentage", "seed"]).astype({"percentage": float})


def beside(random: pd.DataFrame) -> pd.DataFrame:
    """Errors of a study's zero-shot classification on random subsets and of the published ones, by number of cells.

    `random` is its micro-F1, a row a run. Columns study (`this corpus`, `published`), model, dataset, n_cells, error.
    """
    published = select(results(), task="zeroshot_classification", metric="micro_f1", strategy="random")
    runs, keys = pd.concat([random.assign(study="this corpus"), mean_over_splits(published)]), ["model", "dataset"]
    by_size = runs[runs["percentage"] > 0].groupby(["study", *keys, "percentage"])
    means = by_size[["n_cells", "value"]].mean().reset_index().sort_values("study", ascending=False, kind="stable")
    return means.assign(error=1 - means["value"])[["study", *keys, "n_cells", "error"]].reset_index(drop=True)


def embedding_seconds() -> pd.DataFrame:
    """Seconds to embed 10,000 cells, by model, one measurement each."""
    table = pd.read_csv(TABLES / "embedding_seconds.csv").rename(columns={"elapsed_time_s": "seconds"})
    names = {"Pre-trained PCA": "PretrainedPCA", "Geneformer+tokenization": "Geneformer, with tokenizing"}
    return table.replace({"model": names})[["model", "seconds"]]

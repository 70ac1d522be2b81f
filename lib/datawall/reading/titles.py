"""Names as a reader should see them, and what figures say: sentences made of the numbers of a table."""

from collections.abc import Iterable

import pandas as pd

from datawall.analysis.results import CHANCE, ORACLE, headline, lower_is_better
from datawall.engine import paths

LABELS = pd.read_csv(paths.PACKAGE_DATA / "labels.csv", index_col="name", keep_default_na=False)["label"].to_dict()
MARGIN = 0.02  # points of score below which two scores are called level


def label(name: str) -> str:
    """A name as a reader should see it; of a model named `module:Class`, the class."""
    return LABELS.get(name, name.rpartition(":")[2])


def plain(text: str) -> str:
    """A text that matplotlib draws letter by letter: no part of it is a formula, and no legend hides it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def drawn(name: str) -> str:
    """A name as a reader should see it in a figure."""
    return plain(label(name))


def learning_curves(results: pd.DataFrame, metric: str) -> str:
    """How many curves of random subsets rise with size (an error: fall), and how many reach the best baseline."""
    table, name = headline(results, metric), label(metric)
    sizes = table.filter(regex=r" %$").dropna(how="all")
    if sizes.empty:
        return f"The study has no random subsets, of which curves of {name} would be told"
    first, last = sizes.bfill(axis=1).iloc[:, 0], sizes.ffill(axis=1).iloc[:, -1]
    begin, end = sizes.columns[0].removesuffix(" %"), sizes.columns[-1]
    says = f"Models pretrained on {end} of the corpus: {name}"
    if begin != end.removesuffix(" %"):
        says = f"From {begin} to {end} of the corpus, drawn at random, {name} "
        if lower_is_better(metric):
            says += f"falls in {share((last < first).sum(), len(sizes))} curves"
        else:
            up, down = ((sign * (last - first) > MARGIN).sum() for sign in (1, -1))
            says += f"rises by over {MARGIN:g} in {share(up, len(sizes))} curves, falls in {down or 'none'}"
    baselines = table.loc[sizes.index].drop(columns=[*sizes, "untrained", CHANCE, ORACLE], errors="ignore")
    if baselines.empty or lower_is_better(metric):
        return says
    gap = (sizes.max(axis=1) - baselines.max(axis=1)).dropna()
    groups = {"above": gap > MARGIN, "level": gap.abs() <= MARGIN, "below": gap < -MARGIN}
    places = ", ".join(_counted(gap[rows], place) for place, rows in groups.items())
    return f"{says};\nbeside the best baseline, at the best of their sizes: {places}"


def per_class_curves(means: pd.DataFrame, ends: dict[str, dict[str, list[str]]]) -> str:
    """What cell types gain from the smallest to the largest size, mean over models.

    The column value of `means` is F1, by dataset, metric (the type), model, seed and percentage; `ends` has types by
    data set, and by the word for them.
    """
    table = means[means["percentage"] > 0].pivot_table("value", ["dataset", "metric"], "percentage")
    grown, end = table.shape[1] > 1, f"{table.columns[-1]:g} % of the corpus"
    value = table.iloc[:, -1] - table.iloc[:, 0] if grown else table.iloc[:, -1]
    parts = [
        f"{label(dataset)}, {word}: {format(value.loc[dataset].reindex(names).mean(), '+.2f' if grown else '.2f')}"
        for dataset, types in ends.items()
        for word, names in types.items()
        if len(names)
    ]
    what = f"Mean change of F1 from {table.columns[0]:g} to {end}" if grown else f"Mean F1 at {end}"
    return f"{what}\n{'; '.join(parts)}"


def embeddings(scores: pd.Series, metric: str) -> str:
    """Which embedding has the highest score and which the lowest; scores by model."""
    if scores.empty:
        return f"no {label(metric)}"
    high, low = label(scores.idxmax()), label(scores.idxmin())
    return f"{label(metric)} is highest in {high} ({scores.max():.2f}) and lowest in {low} ({scores.min():.2f})"


def share(count: int, total: int) -> str:
    """So many of all, in words."""
    return f"{count or 'none'} of {total}"


def listed(values: pd.Series | dict[str, object], form: str = "{}") -> str:
    """Names, each followed by its value in a format."""
    return ", ".join(f"{label(name)} {form.format(value)}" for name, value in values.items())


def joined(parts: Iterable[str]) -> str:
    """Words with commas and, before the last, "and"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _counted(rows: pd.Series, place: str) -> str:
    """How many curves are in a place, and of which models if they are at most two."""
    models = [label(name) for name in rows.index.unique("model")]
    return f"{len(rows) or 'none'} {place}" + (f" ({joined(models)})" if 0 < len(models) <= 2 else "")

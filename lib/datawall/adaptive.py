"""How little of a study's grid settles its verdict: sizes and seeds are added only while the verdict is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from datawall.saturation import (
    IMPROVING,
    LOWER_IS_BETTER,
    PLATEAU,
    UNDECIDED,
    curves_of,
    mean_over_datasets,
    saturation_points,
)

STEP = 4  # a size is at least so many times the one before, until one in between is needed

type Oracle = Callable[[float, int], float | Sequence[float]]  # percentage and seed to score, or a score per data set
type Scores = dict[float, list[float]]  # by percentage


@dataclass(frozen=True)
class Plan:
    """The grid that may be run, and what would settle the question."""

    margin: float  # difference in score that does not matter
    percentages: tuple[float, ...] = (1, 2, 5, 10, 25, 50, 100)  # ascending; the last is the full corpus
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    first_seeds: int = 2  # run at once at each size
    confidence: float = 0.95
    budget: float = 0.4  # share of the grid's runs that may be spent

    def __post_init__(self) -> None:
        """Refuse plans that cannot be carried out."""
        sizes = self.percentages
        if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] <= 0:
            raise ValueError(f"percentages {sizes}: two or more, above 0, ascending.")
        if not 2 <= self.first_seeds <= len(self.seeds):
            raise ValueError(f"first_seeds {self.first_seeds}: at least 2, and at most the {len(self.seeds)} seeds.")
        if not self.margin > 0:
            raise ValueError(f"margin {self.margin}: a difference above 0, in the metric's units.")
        if 2 * self.first_seeds > self.budget * self.n_runs:
            raise ValueError(
                f"budget {self.budget}: of {self.n_runs} runs, that is fewer than the first two sizes take."
            )

    @property
    def n_runs(self) -> int:
        """Runs of the full grid."""
        return len(self.percentages) * len(self.seeds)

    def ladder(self) -> list[float]:
        """The sizes to be run first: each at least `STEP` times the one before, and the full corpus."""
        sizes = [self.percentages[0]]
        for size in self.percentages[1:-1]:
            if STEP * sizes[-1] <= size <= self.percentages[-1] / STEP:
                sizes.append(size)
        return [*sizes, self.percentages[-1]]

    def test_confidence(self) -> float:
        """Of a single look at the data: each size of the ladder has an equal share of the doubt (Bonferroni)."""
        return 1 - (1 - self.confidence) / (len(self.ladder()) - 1)


@dataclass(frozen=True)
class Outcome:
    """What was found, and at what cost."""

    verdict: str  # plateau, still improving or undecided
    percentage: float  # where the plateau begins, or NaN
    reason: str
    runs: pd.DataFrame  # percentage, seed, score: all that were spent
    share: float  # of the full grid's runs


def settle(oracle: Oracle, plan: Plan) -> Outcome:
    """Whether more of a corpus helps a model, with as few runs as it takes.

    Sizes are run from the smallest up, in large steps, with few seeds each, until `decide` has a verdict. While it has
    none: if the means alone would make a plateau of the sizes from some point on and seeds are left, the full corpus
    reached, the sizes at both ends of it get a seed more; else the next size is run, and at the end the one at half of
    the full corpus, without which no model is called still improving.

    Parameters
    ----------
    oracle
        Score of a run, higher is better, given its percentage and seed; or its scores on several data sets, of which
        the mean is taken.
    plan
        The grid, margin, confidence and budget.
    """
    scores: Scores = {}

    def run(percentage: float, n_more: int) -> None:
        known = scores.setdefault(percentage, [])
        for seed in plan.seeds[len(known) : len(known) + n_more]:
            known.append(float(np.mean(oracle(percentage, seed))))

    ladder = plan.ladder()
    half = max((size for size in plan.percentages if size <= ladder[-1] / 2), default=ladder[0])
    for size in ladder[:2]:
        run(size, plan.first_seeds)
    while True:
        verdict, percentage, reason = decide(scores, plan)
        if verdict == PLATEAU or (verdict == IMPROVING and half in scores):
            break
        gains = still_to_come(scores, plan)
        flat = gains.loc[gains["expected"] < plan.margin, "start"]
        wanted: dict[float, int] = {}
        if ladder[-1] not in scores:
            wanted = {ladder[ladder.index(max(scores)) + 1]: plan.first_seeds}
        elif half not in scores and flat.empty:
            wanted = {half: plan.first_seeds}
        else:
            ends = (flat.iloc[0] if len(flat) else gains["start"].iloc[-1], ladder[-1])
            wanted = {size: 1 for size in ends if len(scores[size]) < len(plan.seeds)}
        spent = sum(map(len, scores.values()))
        if not wanted or spent + sum(wanted.values()) > plan.budget * plan.n_runs:
            verdict, percentage, reason = UNDECIDED, np.nan, f"open after {spent} of {plan.n_runs} runs"
            break
        for size, n_more in wanted.items():
            run(size, n_more)
    rows = [(size, seed, score) for size, of in scores.items() for seed, score in zip(plan.seeds, of, strict=False)]
    runs = pd.DataFrame(rows, columns=["percentage", "seed", "score"])
    return Outcome(verdict, percentage, reason, runs, len(runs) / plan.n_runs)


def decide(scores: Scores, plan: Plan) -> tuple[str, float, str]:
    """Verdict on the scores so far, the percentage where a plateau begins, and the reason.

    A plateau begins at the smallest size beyond which at most less than the margin is `still_to_come`. Failing that,
    and with runs of the full corpus, the verdict is that of the rule `equivalence` (`saturation.saturation_points`).
    """
    gains = still_to_come(scores, plan)
    if len(settled := gains[gains["at_most"] < plan.margin]):
        start, _, at_most = settled.iloc[0]
        return PLATEAU, start, f"beyond {start:g} %, at most {at_most:.2g} is to be gained"
    if plan.percentages[-1] not in scores:
        return UNDECIDED, np.nan, "the full corpus may gain more than the margin"
    rows = [
        (100 * size / plan.percentages[-1], seed, score) for size, of in scores.items() for seed, score in enumerate(of)
    ]
    curve = {"study": "", "model": "", "strategy": "random", "n_cells": 0, "task": "", "dataset": "", "metric": ""}
    results = pd.DataFrame(rows, columns=["percentage", "seed", "value"]).assign(**curve)
    point = saturation_points(
        results, "", rule="equivalence", margin=plan.margin, confidence=plan.test_confidence(), n_resamples=0
    ).iloc[0]
    return point["verdict"], point["percentage"] * plan.percentages[-1] / 100, "by the rule equivalence"


def still_to_come(scores: Scores, plan: Plan) -> pd.DataFrame:
    """What is to be gained from each size, but the largest run, to the full corpus.

    A line in the logarithm of the size is fitted to the runs from that size on (`scipy.stats.linregress`). As no
    doubling is taken to gain more than those before it, its slope is the most that each doubling to the full corpus
    gains.

    Returns
    -------
    table with the columns start (percentage), expected and at_most (by the slope and its upper confidence bound).
    """
    sizes = sorted(scores)
    rows = []
    for start in sizes[:-1]:
        shown = [(np.log2(size), score) for size in sizes if size >= start for score in scores[size]]
        line = stats.linregress(shown)
        doublings = np.log2(plan.percentages[-1] / start)
        upper = line.slope + stats.t.ppf(plan.test_confidence(), len(shown) - 2) * line.stderr
        rows.append((start, max(line.slope, 0) * doublings, max(upper, 0) * doublings))
    return pd.DataFrame(rows, columns=["start", "expected", "at_most"])


def replay(results: pd.DataFrame, metric: str, plan: Plan, *, seed: int = 0) -> pd.DataFrame:
    """Verdicts that `settle` would have reached on a study that has been run, beside those of all its runs.

    Parameters
    ----------
    results
        Tidy results (`read_results`) of one study. A run's score is its mean over the data sets of a task.
    metric
        Any metric.
    plan
        Margin, confidence, budget and first seeds; percentages and seeds are the study's.
    seed
        Of the order in which the seeds of a size are taken.

    Returns
    -------
    table with the columns model, strategy, task, full and full_percentage (`decide` on all runs), adaptive,
    adaptive_percentage and share (of the runs).
    """
    rows = []
    for curve in curves_of(mean_over_datasets(results, metric), metric):
        rng = np.random.default_rng(seed)
        sign = -1 if metric in LOWER_IS_BETTER else 1
        n_seeds = min(map(len, curve.runs))
        scores = {
            size: (sign * rng.permutation(runs)[:n_seeds]).tolist()
            for size, runs in zip(curve.percentages.tolist(), curve.runs, strict=True)
        }
        of_curve = replace(plan, percentages=tuple(scores), seeds=tuple(range(n_seeds)))
        full, full_percentage, _ = decide(scores, of_curve)
        found = settle(lambda percentage, seed, scores=scores: scores[percentage][seed], of_curve)
        rows.append((*curve.key[:3], full, full_percentage, found.verdict, found.percentage, found.share))
    columns = ["model", "strategy", "task", "full", "full_percentage", "adaptive", "adaptive_percentage", "share"]
    return pd.DataFrame(rows, columns=columns)

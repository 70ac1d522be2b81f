"""How little of a study's grid settles its verdict: sizes and seeds are added only while the verdict is open."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import special

from datawall.analysis.results import sign_of
from datawall.analysis.saturation import IMPROVING, PLATEAU, UNDECIDED, Curve, curves_of, mean_over_datasets, verdicts

STEP = 4  # a size is at least so many times the one before, until one in between is needed

type Asked = tuple[float, int]  # a run: percentage and seed
type Scores = dict[float, list[float]]  # by percentage


@dataclass(frozen=True)
class Plan:
    """The grid that may be run, and what would settle the question."""

    margin: float  # difference in score that does not matter
    percentages: tuple[float, ...] = (1, 2, 5, 10, 25, 50, 100)  # ascending; the last is the full corpus
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    first_seeds: int = 2  # run at once at each size
    confidence: float = 0.95
    budget: float = 0.8  # share of the grid's runs that may be spent

    def __post_init__(self) -> None:
        """Refuse plans that cannot be carried out."""
        sizes = self.percentages
        if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] <= 0:
            raise ValueError(f"percentages {sizes}: two or more, above 0, ascending.")
        if not 2 <= self.first_seeds <= len(self.seeds):
            raise ValueError(f"first_seeds {self.first_seeds}: at least 2, and at most the {len(self.seeds)} seeds.")
        if not self.margin > 0:
            raise ValueError(f"margin {self.margin}: a difference above 0, in the metric's units.")
        if len(self.ladder()) * self.first_seeds > self.budget * self.n_runs:
            raise ValueError(f"budget {self.budget}: of {self.n_runs} runs, that is fewer than the first sizes take.")

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
        """Of a single look: each size where a plateau may begin has an equal share of the doubt (Bonferroni)."""
        return 1 - (1 - self.confidence) / (len(self.percentages) - 1)


@dataclass(frozen=True)
class Outcome:
    """What was found, and at what cost."""

    verdict: str  # plateau, still improving or undecided
    percentage: float  # where the plateau begins, or NaN
    reason: str
    runs: pd.DataFrame  # percentage, seed, score: all that were spent
    share: float  # of the full grid's runs


def settle(oracle: Callable[[float, int], float], plan: Plan) -> Outcome:
    """Whether more data helps, with few runs (`ask`); `oracle` gives a run's score, higher is better."""
    scores: Scores = defaultdict(list)
    while not isinstance(step := ask(scores, plan), Outcome):
        for percentage, seed in step:
            scores[percentage].append(float(oracle(percentage, seed)))
    return step


def ask(scores: Scores, plan: Plan) -> list[Asked] | Outcome:
    """The runs that are wanted next, by the scores so far, or the outcome when they settle it.

    A few seeds of each size of the ladder are run, the full corpus too, since what comes late shows there alone. While
    `decide` has no verdict, the size at half of the corpus is run, unless the means alone make a plateau (without that
    size no model is called still improving); then the sizes at both ends of what may be a plateau get a seed more; and
    when those have all seeds, the rest of the grid is filled in from its large end.
    """
    ladder = plan.ladder()
    if not scores:
        return [(size, seed) for size in ladder for seed in plan.seeds[: plan.first_seeds]]
    half = max((size for size in plan.percentages if size <= ladder[-1] / 2), default=ladder[0])
    n_runs = {size: len(scores.get(size, ())) for size in plan.percentages}
    verdict, percentage, reason = decide(scores, plan)
    if verdict != PLATEAU and (verdict != IMPROVING or not n_runs[half]):
        coming = still_to_come(scores, plan)
        flat = [start for start, expected, _ in coming if expected < plan.margin]
        unfilled = [size for size, n in n_runs.items() if n < len(plan.seeds)]
        ends = (flat[0] if flat else coming[-1][0], ladder[-1])
        if not n_runs[half] and not flat:
            wanted = {half: plan.first_seeds}
        else:
            wanted = dict.fromkeys([size for size in ends if size in unfilled] or unfilled[-1:], 1)
        spent = sum(n_runs.values())
        if wanted and spent + sum(wanted.values()) <= plan.budget * plan.n_runs:
            return [(size, seed) for size, n in wanted.items() for seed in plan.seeds[n_runs[size] :][:n]]
        verdict, percentage, reason = UNDECIDED, np.nan, f"open after {spent} of {plan.n_runs} runs"
    rows = [(size, seed, score) for size, runs in scores.items() for seed, score in zip(plan.seeds, runs, strict=False)]
    runs = pd.DataFrame(rows, columns=["percentage", "seed", "score"])
    return Outcome(verdict, percentage, reason, runs, len(runs) / plan.n_runs)


def decide(scores: Scores, plan: Plan) -> tuple[str, float, str]:
    """Verdict on the scores so far, the percentage where a plateau begins, and the reason.

    A plateau begins at the smallest size beyond which at most less than the margin is `still_to_come`. Failing that,
    the verdict is that of the rule `equivalence` (`saturation.saturation_points`).
    """
    for start, _, at_most in still_to_come(scores, plan):
        if at_most < plan.margin:
            return PLATEAU, start, f"beyond {start:g} %, at most {at_most:.2g} is to be gained"
    sizes = np.array(sorted(scores))
    errors = [1 - np.array(scores[size]) for size in sizes]
    curve = Curve(("",) * 4, 100 * sizes / sizes[-1], sizes, errors)
    (point,), (verdict,) = verdicts([curve], plan.margin, plan.test_confidence())
    return str(verdict), float(point * sizes[-1] / 100), "by the rule equivalence"


def still_to_come(scores: Scores, plan: Plan) -> list[tuple[float, float, float]]:
    """Each size below the full corpus, of which there are runs, and what is to be gained from there: expected, at most.

    It is the larger of two readings, at most by their upper confidence bounds: a line in the logarithm of the
    size, fitted to the runs from that size on; and the full corpus's mean beside that of the runs below it, with the
    variance of all sizes from there on, so that a gain that comes late is not lost among sizes that had none.
    """
    sizes = sorted(scores)
    coming = []
    for start in sizes[:-1]:
        later = [np.array(scores[size]) for size in sizes if size >= start]
        below, full, n_runs = np.concatenate(later[:-1]), later[-1], sum(map(len, later))
        x = np.repeat(np.log2([size for size in sizes if size >= start]), [len(runs) for runs in later])
        y, doublings = np.concatenate(later), x[-1] - x[0]
        from_mean = x - x.mean()
        slope = from_mean @ y / (from_mean @ from_mean)
        missed = y - y.mean() - slope * from_mean
        slope_error = np.sqrt(missed @ missed / (n_runs - 2) / (from_mean @ from_mean))
        freedom, gap = n_runs - len(later), full.mean() - below.mean()
        within = sum(((runs - runs.mean()) ** 2).sum() for runs in later)
        error = np.sqrt(within / freedom * (1 / len(below) + 1 / len(full)))
        upper = slope + special.stdtrit(n_runs - 2, plan.test_confidence()) * slope_error
        most = max(upper * doublings, gap + special.stdtrit(freedom, plan.test_confidence()) * error, 0)
        coming.append((start, float(max(slope * doublings, gap, 0)), float(most)))
    return coming


def replay(results: pd.DataFrame, metric: str, plan: Plan) -> pd.DataFrame:
    """Verdicts that `settle` would have reached on a study that has been run, beside those of all its runs.

    A run's score is its mean over a task's data sets. Percentages and seeds are the study's, in a drawn order.
    Columns model, strategy, task, full, full_percentage (`decide` on all runs), adaptive, adaptive_percentage, share.
    """
    rows = []
    for curve in curves_of(mean_over_datasets(results, metric), metric):
        rng = np.random.default_rng(0)
        n_seeds = min(map(len, curve.runs))
        drawn = [(sign_of(metric) * rng.permutation(runs)[:n_seeds]).tolist() for runs in curve.runs]
        scores = dict(zip(curve.percentages.tolist(), drawn, strict=True))
        of_curve = replace(plan, percentages=tuple(scores), seeds=tuple(range(n_seeds)))
        full, full_percentage, _ = decide(scores, of_curve)
        early = settle(lambda percentage, seed, scores=scores: scores[percentage][seed], of_curve)
        rows.append((*curve.key[:3], full, full_percentage, early.verdict, early.percentage, early.share))
    columns = ["model", "strategy", "task", "full", "full_percentage", "adaptive", "adaptive_percentage", "share"]
    return pd.DataFrame(rows, columns=columns)

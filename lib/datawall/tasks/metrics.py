"""Metrics by name: what a task returns, and the list of them all."""

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Self

import numpy as np
import pandas as pd

from datawall.tasks.uncertainty import interval

type Levels = Mapping[str, float] | None  # by the name of a metric


class Metrics(dict[str, float]):
    """Values of metrics by name; beside them, by the same names, what is known of each.

    That is low and high end of the 95 % interval over cells, the level of chance, which no knowledge of the cells
    reaches, and the ceiling, which no prediction or embedding can be expected to exceed. `predicted` has the label
    predicted of each test cell, of classification.
    """

    def __init__(
        self,
        values: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]] | None = None,
        chance: Levels = None,
        ceiling: Levels = None,
        *,
        predicted: np.ndarray | None = None,
    ) -> None:
        super().__init__((name, float(value)) for name, value in values.items())
        tables = (intervals or {}, chance or {}, ceiling or {})
        known = ({name: table[name] for name in self if name in table} for table in tables)
        self.intervals, self.chance, self.ceiling = known
        self.predicted = predicted

    @classmethod
    def of_draws(cls, draws: Mapping[str, np.ndarray], chance: Levels = None, ceiling: Levels = None) -> Self:
        """Of arrays whose first number is the value and whose others are those of bootstrap resamples."""
        intervals = {name: interval(values[0], values[1:]) for name, values in draws.items() if len(values) > 1}
        return cls({name: values[0] for name, values in draws.items()}, intervals, chance, ceiling)

    def rows(self) -> list[dict[str, Any]]:
        """A record of each metric: metric, value, low, high, chance and ceiling; None for what is unknown or NaN."""
        rows = []
        for name, value in self.items():
            low, high = self.intervals.get(name, (None, None))
            numbers = {"value": value, "low": low, "high": high}
            numbers |= {"chance": self.chance.get(name), "ceiling": self.ceiling.get(name)}
            known = {key: float(x) if x is not None and np.isfinite(x) else None for key, x in numbers.items()}
            rows.append({"metric": name, **known})
        return rows

    def prefixed(self, prefix: str) -> Self:
        """The same metrics under longer names."""
        return Metrics(*({prefix + name: value for name, value in part.items()} for part in self._parts()))

    def merged(self, other: Self) -> Self:
        """These metrics, and those of another under other names."""
        both = zip(self._parts(), other._parts(), strict=True)
        return Metrics(*(own | others for own, others in both), predicted=self.predicted)

    def _parts(self) -> tuple[dict[str, Any], ...]:
        return dict(self), self.intervals, self.chance, self.ceiling


def metrics_table() -> pd.DataFrame:
    """Every metric (see `registered`) of every task: its definition, best value, direction, chance, version and source.

    A direction is `higher`, `lower` or `none`; a version counts up when a metric changes its meaning or is mended.
    """
    return pd.read_csv(files("datawall.tasks") / "metrics.csv", keep_default_na=False)


def registered(metric: str) -> str:
    """The name under which a metric stands in `metrics.csv`: `f1[]` for `f1[B cell]`, `knn_micro_f1` for k = 15."""
    return re.sub(r"^knn\d+_", "knn_", re.sub(r"(?s)\[.*\]\Z", "[]", metric))

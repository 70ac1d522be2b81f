"""Made-up results tables."""

import numpy as np
import pandas as pd

from datawall.analysis.results import COLUMNS

DEFAULTS = {
    "study": "quick", "model": "scVI", "strategy": "random", "percentage": 1.0, "seed": 0, "n_cells": 100,
    "task": "zeroshot_classification", "dataset": "kang2018", "metric": "micro_f1", "value": 0.5, "split": "donors",
    "run_id": "a",
}  # fmt: skip


def table(*rows):
    return pd.DataFrame([DEFAULTS | row for row in rows])[COLUMNS]


def curve(scores, **common):
    """A row for each score of each percentage."""
    return [
        common | {"percentage": float(percentage), "seed": seed, "value": value}
        for percentage, values in scores.items()
        for seed, value in enumerate(np.atleast_1d(values))
    ]

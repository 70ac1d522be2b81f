"""Labels from clusters and markers, against the authors' labels."""

import random

import numpy as np
import pandas as pd
import pytest
import real
import scipy.sparse as sp

from datawall.cells import annotation, datasets


@pytest.fixture(scope="module")
def kang_labels():
    """A row a cell that the authors labelled: their label and ours."""
    theirs, ours = real.kang().obs["cell_type"], datasets.load("kang2018").obs["cell_type"]
    return pd.DataFrame({"authors": theirs, "ours": ours[theirs.index]}).astype(str)


def test_kang_labels_agree_with_the_authors(kang_labels):
    together = kang_labels.replace(dict.fromkeys(["CD4 T cells", "CD8 T cells", "NK cells"], "T or NK cells"))
    assert len(kang_labels) == 973
    assert (together["authors"] == together["ours"]).mean() >= 0.94
    assert (kang_labels["authors"] == kang_labels["ours"]).mean() >= 0.80


def annotated(adata, *without):
    markers = {name: genes for name, genes in annotation.PBMC_MARKERS.items() if name not in without}
    return annotation.annotate(adata.X, adata.var_names, adata.obs["condition"], markers)


def test_packaged_labels_are_what_annotation_gives():
    cells = real.all_of_kang()
    given = annotated(cells)
    assert list(given.categories) == list(cells.obs["cell_type"].cat.categories)
    assert (given == cells.obs["cell_type"].array).mean() > 0.999  # all of them, with the locked packages


def test_labels_repeat_whatever_the_global_random_state():
    kang = real.kang()
    before = kang.X.copy()
    random.seed(1)
    first = annotated(kang, "Erythrocytes")
    random.seed(2)
    assert (first == annotated(kang, "Erythrocytes")).all()
    assert (kang.obs["cell_type"].to_numpy() == np.asarray(first)).mean() > 0.80
    assert set(first) <= set(annotation.PBMC_MARKERS)
    assert (before != kang.X).nnz == 0


def test_type_without_any_marker_is_refused():
    genes, markers = pd.Index(["CD3D", "MS4A1"]), {"T": ["CD3D", "CD3E"], "platelets": ["PPBP", "PF4"]}
    with pytest.raises(ValueError, match=r"no marker of \['platelets'\] is among the genes"):
        annotation.annotate(sp.csr_matrix(np.ones((4, 2))), genes, pd.Series(list("aaaa")), markers)


def test_scaled_within_is_a_z_score_of_each_batch_alone():
    X = np.array([[1.0, 5], [3, 5], [10, 0], [10, 4], [10, 8]])
    z = annotation._scaled_within(X, np.array([0, 0, 1, 1, 1]))
    root = np.sqrt(1.5)
    np.testing.assert_allclose(z, [[-1, 0], [1, 0], [0, -root], [0, 0], [0, root]])
    np.testing.assert_array_equal(X[:, 0], [1, 3, 10, 10, 10])

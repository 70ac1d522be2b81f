"""Files from strangers are data: pickles behind each loader, code in parameters and tags, and nothing of it is run."""

import ast
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
import yaml
import zarr
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from small import STUDY, small_study

import datawall as dw
import run_all
from datawall.engine import code, disk, store
from datawall.models import training
from datawall.planning import starter
from datawall.study import params
from datawall.study.records import Run, Subset
from datawall.study.study import Study

ROOT = Path(__file__).resolve().parents[1]
RUN = Run("PretrainedPCA", Subset("random", 100.0, 0))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path):
    """A trap that must not have sprung by the end, and that springs when it is asked to."""
    set_up = Trap(tmp_path / "sprung")
    yield set_up
    assert not set_up.folder.exists()
    pickle.loads(pickle.dumps(set_up))
    assert set_up.folder.exists()


def object_array(trap):
    """Bytes of an .npy file that numpy would unpickle if it were allowed to."""
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def object_archive(trap, name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", object_array(trap))
    return file.getvalue()


# Artifacts, as another's run folder may hold them: complete with checksums


@pytest.fixture
def study(tmp_path):
    return small_study(tmp_path / "run")


def plant(study, unit, name, content):
    """An artifact with a file of a stranger's."""

    def write(folder):
        (folder / name).write_bytes(content)

    return study.store.find_or_make(unit, write).folder


ARRAYS = {
    "split": (lambda s: s.split_unit, "held_out.npy", lambda s: s.split_rows("held_out")),
    "spike-in": (lambda s: s.corpus_unit, "spike_in.npy", lambda s: s.split_rows("spike_in")),
    "subset": (lambda s: s.subset_unit(RUN.subset), "rows.npy", lambda s: s.rows(RUN.subset)),
    "sketch": (lambda s: s.sketch_unit, "X_pca.npy", lambda s: s.X_pca),
    "embedding": (lambda s: s.embedding_unit(RUN, "a"), "embedding.npy", lambda s: s.embedding(RUN, "a")),
}


@pytest.mark.parametrize(("unit_of", "name", "load"), ARRAYS.values(), ids=ARRAYS)
def test_object_array_in_an_artifact(unit_of, name, load, study, trap, monkeypatch):
    monkeypatch.setattr(Study, "dataset_unit", lambda self, name: self.split_unit)
    plant(study, unit_of(study), name, object_array(trap))
    with pytest.raises(ValueError, match=r"pickle|object"):
        load(study)


def test_object_array_in_a_list_of_duplicates(study, trap):
    unit = study.contamination_unit(study.params.held_out_name)
    folder = plant(study, unit, "contamination.npz", object_archive(trap, "cells"))
    with pytest.raises((ValueError, KeyError)):
        study.contamination(study.params.held_out_name)
    with np.load(folder / "contamination.npz") as file, pytest.raises(ValueError, match="allow_pickle=False"):
        file["cells"]


def test_object_array_in_a_checkpoint(tmp_path, trap, caplog):
    (tmp_path / "a.npz").write_bytes(object_archive(trap, "identity"))
    X, recipe = torch.ones(4, 2), training.Recipe(steps=2, batch_size=2, learning_rate=0.1)
    loss_of = lambda forward, rows, step: forward(X[rows]).mean()  # noqa: E731
    history = training.train(torch.nn.Linear(2, 1), loss_of, 4, recipe, seed=0, checkpoint=tmp_path / "a.npz")
    assert "a.npz is damaged" in caplog.text
    assert len(history.loss) == 2


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_pickled_weights(form, trap, tmp_path):
    """Neither in place of a model's weights nor beside them."""
    model, counts = dw.models.create("SSL", n_hidden=[4], n_latent=2), sp.csr_matrix(np.ones((2, 5), np.float32))
    model.untrained(5, seed=0).save(tmp_path / "model")
    sound = model.embed(counts)
    file = io.BytesIO()
    pickle.dump(trap, file) if form == "pickle" else torch.save({"weight": trap}, file)
    for name in ("model.pt", "pytorch_model.bin", "model.joblib", "model.pkl"):
        (tmp_path / "model" / name).write_bytes(file.getvalue())
    assert np.array_equal(sound, type(model).load(tmp_path / "model").embed(counts))
    (tmp_path / "model" / "model.safetensors").write_bytes(file.getvalue())
    with pytest.raises(Exception, match=r"(?i)header|deserializ"):
        type(model).load(tmp_path / "model")


def test_pickled_extension_type_in_a_table(tmp_path, trap):
    """As pyarrow before version 14.0.1 would unpickle it (CVE-2023-47248)."""
    mark = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(trap)}
    table = pa.table([pa.array([1])], schema=pa.schema([pa.field("value", pa.int64(), metadata=mark)]))
    pq.write_table(table, tmp_path / "results.parquet")
    disk.write_checksums(tmp_path / dw.results.CHECKSUMS, ["results.parquet"])
    assert dw.read_results(tmp_path)["value"].tolist() == [1]


# Files of cells


def cells():
    X = sp.csr_matrix(np.eye(6, dtype=np.float32))
    genes = pd.read_csv(dw.paths.PACKAGE_DATA / "sctab_genes.csv")["feature_id"][:6]
    obs = pd.DataFrame({"cell_type": list("aabbcc")}, index=[f"cell {i}" for i in range(6)])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=pd.Index(genes, name=None)))


def in_uns(root, trap):
    root["uns"].create_dataset("trap", data=np.void(pickle.dumps(trap)))


def in_attributes(root, trap):
    """As PyTables keeps objects, and unpickles them."""
    for node in (root, root["obs"], root["X"]):
        node.attrs["trap"] = np.bytes_(pickle.dumps(trap, 0))


def in_a_column(root, trap):
    del root["obs/cell_type"]
    root["obs"].create_dataset("cell_type", data=np.array([np.void(pickle.dumps(trap))] * 6))
    root["obs/cell_type"].attrs.update({"encoding-type": "pickle", "encoding-version": "0.1.0"})


def read_all(path):
    """Every reader of files of cells; what each gives, or how it refuses."""
    outcomes = []
    for read in (
        lambda: starter.look([str(path)]).obs["cell_type"].astype(str).tolist(),
        lambda: next(dw.sources.open_source([path], {"cell_type": "cell_type"}).blocks()).obs["cell_type"].tolist(),
    ):
        try:
            outcomes.append(read())
        except (dw.datasets.DatasetError, dw.corpus.CorpusError) as error:
            outcomes.append(f"refused {path.name}" if path.name in str(error) else str(error))
    return outcomes


@pytest.mark.parametrize("plant_in", [in_uns, in_attributes, in_a_column])
def test_pickle_in_an_h5ad_file(plant_in, trap, tmp_path):
    cells().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as root:
        plant_in(root, trap)
    assert len(read_all(tmp_path / "a.h5ad")) == 2


@pytest.mark.parametrize("where", ["attributes", "compressor", "filter"])
def test_pickle_in_a_zarr_store(where, trap, tmp_path):
    with ad.settings.override(zarr_write_format=2):
        cells().write_zarr(tmp_path / "a.zarr")
    if where == "attributes":
        zarr.open_group(tmp_path / "a.zarr").attrs["trap"] = pickle.dumps(trap, 0).decode("latin1")
    else:
        values = tmp_path / "a.zarr" / "X" / "data"
        metadata = json.loads((values / ".zarray").read_text())
        codec = {"id": "pickle", "protocol": 5}
        change = {"compressor": codec, "filters": None} if where == "compressor" else {"filters": [codec]}
        (values / ".zarray").write_text(json.dumps({**metadata, "dtype": "|O", **change}))
        (values / "0").write_bytes(pickle.dumps(trap))
    (tmp_path / "a.zarr" / ".zmetadata").unlink(missing_ok=True)
    outcomes = read_all(tmp_path / "a.zarr")
    if where != "attributes":
        assert outcomes == ["refused a.zarr"] * 2


@pytest.mark.parametrize("name", ["cells.pkl", "cells.joblib", "cells.pt", "cells.npy"])
def test_file_of_another_kind_is_no_data_set(name, trap, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(dw.datasets.DatasetError, match="not a named data set"):
        dw.datasets.load(str(tmp_path / name))


def test_embeddings_with_a_pickle_beside_them(trap, tmp_path):
    some = cells()
    some.obsm["X_A"] = np.ones((6, 2), np.float32)
    some.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as root:
        in_uns(root, trap)
        in_attributes(root, trap)
    embedding = dw.external.read_embedding(str(tmp_path / "a.h5ad"), "X_A", some.obs_names, "a")
    assert embedding.tolist() == [[1, 1]] * 6


# Study files


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{0}]", "!!python/object/new:os.mkdir [[{0}]]", "!!python/name:os.mkdir"]
)
def test_tags_in_a_study_file(tag, trap, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY) + f"control: {tag.format(trap.folder)}\n")
    with pytest.raises(params.ParamsError, match="not readable as YAML"):
        dw.open_study(str(tmp_path))
    assert run_all.main(["params/tiny.yaml", "--out", str(tmp_path / "run"), "--set", f"control={tag}"]) == 2
    assert not (tmp_path / "run").exists()


HOSTILE = [
    '"); __import__("os").mkdir("{0}"); ("',
    "'); __import__('os').mkdir('{0}'); ('",
    '\n__import__("os").mkdir("{0}")\n',
    '\\"\n__import__("os").mkdir("{0}")  # ',
    "{{__import__('os').mkdir('{0}')}}",
    "!mkdir {0}",
    "%%bash\nmkdir {0}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_a_notebook_parameter_stays_text(text, trap):
    """The cell that papermill writes holds assignments of literals and nothing else."""
    text = text.replace("{0}", str(trap.folder))
    values = {"corpus": text, "models": [text], "hyperparameters": {text: {text: [text, 1.5, None, True]}}}
    notebook = load_notebook_node(str(ROOT / "notebooks" / "02_pretraining.ipynb"))
    cells = parameterize_notebook(notebook, values).cells
    (source,) = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    statements = ast.parse(source).body
    assert all(isinstance(line, ast.Assign) for line in statements)
    assert {line.targets[0].id: ast.literal_eval(line.value) for line in statements} == values
    assert not [line for line in source.splitlines() if line.startswith(("!", "%"))]
    exec(source, {})


def test_names_in_a_study_file_lead_nowhere_else(tmp_path):
    """Names of data sets, columns and types end up in tables, never in paths that are written."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    cells().write_h5ad(tmp_path / "cells.h5ad")
    there = sorted(tmp_path.rglob("*"))
    escape = "../../../escape"
    given = {"file": str(tmp_path / "cells.h5ad"), "name": escape, "cell_type_key": "cell_type"}
    changes = {"corpus": str(tmp_path / "cells.h5ad"), "evaluation": [given], "min_matched_genes": 0.1}
    study = small_study(tmp_path / "a" / "b" / "run", **changes)
    study.write_params()
    study.dataset_artifact(escape)
    study.contamination(escape)
    dw.curation.gene_matches(study)
    written = [path for path in tmp_path.rglob("*") if path not in there]
    assert written
    assert all(path.is_relative_to(study.folder) for path in written)
    assert not list(study.folder.rglob("*escape*"))


def test_manifest_that_names_files_elsewhere(tmp_path):
    unit = store.Unit("subset", {}, ())
    artifact = store.Store(tmp_path).find_or_make(unit, lambda folder: disk.write_json(folder / "a", 1))
    outside = tmp_path / "outside"
    outside.write_text("secret")
    manifest = json.loads((artifact.folder / disk.MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"]["../../outside"] = disk.file_sha256(outside)
    disk.write_json(artifact.folder / disk.MANIFEST, {**manifest, "sha256": code.json_sha256(manifest)})
    assert store.check(artifact.folder)[1] == ["../../outside is missing"]


# What the code may do at all

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "joblib.load", "pd.read_pickle", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "os.system", "marshal.loads", "shelve.open",
}  # fmt: skip
# From the process that started this one, through a socket of theirs; and a safe loader of its own.
ALLOWED = {("processes", "pickle.loads"), ("params", "yaml.load")}


def test_library_never_calls_what_runs_data():
    found = set()
    for path in [*(ROOT / "lib").rglob("*.py"), ROOT / "run_all.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in FORBIDDEN:
                    found.add((path.stem, name))
                given = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert given.get("allow_pickle", "False") == "False"
                assert "shell" not in given
    assert found == ALLOWED
    assert issubclass(params._Loader, yaml.SafeLoader)

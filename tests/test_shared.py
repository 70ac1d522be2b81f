"""Artifacts in an object store: taken where they are, put where they were made, checked on the way."""

import io
import logging
import os
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path

import pyarrow.fs
import pytest
from small import small_study
from test_store import UNIT, refuse_to_make

from datawall.engine import processes
from datawall.engine.store import Store, Unit
from datawall.study.study import Study

ROOT = Path(__file__).resolve().parents[1]


def write_files(folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "rows.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "note.txt").write_text("first\n")


@pytest.fixture(scope="module")
def s3():
    """URLs in a bucket on a server of moto, which has an environment of its own: it asks for an older dateutil."""
    if not (program := shutil.which("moto_server", path=f"{ROOT}/.venv/moto/bin:{os.environ['PATH']}")):
        pytest.skip("needs an object store: make .venv/moto/bin/moto_server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere:
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        command = [program, "-H", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(command, stdout=nowhere, stderr=nowhere) as server:
            try:
                deadline = time.monotonic() + 60
                while not (answers := _answers(port)) and server.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if not answers:
                    pytest.skip("needs an object store: moto_server does not run here")
                options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
                files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{options}")
                files.create_dir("bucket")
                yield lambda name: f"s3://bucket/{name}/a?{options}"
            finally:
                server.terminate()


def _answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    return (tmp_path / "objects").as_uri() if request.param == "file" else request.getfixturevalue("s3")(tmp_path.name)


def objects(url):
    files, root = pyarrow.fs.FileSystem.from_uri(url)
    found = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    return files, [each.path for each in found if each.is_file]


def test_what_one_machine_makes_another_takes(url, tmp_path):
    made = Store(tmp_path / "one", url).find_or_make(UNIT, write_files)
    taken = Store(tmp_path / "other", url).find_or_make(UNIT, refuse_to_make)
    assert taken.folder == tmp_path / "other" / UNIT.kind / UNIT.key
    assert taken.made == made.made
    assert (taken.folder / "inner" / "rows.bin").read_bytes() == bytes(range(256)) * 20
    (path,) = objects(url)[1]
    assert path.endswith(f"/{UNIT.kind}/{UNIT.key}.tar")
    assert Store(tmp_path / "third", url).find(Unit("model", {}, ())) is None
    assert not list(tmp_path.rglob(".*"))


def test_what_could_not_be_put_is_put_when_it_is_found_again(url, tmp_path, monkeypatch):
    alone, away = Unit("subset", {"seed": 1}, ()), Unit("subset", {"seed": 2}, ())
    Store(tmp_path / "one").find_or_make(alone, write_files)  # before there was a store
    one = Store(tmp_path / "one", url)
    with monkeypatch.context() as patch:
        patch.setattr(one.shared, "put", lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
        for _ in range(2):  # the same process tries again
            with pytest.raises(OSError, match="no route"):
                one.find_or_make(away, write_files)
    one.find_or_make(away, refuse_to_make)
    Store(tmp_path / "one", url).find(alone)
    put = []
    again = Store(tmp_path / "one", url)
    monkeypatch.setattr(again.shared, "put", lambda *of: put.append(of))
    for unit in (alone, away):
        Store(tmp_path / "other", url).find_or_make(unit, refuse_to_make)
        assert again.find(unit)
    assert not put


def tar_of(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


DAMAGES = {
    "cut": lambda content: content[:700],
    "changed": lambda content: content.replace(b"first", b"worst"),
    "escaping": lambda content: tar_of("../../escaped", b"no"),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_object_is_named_and_replaced(damage, url, tmp_path, caplog):
    Store(tmp_path / "one", url).find_or_make(UNIT, write_files)
    files, (path,) = objects(url)
    with files.open_input_stream(path) as stream:
        content = stream.read()
    with files.open_output_stream(path) as stream:
        stream.write(damage(content))
    with caplog.at_level(logging.WARNING):
        assert Store(tmp_path / "other", url).find(UNIT) is None
    assert "is damaged" in caplog.text
    assert UNIT.key in caplog.text
    assert not list(tmp_path.rglob("*escaped*"))
    Store(tmp_path / "other", url).find_or_make(UNIT, write_files)
    Store(tmp_path / "third", url).find_or_make(UNIT, refuse_to_make)


class LikeHdfs:
    """A file system on which a file is seen while it is written, and no other takes its name."""

    type_name = "hdfs"

    def __init__(self, files):
        self.files = files

    def __getattr__(self, name):
        return getattr(self.files, name)

    def move(self, source, target):
        if self.files.get_file_info(target).type != pyarrow.fs.FileType.NotFound:
            raise OSError(f"{target} exists")
        self.files.move(source, target)


def test_file_is_not_seen_under_its_name_until_it_is_whole(tmp_path, monkeypatch):
    url = (tmp_path / "objects").as_uri()
    one, seen, add = Store(tmp_path / "one", url), [], tarfile.TarFile.add
    one.shared._files = LikeHdfs(one.shared._files)
    names = lambda: [path.name for path in (tmp_path / "objects").rglob("*.tar")]  # noqa: E731
    monkeypatch.setattr(tarfile.TarFile, "add", lambda *of, **how: (add(*of, **how), seen.append(names())))
    made = one.find_or_make(UNIT, write_files)
    one.shared.put(f"{UNIT.kind}/{UNIT.key}", made.folder)  # in place of another
    assert (seen[0], names()) == ([], [f"{UNIT.key}.tar"])
    Store(tmp_path / "other", url).find_or_make(UNIT, refuse_to_make)


def test_what_fails_half_way_leaves_no_object(url, tmp_path, monkeypatch):
    add = tarfile.TarFile.add

    def fail(*of, **how):
        add(*of, **how)
        raise OSError("cannot be read")

    monkeypatch.setattr(tarfile.TarFile, "add", fail)
    with pytest.raises(OSError, match="cannot be read"):
        Store(tmp_path / "one", url).find_or_make(UNIT, write_files)
    assert not objects(url)[1]


def test_artifact_under_the_name_of_another_is_not_used(url, tmp_path, caplog):
    other = Unit("subset", {"seed": 1}, ())
    one = Store(tmp_path / "one", url)
    one.shared.put(f"{other.kind}/{other.key}", one.find_or_make(UNIT, write_files).folder)
    assert Store(tmp_path / "other", url).find(other) is None
    assert f"{other.key} of {url} is damaged (it is subset {UNIT.key}, in the place of another)" in caplog.text


def test_a_study_goes_on_where_there_is_only_its_storage(url, tmp_path, monkeypatch):
    given = small_study(tmp_path).params.model_copy(update={"storage": url})
    study = Study(given, tmp_path / "one")
    table = study.pretrain()
    monkeypatch.setattr(processes, "on_this_machine", None)  # nothing is made again
    elsewhere = Study(study.params, tmp_path / "other")
    assert elsewhere.pretrain().equals(table)
    there = {path.relative_to(study.folder) for path in study.folder.rglob("*.safetensors")}
    assert there == {path.relative_to(elsewhere.folder) for path in elsewhere.folder.rglob("*.safetensors")}

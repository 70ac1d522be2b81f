"""Artifacts in an object store, from which machines that share no folder take them, and where they put theirs.

An artifact is one object, `<url>/<kind>/<key>.tar`: it is there as a whole or not at all, and nobody appends to it.
What is taken is checked by `store` like all that is read. Not covered: nothing is ever removed from an object store,
and of two machines that make the same unit the later replaces what the earlier put there.
"""

import logging
import tarfile
import uuid
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

WHOLE = ("s3", "gcs")  # where an object appears when all of it is written; a file is there from its first byte


class Shared:
    """An object store, `s3://bucket/folder` or another URL that pyarrow knows; its keys are in the environment."""

    def __init__(self, url: str) -> None:
        from pyarrow import fs

        self.url = url
        self._files, self._root = fs.FileSystem.from_uri(url)
        self._there: dict[str, set[str]] = {}  # names of objects, by kind, when this process first asked for them

    def take(self, name: str, folder: Path) -> bool:
        """Unpack an artifact, `kind/key`, into an empty folder; says whether there was one that can be read."""
        try:
            with (
                self._files.open_input_stream(f"{self._root}/{name}.tar") as stream,
                tarfile.open(fileobj=stream, mode="r|") as tar,
            ):
                tar.extractall(folder, filter="data")  # nothing outside of the folder, no links, no devices
        except FileNotFoundError:
            return False
        except tarfile.TarError as error:
            log.warning("%s/%s.tar is damaged (%s) and will be made again.", self.url, name, error)
            return False
        return True

    def put(self, name: str, folder: Path) -> None:
        """Pack an artifact's folder, in place of an earlier one of that name."""
        path = f"{self._root}/{name}.tar"
        written = path if self._files.type_name in WHOLE else f"{path}.{uuid.uuid4().hex}"
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        try:
            with self._files.open_output_stream(written) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
                tar.add(folder, ".")
        except BaseException:
            with suppress(OSError):
                self._files.delete_file(written)  # of an object store: closed half-way, it would appear
            raise
        if written != path:
            try:
                self._files.move(written, path)
            except OSError:  # HDFS gives no file the name of another
                self._files.delete_file(path)
                self._files.move(written, path)

    def put_if_missing(self, name: str, folder: Path) -> None:
        """Pack an artifact's folder that may be here alone: made before there was a store, or when it was away."""
        from pyarrow import fs

        kind, _, key = name.partition("/")
        if kind not in self._there:
            found = self._files.get_file_info(fs.FileSelector(f"{self._root}/{kind}", allow_not_found=True))
            self._there[kind] = {info.base_name for info in found}
        if f"{key}.tar" not in self._there[kind]:
            self.put(name, folder)

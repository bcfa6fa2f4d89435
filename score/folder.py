"""The folder of a run: files that are whole or not there, on this machine or in an object store."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from bundle.errors import DataError
from score.errors import FolderFailed
from score.files import absolute, system_of

DRAFT = ".tmp-"  # in the name of a file that is not whole yet, which begins with a dot


class Folder:
    """Where parts are written.

    Attributes:
        path: absolute, or a URL.
        system: the pyarrow filesystem that it is on.
    """

    def __init__(self, path: str) -> None:
        self.path = absolute(path)
        self.system, self._inside = system_of(self.path)
        self._is_local = isinstance(self.system, fs.LocalFileSystem)

    def inside(self, name: str) -> str:
        """What a file of the folder is called on its filesystem."""
        return f"{self._inside.rstrip('/')}/{name}"

    def names(self) -> set[str]:
        """Its files, without those that are not whole yet; none when it is not there.

        Raises:
            DataError: it is no folder, or cannot be read.
        """
        return {name for name in self._all() if not _is_draft(name)}

    def _all(self) -> set[str]:
        try:
            found = self.system.get_file_info(fs.FileSelector(self._inside, allow_not_found=True))
        except OSError as error:
            raise DataError(f"{self.path} cannot be used as a folder: {_reason(error)}.") from error
        return {info.base_name for info in found}

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None when it is not there.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with self.system.open_input_file(self.inside(name)) as file:
                data: bytes = file.read()
                return data
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{self.path} cannot be used as a folder: {_reason(error)}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, in the place of one that is there.

        Raises:
            FolderFailed: it cannot be written.
        """
        with self.writing(), self.draft(name) as path:
            path.write_bytes(data)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the system says of a folder that is full, or may not be written, as one error that says what stays."""
        try:
            yield
        except OSError as error:
            raise FolderFailed(
                f"{self.path} cannot be written: {_reason(error)}. What is there stays, and the same command goes on "
                "from it."
            ) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one: whether it is ours. An object store cannot tell of two at once."""
        if not self._is_local:
            if name in self.names():
                return False
            self.write(name, data)
            return True
        with self.writing():
            return self._link(name, data)

    def _link(self, name: str, data: bytes) -> bool:
        self._make()
        draft = self._draft(name)
        try:
            draft.write_bytes(data)
            _flush(draft)
            os.link(draft, self.inside(name))
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        _flush(Path(self._inside))
        return True

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """A new file of this machine; when the block ends it becomes `name`, and when it fails it is removed.

        Raises:
            FolderFailed: it cannot become that.
        """
        if not self._is_local:
            with tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
                path = Path(folder) / name
                yield path
                with self.writing():
                    self._put(path, name)
            return
        with self.writing():
            self._make()
        path = self._draft(name)
        try:
            yield path
            with self.writing():
                self._publish(path, name)
        finally:
            path.unlink(missing_ok=True)

    def _make(self) -> None:
        Path(self._inside).mkdir(parents=True, exist_ok=True)

    def _draft(self, name: str) -> Path:
        return Path(self.inside(f".{name}{DRAFT}{secrets.token_hex(8)}"))

    def _publish(self, path: Path, name: str) -> None:
        try:
            _flush(path)
            path.rename(self.inside(name))
        except FileNotFoundError:  # a run that finished first has swept it away, and has written the same
            if not os.path.lexists(self.inside(name)):
                raise
        _flush(Path(self._inside))

    def _put(self, path: Path, name: str) -> None:
        """An object of a bucket appears with its last byte; elsewhere it gets its name when it is whole."""
        if isinstance(self.system, fs.PyFileSystem):
            draft = f".{name}{DRAFT}{secrets.token_hex(8)}"
            with suppress(OSError):
                self.system.create_dir(self._inside, recursive=True)  # object stores have none, others need it
            self._copy(path, draft)
            self.system.move(self.inside(draft), self.inside(name))
        else:
            self._copy(path, name)

    def _copy(self, path: Path, name: str) -> None:
        fs.copy_files(
            str(path),
            self.inside(name),
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.system,
            use_threads=False,
        )

    def remove(self, name: str) -> None:
        """Remove a file, where it is there.

        Raises:
            FolderFailed: it cannot be removed.
        """
        path = self.inside(name)
        found = self.system.get_file_info(path)
        if found.type == fs.FileType.File:  # in place of none pyarrow would put an object "FOLDER/" into a bucket
            with self.writing(), suppress(FileNotFoundError):
                self.system.delete_file(path)

    def sweep(self) -> None:
        """Remove what runs that were killed have left: for when every file is whole."""
        for name in self._all():
            if _is_draft(name):
                self.remove(name)

    def open(self, name: str) -> Any:
        """A file to read.

        Raises:
            OSError: it cannot be opened.
        """
        return self.system.open_input_file(self.inside(name))


def _reason(error: OSError) -> str:
    """What is wrong, without the name of a file that is of no interest."""
    return os.strerror(error.errno) if error.errno else str(error).rstrip(".")


def _is_draft(name: str) -> bool:
    return name.startswith(".") and DRAFT in name


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""npz: rows of its arrays, read one after the other from the archive."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from bundle.errors import DataError
from score.examples import Columns
from score.files import open_file
from score.row_groups import CHUNK_BYTES

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}.") from error


def shapes(path: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array.

    Raises:
        DataError: the file cannot be read, or holds Python objects, which would be unpickled.
    """
    found = {}
    with _opened(path) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    shape, _, dtype = _read_header(path, name, member)
                found[name.removesuffix(".npy")] = (shape, dtype)
    return found


def _read_header(path: str, name: str, member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise DataError(f"array {name!r} of {path} has version {version} of the .npy format, which is not supported.")
    shape, fortran, dtype = _HEADERS[version](member)
    if dtype.hasobject:
        raise DataError(f"array {name!r} of {path} holds Python objects.")
    return shape, fortran, dtype


def rows(columns: Columns) -> int:
    """As many as every array that is needed has.

    Raises:
        DataError: they differ in length, or one has no axis.
    """
    found = shapes(columns.path)
    lengths = {name: (*found[name][0], None)[0] for name in columns.all}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise DataError(f"the arrays of {columns.path} do not have the same number of rows: {lengths}.")
    return next(iter(lengths.values())) or 0


def blocks(columns: Columns, start: int, chunk: int) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Everything from row `start` on, at most `chunk` rows at a time, as (stop of the last unit, first row, rows)."""
    total = rows(columns)
    with _opened(columns.path) as archive:
        read = {name: _Column(columns.path, archive, name) for name in columns.all}
        size = max(1, min(chunk, CHUNK_BYTES // max(1, sum(each.row_bytes for each in read.values()))))
        for each in read.values():
            each.skip(start)
        for row in range(start, total, size):
            yield total, row, {name: each.take(min(size, total - row)) for name, each in read.items()}


class _Column:
    """The rows of one array, in their order."""

    def __init__(self, path: str, archive: zipfile.ZipFile, name: str) -> None:
        self._member: Any = archive.open(f"{name}.npy")
        shape, fortran, self._dtype = _read_header(path, name, self._member)
        self._shape = shape[1:]
        self.row_bytes = self._dtype.itemsize * int(np.prod(self._shape))
        if fortran and len(shape) > 1:  # its rows do not lie together
            data = np.frombuffer(self._member.read(), self._dtype).reshape(shape, order="F")
            self._member = pa.BufferReader(np.ascontiguousarray(data))

    def skip(self, count: int) -> None:
        self._member.seek(count * self.row_bytes, 1)

    def take(self, count: int) -> np.ndarray:
        data = np.frombuffer(self._member.read(count * self.row_bytes), self._dtype)
        native = data.astype(self._dtype.newbyteorder("="), copy=False)  # as pyarrow takes it
        return native.reshape(count, *self._shape)

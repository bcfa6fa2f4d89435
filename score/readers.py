"""Units -> chunks of raw examples, whatever kind of file they are in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bundle.errors import DataError
from bundle.manifest import ImageInput, Input, VectorInput
from score import arrays, line_files, row_groups
from score.examples import Columns, Raws, Stored, choose_columns, from_arrow, from_values, input_names
from score.files import Found, version_of
from score.units import InputFile, Unit

_ARRAY = "x"  # of an .npz, where the bundle's column is not there, as in training


@dataclass(frozen=True)
class Chunk:
    """Rows of one file that are next to each other.

    Attributes:
        files: the file that each row is from, or that all are from.
        first_row: number in its file.
        raws: an example of each row.
        keep: columns that are copied to the output.
    """

    files: str | Sequence[str]
    first_row: int
    raws: Raws
    keep: Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is to be read of every file.

    Attributes:
        spec: of the examples.
        column: column of the bundle -> column of the file, where they differ.
        keep: column of the output -> column of the file.
    """

    spec: Input
    column: Mapping[str, str]
    keep: Mapping[str, str]

    def columns(self, path: str, kind: str) -> tuple[Columns, dict[str, pa.DataType]]:
        """The columns of a file that hold it, and the types of those that are kept.

        Raises:
            DataError: the file lacks one, or cannot be read.
        """
        kept = dict.fromkeys(self.keep, pa.string())
        match kind:
            case "parquet":
                types = row_groups.schema(path)
            case "csv":
                names = line_files.header(path)
                return choose_columns(self.spec, self.column, self.keep, names, path), kept
            case "jsonl":
                keys = line_files.keys(path)
                names = list(dict.fromkeys([*keys, *self.keep.values(), *([] if keys else self._all())]))
                return choose_columns(self.spec, self.column, self.keep, names, path), kept
            case "npz":
                types = {name: _arrow_type(shape, dtype) for name, (shape, dtype) in arrays.shapes(path).items()}
            case _:
                return self._image_columns(path), {}
        column = self.column
        if kind == "npz" and isinstance(self.spec, VectorInput) and self.spec.column not in {*column, *types}:
            column = {**column, self.spec.column: _ARRAY}
        found = choose_columns(self.spec, column, self.keep, list(types), path)
        for source in self.keep.values():
            if kind == "npz" and pa.types.is_null(types[source]):
                raise DataError(
                    f"array {source!r} of {path} cannot be kept: a number, a truth value or a text a row is expected."
                )
        return found, {name: types[source] for name, source in self.keep.items()}

    def _all(self) -> list[str]:
        return [self.column.get(name, name) for name in sorted(input_names(self.spec))]

    def _image_columns(self, path: str) -> Columns:
        if self.keep or self.column:
            raise DataError(f"{path} are images, which have no columns to keep or to name.")
        assert isinstance(self.spec, ImageInput)
        return Columns(self.spec, path, {self.spec.column: ""}, {})


def _arrow_type(shape: tuple[int, ...], dtype: np.dtype) -> pa.DataType:
    """Of an array's rows; null where a column cannot hold them."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or len(shape) != 1:
        return pa.string() if dtype.kind == "U" and len(shape) == 1 else pa.null()
    return pa.from_numpy_dtype(dtype.newbyteorder("="))


def cut(found: Found, index: int, columns: Columns, unit_rows: int) -> Iterator[Unit]:
    """The units of a file."""
    file = found.file
    match file.kind:
        case "parquet":
            ranges = row_groups.cut(file.path, unit_rows)
        case "csv" | "jsonl":
            ranges = line_files.cut(file.path, file.kind, unit_rows)
        case "npz":
            ranges = _slices(arrays.rows(columns), unit_rows)
        case _:
            ranges = _slices(len(found.entries), unit_rows)
    for part, (first, rows, start, stop) in enumerate(ranges):
        entries = found.entries[start:stop] if file.kind == "images" else ()
        yield Unit(
            file=file.path,
            index=index,
            part=part,
            kind=file.kind,
            first_row=first,
            rows=rows,
            start=start,
            stop=stop,
            entries=entries,
        )


def _slices(total: int, unit_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Units of what can be cut anywhere, as (first row, rows, first position, position after the last)."""
    for start in range(0, total, unit_rows):
        stop = min(start + unit_rows, total)
        yield start, stop - start, start, stop


class Reader:
    """Reads units; those that follow each other in a file are read without going back to its beginning."""

    def __init__(self, wanted: Wanted, files: Sequence[InputFile], chunk: int) -> None:
        """Open nothing yet.

        Args:
            wanted: of every file.
            files: all of the plan.
            chunk: most rows that are read together.
        """
        self._wanted = wanted
        self._files = {file.path: file for file in files}
        self._chunk = chunk
        self._cursor: _Cursor | None = None

    def read(self, unit: Unit) -> Iterator[Chunk]:
        """The rows of a unit, in their order.

        Raises:
            DataError: the file cannot be read, or is another than when the run was planned.
        """
        file = self._files[unit.file]
        if unit.kind == "images":
            return self._images(unit)
        if version_of(file.path) != (file.size, file.version):
            raise DataError(f"{file.path} has changed since the run was planned. Choose another --out.")
        if unit.kind in ("csv", "jsonl"):
            return self._lines(unit)
        return self._ranges(unit)

    def _images(self, unit: Unit) -> Iterator[Chunk]:
        for start in range(0, unit.rows, self._chunk):
            entries = unit.entries[start : start + self._chunk]
            yield Chunk(entries, unit.first_row + start, list(map(Stored, entries)), {})

    def _lines(self, unit: Unit) -> Iterator[Chunk]:
        columns, _ = self._wanted.columns(unit.file, unit.kind)
        row = unit.first_row
        for rows in line_files.read(columns, unit, self._chunk):
            keep = {name: line_files.kept(column, rows) for name, column in columns.keep.items()}
            yield Chunk(unit.file, row, from_values(columns, rows), keep)
            row += len(rows)

    def _ranges(self, unit: Unit) -> Iterator[Chunk]:
        if self._cursor is None or not self._cursor.reaches(unit):
            known = self._cursor.file if self._cursor and self._cursor.file.path == unit.file else None
            self._cursor = _Cursor(known or _Opened.of(self._wanted, unit), unit, self._chunk)
        yield from self._cursor.read(unit)


@dataclass(frozen=True)
class _Opened:
    """What is known of a Parquet or .npz file when it has been opened once.

    Attributes:
        path: of the file.
        columns: that hold what is wanted.
        types: of those that are kept.
        footer: of Parquet.
    """

    path: str
    columns: Columns
    types: Mapping[str, pa.DataType]
    footer: Any

    @classmethod
    def of(cls, wanted: Wanted, unit: Unit) -> "_Opened":
        """That of a unit."""
        footer = row_groups.footer(unit.file) if unit.kind == "parquet" else None
        return cls(unit.file, *wanted.columns(unit.file, unit.kind), footer)


class _Cursor:
    """Where reading of a Parquet or .npz file has got to."""

    def __init__(self, file: _Opened, unit: Unit, chunk: int) -> None:
        self.file = file
        self._tables = (
            row_groups.tables(unit.file, file.columns.all, unit.start, chunk, file.footer)
            if unit.kind == "parquet"
            else arrays.blocks(file.columns, unit.start, chunk)
        )
        self._group = self._row = 0
        self._rest: Any = None

    def reaches(self, unit: Unit) -> bool:
        """Whether the unit comes next, or after rows that have to be read on the way to it."""
        if unit.file != self.file.path or self._rest is None or unit.first_row < self._row:
            return False
        return unit.start <= self._group or unit.first_row <= self._row + _length(self._rest)

    def read(self, unit: Unit) -> Iterator[Chunk]:
        row, stop = unit.first_row, unit.first_row + unit.rows
        while row < stop:
            while self._rest is None or self._row + _length(self._rest) <= row:
                self._group, self._row, self._rest = self._next()
            offset = row - self._row
            taken = _slice(self._rest, offset, min(_length(self._rest), stop - self._row))
            yield self._chunk(row, taken)
            row += _length(taken)

    def _next(self) -> tuple[int, int, Any]:
        found = next(self._tables, None)
        if found is None:
            raise DataError(f"{self.file.path} has fewer rows than when the run was planned.")
        return found

    def _chunk(self, row: int, taken: Any) -> Chunk:
        path, columns = self.file.path, self.file.columns
        if isinstance(taken, pa.Table):
            kept = {name: taken[column] for name, column in columns.keep.items()}
            return Chunk(path, row, from_arrow(columns, taken), kept)
        table = pa.table({name: _arrow(taken[name]) for name in columns.inputs.values()})
        kept = {name: pa.array(taken[column], self.file.types[name]) for name, column in columns.keep.items()}
        return Chunk(path, row, from_arrow(columns, table), kept)


def _length(rows: Any) -> int:
    return len(rows) if isinstance(rows, pa.Table) else len(next(iter(rows.values())))


def _slice(rows: Any, start: int, stop: int) -> Any:
    if isinstance(rows, pa.Table):
        return rows.slice(start, stop - start)
    return {name: values[start:stop] for name, values in rows.items()}


def _arrow(values: np.ndarray) -> pa.Array:
    """An array (N, ...) as N lists."""
    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array

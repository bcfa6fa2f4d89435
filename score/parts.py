"""Parts: what they look like, what they say of themselves, which of them are there, and the end of a run."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa
from pyarrow import csv, parquet

from bundle.errors import DataError
from score.config import Format
from score.folder import Folder
from score.units import Counts, Footer, Plan, Success, Unit, to_json

SUCCESS = "_SUCCESS"
_GROUP_ROWS = 8192  # of a Parquet part, however its rows were read
_KEY = b"edgeward"
_ROW = "_row"
PLACE = [pa.field("_file", pa.string()), pa.field(_ROW, pa.int64())]  # the first columns of every part
_BUFFER = 1 << 20


def part_name(unit: Unit, form: str) -> str:
    """The file that a unit becomes."""
    return f"{unit.name}.{form}"


def _beside(name: str) -> str:
    """The file that holds the footer of a part whose format has no room for it."""
    return f"_{name}.json"


class PartWriter:
    """Writes one part; used in a `with` block, without whose end there is no part.

    Two writers that are given the same rows write the same bytes, whatever tables the rows come in.
    """

    def __init__(self, folder: Folder, unit: Unit, schema: pa.Schema, form: Format) -> None:
        self._folder = folder
        self._name = part_name(unit, form)
        self._schema = schema
        self._form = form
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._folder.writing(), ExitStack() as stack:
            path: Path = stack.enter_context(self._folder.draft(self._name))
            self._file = stack.enter_context(pa.OSFile(str(path), "wb"))
            match self._form:
                case "parquet":
                    self._rows: Any = _ParquetRows(self._file, self._schema)
                case "csv":
                    self._rows = _CsvRows(self._file, self._schema)
                case _:
                    self._rows = _JsonRows(self._file)
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def write(self, table: pa.Table) -> None:
        """Add rows, of the schema.

        Raises:
            FolderFailed: they cannot be written.
        """
        with self._folder.writing():
            self._rows.write(table)

    def finish(self, footer: Footer) -> int:
        """Add the footer, after the last row; the bytes of the part.

        Raises:
            FolderFailed: it cannot be written.
        """
        with self._folder.writing():
            if isinstance(self._rows, _ParquetRows):
                self._rows.describe(to_json(footer))
        self._close()
        if not isinstance(self._rows, _ParquetRows):
            self._folder.write(_beside(self._name), to_json(footer))
        size: int = self._file.tell()
        return size

    def _close(self) -> None:
        with self._folder.writing():
            self._rows.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


class _ParquetRows:
    """Row groups of _GROUP_ROWS."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        repeated = [field.name for field in schema if not pa.types.is_floating(field.type) and field.name != _ROW]
        encoding = {_ROW: "DELTA_BINARY_PACKED"}  # each is one more than the last
        self._writer = parquet.ParquetWriter(file, schema, use_dictionary=repeated, column_encoding=encoding)
        self._pending: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._rows += len(table)
        while self._rows >= _GROUP_ROWS:
            self._flush(_GROUP_ROWS)

    def _flush(self, size: int) -> None:
        joined = pa.concat_tables(self._pending)
        self._writer.write_table(joined.slice(0, size).combine_chunks(), row_group_size=size)
        self._rows -= size
        self._pending = [joined.slice(size)] if self._rows else []

    def describe(self, footer: bytes) -> None:
        if self._rows:
            self._flush(self._rows)
        self._writer.add_key_value_metadata({_KEY: footer})

    def close(self) -> None:
        self._writer.close()


class _CsvRows:
    """Lists are written as JSON."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        self._schema = pa.schema([pa.field(field.name, _flat(field.type)) for field in schema])
        self._writer = csv.CSVWriter(file, self._schema)

    def write(self, table: pa.Table) -> None:
        columns = [_json(column) if pa.types.is_nested(column.type) else column for column in table.columns]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _flat(of: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_nested(of) else of


def _json(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([None if value is None else _encode(value).decode() for value in column.to_pylist()], pa.string())


class _JsonRows:
    """An object a line, every column in each."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, table: pa.Table) -> None:
        self._file.write(b"".join(_encode(row) + b"\n" for row in table.to_pylist()))

    def close(self) -> None:
        """Whoever opened the file closes it."""


_encode = msgspec.json.Encoder(enc_hook=str).encode


def done(folder: Folder, plan: Plan) -> dict[str, Footer]:
    """What the parts that are there say of themselves, by the name of their unit.

    Raises:
        DataError: a part is of another run, or damaged.
    """
    form = plan.options["format"]
    present = {name for name in folder.names() if name.startswith("part-")}
    found = {}
    for unit in plan.units:
        name = part_name(unit, form)
        if name in present:
            found[unit.name] = _checked(_footer(folder, name, form), plan, unit, folder)
            present.remove(name)
    if present:
        raise DataError(
            f"{folder.path} holds parts that are not of this run: {', '.join(sorted(present)[:5])}. Choose another "
            "--out, or remove them."
        )
    return found


def _footer(folder: Folder, name: str, form: str) -> Footer:
    try:
        data = _parquet_footer(folder, name) if form == "parquet" else folder.read(_beside(name))
        if data is None:
            raise DataError(f"{folder.path}/{name} does not say what it is. Remove it and run again.")
        return msgspec.json.decode(data, type=Footer)
    except PermissionError as error:
        raise DataError(f"{folder.path}/{name} may not be read.") from error
    except (pa.ArrowException, OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{folder.path}/{name} is no part: {error}. Remove it and run again.") from error


def _parquet_footer(folder: Folder, name: str) -> bytes | None:
    with folder.open(name) as file:
        metadata: Mapping[bytes, bytes] | None = parquet.read_metadata(file).metadata
    return (metadata or {}).get(_KEY)


def _checked(footer: Footer, plan: Plan, unit: Unit, folder: Folder) -> Footer:
    if (footer.fingerprint, footer.unit, footer.counts.rows_in) != (plan.fingerprint, unit.name, unit.rows):
        raise DataError(f"part {unit.name} of {folder.path} is of another run. Choose another --out, or remove it.")
    return footer


def total(footers: Mapping[str, Footer]) -> Counts:
    """The counts of parts."""
    return sum((footer.counts for footer in footers.values()), Counts())


def finish(folder: Folder, plan: Plan, counts: Counts) -> None:
    """Write _SUCCESS.

    Args:
        folder: holds the part of every unit.
        plan: of the run.
        counts: of all parts.

    Raises:
        DataError: the parts do not have as many rows as the input.
    """
    if not counts.rows_in == counts.rows_ok + counts.rows_bad == plan.rows:
        raise DataError(
            f"the parts in {folder.path} have {counts.rows_ok} scored and {counts.rows_bad} bad rows; the input has "
            f"{plan.rows}. No {SUCCESS} was written."
        )
    names = [part_name(unit, plan.options["format"]) for unit in plan.units]
    success = Success(fingerprint=plan.fingerprint, counts=counts, parts=dict(_digests(folder, names)))
    folder.sweep()
    folder.write(SUCCESS, to_json(success))


def _digests(folder: Folder, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        digest = hashlib.sha256()
        with folder.open(name) as file:
            while data := file.read(_BUFFER):
                digest.update(data)
        yield name, digest.hexdigest()

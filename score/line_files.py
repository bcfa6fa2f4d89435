"""CSV and JSONL: bytes of a file, on boundaries of rows that were found when the run was planned."""

import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa

from bundle.errors import BadInput, DataError
from score.examples import Columns
from score.files import open_file
from score.lines import CsvRows, JsonRows, between
from score.row_groups import CHUNK_BYTES
from score.units import Unit

Rows = list[dict[str, Any] | BadInput]
_SURROGATES = re.compile("[\ud800-\udfff]")
_SAMPLE = 1000  # rows of JSONL whose keys are taken for its columns


def header(path: str) -> list[str]:
    """The columns of a CSV file.

    Raises:
        DataError: it has none, or they are no CSV, or not UTF-8.
    """
    with open_file(path) as file:
        _check_encoding(path, file)
        return _header(path, CsvRows(file))


def _check_encoding(path: str, file: BinaryIO) -> None:
    """Refuse UTF-16, of which every row would be bad."""
    if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
        raise DataError(f"{path} is UTF-16. Convert it, for example with iconv -f UTF-16 -t UTF-8.")
    file.seek(0)


def _header(path: str, rows: CsvRows) -> list[str]:
    first = next(iter(rows), None)
    if first is None or isinstance(first, BadInput):
        raise DataError(f"{path} has no header: {first or 'it is empty'}")
    if _SURROGATES.search("".join(first)):
        raise DataError(f"{path} is not UTF-8. Convert it, for example with iconv -t UTF-8.")
    return first


def keys(path: str) -> list[str]:
    """The keys of the first objects of a JSONL file, in which they need not all be; none when there is no object.

    Raises:
        DataError: it is UTF-16.
    """
    with open_file(path) as file:
        _check_encoding(path, file)
        rows = islice(JsonRows(file), _SAMPLE)
        return list(dict.fromkeys(key for row in rows if not isinstance(row, BadInput) for key in row))


def cut(path: str, kind: str, unit_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Units as (first row, rows, first byte, byte after the last)."""
    with open_file(path) as file:
        rows = CsvRows(file) if kind == "csv" else JsonRows(file)
        if isinstance(rows, CsvRows):
            _header(path, rows)
        first, count, start = 0, 0, rows.offset
        for _ in rows if isinstance(rows, CsvRows) else rows.raw():
            count += 1
            if count == unit_rows:
                yield first, count, start, rows.offset
                first, count, start = first + count, 0, rows.offset
        if count:
            yield first, count, start, rows.offset


def read(columns: Columns, unit: Unit, chunk: int) -> Iterator[Rows]:
    """The rows of a unit: column of the file -> value, those that are needed; at most `chunk` rows at a time."""
    with open_file(columns.path) as file:
        names = _header(columns.path, CsvRows(file)) if unit.kind == "csv" else []
        file.seek(unit.start)
        lines = between(file, unit.stop - unit.start)
        if unit.kind == "csv":
            rows = CsvRows(lines, unit.start)
            yield from _chunks(rows, _picked(columns, names, rows), chunk)
        else:
            objects = JsonRows(lines, unit.start)
            yield from _chunks(objects, iter(objects), chunk)


def _chunks(source: CsvRows | JsonRows, rows: Iterator[Any], chunk: int) -> Iterator[Rows]:
    found: Rows = []
    start = source.offset
    for row in rows:
        found.append(row)
        if len(found) == chunk or source.offset - start > CHUNK_BYTES:
            yield found
            found, start = [], source.offset
    if found:
        yield found


def _picked(columns: Columns, names: list[str], rows: CsvRows) -> Iterator[dict[str, str] | BadInput]:
    places = [(name, names.index(name)) for name in columns.all]
    for row in rows:
        if isinstance(row, BadInput):
            yield row
        elif len(row) != len(names):
            yield BadInput(f"row has {len(row)} fields; the header has {len(names)}.")
        else:
            yield {name: row[place] for name, place in places}


def kept(column: str, rows: Rows) -> pa.Array:
    """A column as text: what CSV has, or JSON; null where a row has none or cannot be read."""
    values = [None if isinstance(row, BadInput) else _as_text(row.get(column)) for row in rows]
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # bytes that are not UTF-8
        cleaned = [value and _SURROGATES.sub("\ufffd", value) for value in values]
        return pa.array(cleaned, pa.string())


def _as_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()

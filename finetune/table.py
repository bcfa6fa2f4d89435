"""CSV, JSONL and Parquet -> two columns of strings."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

from bundle.errors import DataError, MissingExtra

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet", ".pq")


def read_table(path: Path, input_column: str, label_column: str) -> tuple[list[str | None], list[str | None]]:
    """The values of two columns, row by row; what is missing is None or empty.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or lacks a column.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtra("pyarrow is not installed: pip install 'edgeward[finetune]'.") from error
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not a table: its suffix is none of {', '.join(SUFFIXES)}.")
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, input_column, label_column)
    try:
        table = _read_csv(path, input_column, label_column) if suffix == ".csv" else _read_parquet(path)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    _require(path, table.column_names, input_column, label_column)
    return _strings(path, table, input_column), _strings(path, table, label_column)


def _read_csv(path: Path, *columns: str) -> Any:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    text = _utf8(path).removeprefix("\ufeff")
    header = next(csv.reader(StringIO(text)), [])
    _require(path, header, *columns)
    return arrow_csv.read_csv(
        pa.py_buffer(text.encode()),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
        ),
    )


def _read_jsonl(path: Path, *columns: str) -> tuple[list[str | None], list[str | None]]:
    """By Python's parser: Arrow's takes texts that look like dates for dates."""
    rows = []
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is not a JSON object.")
        for column in columns:
            if isinstance(row.get(column), dict | list):
                raise DataError(f"{column!r} in line {number} of {path} is a {type(row[column]).__name__}, not text.")
        rows.append(row)
    _require(path, sorted({key for row in rows for key in row}), *columns)
    first, second = ([_json_string(row.get(column)) for row in rows] for column in columns)
    return first, second


def _json_string(value: str | float | None) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _read_parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path).read()


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}. Convert it, for example with iconv -t UTF-8."
        ) from error


def _require(path: Path, present: list[str], *columns: str) -> None:
    for column in columns:
        if column not in present:
            raise DataError(f"{path} has no column {column!r}; its columns are {', '.join(present) or '(none)'}.")


def _strings(path: Path, table: Any, name: str) -> list[str | None]:
    import pyarrow as pa

    column = table[name]
    try:
        values: list[str | None] = column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"column {name!r} of {path} holds {column.type}, not text: {error}.") from error
    return values

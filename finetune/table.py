"""CSV, JSONL and Parquet -> columns of strings, labels or numbers."""

import csv
import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bundle.errors import DataError, MissingExtra
from finetune.labels import Cell

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet", ".pq")
_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Table:
    """Columns of N rows, each an Arrow array or, of JSONL, a list of Python values.

    Attributes:
        path: of the file.
        names: what to call each row in a message.
        columns: by name, in the file's order.
        lost: what is wrong with each row that could not be read at all, in addition to the N.
    """

    path: Path
    names: list[str]
    columns: dict[str, Any]
    lost: list[str]

    def strings(self, name: str) -> list[str | None]:
        """A column as text: numbers and truth values are as JSON writes them, what is missing is None.

        Raises:
            DataError: it holds something else.
        """
        column = self.columns[name]
        if isinstance(column, list):
            return [self._string(name, row, value) for row, value in enumerate(column)]
        strings: list[str | None] = self._cast(name, _pyarrow().string())
        return strings

    def cells(self, name: str) -> Sequence[Cell]:
        """A column of labels: as strings, but lists of them stay lists."""
        column = self.columns[name]
        if isinstance(column, list):
            return [self._cell(name, row, value) for row, value in enumerate(column)]
        pa = _pyarrow()
        of = column.type
        is_list = pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of)
        if not is_list:
            return self.strings(name)
        lists: list[list[str | None] | None] = self._cast(name, pa.list_(pa.string()))
        return [cell if cell is None else [label for label in cell if label] for cell in lists]

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 (N,), NaN where there is no number.

        Raises:
            DataError: it holds neither numbers nor text.
        """
        column = self.columns[name]
        if isinstance(column, list):
            return np.fromiter(map(_float, column), dtype=np.float64, count=len(column))
        pa = _pyarrow()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return np.fromiter(map(_float, column.to_pylist()), dtype=np.float64, count=len(column))
        try:
            numbers: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise DataError(f"column {name!r} of {self.path} holds {column.type}, not numbers: {error}.") from error
        return numbers

    def is_numeric(self, name: str) -> bool:
        """Whether a column holds numbers and, perhaps, gaps."""
        column = self.columns[name]
        if isinstance(column, list):
            known = [value for value in column if value is not None]
            return bool(known) and all(type(value) in (int, float) for value in known)
        types = _pyarrow().types
        is_number = types.is_integer(column.type) or types.is_floating(column.type) or types.is_decimal(column.type)
        return bool(is_number)

    def value(self, name: str, row: int) -> object:
        """One cell as it came."""
        column = self.columns[name]
        cell: object = column[row] if isinstance(column, list) else column[row].as_py()
        return cell

    def _cell(self, name: str, row: int, value: object) -> Cell:
        if isinstance(value, list):
            return [label for item in value if (label := self._string(name, row, item))]
        return self._string(name, row, value)

    def _string(self, name: str, row: int, value: object) -> str | None:
        if isinstance(value, dict | list):
            raise DataError(f"{name!r} in {self.names[row]} of {self.path} is a {type(value).__name__}, not text.")
        return value if value is None or isinstance(value, str) else json.dumps(value)

    def _cast(self, name: str, to: Any) -> Any:
        column = self.columns[name]
        try:
            return column.cast(to).to_pylist()
        except _pyarrow().ArrowException as error:
            raise DataError(f"column {name!r} of {self.path} holds {column.type}, not text: {error}.") from error


def read_table(path: Path, strings: Collection[str], numbers: Collection[str] | None = ()) -> Table:
    """Some columns of a table.

    Args:
        path: a file with one of SUFFIXES.
        strings: columns whose cells are text, whatever they look like.
        numbers: columns whose cells are meant to be numbers; None is all that are not in `strings`.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or lacks a column.
        MissingExtra: pyarrow is not installed.
    """
    pa = _pyarrow()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not a table: its suffix is none of {', '.join(SUFFIXES)}.")
    wanted = None if numbers is None else [*strings, *numbers]
    try:
        if suffix in _JSON_SUFFIXES:
            return _read_jsonl(path, strings, wanted)
        return _read_csv(path, strings, wanted) if suffix == ".csv" else _read_parquet(path, strings, wanted)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra("pyarrow is not installed: pip install 'edgeward[finetune]'.") from error
    module: ModuleType = pyarrow
    return module


def _read_csv(path: Path, strings: Collection[str], wanted: list[str] | None) -> Table:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    data = path.read_bytes()
    _decode(data, path)
    header = next(csv.reader(TextIOWrapper(BytesIO(data), encoding="utf-8-sig", newline="")), [])
    _require(path, header, [*strings, *header] if wanted is None else wanted)
    lost: dict[int, str] = {}

    def lose(row: Any) -> str:
        number = row.number - 1  # the header is the first
        lost[number] = f"row {number} has {row.actual_columns} columns instead of {row.expected_columns}"
        return "skip"

    table = arrow_csv.read_csv(
        pa.py_buffer(data),
        read_options=arrow_csv.ReadOptions(
            use_threads=False,  # with threads, rows that are lost have no number
            block_size=min(len(data) + 1, 2**31 - 1),  # the most that a cell may have
        ),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lose),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(strings, pa.string())
        ),
    )
    numbers = (number for number in range(1, len(table) + len(lost) + 1) if number not in lost)
    return _arrow_table(path, table, [f"row {number}" for number in numbers], list(lost.values()))


def _read_parquet(path: Path, strings: Collection[str], wanted: list[str] | None) -> Table:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        present = file.schema_arrow.names
        _require(path, present, [*strings, *present] if wanted is None else wanted)
        table = file.read(columns=wanted)
    return _arrow_table(path, table, [f"row {number}" for number in range(1, len(table) + 1)], [])


def _arrow_table(path: Path, table: Any, names: list[str], lost: list[str]) -> Table:
    return Table(path, names, {name: table[name] for name in table.column_names}, lost)


def _read_jsonl(path: Path, strings: Collection[str], wanted: list[str] | None) -> Table:
    """By Python's parser: Arrow's takes texts that look like dates for dates."""
    data = path.read_bytes()
    _decode(data, path)
    names: list[str] = []
    lost: list[str] = []
    seen: dict[str, None] = {}
    columns: dict[str, list[object]] = {name: [] for name in wanted or ()}
    for number, line in enumerate(BytesIO(data), start=1):
        if not line.strip():
            continue
        row = _json_row(line)
        if isinstance(row, str):
            lost.append(f"line {number} is {row}")
            continue
        seen.update(dict.fromkeys(row))
        for name in row if wanted is None else ():
            columns.setdefault(name, [None] * len(names))
        for name, column in columns.items():
            column.append(row.get(name))
        names.append(f"line {number}")
    if names or not lost:
        _require(path, list(seen), strings if wanted is None else wanted)
    return Table(path, names, dict(columns), lost)


def _json_row(line: bytes) -> dict[str, object] | str:
    """The object on a line, or what it is instead."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return "not a JSON object"
    if b"\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "not Unicode: it has half of a surrogate pair"
    return row


def _decode(data: bytes, path: Path) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}. Convert it, for example with iconv -t UTF-8."
        ) from error


def _require(path: Path, present: Sequence[str], columns: Collection[str]) -> None:
    counts = Counter(present)
    for column in columns:
        if not counts[column]:
            raise DataError(
                f"{path} has no column {column!r}; its columns are {', '.join(present) or '(none)'}. "
                "edgeward finetune takes others by --input-column and --label-column."
            )
        if counts[column] > 1:
            raise DataError(f"{path} has {counts[column]} columns with the name {column!r}. Rename all but one.")


def _float(value: object) -> float:
    """A number, or text that is one; NaN for everything else."""
    if isinstance(value, str):
        value = math.nan if "_" in value else value  # Python reads 1_000 as 1000
    elif not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan

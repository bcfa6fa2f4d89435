"""Parquet: row groups, read a page at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from bundle.errors import DataError
from score.files import system_of

CHUNK_BYTES = 16 << 20  # of the rows that are read together
_LEAN: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}


@contextmanager
def open_parquet(path: str, metadata: Any = None) -> Iterator[Any]:
    """A parquet.ParquetFile that holds no more of a row group in memory than it is asked for.

    Args:
        path: of the file.
        metadata: its footer, from `footer`, which then is not read again.

    Raises:
        DataError: it is none, also when that is found in the block.
    """
    system, inside = system_of(path)
    try:
        with parquet.ParquetFile(inside, metadata=metadata, filesystem=system, **_LEAN) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(" .")  # of several lines, some of them
        raise DataError(f"{path} cannot be read as Parquet: {reason}.") from error


def footer(path: str) -> Any:
    """The metadata of a file, a parquet.FileMetaData: with thousands of row groups it takes a while to read."""
    with open_parquet(path) as file:
        return file.metadata


def schema(path: str) -> dict[str, pa.DataType]:
    """The type of each column; of names that are there twice, the last."""
    with open_parquet(path) as file:
        return {field.name: field.type for field in file.schema_arrow}


def cut(path: str, unit_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Units as (first row, rows, first row group, row group after the last).

    Small row groups are joined, large ones are cut.
    """
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    first = start = rows = 0
    for group, size in enumerate(sizes):
        if rows and rows + size > unit_rows:
            yield first, rows, start, group
            first, start, rows = first + rows, group, 0
        rows += size
        while rows > unit_rows:  # then it is this row group alone
            yield first, unit_rows, group, group + 1
            first, start, rows = first + unit_rows, group, rows - unit_rows
    if rows:
        yield first, rows, start, len(sizes)


def tables(path: str, columns: list[str], start: int, chunk: int, metadata: Any) -> Iterator[tuple[int, int, pa.Table]]:
    """Everything from row group `start` on, at most `chunk` rows at a time, as (row group, first row, rows)."""
    with open_parquet(path, metadata) as file:
        row = sum(metadata.row_group(group).num_rows for group in range(start))
        for group in range(start, metadata.num_row_groups):
            rows = metadata.row_group(group)
            size = _even(rows.num_rows, min(chunk, _fitting(rows, columns)))
            batches = file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                yield group, row, pa.Table.from_batches([batch])
                row += len(batch)


def _even(rows: int, most: int) -> int:
    """The size of as few pieces as `most` allows, all about as large: then each takes the memory of the last one."""
    pieces = max(1, -(-rows // most))
    return max(1, -(-rows // pieces))


def _fitting(group: Any, columns: list[str]) -> int:
    """Rows that CHUNK_BYTES hold, by their average size."""
    wanted = (group.column(number) for number in range(group.num_columns))
    size: int = sum(each.total_uncompressed_size for each in wanted if each.path_in_schema.split(".")[0] in columns)
    return max(1, CHUNK_BYTES * int(group.num_rows) // max(1, size))

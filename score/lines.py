"""Rows of CSV and JSONL files: what begins where. Planning and reading count them by the same code."""

import csv
from collections.abc import Iterable, Iterator

import msgspec

from bundle.errors import BadInput

BOM = b"\xef\xbb\xbf"  # that a file may begin with, which is none of its text
MAX_FIELD = 64 << 20  # characters; a longer field of CSV is one that nobody closed


class CsvRows:
    """The rows of CSV lines, as Python's csv reads them: fields that hold the bytes that are not UTF-8 as surrogates.

    A quoted field may hold line ends. A blank line is no row. A row that is no CSV is a BadInput in its place.

    Attributes:
        offset: where in the file the next row begins.
    """

    def __init__(self, lines: Iterable[bytes], offset: int = 0) -> None:
        self.offset = offset
        self._ended = False
        csv.field_size_limit(MAX_FIELD)
        self._reader = csv.reader(self._decoded(lines))

    def _decoded(self, lines: Iterable[bytes]) -> Iterator[str]:
        for line in lines:
            line_start, self.offset = self.offset, self.offset + len(line)
            if line_start == 0:
                line = line.removeprefix(BOM)
            yield line.decode("utf-8", "surrogateescape")
        self._ended = True

    def __iter__(self) -> Iterator[list[str] | BadInput]:
        while True:
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadInput(f"row is not CSV: {error}.")
                continue
            if self._ended:  # the reader asked for another line, and there was none
                yield BadInput("row is not CSV: a quote is not closed before the end of the file.")
            elif row:
                yield row


class JsonRows:
    """The rows of JSONL lines: objects. A blank line is no row. A row that is no object is a BadInput in its place.

    Attributes:
        offset: where in the file the next row begins.
    """

    def __init__(self, lines: Iterable[bytes], offset: int = 0) -> None:
        self.offset = offset
        self._lines = lines

    def __iter__(self) -> Iterator[dict[str, object] | BadInput]:
        for line in self.raw():
            yield _object(line)

    def raw(self) -> Iterator[bytes]:
        """The lines of the rows, unread."""
        for line in self._lines:
            line_start, self.offset = self.offset, self.offset + len(line)
            if line_start == 0:
                line = line.removeprefix(BOM)
            if line.strip():
                yield line


def _object(line: bytes) -> dict[str, object] | BadInput:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadInput(f"row is not JSON: {error}.")
    return row if isinstance(row, dict) else BadInput("row is not a JSON object.")


def between(lines: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The lines that begin in the next `size` bytes."""
    for line in lines:
        yield line
        size -= len(line)
        if size <= 0:
            return

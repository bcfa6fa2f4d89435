"""Texts of mixed quality in several files, and whether their scores are all there: for the other benchmarks of scoring.

Of 20 rows one is bad, each in one of the ways of its kind of file, and one is odd but good. So which rows must have an
answer is known without a list of them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

FILES = ("a.parquet", "b.csv", "c.jsonl", "d.parquet")  # each with a quarter of the rows
EVERY = 20
LONG_EVERY = 500  # bad rows, of which one is longer than any bundle takes
TOO_LONG = b"x" * ((1 << 20) + 1)
ODD = ("", " ", 'two\nlines, "quoted"', "🙂 naïve 这部电影", "long " * 150, "\t\\ '")
_GROUP = 10_000  # rows of a row group of Parquet

NOT_UTF8 = b"caf\xe9"
OF_PARQUET = (None, NOT_UTF8)
OF_CSV = (b"too few", b"%d,too,many", b"%d," + NOT_UTF8)
OF_JSONL = (
    b'{"id": "%d", "text": null}',
    b'{"id": "%d"}',
    b'{"text": ["a", "list"]}',
    b'{"text": "half',
    b"[1]",
    b'"x',
    b'{"text": "' + NOT_UTF8 + b'"}',
)


def write(folder: Path, rows: int, texts: Sequence[str]) -> None:
    """Write `rows` rows, which four divides, with the columns id and text; the good ones are of these texts."""
    folder.mkdir(parents=True)
    for name in FILES:
        path, numbers = folder / name, range(rows // len(FILES))
        match path.suffix:
            case ".parquet":
                _write_parquet(path, numbers, texts)
            case ".csv":
                path.write_bytes(b"id,text\n")
                _write_lines(path, (_csv(number, texts) for number in numbers))
            case _:
                _write_lines(path, (_jsonl(number, texts) for number in numbers))


def is_bad(numbers: np.ndarray) -> np.ndarray:
    """Whether rows can have no answer, by their numbers in their file."""
    return numbers % EVERY == EVERY - 1


def _good(number: int, texts: Sequence[str]) -> str:
    return ODD[number // EVERY % len(ODD)] if number % EVERY == EVERY // 2 else texts[number % len(texts)]


def _is_bad(number: int) -> bool:
    return number % EVERY == EVERY - 1


def _is_long(number: int) -> bool:
    return number // EVERY % LONG_EVERY == 0


def _write_parquet(path: Path, numbers: range, texts: Sequence[str]) -> None:
    """Texts are binary, as what is not UTF-8 could not be there otherwise."""
    schema = pa.schema([("id", pa.string()), ("text", pa.binary())])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(numbers), _GROUP):
            block = numbers[start : start + _GROUP]
            rows = [_parquet(number) if _is_bad(number) else _good(number, texts).encode() for number in block]
            writer.write_table(pa.table({"id": [str(number) for number in block], "text": rows}, schema))


def _parquet(number: int) -> bytes | None:
    return TOO_LONG if _is_long(number) else OF_PARQUET[number // EVERY % len(OF_PARQUET)]


def _csv(number: int, texts: Sequence[str]) -> bytes:
    if not _is_bad(number):
        return b'%d,"%s"' % (number, _good(number, texts).replace('"', '""').encode())
    return b"%d,%s" % (number, TOO_LONG) if _is_long(number) else _filled(OF_CSV, number)


def _jsonl(number: int, texts: Sequence[str]) -> bytes:
    if not _is_bad(number):
        return json.dumps({"id": str(number), "text": _good(number, texts)}).encode()
    return b'{"text": "%s"}' % TOO_LONG if _is_long(number) else _filled(OF_JSONL, number)


def _filled(faults: Sequence[bytes], number: int) -> bytes:
    fault = faults[number // EVERY % len(faults)]
    return fault % number if b"%d" in fault else fault


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    with path.open("ab") as file:
        for line in lines:
            file.write(line + b"\n")


def count(out: Path, rows: int) -> tuple[int, int]:
    """Rows and bad rows of the parts in a folder.

    Raises:
        ValueError: a row of the input is not there, is there twice, is another, or is bad or good against expectation.
    """
    found: dict[str, int] = dict.fromkeys(FILES, 0)
    bad = 0
    for part in sorted(out.glob("part-*.parquet")):
        table = parquet.read_table(part, columns=["_file", "_row", "id", "_status", "label"])
        (path,) = set(table["_file"].to_pylist())
        name, numbers = Path(path).name, table["_row"].to_numpy()
        wrong = table["_status"].to_numpy() != 0
        if not np.array_equal(numbers, np.arange(found[name], found[name] + len(numbers))):
            raise ValueError(f"{part} does not begin where the last part of {name} ended")
        if not np.array_equal(wrong, is_bad(numbers)) or table["label"].null_count != wrong.sum():
            raise ValueError(f"{part}: rows are bad that are good, or the reverse")
        if table["id"].filter(pa.array(~wrong)).to_pylist() != [str(number) for number in numbers[~wrong]]:
            raise ValueError(f"{part}: rows have each other's numbers")
        found[name] += len(numbers)
        bad += int(wrong.sum())
    if set(found.values()) != {rows // len(FILES)}:
        raise ValueError(f"of {rows} rows there are {found}")
    return sum(found.values()), bad

"""Files of word vectors, read one word at a time: word2vec's text and binary formats, GloVe's text, gensim's own.

Only the words that are asked for are kept, so that a file may be much larger than memory.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from bundle.errors import MissingExtra, ModelError

Kept = tuple[list[str], np.ndarray]

_CHUNK = 1 << 20  # bytes read at a time of a binary file
_LONGEST_WORD = 1 << 16  # bytes; beyond them the file is something else
_LONGEST_LINE = 1 << 22
_LARGEST = 1 << 16  # numbers of a vector


def read_vectors(path: Path, wanted: Iterable[str], most_frequent: int, usable: Callable[[str], bool]) -> Kept:
    """Some words of a file and their vectors, in the order of the file.

    The name says the format: `.bin` is word2vec's binary one, `.kv` and `.model` what gensim saves (pickled: load only
    files that you trust), anything else is text, of word2vec if its first line is two integers, else of GloVe. All
    but gensim's may be compressed, with `.gz` at the end.

    Args:
        path: the file. Of a word that it has twice, the first vector counts.
        wanted: words that are kept wherever they stand.
        most_frequent: so many words from the beginning of the file are kept besides; the files begin with the most
            frequent words.
        usable: which words may be kept, and count as frequent.

    Returns:
        The words, and their vectors float32 (words, size).

    Raises:
        ModelError: the file cannot be read, or is not as its format wants it, with the place.
        MissingExtra: it is gensim's, and gensim is not installed.
    """
    keep = _Keep(path, wanted, most_frequent, usable)
    if path.suffix in (".kv", ".model"):
        return _read_gensim(path, keep)
    try:
        with _open(path) as file:
            if path.name.removesuffix(".gz").endswith(".bin"):
                _read_binary(path, file, keep)
            else:
                _read_text(path, file, keep)
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"the vectors {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return keep.result()


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    if path.suffix == ".gz":
        return cast("AbstractContextManager[BinaryIO]", gzip.open(path))
    return path.open("rb")


class _Keep:
    """Which words are kept, and what is kept of them."""

    def __init__(self, path: Path, wanted: Iterable[str], most_frequent: int, usable: Callable[[str], bool]) -> None:
        self._path = path
        self._wanted = {word.encode() for word in wanted}
        self._left = most_frequent
        self._usable = usable
        self._vectors: dict[str, np.ndarray] = {}

    def wants(self, encoded: bytes) -> str | None:
        """The word, if its vector is to be added."""
        if not self._left and encoded not in self._wanted:
            return None
        try:
            word = encoded.decode("utf-8")
        except UnicodeDecodeError:  # word2vec cuts long words in the middle of a character; no text has them
            return None
        return word if word not in self._vectors and self._usable(word) else None

    def add(self, word: str, vector: np.ndarray, place: str) -> None:
        """Keep a vector float32 (size,), refused if it is not finite."""
        if not np.isfinite(vector).all():
            raise ModelError(f"{self._path}: the vector of {word!r} in {place} has numbers that are not finite.")
        self._vectors[word] = vector
        self._left -= bool(self._left)

    def result(self) -> Kept:
        if not self._vectors:
            raise ModelError(f"{self._path} has none of the words that are wanted.")
        return list(self._vectors), np.stack(list(self._vectors.values()))


def _read_text(path: Path, file: BinaryIO, keep: _Keep) -> None:
    first = file.readline(_LONGEST_LINE)
    header = _header(first)
    size = header[1] if header else first.rstrip().count(b" ")
    if size < 1 or not (header or _ends_in_numbers(first, size)):
        raise ModelError(
            f"{path} does not begin like word vectors: line 1 is {first[:60]!r}, neither two integers nor a word and "
            "its numbers. The names of word2vec's binary files must end in .bin, of gensim's in .kv or .model."
        )
    lines = 0
    for number, line in enumerate(file if header else chain([first], file), start=2 if header else 1):
        encoded = _word(path, line, number, size, strict=header is not None)
        lines += bool(line.strip())
        word = keep.wants(encoded)
        if word is not None:
            keep.add(word, _numbers(path, line, number, size), f"line {number}")
    if header and lines != header[0]:
        raise ModelError(f"{path} has {lines} words, and its first line says {header[0]}. Was it cut short?")


def _header(line: bytes) -> tuple[int, int] | None:
    """Number of words and size of a vector, of word2vec's formats."""
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[0]), int(fields[1])
    return None


def _word(path: Path, line: bytes, number: int, size: int, *, strict: bool) -> bytes:
    """What is before the numbers; GloVe has words of several parts, which is how a line may be longer if not strict."""
    line = line.rstrip()
    spaces = line.count(b" ")
    if spaces == size:
        return line[: line.index(b" ")]
    word = line.rsplit(b" ", size)[0]
    if not line or (spaces > size and not strict and not _ends_in_numbers(word, 1)):
        return word
    hint = " Names of binary files must end in .bin." if b"\0" in line else ""
    raise ModelError(f"{path}: line {number} has {spaces} numbers, and {size} were expected.{hint}")


def _ends_in_numbers(line: bytes, size: int) -> bool:
    try:
        return len([float(field) for field in line.rstrip().rsplit(b" ", size)[1:]]) == size
    except ValueError:
        return False


def _numbers(path: Path, line: bytes, number: int, size: int) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
            return np.array([float(field) for field in line.rstrip().rsplit(b" ", size)[1:]]).astype(np.float32)
    except ValueError as error:
        raise ModelError(f"{path}: line {number} has something that is no number: {error}.") from error


def _read_binary(path: Path, file: BinaryIO, keep: _Keep) -> None:
    line = file.readline(_LONGEST_LINE)
    header = _header(line)
    if header is None or not 1 <= header[1] <= _LARGEST:
        raise ModelError(f"{path} does not begin like word2vec's binary format, with two integers: {line[:60]!r}.")
    count, size = header
    data, start, offset = b"", 0, len(line)  # `data` begins `offset` bytes into the file; `start` is where we are
    for number in range(count):
        while (space := data.find(b" ", start)) < 0 or len(data) < space + 1 + 4 * size:
            more = file.read(_CHUNK)
            offset, data, start = offset + start, data[start:] + more, 0
            if not more or b" " not in data[:_LONGEST_WORD]:
                raise ModelError(f"{path} breaks off in word {number + 1} of {count}, at byte {offset}.")
        end = space + 1 + 4 * size
        word = keep.wants(data[start:space].lstrip(b"\n"))  # word2vec ends vectors with a newline, gensim does not
        if word is not None:
            vector = np.frombuffer(data, dtype="<f4", count=size, offset=space + 1).astype(np.float32)
            keep.add(word, vector, f"word {number + 1}, byte {offset + start}")
        start = end
    rest = (data[start:] + file.read(_CHUNK)).strip()
    if rest:
        raise ModelError(
            f"{path} goes on at byte {offset + start}, behind the {count} words of {size} numbers that it begins with."
        )


def _read_gensim(path: Path, keep: _Keep) -> Kept:
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        raise MissingExtra(
            f"{path} was saved by gensim, which is not installed: pip install 'edgeward[vectors]'."
        ) from error
    try:
        saved = KeyedVectors.load(str(path), mmap="r")
        vectors = getattr(saved, "wv", saved)  # a .model has them inside
        words, table = list(vectors.index_to_key), vectors.vectors
    except Exception as error:  # pickle's, OSError of a file that belongs to it, AttributeError of something else
        raise ModelError(f"{path} is not word vectors that gensim saved: {type(error).__name__}: {error}.") from error
    for row, encoded in enumerate(words):
        word = keep.wants(str(encoded).encode("utf-8", "surrogatepass"))
        if word is not None:
            keep.add(word, np.array(table[row], dtype=np.float32), f"row {row + 1}")
    return keep.result()

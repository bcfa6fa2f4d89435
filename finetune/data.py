"""Labelled raw examples: a folder of class folders, or a CSV, JSONL or Parquet table."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import structlog
from PIL import Image

from bundle.errors import DataError
from bundle.host import cpu_count
from finetune.progress import track
from finetune.table import read_table

log = structlog.get_logger()

Modality = Literal["text", "image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Dataset:
    """Raw examples and their labels. Images stay on disk until they are asked for.

    Attributes:
        location: absolute path.
        input_column: of a table; None for a folder.
        label_column: of a table; None for a folder.
        names: what to call each example in a message.
        hashes: hex sha256 of each example's raw bytes.
        labels: int64 (N,), indices into label_names.
        label_names: sorted as strings.
        sha256: hex digest of the whole: of its (content, label) pairs, whatever their order.
    """

    location: str
    input_column: str | None
    label_column: str | None
    names: Sequence[str]
    hashes: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    sha256: str
    _raw: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.hashes)

    def raw(self, index: int) -> bytes:
        """One example as it came: an encoded image, or a text in UTF-8."""
        return self._raw(index)


@dataclass(frozen=True)
class _Example:
    name: str
    label: str
    raw: bytes | Path


def load_dataset(
    location: str | Path,
    modality: Modality,
    *,
    input_column: str | None = None,
    label_column: str = "label",
    max_bad: int = 0,
) -> Dataset:
    """Find, read and check labelled examples.

    Texts come from a table's text column. Images come from `CLASS/*.png`, `*.jpg` and `*.jpeg` below a folder, at any
    depth, or from the paths in a table's column, relative to the table's folder; every one is decoded once.

    Args:
        location: a folder, or a file .csv, .jsonl, .ndjson, .parquet or .pq.
        modality: what an example is.
        input_column: of a table; None is "text" or "image", as the modality.
        label_column: of a table.
        max_bad: rows without text or label, and images that cannot be read, that are left out with a warning.

    Raises:
        DataError: nothing there, too many bad examples, fewer than two labels, or a label with fewer than two examples.
    """
    path = Path(location).expanduser().resolve()
    column = input_column or modality
    is_table = path.is_file()
    if is_table:
        examples, bad = _table_examples(path, modality, column, label_column)
    elif path.is_dir() and modality == "image":
        examples, bad = _folder_examples(path), []
    elif path.is_dir():
        raise DataError(f"{path} is a folder, which holds images; texts come as a .csv, .jsonl or .parquet file.")
    else:
        raise DataError(f"there is no dataset at {path}.")
    rows = len(examples) + len(bad)
    hashes = [hashlib.sha256(e.raw).hexdigest() if isinstance(e.raw, bytes) else "" for e in examples]
    if modality == "image":
        hashes = _check_images(examples, bad)
    _judge_bad(path, bad, max_bad, rows)
    examples = [example for example, digest in zip(examples, hashes, strict=True) if digest]
    return _dataset(path, examples, [h for h in hashes if h], (column, label_column) if is_table else (None, None))


def _table_examples(path: Path, modality: Modality, column: str, label_column: str) -> tuple[list[_Example], list[str]]:
    examples, bad = [], []
    inputs, labels = read_table(path, column, label_column)
    for row, (value, label) in enumerate(zip(inputs, labels, strict=True), start=1):
        if not (value and value.strip()) or not (label and label.strip()):
            empty = label_column if value and value.strip() else column
            bad.append(f"row {row} has no {empty}")
            continue
        raw = value.encode() if modality == "text" else path.parent / value
        examples.append(_Example(f"row {row}", label, raw))
    return examples, bad


def _folder_examples(path: Path) -> list[_Example]:
    examples = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        files = [p for p in files if not p.name.startswith(".")]
        if not files:
            raise DataError(f"class folder {folder} holds no PNG or JPEG file. Fill it or remove it.")
        examples += [_Example(str(p.relative_to(path)), folder.name, p) for p in files]
    return examples


def _check_images(examples: list[_Example], bad: list[str]) -> list[str]:
    """Hex sha256 per example, "" for images that cannot be decoded, which `bad` is told of."""
    hashes = []
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(_check_image, examples)
        for example, result in zip(examples, track(results, len(examples), "reading data"), strict=True):
            hashes.append(result if isinstance(result, str) else "")
            if isinstance(result, Exception):
                bad.append(f"{example.name} is not a readable PNG or JPEG: {result}")
    return hashes


def _check_image(example: _Example) -> str | Exception:
    try:
        raw = _read(example.raw)
        image = Image.open(BytesIO(raw), formats=("PNG", "JPEG"))
        image.draft("RGB", (1, 1))  # JPEG is decoded at an eighth of its size, but to its end
        image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … on broken files
        return error
    return hashlib.sha256(raw).hexdigest()


def _read(raw: bytes | Path) -> bytes:
    return raw if isinstance(raw, bytes) else raw.read_bytes()


def _judge_bad(path: Path, bad: list[str], max_bad: int, examples: int) -> None:
    if len(bad) > max_bad:
        raise DataError(
            f"{path} has {len(bad)} bad of {examples} examples (max_bad is {max_bad}). The first: {bad[0].rstrip('.')}."
        )
    if bad:
        log.warning("bad examples left out", data=str(path), count=len(bad), first=bad[0])


def _dataset(
    path: Path, examples: list[_Example], hashes: list[str], columns: tuple[str, str] | tuple[None, None]
) -> Dataset:
    label_names = tuple(sorted({example.label for example in examples}))
    index = {label: i for i, label in enumerate(label_names)}
    _judge_labels(path, examples, hashes)
    lines = sorted(f"{digest} {example.label}\n" for digest, example in zip(hashes, examples, strict=True))
    raws = [example.raw for example in examples]

    return Dataset(
        location=str(path),
        input_column=columns[0],
        label_column=columns[1],
        names=[example.name for example in examples],
        hashes=hashes,
        labels=np.array([index[example.label] for example in examples], dtype=np.int64),
        label_names=label_names,
        sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        _raw=lambda i: _read(raws[i]),
    )


def _judge_labels(path: Path, examples: list[_Example], hashes: list[str]) -> None:
    if not examples:
        raise DataError(f"{path} has no examples.")
    distinct: dict[str, set[str]] = {}
    for example, digest in zip(examples, hashes, strict=True):
        distinct.setdefault(example.label, set()).add(digest)
    if len(distinct) < 2:
        raise DataError(f"{path} has one label, {next(iter(distinct))!r}; a classifier needs two or more.")
    rare = [label for label, contents in distinct.items() if len(contents) < 2]
    if rare:
        raise DataError(
            f"{path} has {len(rare)} labels with fewer than 2 different examples, {rare[0]!r} the first. "
            "Add examples or leave these labels out."
        )
    labels_of = Counter(digest for contents in distinct.values() for digest in contents)
    conflicting = sum(count > 1 for count in labels_of.values())
    if conflicting:
        log.warning("equal examples with different labels", data=str(path), contents=conflicting)

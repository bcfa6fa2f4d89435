"""Labelled raw examples: image folders, tables of texts, images or vectors, .npz arrays, and CIFAR-10."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bundle.errors import DataError
from bundle.log import log
from finetune import cifar, npz
from finetune.folder import check_images, read_folder
from finetune.labels import LabelColumn, judge_targets, parse_label_columns, read_target
from finetune.source import Source, vector_content
from finetune.table import SUFFIXES, Table, read_table
from finetune.target import Target

Modality = Literal["text", "image", "vector"]

LABEL = "label"
_DEFAULT_LABELS = (LABEL,)


@dataclass(frozen=True)
class Dataset:
    """N raw examples and their targets. Images stay on disk until they are asked for.

    Attributes:
        location: absolute path, or "torchvision:CIFAR10".
        input_columns: of a table, or the array of an .npz; empty for folders.
        label_columns: of a table or an .npz, NAME[:KIND[:WEIGHT]]; empty for folders.
        names: what to call each example in a message.
        hashes: hex sha256 of each example's raw bytes; of CIFAR-10, of its pixels.
        targets: what is to be predicted, one for each task; at least one value of each example is known.
        weights: of each task's loss.
        sha256: hex digest of the whole: of its (content, labels) pairs, whatever their order.
        held_out: bool (N,), which examples the dataset itself keeps for testing; None if it does not say.
        feature_names: what each number of a vector is, when they are columns of a table.
    """

    location: str
    input_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    names: Sequence[str]
    hashes: list[str]
    targets: tuple[Target, ...]
    weights: tuple[float, ...]
    sha256: str
    held_out: np.ndarray | None
    feature_names: tuple[str, ...]
    _raw: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.hashes)

    def raw(self, index: int) -> bytes:
        """One example as it came: an image file, a text in UTF-8, JSON of two texts, or float32 numbers."""
        return self._raw(index)


def load_dataset(
    location: str | Path,
    modality: Modality,
    *,
    input_column: tuple[str, ...] = (),
    label_column: tuple[str, ...] = _DEFAULT_LABELS,
    max_bad: int = 0,
) -> Dataset:
    """Find, read and check labelled examples.

    Texts come from one or two text columns of a table. Images come from `CLASS/*.png`, `*.jpg` and `*.jpeg` below a
    folder, at any depth, from the paths in a table's column, relative to the table's folder, from a folder of
    CIFAR-10's binary batches, or from torchvision:CIFAR10; every file is decoded once. Vectors come from a table's
    columns of numbers, or from an array of an .npz.

    Args:
        location: a folder, a file .csv, .jsonl, .ndjson, .parquet, .pq or .npz, or torchvision:CIFAR10.
        modality: what an example is.
        input_column: of a table; () is "text" or "image", and of vectors all columns of numbers that are no labels.
            Of an .npz the array, "x" by default.
        label_column: NAME[:KIND[:WEIGHT]] for each task; of an .npz "y" by default. A table's labels are multiclass
            unless they have a kind. Where there are several, an empty cell is a missing label.
        max_bad: examples without input or label, and those that cannot be used, that are left out with a warning.

    Raises:
        DataError: nothing there, too many bad examples, or labels that nothing can be learned from.
        MissingExtra: pyarrow or torchvision is not installed.
    """
    source = _read(location, modality, input_column, label_column or _DEFAULT_LABELS)
    keep = _keep(source, max_bad)
    whole, raw = len(keep) == len(source.digests), source.raw
    targets = source.targets if whole else tuple(target.pruned(keep) for target in source.targets)
    hashes = [source.digests[i] for i in keep]
    judge_targets(source.location, targets, hashes)
    return Dataset(
        location=source.location,
        input_columns=source.input_columns,
        label_columns=source.label_columns,
        names=[source.names[i] for i in keep],
        hashes=hashes,
        targets=targets,
        weights=source.weights,
        sha256=digest(hashes, targets),
        held_out=None if source.held_out is None else source.held_out[keep],
        feature_names=source.feature_names,
        _raw=raw if whole else lambda index: raw(int(keep[index])),
    )


def _read(location: str | Path, modality: Modality, inputs: tuple[str, ...], labels: tuple[str, ...]) -> Source:
    path = Path(location).expanduser().resolve()
    if str(location) == cifar.LOCATION or path.is_dir():
        return _read_images(location, path, modality)
    if path.is_file() and path.suffix.lower() == npz.SUFFIX:
        if modality != "vector":
            raise DataError(f"{path} holds vectors, and the model takes {modality}s.")
        if labels == _DEFAULT_LABELS and LABEL not in npz.array_names(path):
            labels = (npz.LABEL,)
        return npz.read_npz(path, inputs, parse_label_columns(labels), labels)
    if path.is_file():
        return _read_rows(path, modality, inputs, labels)
    if ":" in str(location):
        raise DataError(f"there is no dataset {location}; the one that is known by a name is {cifar.LOCATION}.")
    raise DataError(
        f"there is no dataset at {path}. Give a folder, a table, an .npz file, or {cifar.LOCATION}; where the data "
        "of a checkpoint has moved, edgeward export takes --data."
    )


def _read_images(location: str | Path, path: Path, modality: Modality) -> Source:
    if modality != "image":
        kinds = " or ".join(SUFFIXES if modality == "text" else (*SUFFIXES, npz.SUFFIX))
        where = f"{path} is a folder, which holds" if path.is_dir() else f"{location} holds"
        raise DataError(f"{where} images; {modality}s come as a file: {kinds}.")
    if str(location) == cifar.LOCATION:
        return cifar.download()
    return cifar.read_batches(path) if cifar.has_batches(path) else read_folder(path)


def _read_rows(path: Path, modality: Modality, inputs: tuple[str, ...], labels: tuple[str, ...]) -> Source:
    columns = parse_label_columns(labels)
    inputs = inputs or (() if modality == "vector" else (modality,))
    _check_columns(modality, inputs, columns)
    names = [column.name for column in columns]
    if modality == "vector":
        table = read_table(path, names, inputs or None)
        inputs = inputs or _numeric_columns(table, names)
    else:
        table = read_table(path, [*inputs, *names])
    digests, raw, bad = _contents(table, modality, inputs)
    targets = []
    for column in columns:
        target, wrong = read_target(column.name, column.kind or "multiclass", table.cells(column.name))
        targets.append(target)
        bad = wrong | bad
    return Source(
        location=str(path),
        names=table.names,
        digests=digests,
        raw=raw,
        targets=tuple(targets),
        bad=bad,
        lost=table.lost,
        input_columns=inputs,
        label_columns=labels,
        weights=tuple(column.weight for column in columns),
        feature_names=inputs if modality == "vector" else (),
    )


def _check_columns(modality: Modality, inputs: tuple[str, ...], labels: Sequence[LabelColumn]) -> None:
    most = {"text": 2, "image": 1, "vector": len(inputs)}[modality]
    if len(inputs) > most:
        raise DataError(f"{len(inputs)} input columns, {', '.join(inputs)}; {modality}s have at most {most}.")
    twice = [name for name in inputs if inputs.count(name) > 1]
    if twice:
        raise DataError(f"input column {twice[0]!r} is given {inputs.count(twice[0])} times.")
    both = [column.name for column in labels if column.name in inputs]
    if both:
        raise DataError(f"column {both[0]!r} cannot be both input and label.")


def _numeric_columns(table: Table, labels: Sequence[str]) -> tuple[str, ...]:
    others = [name for name in table.columns if name not in labels]
    numeric = tuple(name for name in others if table.is_numeric(name))
    if not numeric:
        raise DataError(f"{table.path} has no column of numbers but its labels; its columns are {', '.join(others)}.")
    if len(numeric) < len(others):
        left_out = [name for name in others if name not in numeric]
        log.warning("columns that do not hold numbers are left out", data=str(table.path), columns=left_out)
    return numeric


def _contents(
    table: Table, modality: Modality, inputs: tuple[str, ...]
) -> tuple[list[str], Callable[[int], bytes], dict[int, str]]:
    """Digests of the rows' inputs, what gives them as bytes, and position -> what is wrong with one."""
    if modality == "vector":
        vectors, bad = _vectors(table, inputs)
        return *vector_content(vectors), bad
    columns = [table.strings(name) for name in inputs]
    bad = {}
    for name, column in zip(inputs, columns, strict=True):
        bad |= {row: f"has no {name}" for row, cell in enumerate(column) if not (cell and cell.strip())}
    if modality == "image":
        files = [table.path.parent / (cell or "") for cell in columns[0]]
        present = [row for row in range(len(files)) if row not in bad]
        checked, wrong = check_images([files[row] for row in present])
        digests = [""] * len(files)
        for row, digest in zip(present, checked, strict=True):
            digests[row] = digest
        return digests, lambda index: files[index].read_bytes(), bad | {present[i]: why for i, why in wrong.items()}
    texts = [_text(cells) for cells in zip(*columns, strict=True)]
    return [hashlib.sha256(text).hexdigest() for text in texts], texts.__getitem__, bad


def _text(cells: tuple[str | None, ...]) -> bytes:
    if len(cells) == 1:
        return (cells[0] or "").encode()
    return json.dumps(cells, ensure_ascii=False).encode()


def _vectors(table: Table, columns: tuple[str, ...]) -> tuple[np.ndarray, dict[int, str]]:
    """The columns as float32 (N, D), and which rows are not finite."""
    vectors = np.empty((len(table.names), len(columns)), dtype="<f4")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is found as that
        for position, name in enumerate(columns):
            vectors[:, position] = table.numbers(name)
    wrong = ~np.isfinite(vectors)
    rows = np.flatnonzero(wrong.any(axis=1)).tolist()
    first = {row: columns[int(wrong[row].argmax())] for row in rows}
    return vectors, {
        row: f"has {table.value(name, row)!r} in column {name!r}, not a finite number" for row, name in first.items()
    }


def _keep(source: Source, max_bad: int) -> np.ndarray:
    """Positions int64 (M,), ascending, of the examples that can be used.

    Raises:
        DataError: more than max_bad cannot.
    """
    bad = _unlabelled(source.targets) | source.bad
    reasons = [*source.lost, *(f"{source.names[i]} {bad[i]}" for i in sorted(bad))]
    total = len(source.digests) + len(source.lost)
    if len(reasons) > max_bad:
        raise DataError(
            f"{source.location} has {len(reasons)} bad of {total} examples (--max-bad is {max_bad}). "
            f"The first: {reasons[0].rstrip('.')}."
        )
    if reasons:
        log.warning("bad examples left out", data=source.location, count=len(reasons), first=reasons[0])
    usable = np.ones(len(source.digests), dtype=bool)
    usable[list(bad)] = False
    return np.flatnonzero(usable)


def _unlabelled(targets: Sequence[Target]) -> dict[int, str]:
    known = np.any([target.known for target in targets], axis=0)
    names = " and no ".join(target.name for target in targets)
    return {int(row): f"has no {names}" for row in np.flatnonzero(~known)}


def digest(hashes: Sequence[str], targets: Sequence[Target]) -> str:
    """Hex sha256 of the sorted lines "CONTENT LABELS"; docs/checkpoint-format.md says how labels are written."""
    whole = hashlib.sha256()
    for line in sorted(f"{content} {labels}\n" for content, labels in zip(hashes, _labels(targets), strict=True)):
        whole.update(line.encode())
    return whole.hexdigest()


def _labels(targets: Sequence[Target]) -> Iterator[str]:
    if len(targets) == 1 and targets[0].kind == "multiclass":
        return (targets[0].labels[value] for value in targets[0].values)
    rows = zip(*(_values(target) for target in targets), strict=True)
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)


def _values(target: Target) -> Iterator[object]:
    for value, known in zip(target.values, target.known, strict=True):
        if not known:
            yield None
        elif target.kind == "multiclass":
            yield target.labels[value]
        elif target.kind == "regression":
            yield float(value)
        else:
            yield [target.labels[i] for i in np.flatnonzero(value)]

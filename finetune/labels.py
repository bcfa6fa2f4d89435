"""Label columns: how they are named on the command line, and how their cells become targets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from bundle.errors import DataError
from bundle.log import log
from finetune.target import Kind, Target

Cell = str | Sequence[str] | None  # a list is a set of labels

KINDS: tuple[Kind, ...] = get_args(Kind)
SEPARATOR = "|"  # of the labels in one cell of a multilabel column


@dataclass(frozen=True)
class LabelColumn:
    """What is asked for of one column."""

    name: str
    kind: Kind | None  # None: the table's default
    weight: float  # of the task's loss


def parse_label_columns(columns: Sequence[str]) -> tuple[LabelColumn, ...]:
    """Label columns from NAME[:KIND[:WEIGHT]].

    Raises:
        DataError: an unknown kind, a weight that is not positive, or a column twice.
    """
    parsed = tuple(_parse(column) for column in columns)
    names = [column.name for column in parsed]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"label column {twice[0]!r} is given {names.count(twice[0])} times; one task for each column.")
    return parsed


def _parse(column: str) -> LabelColumn:
    parts = column.split(":")
    for kind in KINDS:
        if len(parts) > 1 and parts[-1] == kind:
            return LabelColumn(":".join(parts[:-1]), kind, 1.0)
        if len(parts) > 2 and parts[-2] == kind:
            return LabelColumn(":".join(parts[:-2]), kind, _weight(parts[-1], column))
    if len(parts) > 1:
        raise DataError(
            f"label column {column!r} has no kind that there is: NAME:KIND[:WEIGHT] with {', '.join(KINDS)} for KIND. "
            "A name with a colon in it needs its kind too."
        )
    return LabelColumn(column, None, 1.0)


def _weight(text: str, column: str) -> float:
    weight = _number(text)
    if weight is None or not 0 < weight < math.inf:
        raise DataError(f"label column {column!r} has the weight {text!r}, which is not a positive number.")
    return weight


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)  # Python reads 1_000 as 1000
    except ValueError:
        return None


def read_target(name: str, kind: Kind, cells: Sequence[Cell]) -> tuple[Target, dict[int, str]]:
    """A target from the cells of its column.

    Args:
        name: of the column.
        kind: multiclass takes a cell as one label, without space around it; multilabel as labels between bars, "|"
            being none of them, or as a list of labels; regression as a number, "nan" being a missing one.
        cells: None, and what is empty or blank, is missing.

    Returns:
        The target, and position -> what is wrong with the cell, where it is missing although there is one.

    Raises:
        DataError: a list where a label or a number belongs.
    """
    reader: Callable[[str, Sequence[Cell]], tuple[Target, dict[int, str]]]
    reader = {"multiclass": _multiclass, "multilabel": _multilabel, "regression": _regression}[kind]
    return reader(name, cells)


def _multiclass(name: str, cells: Sequence[Cell]) -> tuple[Target, dict[int, str]]:
    found = list(map(_one(name), cells))
    labels = tuple(sorted({label for label in found if label is not None}))
    index: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    values = np.fromiter((index.get(label, -1) for label in found), dtype=np.int64, count=len(cells))
    return Target(name, "multiclass", labels, values), {}


def _multilabel(name: str, cells: Sequence[Cell]) -> tuple[Target, dict[int, str]]:
    rows = [None if _is_blank(cell) else _several(cell or ()) for cell in cells]
    labels = tuple(sorted({label for row in rows if row for label in row}))
    index = {label: i for i, label in enumerate(labels)}
    values = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for i, row in enumerate(rows):
        if row is None:
            values[i] = np.nan
        else:
            values[i, [index[label] for label in row]] = 1
    return Target(name, "multilabel", labels, values), {}


def _regression(name: str, cells: Sequence[Cell]) -> tuple[Target, dict[int, str]]:
    values = np.full(len(cells), np.nan)
    bad = {}
    for i, cell in enumerate(map(_one(name), cells)):
        if cell is None:
            continue
        value = _number(cell)
        if value is None or math.isinf(value):
            bad[i] = f"has {cell!r} as {name}, which is not a finite number"
        else:
            values[i] = value
    return Target(name, "regression", (), values), bad


def _one(name: str) -> Callable[[Cell], str | None]:
    def check(cell: Cell) -> str | None:
        if cell is None or isinstance(cell, str):
            return (cell or "").strip() or None
        raise DataError(f"column {name!r} holds lists, such as {list(cell)}; sets of labels are {name}:multilabel.")

    return check


def _is_blank(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _several(cell: str | Sequence[str]) -> list[str]:
    parts = cell.split(SEPARATOR) if isinstance(cell, str) else cell
    return [part.strip() for part in parts if part.strip()]


def judge_targets(location: str, targets: Sequence[Target], hashes: Sequence[str]) -> None:
    """Refuse what nothing can be learned from, and warn about equal examples with different labels.

    Raises:
        DataError: no examples; of one task, fewer than two labels, a label with fewer than two different examples, or
            numbers that are all equal.
    """
    if not hashes:
        raise DataError(f"{location} has no examples.")
    contents = np.unique(np.array(hashes, dtype="S64"), return_inverse=True)[1]
    for target in targets:
        where = location if len(targets) == 1 else f"column {target.name!r} of {location}"
        if target.kind == "regression":
            _judge_numbers(target, where)
        else:
            _judge_labels(target, contents, where)
        conflicting = _conflicting(target, contents)
        if conflicting:
            log.warning("equal examples with different labels", data=location, task=target.name, contents=conflicting)


def _judge_numbers(target: Target, where: str) -> None:
    values = target.values[target.known]
    if not len(values):
        raise DataError(f"{where} has no known value of {target.name!r}.")
    if values.min() == values.max():
        raise DataError(f"{where} has one value of {target.name!r}, {values[0]}; a regression needs different ones.")


def _judge_labels(target: Target, contents: np.ndarray, where: str) -> None:
    known = target.known
    if not target.labels:
        raise DataError(f"{where} has no labels.")
    if len(np.unique(target.codes[known])) < 2:
        if target.kind == "multiclass":
            raise DataError(f"{where} has one label, {target.labels[0]!r}; a classifier needs two or more.")
        raise DataError(f"every example of {where} has the same labels, {', '.join(target.labels)}.")
    examples = _distinct_examples(target, contents)
    rare = [label for label, count in zip(target.labels, examples, strict=True) if count < 2]
    if rare:
        raise DataError(
            f"{where} has {len(rare)} labels with fewer than 2 different examples, {rare[0]!r} the first. "
            f"{_hint(target, known.sum())}Add examples or leave these labels out."
        )


def _hint(target: Target, rows: int) -> str:
    """Numbers that are hardly ever equal were not meant as labels."""
    if (
        target.kind != "multiclass"
        or 2 * target.width <= rows
        or any(_number(label) is None for label in target.labels)
    ):
        return ""
    return f"Its {target.width} labels are numbers: to predict a number, give --label-column {target.name}:regression. "


def _distinct_examples(target: Target, contents: np.ndarray) -> list[int]:
    """Of each label, how many different contents have it."""
    if target.kind == "multiclass":
        rows, labels = np.flatnonzero(target.known), target.values[target.known]
    else:
        rows, labels = np.nonzero(target.values == 1)
    pairs = np.unique(contents[rows] * target.width + labels)
    counts: list[int] = np.bincount(pairs % target.width, minlength=target.width).tolist()
    return counts


def _conflicting(target: Target, contents: np.ndarray) -> int:
    """How many contents have more than one value."""
    codes = target.codes
    known = codes >= 0
    pairs = np.unique(contents[known] * (codes.max(initial=0) + 1) + codes[known])
    return int((np.bincount(pairs // (codes.max(initial=0) + 1)) > 1).sum())

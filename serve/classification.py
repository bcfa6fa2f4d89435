"""The classification extension: the highest values of an output as text, for clients that want labels, not numbers."""

import math
from collections.abc import Sequence

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import TensorSpec


def check(spec: TensorSpec) -> None:
    """Refuse an output whose elements have no order.

    Raises:
        BadInput: it holds truth values, texts, or BF16.
    """
    if spec.datatype in ("BOOL", "BF16", "BYTES"):
        raise BadInput(f"output {spec.name!r} is {spec.datatype}; 'classification' is expected of numbers only.")


def top_classes(array: np.ndarray, count: int, labels: Sequence[str] = (), *, batched: bool) -> np.ndarray:
    """The highest values, of each row or of all, as Triton writes them: "VALUE:INDEX" or "VALUE:INDEX:LABEL".

    Floats have six decimals. Of equal values the first comes first; NaN comes last.

    Args:
        array: numbers, of any shape.
        count: how many; at most as many as there are come back.
        labels: by index; where there is none, or it is empty, the text ends with the index.
        batched: whether the first axis is the batch. The other axes count as one.

    Returns:
        Objects that are bytes, of shape (rows, count) or (count,).
    """
    rows = array.reshape(len(array), math.prod(array.shape[1:])) if batched and array.ndim else array.reshape(1, -1)
    width = min(count, rows.shape[1])
    texts = np.empty((len(rows), width), object)
    for row, values in enumerate(rows):
        for place, index in enumerate(_descending(values)[:width]):
            texts[row, place] = _text(values[index], int(index), labels)
    return texts if batched and array.ndim else texts.reshape(width)


def _descending(values: np.ndarray) -> np.ndarray:
    order = len(values) - 1 - np.argsort(values[::-1], kind="stable")[::-1]  # stable from behind: equals stay in order
    return np.roll(order, -np.count_nonzero(values != values))  # NaN, which was sorted to the front


def _text(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):f}" if value.dtype.kind == "f" else str(value)
    label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
    return f"{number}:{index}{label}".encode()

"""Raw examples as the columns of a bundle, in requests of a size that a server takes."""

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import TensorSpec, conform
from serve.client.limits import whole

Raws = Sequence[Any] | np.ndarray | Mapping[str, Any]

MAX_BYTES = 32 << 20  # of the examples of one request: half of what a server takes by default


@dataclass(frozen=True)
class ModelMetadata:
    """What a served model is called, takes and gives."""

    name: str
    versions: tuple[int, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def examples(self) -> Literal["raw", "pair", "vector", "tensors"] | None:
        """What Client.predict takes: texts or images, pairs of texts, vectors, or named arrays; None: it refuses."""
        if self.platform != "edgeward_bundle":
            return None
        match self.inputs:
            case [TensorSpec(datatype="BYTES")]:
                return "raw"
            case [TensorSpec(datatype="BYTES"), TensorSpec(datatype="BYTES")]:
                return "pair"
            case [TensorSpec(datatype="FP32", shape=(_, _))]:
                return "vector"
        return "tensors"


def to_columns(raws: Raws, metadata: ModelMetadata) -> dict[str, np.ndarray]:
    """Raw examples as the tensors of a bundle, one row for each.

    Raises:
        BadInput: the model is no bundle, or takes other examples.
    """
    match metadata.examples:
        case "raw":
            columns = [_bytes_column(raws, "a text or the bytes of an image")]
        case "pair":
            columns = _pair_columns(raws)
        case "vector" if not isinstance(raws, Mapping):
            columns = [_vectors(raws, metadata.inputs[0].shape[1])]
        case "vector" | "tensors":
            columns = _tensors(raws, metadata.inputs)
        case None:
            takes = ", ".join(f"{spec.name!r} {spec}" for spec in metadata.inputs)
            raise BadInput(f"model {metadata.name!r} takes no raw examples but {takes}. Send tensors with infer.")
    return {spec.name: column for spec, column in zip(metadata.inputs, columns, strict=True)}


def check_batching(max_rows: int, parallel: int) -> None:
    """Refuse sizes that no request can have.

    Raises:
        BadInput: one is no integer, or below 1.
    """
    whole("max_rows", max_rows, 1)
    whole("parallel", parallel, 1)


def cut(columns: Mapping[str, np.ndarray], max_rows: int) -> list[slice]:
    """The rows of each request: in order, at most `max_rows`, and MAX_BYTES where one row has no more.

    No rows at all are one request. So are columns that differ in rows, which the server refuses.
    """
    lengths = {len(column) for column in columns.values()}
    rows = max(lengths)
    if len(lengths) > 1 or not rows:
        return [slice(0, rows)]
    starts, size = [0], 0
    for row in range(rows):
        added = sum(_row_bytes(column[row]) for column in columns.values())
        if row > starts[-1] and (row - starts[-1] == max_rows or size + added > MAX_BYTES):
            starts.append(row)
            size = 0
        size += added
    return [slice(start, stop) for start, stop in pairwise([*starts, rows])]


def _row_bytes(row: Any) -> int:
    return sum(4 + len(element) for element in row) if row.dtype == object else int(row.nbytes)


def _bytes_column(raws: Raws, expected: str) -> np.ndarray:
    if isinstance(raws, str | bytes | Mapping) or not _are_many(raws):
        raise BadInput(f"the examples are one {type(raws).__name__}; expected a list, each of it {expected}.")
    column = np.empty((len(raws), 1), object)
    for i, raw in enumerate(raws):
        if not isinstance(raw, str | bytes):
            raise BadInput(f"example {i} is of type {type(raw).__name__}; expected {expected}.")
        column[i, 0] = _encoded(raw, i)
    return column


def _are_many(values: Any) -> bool:
    """Whether values have a length. An iterator has none: it may never end, and can be read only once."""
    return isinstance(values, Collection) and getattr(values, "shape", None) != ()


def _encoded(raw: str | bytes, example: int) -> bytes:
    try:
        return raw.encode() if isinstance(raw, str) else raw
    except UnicodeEncodeError as error:
        raise BadInput(f"example {example} has a text that is not UTF-8: {error.reason} at {error.start}.") from error


def _pair_columns(raws: Raws) -> list[np.ndarray]:
    if not _are_many(raws):
        raise BadInput(f"the examples are one {type(raws).__name__}; expected a list, each of it a pair of texts.")
    pairs = []
    for i, raw in enumerate(raws):
        if isinstance(raw, str | bytes | Mapping | Set) or not _are_many(raw) or len(raw) != 2:
            raise BadInput(f"example {i} is no pair of texts; expected (first, second).")
        pairs.append(tuple(raw))
    return [_bytes_column([pair[side] for pair in pairs], "a pair of texts") for side in (0, 1)]


def _vectors(raws: Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    try:
        array = np.asarray(raws)
    except ValueError as error:  # the vectors differ in length
        raise BadInput(f"the vectors are no array: {error}.") from error
    if array.shape == (0,):
        array = np.zeros((0, size), np.float32)
    if array.dtype.kind not in "biuf" or array.ndim != 2 or array.shape[1] != size:
        raise BadInput(f"the vectors are {array.dtype} {list(array.shape)}; expected numbers of shape [-1, {size}].")
    with np.errstate(over="ignore"):  # the server says which number is not finite
        return array.astype(np.float32)


def _tensors(arrays: Any, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
    names = [spec.name for spec in specs]
    if not isinstance(arrays, Mapping) or set(arrays) != set(names):
        got = ", ".join(map(repr, arrays)) if isinstance(arrays, Mapping) else f"one {type(arrays).__name__}"
        raise BadInput(f"the examples are {got or 'nothing'}; expected arrays by name: {', '.join(map(repr, names))}.")
    return [conform(arrays[spec.name], spec, f"input {spec.name!r}") for spec in specs]

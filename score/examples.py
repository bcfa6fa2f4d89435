"""Columns of a file -> raw examples, as bundle.preprocess takes them. What cannot be one is a BadInput in its place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bundle import tensors, text, vector
from bundle.errors import BadInput, DataError
from bundle.manifest import ImageInput, Input, TensorsInput, TextInput, VectorInput
from bundle.tensor import TensorSpec, conform
from score.errors import Missing
from score.files import beside


class Stored(NamedTuple):
    """A raw example that lies in a file of its own, to be read where it is decoded."""

    path: str


Raw = bytes | Stored | BadInput
Raws = Sequence[Raw] | np.ndarray  # of vectors also float32 (N, size), what bundle.vector.decode makes of bytes


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what.

    Attributes:
        spec: of the examples.
        path: of the file, for messages, and for the paths of images in it.
        inputs: column of the bundle -> column of the file.
        keep: column of the output -> column of the file.
    """

    spec: Input
    path: str
    inputs: Mapping[str, str]
    keep: Mapping[str, str]

    @property
    def all(self) -> list[str]:
        """Of the file, each once."""
        return list(dict.fromkeys([*self.inputs.values(), *self.keep.values()]))


def renamed(given: Sequence[str], option: str) -> dict[str, str]:
    """NAME=COLUMN or NAME, as an option gives them, by name.

    Raises:
        DataError: a name is there twice, or missing.
    """
    names = dict((name, column or name) for name, _, column in (each.partition("=") for each in given))
    if len(names) < len(given) or "" in names:
        raise DataError(f"{option} {' '.join(given)} does not give each name once.")
    return names


def choose_columns(
    spec: Input, column: Mapping[str, str], keep: Mapping[str, str], present: Sequence[str], path: str
) -> Columns:
    """The columns of a file that are needed.

    Args:
        spec: of the examples.
        column: column of the bundle -> column of the file, where they differ.
        keep: column of the output -> column of the file.
        present: all columns of the file.
        path: of the file.

    Raises:
        DataError: one is not there, or there twice.
    """
    inputs = {name: column.get(name, name) for name in _needed(spec, column, present)}
    for name in (*inputs.values(), *keep.values()):
        if present.count(name) != 1:
            option = "that hold the examples with --column" if name in inputs.values() else "to keep with --keep"
            raise DataError(
                f"{path} has {present.count(name) or 'no'} columns {name!r}; its columns are "
                f"{', '.join(map(_shown, present)) or '(none)'}. Name those {option} NAME=COLUMN."
            )
    return Columns(spec, path, inputs, keep)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _needed(spec: Input, column: Mapping[str, str], present: Sequence[str]) -> tuple[str, ...]:
    match spec:
        case TensorsInput():
            return tuple(each.name for each in spec.tensors)
        case TextInput(pair=str(pair)):
            return (spec.column, pair)
        case VectorInput() if spec.names and column.get(spec.column, spec.column) not in present:
            return spec.names
        case _:
            return (spec.column,)


def input_names(spec: Input) -> set[str]:
    """Every name of a column that --column may give."""
    names = _needed(spec, {}, ())
    return {*names, spec.column} if isinstance(spec, VectorInput) else set(names)


def from_values(columns: Columns, rows: Sequence[Mapping[str, object] | BadInput]) -> list[Raw]:
    """Raw examples of rows of a text file: column of the file -> str, or what JSON has."""
    make = _maker(columns)
    return [row if isinstance(row, BadInput) else _attempt(make, row) for row in rows]


def _attempt(make: Callable[[Mapping[str, Any]], Raw], row: Mapping[str, object]) -> Raw:
    try:
        return make(row)
    except BadInput as error:
        return error


def _maker(columns: Columns) -> Callable[[Mapping[str, Any]], Raw]:
    spec, inputs = columns.spec, columns.inputs
    match spec:
        case TensorsInput():
            return lambda row: _tensors(spec, {name: _parsed(row.get(inputs[name]), name) for name in inputs})
        case VectorInput():
            return lambda row: _vector(spec, [_number(row.get(column), column) for column in inputs.values()], inputs)
        case TextInput(pair=str(pair)):
            first, second = inputs[spec.column], inputs[pair]
            return lambda row: text.join_raw_pair(_text(row.get(first), first), _text(row.get(second), second), spec)
        case ImageInput():
            column = inputs[spec.column]
            return lambda row: Stored(beside(columns.path, _text(row.get(column), column).decode()))
        case _:
            column = inputs[spec.column]
            return lambda row: _text(row.get(column), column)


def _text(value: object, column: str) -> bytes:
    """UTF-8; numbers and truth values are as JSON writes them."""
    if value is None:
        raise Missing(f"{column!r} is missing.")
    if isinstance(value, list | dict):
        raise BadInput(f"{column!r} is a {type(value).__name__}, not text.")
    if not isinstance(value, str):
        return msgspec.json.encode(value)
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadInput(f"{column!r} is not Unicode: it has half of a surrogate pair.") from error


def _parsed(value: object, column: str) -> object:
    """A value as JSON has it; of CSV the cell is JSON."""
    if value is None:
        raise Missing(f"{column!r} is missing.")
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadInput(f"{column!r} is not JSON: {error}.") from error


def _number(value: object, column: str) -> object:
    """A number, or a list of them."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        try:
            return float("" if "_" in value else value)  # Python reads 1_000 as 1000
        except ValueError as error:
            raise BadInput(f"{column!r} is no number but {value[:40]!r}.") from error
    return _parsed(value, column)


def _vector(spec: VectorInput, numbers: list[Any], inputs: Mapping[str, str]) -> bytes:
    values = numbers[0] if spec.column in inputs else numbers
    array = _conform(values, TensorSpec(spec.column, "FP64", (spec.size,)), "vector")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        return vector.encode(array)


def _conform(values: Any, spec: TensorSpec, where: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return conform(values, spec, where)


def _tensors(spec: TensorsInput, values: Mapping[str, object]) -> bytes:
    arrays = {}
    for each in spec.tensors:
        wanted = TensorSpec(each.name, each.datatype, each.shape)
        arrays[each.name] = _conform(values[each.name], wanted, f"tensor {each.name!r}")[None]
    return tensors.encode(arrays, spec)[0]


def from_arrow(columns: Columns, table: pa.Table) -> Raws:
    """Raw examples of the rows of a table.

    Raises:
        DataError: a column is of a type that can hold none.
    """
    spec, inputs = columns.spec, columns.inputs
    if isinstance(spec, VectorInput | TensorsInput):
        return _numbers_from_arrow(columns, table)
    found = [_strings(columns, table[column], column) for column in inputs.values()]
    match spec:
        case TextInput(pair=str()):
            both = zip(*found, strict=True)
            return [_attempt_pair(spec, *pair) for pair in both]
        case _:
            return found[0]


def _attempt_pair(spec: TextInput, first: Raw, second: Raw) -> Raw:
    if isinstance(first, bytes) and isinstance(second, bytes):
        try:
            return text.join_raw_pair(first, second, spec)
        except BadInput as error:
            return error
    return first if isinstance(first, BadInput) else second


def _strings(columns: Columns, column: pa.ChunkedArray, name: str) -> list[Raw]:
    """Texts as UTF-8, images as bytes; an image's path where the column holds text."""
    types, of = pa.types, column.type
    if types.is_dictionary(of):
        column, of = column.cast(of.value_type), of.value_type
    if isinstance(columns.spec, ImageInput) and types.is_struct(of) and of.get_field_index("bytes") >= 0:
        column = pa.chunked_array([pc.struct_field(chunk, "bytes") for chunk in column.chunks], pa.binary())
    try:
        if not (types.is_binary(of) or types.is_large_binary(of) or types.is_struct(of)):
            column = column.cast(pa.string())
        values = column.cast(pa.large_binary()).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"column {name!r} of {columns.path} holds {of}, not text or images: {error}.") from error
    missing = Missing(f"{name!r} is missing.")
    found: list[Raw] = [missing if value is None else value for value in values]
    if isinstance(columns.spec, ImageInput) and (types.is_string(of) or types.is_large_string(of)):
        return [Stored(beside(columns.path, raw.decode())) if isinstance(raw, bytes) else raw for raw in found]
    return found


def _numbers_from_arrow(columns: Columns, table: pa.Table) -> Raws:
    """Rows of numbers: all at once where no row differs from the others, else one by one."""
    blocks = _blocks(columns, table)
    if blocks is None:
        rows = (dict(zip(columns.inputs, row, strict=True)) for row in zip(*_cells(columns, table), strict=True))
        make = _maker(Columns(columns.spec, columns.path, {name: name for name in columns.inputs}, {}))
        return [_attempt(make, row) for row in rows]
    if isinstance(columns.spec, TensorsInput):
        return list(tensors.encode(blocks, columns.spec))
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        numbers = [each.reshape(len(table), -1).astype(np.float32, copy=False) for each in blocks.values()]
    return numbers[0] if len(numbers) == 1 else np.concatenate(numbers, axis=1)


def _cells(columns: Columns, table: pa.Table) -> list[list[Any]]:
    return [table[column].to_pylist() for column in columns.inputs.values()] or [list(repeat(None, len(table)))]


def _blocks(columns: Columns, table: pa.Table) -> dict[str, np.ndarray] | None:
    """An array (N, *shape) for each column, or None where a row lacks one or has another shape."""
    spec = columns.spec
    specs = (
        {each.name: TensorSpec(each.name, each.datatype, (-1, *each.shape)) for each in spec.tensors}
        if isinstance(spec, TensorsInput)
        else {}
    )
    blocks = {}
    for name, column in columns.inputs.items():
        block = _block(_whole(table[column]), columns, column)
        if block is None:
            return None
        if name in specs:
            try:
                block = conform(block, specs[name], name)
            except BadInput:
                return None
        elif block.size != len(table) * (spec.size if isinstance(spec, VectorInput) and name == spec.column else 1):
            return None
        blocks[name] = block
    return blocks


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array, copied only where there are several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _block(array: pa.Array, columns: Columns, column: str) -> np.ndarray | None:
    shape = [len(array)]
    types = pa.types
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array)
        if array.null_count or not len(array) or pc.min_max(lengths)["min"] != lengths[0]:
            return None
        if pc.min_max(lengths)["max"] != lengths[0]:
            return None
        shape.append(lengths[0].as_py())
        array = array.flatten()
    of = array.type
    if not (types.is_integer(of) or types.is_floating(of) or types.is_boolean(of)):
        raise DataError(f"column {column!r} of {columns.path} holds {of}, not numbers.")
    if array.null_count:
        return None
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values.reshape(shape)

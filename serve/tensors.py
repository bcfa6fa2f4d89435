"""Tensors of the wire <-> numpy arrays, raw and typed, for the server and its clients."""

import math
from collections.abc import Sequence

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES
from protos import inference_pb2 as pb

Tensor = pb.ModelInferRequest.InferInputTensor

_DATATYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> the field of InferTensorContents that holds it. FP16 and BF16 have none."""


def from_raw(raw: bytes | memoryview, datatype: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The array that an entry of raw contents holds; of numbers a view.

    Args:
        raw: little-endian, row-major, no padding; BYTES elements each after their length as uint32.
        datatype: a key of NUMPY_TYPES.
        shape: without negative lengths.
        where: what the errors call it.

    Raises:
        BadInput: the bytes are not exactly the elements of the shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _object_array(_split_elements(raw, count, shape, where), shape)
    dtype = NUMPY_TYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadInput(
            f"{where} has {len(raw)} raw bytes; expected {count * dtype.itemsize} for {datatype} {list(shape)}."
        )
    if datatype == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise BadInput(f"{where} has raw BOOL bytes other than 0 and 1; expected only these.")
    return np.frombuffer(raw, dtype).reshape(shape)


def _split_elements(raw: bytes | memoryview, count: int, shape: tuple[int, ...], where: str) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(elements) == count:
            raise BadInput(f"{where} has more than the {count} BYTES elements that shape {list(shape)} expects.")
        start = position + 4
        position = start + int.from_bytes(raw[position:start], "little")
        if start > len(raw) or position > len(raw):
            raise BadInput(f"{where} is cut off in BYTES element {len(elements)}; expected {count} whole ones.")
        elements.append(bytes(raw[start:position]))
    if len(elements) != count:
        raise BadInput(f"{where} has {len(elements)} BYTES elements; expected {count} for shape {list(shape)}.")
    return elements


def _object_array(elements: Sequence[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def from_contents(tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The array that the typed contents of an input hold.

    Args:
        tensor: of a datatype that NUMPY_TYPES has.
        shape: its own, without negative lengths.

    Raises:
        BadInput: the contents are in another field, are not exactly the elements of the shape, or an integer is outside
            the datatype.
    """
    where = f"input {tensor.name!r}"
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise BadInput(f"{where} has datatype {tensor.datatype}, which is expected in raw_input_contents only.")
    others = [descriptor.name for descriptor, _ in tensor.contents.ListFields() if descriptor.name != field]
    if others:
        raise BadInput(f"{where} has {', '.join(others)}; expected {field} for {tensor.datatype}.")
    values = getattr(tensor.contents, field)
    count = math.prod(shape)
    if len(values) != count:
        raise BadInput(f"{where} has {len(values)} elements in {field}; expected {count} for shape {list(shape)}.")
    if tensor.datatype == "BYTES":
        return _object_array(values, shape)
    return _numbers(tensor.contents, field, count, NUMPY_TYPES[tensor.datatype], where).reshape(shape)


def _numbers(contents: pb.InferTensorContents, field: str, count: int, dtype: np.dtype, where: str) -> np.ndarray:
    if dtype.kind == "f":  # serialised, they stand as they are behind a tag and a length: 100 times faster
        contents.DiscardUnknownFields()  # which would stand behind them
        data = contents.SerializeToString()
        return np.frombuffer(data, dtype, count, len(data) - count * dtype.itemsize)
    values = getattr(contents, field)
    if dtype.kind == "b" or dtype.itemsize >= 4:
        return np.fromiter(values, dtype, count)
    wide = np.fromiter(values, np.int64, count)  # sent in fields of 32 bits
    limits = np.iinfo(dtype)
    outside = wide[(wide < limits.min) | (wide > limits.max)]
    if len(outside):
        raise BadInput(f"{where} has the element {outside[0]}; expected {limits.min} to {limits.max}.")
    return wide.astype(dtype)


def to_raw(array: np.ndarray, datatype: str, where: str = "an array") -> bytes:
    """The array as an entry of raw contents; elements of BYTES are bytes or str.

    Args:
        array: any shape; numbers are not converted, only brought to little-endian order. BF16 in this machine's order.
        datatype: a key of NUMPY_TYPES that fits the array's dtype.
        where: what the errors call it.

    Raises:
        BadInput: an element of BYTES is something else, or a str that UTF-8 does not have.
    """
    if datatype == "BF16":
        return array.tobytes()
    if datatype != "BYTES":
        return array.astype(NUMPY_TYPES[datatype], order="C", casting="equiv", copy=False).tobytes()
    parts = []
    for element in array.ravel():
        data = _bytes(element, where)
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def _bytes(element: object, where: str) -> bytes:
    if isinstance(element, bytes):
        return element
    if not isinstance(element, str):
        raise BadInput(f"{where} has an element of type {type(element).__name__}; expected str or bytes.")
    try:
        return element.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where} has a text that is not UTF-8: {error.reason} at {error.start}.") from error


def datatype_of(array: np.ndarray, where: str) -> str:
    """The datatype of the protocol that holds an array's elements, whatever their byte order.

    Args:
        array: of numbers, truth values, texts or bytes; also of ml_dtypes.bfloat16.
        where: what the errors call it.

    Raises:
        BadInput: the protocol has none, or it is no array.
    """
    if not isinstance(array, np.ndarray | np.generic):
        raise BadInput(f"{where} is a {type(array).__name__}; expected an array of numpy.")
    if array.dtype.kind in "OSUT":  # T: numpy.dtypes.StringDType
        return "BYTES"
    datatype = "BF16" if array.dtype.name == "bfloat16" else _DATATYPES.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise BadInput(f"{where} has dtype {array.dtype}, which the protocol does not have.")
    return datatype

"""Tensors of the wire <-> numpy arrays. Everything that a request can get wrong about a tensor is found here."""

import math
from collections.abc import Sequence

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb

MAX_BYTES = 2**31 - 1  # of one tensor; no gRPC message is longer

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
"""Datatype -> the field of InferTensorContents that holds it. FP16 has none."""


def read_inputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """The arrays of a request, each of exactly the datatype and a shape that its spec allows.

    Args:
        request: as it came.
        specs: what the model takes.

    Returns:
        Arrays by name, read-only, little-endian; BYTES as objects that are bytes.

    Raises:
        BadInput: naming the input, what was expected and what came.
    """
    _check_names([tensor.name for tensor in request.inputs], specs)
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise BadInput(
            f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs; expected as many."
        )
    expected = {spec.name: spec for spec in specs}
    arrays = {}
    for position, tensor in enumerate(request.inputs):
        shape = _check_shape(tensor, expected[tensor.name])
        if raws and tensor.contents.ListFields():
            raise BadInput(f"input {tensor.name!r} has contents, but the request has raw_input_contents; send one.")
        if raws:
            arrays[tensor.name] = from_raw(raws[position], tensor.datatype, shape, f"input {tensor.name!r}")
        else:
            arrays[tensor.name] = _from_contents(tensor, shape)
    return arrays


def _check_names(names: Sequence[str], specs: Sequence[TensorSpec]) -> None:
    known = [spec.name for spec in specs]
    for name in names:
        if name not in known:
            raise BadInput(f"unexpected input {name!r}; the model takes {', '.join(map(repr, known)) or 'none'}.")
        if names.count(name) > 1:
            raise BadInput(f"input {name!r} is given {names.count(name)} times; expected once.")
    missing = [name for name in known if name not in names]
    if missing:
        raise BadInput(
            f"input {', '.join(map(repr, missing))} is missing: expected {len(known)} inputs, got {len(names)}."
        )


def _check_shape(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    where = f"input {tensor.name!r}"
    if tensor.datatype != spec.datatype:
        raise BadInput(f"{where} has datatype {tensor.datatype!r}; expected {spec.datatype}.")
    if len(shape) != len(spec.shape) or any(want not in (-1, got) for want, got in zip(spec.shape, shape, strict=True)):
        raise BadInput(f"{where} has shape {list(shape)}; expected {list(spec.shape)}, where -1 is any length.")
    if any(size < 0 for size in shape):
        raise BadInput(f"{where} has shape {list(shape)}; expected no negative length.")
    claimed = math.prod(max(size, 1) for size in shape) * NUMPY_TYPES[spec.datatype].itemsize  # also beside a 0
    if claimed > MAX_BYTES:
        raise BadInput(f"{where} has shape {list(shape)}, which is {claimed} bytes; expected at most {MAX_BYTES}.")
    return shape


def from_raw(raw: bytes, datatype: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The array that an entry of raw contents holds.

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


def _split_elements(raw: bytes, count: int, shape: tuple[int, ...], where: str) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(elements) == count:
            raise BadInput(f"{where} has more than the {count} BYTES elements that shape {list(shape)} expects.")
        start = position + 4
        position = start + int.from_bytes(raw[position:start], "little")
        if start > len(raw) or position > len(raw):
            raise BadInput(f"{where} is cut off in BYTES element {len(elements)}; expected {count} whole ones.")
        elements.append(raw[start:position])
    if len(elements) != count:
        raise BadInput(f"{where} has {len(elements)} BYTES elements; expected {count} for shape {list(shape)}.")
    return elements


def _object_array(elements: Sequence[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, shape: tuple[int, ...]) -> np.ndarray:
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
    dtype = NUMPY_TYPES[tensor.datatype]
    if dtype.kind in "iu" and dtype.itemsize < 4:  # sent in fields of 32 bits
        _check_range(values, np.iinfo(dtype), where)
    return np.array(values, dtype).reshape(shape)


def _check_range(values: Sequence[int], limits: np.iinfo, where: str) -> None:
    outside = next((value for value in values if not limits.min <= value <= limits.max), None)
    if outside is not None:
        raise BadInput(f"{where} has the element {outside}; expected {limits.min} to {limits.max}.")


def to_raw(array: np.ndarray, datatype: str) -> bytes:
    """The array as an entry of raw contents; elements of BYTES are bytes or str.

    Args:
        array: any shape; numbers are not converted, only brought to little-endian order.
        datatype: a key of NUMPY_TYPES that fits the array's dtype.
    """
    if datatype != "BYTES":
        return array.astype(NUMPY_TYPES[datatype], order="C", casting="equiv", copy=False).tobytes()
    parts = []
    for element in array.ravel():
        data = element.encode() if isinstance(element, str) else element
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def write_outputs(response: pb.ModelInferResponse, specs: Sequence[TensorSpec], arrays: dict[str, np.ndarray]) -> None:
    """Add the arrays that `specs` names to a response, in that order, raw."""
    for spec in specs:
        array = arrays[spec.name]
        response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        response.raw_output_contents.append(to_raw(array, spec.datatype))

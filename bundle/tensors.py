"""Raw bytes -> the tensors of one example: the only reading of them in the repository."""

from collections.abc import Mapping, Sequence

import numpy as np

from bundle.errors import BadInput
from bundle.manifest import TensorsInput
from bundle.tensor import NUMPY_TYPES


def row_dtype(spec: TensorsInput) -> np.dtype:
    """Of one example: a field for each tensor, packed, in their order."""
    return np.dtype([(tensor.name, NUMPY_TYPES[tensor.datatype], tensor.shape) for tensor in spec.tensors])


def decode(raw: bytes, spec: TensorsInput) -> np.ndarray:
    """One example, of row_dtype and without axes, from its bytes.

    Raises:
        BadInput: there are more or fewer bytes, a number is not finite, or a truth value neither 0 nor 1.
    """
    dtype = row_dtype(spec)
    if len(raw) != dtype.itemsize:
        parts = " and ".join(f"{tensor.name!r} {tensor.datatype} {list(tensor.shape)}" for tensor in spec.tensors)
        raise BadInput(f"the tensors have {len(raw)} bytes; expected {dtype.itemsize}, {parts}.")
    row = np.frombuffer(raw, dtype).reshape(())
    for tensor in spec.tensors:
        _check(tensor.name, row[tensor.name])
    return row


def _check(name: str, values: np.ndarray) -> None:
    if values.dtype.kind == "b":
        wrong = np.ascontiguousarray(values).view(np.uint8).reshape(values.shape) > 1
        fault = "tensor {!r} holds a byte that is neither 0 nor 1: element {}."
    elif values.dtype.kind == "f":
        wrong = ~np.isfinite(values)
        fault = "tensor {!r} is not finite: element {} is {}."
    else:
        return
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), values.shape)
        raise BadInput(fault.format(name, [int(index) for index in place], values[place]))


def encode(arrays: Mapping[str, np.ndarray], spec: TensorsInput) -> list[bytes]:
    """The raw bytes of N examples.

    Args:
        arrays: by the names of the tensors, of their datatypes and of shape (N, *shape).
        spec: the tensors.
    """
    rows = np.empty(len(arrays[spec.tensors[0].name]), row_dtype(spec))
    for tensor in spec.tensors:
        rows[tensor.name] = arrays[tensor.name]
    return [row.tobytes() for row in rows]


def collate(rows: Sequence[np.ndarray] | np.ndarray, spec: TensorsInput) -> dict[str, np.ndarray]:
    """Examples of row_dtype as one array (N, *shape) for each tensor."""
    return {tensor.name: np.stack([row[tensor.name] for row in rows]) for tensor in spec.tensors}

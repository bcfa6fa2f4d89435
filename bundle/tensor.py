"""Names, shapes and types of tensors, in the words of the Open Inference Protocol."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bundle.errors import BadInput

NUMPY_TYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("V2"),  # numpy has no such number: two bytes; .view(ml_dtypes.bfloat16) reads them
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),  # elements are bytes
}
"""Datatype of the protocol -> numpy dtype of the array, little-endian."""


@dataclass(frozen=True)
class TensorSpec:
    """What a model takes or gives under one name."""

    name: str
    datatype: str  # a key of NUMPY_TYPES
    shape: tuple[int, ...]  # -1 where any length is accepted

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.shape)}"


def conform(values: Any, spec: TensorSpec, where: str) -> np.ndarray:
    """Values as the array that a spec asks for: of its datatype, in a shape that it allows.

    Floats are rounded and integers become floats; no integer changes its value, and no float becomes one.

    Args:
        values: an array, or what numpy makes one of.
        spec: of numbers or truth values.
        where: what the errors call it.

    Raises:
        BadInput: they are of another shape or kind, or an integer is outside the datatype.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists that differ in length
        raise BadInput(f"{where} is no array: {error}.") from error
    dtype = NUMPY_TYPES[spec.datatype]
    integers = array.dtype.kind in "iu" and dtype.kind in "iu"
    same_rank = array.ndim == len(spec.shape)
    if not same_rank or any(want not in (-1, got) for want, got in zip(spec.shape, array.shape, strict=True)):
        raise BadInput(f"{where} has shape {list(array.shape)}; expected {list(spec.shape)}, where -1 is any length.")
    if not integers and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise BadInput(f"{where} holds {array.dtype}; expected {spec.datatype}.")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        converted = array.astype(dtype)
    if integers and not np.array_equal(converted, array):
        outside = array[converted != array][0]
        raise BadInput(f"{where} holds {outside}, which {spec.datatype} cannot.")
    return converted

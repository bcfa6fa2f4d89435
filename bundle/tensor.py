"""Names, shapes and types of tensors, in the words of the Open Inference Protocol."""

from dataclasses import dataclass

import numpy as np

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

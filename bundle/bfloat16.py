"""Runs of graphs with tensors of bfloat16, which numpy does not have: here an element is two raw bytes."""

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from bundle.errors import ModelError
from bundle.runtime import onnxruntime
from bundle.tensor import NUMPY_TYPES, TensorSpec

_BFLOAT16 = 16  # in ONNX's TensorProto.DataType


def check_no_strings(inputs: Sequence[TensorSpec]) -> None:
    """Refuse a graph that takes strings besides.

    Raises:
        ModelError: it does.
    """
    strings = [spec.name for spec in inputs if spec.datatype == "BYTES"]
    if strings:
        raise ModelError(
            f"the graph has tensors of BF16 and takes {strings[0]!r}, of BYTES: ONNX Runtime cannot be given both from "
            "Python. Cast one of them in the graph."
        )


def run(
    session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """As session.run, which knows no bfloat16."""
    values = {name: _ort_value(array) for name, array in feeds.items()}
    return [_array(value) for value in session.run_with_ort_values(names, values)]


def _ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    array = np.asarray(array, order="C")
    if array.dtype != NUMPY_TYPES["BF16"]:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        array: np.ndarray = value.numpy()
        return array
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())  # copied: the memory is the value's
    return np.frombuffer(data, NUMPY_TYPES["BF16"]).reshape(value.shape())

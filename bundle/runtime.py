"""The only import of onnxruntime in this package: after its telemetry is switched off."""

import os

from bundle.errors import MissingExtra

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, which already writes below HOME; "" and "0" leave it on
try:
    import onnxruntime
except ImportError as error:
    raise MissingExtra(
        "onnxruntime is not installed. Install edgeward with one of its extras 'cpu' and 'cuda'."
    ) from error

__all__ = ["DATATYPES", "onnxruntime"]

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""Type of a tensor as the runtime names it -> datatype of the protocol."""

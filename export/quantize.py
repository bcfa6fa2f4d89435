"""The fp32 graph in int8, dynamic and static. Which one ships is not decided here."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as ort_quantization  # bundle.session has switched telemetry off: see export/__init__.py
from onnxruntime.quantization.shape_inference import quant_pre_process

from bundle import preprocess
from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input
from export.quiet import silenced

DENSE = ("MatMul", "Gemm")
CONVOLUTIONAL = (*DENSE, "Conv", "Relu", "Clip", "Add", "Mul", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat")
"""What ONNX Runtime's CPU provider really runs in int8. Other operators would become islands between conversions."""


def int8_dynamic(graph: bytes) -> bytes:
    """Weights in int8 per channel; activations scaled at every run, over the whole batch.

    Its answers therefore depend on what an example is batched with: see bundle.model.predict_logits.
    """
    with _workspace() as folder:
        ort_quantization.quantize_dynamic(
            onnx.load_from_string(graph),
            folder / "int8.onnx",
            op_types_to_quantize=list(DENSE),
            weight_type=ort_quantization.QuantType.QInt8,
            per_channel=True,
        )
        return (folder / "int8.onnx").read_bytes()


def int8_static(graph: bytes, spec: Input, rows: Sequence[np.ndarray]) -> bytes:
    """Weights in int8 per channel, activations in uint8 with ranges seen on calibration examples (QDQ).

    Unsigned activations, because signed ones miss the fast kernels of x86-64.
    Of all but images only the dense layers become int8: around a text encoder's softmax, layer norms and additions, and
    between the layers of a small network on words or vectors, everything stays fp32.

    Args:
        graph: fp32.
        spec: of its input.
        rows: preprocessed training examples, run one at a time.
    """
    with _workspace() as folder:
        (folder / "fp32.onnx").write_bytes(graph)
        quant_pre_process(folder / "fp32.onnx", folder / "folded.onnx", skip_symbolic_shape=True)
        ort_quantization.quantize_static(
            folder / "folded.onnx",
            folder / "int8.onnx",
            _Calibration(spec, rows),
            quant_format=ort_quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(CONVOLUTIONAL if isinstance(spec, ImageInput) else DENSE),
            nodes_to_exclude=_scalings(onnx.load(folder / "folded.onnx")),
            activation_type=ort_quantization.QuantType.QUInt8,
            weight_type=ort_quantization.QuantType.QInt8,
            per_channel=True,
            calibrate_method=ort_quantization.CalibrationMethod.MinMax,
        )
        return (folder / "int8.onnx").read_bytes()


def _scalings(model: onnx.ModelProto) -> list[str]:
    """Additions and multiplications by constants, such as the scaling of the pixels.

    int8 would round here what the next convolution rounds anyway, by kernels that broadcast slowly: in
    EfficientNet-Lite0 they took 4 of 12 ms.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name for node in model.graph.node if node.op_type in ("Add", "Mul") and constants.intersection(node.input)
    ]


class _Calibration(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, spec: Input, rows: Sequence[np.ndarray]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = (preprocess.collate([row], spec) for row in rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder for the quantizer's files, its log silenced and its many errors mapped."""
    onnxruntime.set_default_logger_severity(4)  # the quantizer's own sessions; those of bundle.session have their own
    try:
        with silenced(), tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
            yield Path(folder)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the graph cannot be quantized: {reason[0]}") from error

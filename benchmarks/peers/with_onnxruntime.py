"""ONNX Runtime's own quantizer, as its documentation says: static (QDQ, U8S8) for CNNs, dynamic for transformers."""

import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from work import Calibration, Work, opened


def quantize(work: Work) -> str:
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(work.graph, prepared, skip_symbolic_shape=True)
        if work.job.kind == "text":
            quantize_dynamic(prepared, work.model)
            return "quant_pre_process, quantize_dynamic"
        quantize_static(
            prepared,
            work.model,
            Calibration(work),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return "quant_pre_process, quantize_static, QDQ, U8S8, per channel, MinMax"


if __name__ == "__main__":
    work = opened()
    work.finish(quantize(work), "onnxruntime", "onnx")

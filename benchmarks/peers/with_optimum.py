"""Optimum's ORTQuantizer with its configuration for AVX512-VNNI: static for CNNs, dynamic for transformers."""

import tempfile
from pathlib import Path

from onnxruntime.quantization import CalibrationMethod
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig
from work import Work, opened


def quantize(work: Work) -> str:
    static = work.job.kind == "image"
    chosen = AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=static)
    quantizer = ORTQuantizer(work.graph)
    with tempfile.TemporaryDirectory() as folder:
        ranges = None
        if static:
            examples = [{name: value[0] for name, value in feeds.items()} for feeds in work.calibration()]
            ranges = quantizer.fit(
                examples,
                CalibrationConfig("digits", "", "train", len(examples), CalibrationMethod.MinMax, moving_average=False),
                Path(folder) / "augmented.onnx",
                chosen.operators_to_quantize,
            )
        quantizer.quantize(chosen, folder, calibration_tensors_range=ranges)
        (Path(folder) / "fp32_quantized.onnx").rename(work.model)
    return f"ORTQuantizer, avx512_vnni, {'static, per channel, MinMax' if static else 'dynamic'}"


if __name__ == "__main__":
    work = opened()
    work.finish(quantize(work), "optimum-onnx", "optimum", "onnxruntime", "onnx")

"""ONNX Neural Compressor: static or dynamic quantization, or with NAME inc-autotune its tuning on the selection."""

import tempfile

import onnx
from onnx_neural_compressor.quantization import QuantFormat, config, quantize, tuning
from work import Calibration, Work, opened


def compress(work: Work) -> str:
    dynamic = work.job.kind == "text"
    reader = Calibration(work)
    seen = {} if dynamic else {"calibration_sampling_size": sum(1 for _ in work.calibration())}
    if work.name == "inc":
        chosen = (
            config.DynamicQuantConfig()
            if dynamic
            else config.StaticQuantConfig(
                calibration_data_reader=reader,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                **seen,
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            quantize(str(work.graph), f"{folder}/model.onnx", chosen)
            onnx.save(onnx.load(f"{folder}/model.onnx"), work.model)  # it may leave the weights in a second file
        return "DynamicQuantConfig" if dynamic else "StaticQuantConfig, QDQ, U8S8, per channel, MinMax"
    kind = config.DynamicQuantConfig if dynamic else config.StaticQuantConfig
    tuned = tuning.autotune(
        str(work.graph),
        tuning.TuningConfig(config_set=kind.get_config_set_for_tuning(**seen), tolerable_loss=work.job.budget),
        work.accuracy,
        calibration_data_reader=reader,
    )
    onnx.save(tuned, work.model)
    return f"autotune, {kind.__name__}.get_config_set_for_tuning, tolerable_loss {work.job.budget:g} relative"


if __name__ == "__main__":
    work = opened()
    work.finish(compress(work), "onnx-neural-compressor", "onnxruntime", "onnx")

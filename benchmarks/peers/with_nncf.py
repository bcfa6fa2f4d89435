"""NNCF on ONNX: nncf.quantize, or with NAME nncf-accuracy its accuracy control on the selection."""

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
from work import Feeds, Work, opened


def validate(model: onnx.ModelProto, items: Iterable[tuple[Feeds, int]]) -> tuple[float, list[list[np.ndarray]]]:
    """Accuracy, and the outputs of each example, by which NNCF ranks the layers."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs, right = [], []
    for feeds, label in items:
        outputs.append(session.run(None, feeds))
        right.append(int(np.argmax(outputs[-1][0])) == label)
    return float(np.mean(right)), outputs


def quantize(work: Work) -> str:
    model = onnx.load(work.graph)
    kind = nncf.ModelType.TRANSFORMER if work.job.kind == "text" else None
    calibration = nncf.Dataset(list(work.calibration()))
    common: dict[str, Any] = {
        "model_type": kind,
        "preset": nncf.QuantizationPreset.MIXED,  # unsigned activations: signed ones miss the fast kernels of x86-64
        "target_device": nncf.TargetDevice.CPU,
    }
    described = f"preset MIXED, model_type {kind.name if kind else None}"
    if work.name == "nncf":
        onnx.save(nncf.quantize(model, calibration, **common), work.model)
        return f"quantize, {described}"

    controlled = nncf.quantize_with_accuracy_control(
        model,
        calibration,
        nncf.Dataset(list(zip(work.selection(), work.labels(), strict=True)), lambda item: item[0]),
        validate,
        max_drop=work.job.budget,
        drop_type=nncf.DropType.ABSOLUTE,
        **common,
    )
    onnx.save(controlled, work.model)
    return f"quantize_with_accuracy_control, {described}, max_drop {work.job.budget:g} absolute"


if __name__ == "__main__":
    work = opened()
    work.finish(quantize(work), "nncf", "onnxruntime", "onnx")

"""The fp32 graph in int8: static by given ranges, dynamic, and weights alone. Which one ships is not decided here.

A heavy node is a convolution or a product with constant weights. What is cheap becomes int8 only where it follows one
that is, so that whatever stays in fp32 leaves no island behind.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as ort_quantization  # bundle.session has switched telemetry off: see export/__init__.py
from onnx import numpy_helper
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from bundle.errors import EdgewardError, ModelError
from bundle.manifest import ImageInput, Input
from bundle.session import optimized
from export.quiet import silenced

DENSE = ("MatMul", "Gemm")
HEAVY = (*DENSE, "Conv")
CONVOLUTIONAL = (*HEAVY, "Relu", "Clip", "Add", "Mul", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat")
"""What ONNX Runtime's CPU provider really runs in int8. Other operators would become islands between conversions."""
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")

Ranges = Mapping[str, tuple[float, float]]
"""Least and greatest value of activations, by tensor."""


def prepared(graph: bytes) -> bytes:
    """A graph as all static candidates start from it: constants folded, shapes inferred, every node named once.

    Raises:
        ModelError: the runtime cannot load it.
    """
    model = onnx.load_from_string(optimized(graph, level="basic"))
    del model.graph.value_info[:]  # of before the folding; shape inference trips over what is stale
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{i}"
        seen.add(node.name)
    with _mapped():
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        add_infer_metadata(model)
    return bytes(model.SerializeToString())


def int8_static(
    prepared: bytes,
    spec: Input,
    ranges: Ranges,
    *,
    per_channel: bool = True,
    signed: bool = False,
    kept: Collection[str] = (),
) -> bytes:
    """Weights in int8, activations in 8 bits with given ranges (QDQ).

    Of all but images only the dense layers become int8: around a text encoder's softmax, layer norms and additions, and
    between the layers of a small network on words or vectors, everything stays fp32.

    Args:
        prepared: fp32, as `prepared` gives it.
        spec: of its input.
        ranges: of the tensors that `activations` names, as `export.ranges` measures them; zero is included.
        per_channel: one scale of the weights for each output channel, instead of one for all.
        signed: activations in int8, as arm64 wants them, instead of uint8; those miss the fast kernels of x86-64.
        kept: nodes that stay in fp32, by name.

    Raises:
        ModelError: nothing can be quantized, or a node cannot; it is named.
    """
    model = onnx.load_from_string(prepared)
    nodes = _quantized(model, spec, kept)
    constants = _constants(model)
    wanted = _activations(model, nodes)
    _check(nodes, constants, ranges, wanted)
    with _mapped():
        quantizer = QDQQuantizer(
            model,
            per_channel,
            False,
            ort_quantization.QuantType.QInt8,
            ort_quantization.QuantType.QInt8 if signed else ort_quantization.QuantType.QUInt8,
            TensorsData(
                ort_quantization.CalibrationMethod.MinMax, {name: _tensor_data(*ranges[name]) for name in wanted}
            ),
            [node.name for node in nodes],
            [],
            list(CONVOLUTIONAL),
            {},
        )
        return bytes(quantizer.quantize_model().SerializeToString())


def activations(prepared: bytes, spec: Input) -> tuple[str, ...]:
    """The tensors whose ranges `int8_static` may need, in graph order."""
    model = onnx.load_from_string(prepared)
    return _activations(model, _quantized(model, spec, ()))


def int8_dynamic(graph: bytes, *, kept: Collection[str] = ()) -> bytes:
    """Weights in int8 per channel; activations scaled at every run, over the whole batch.

    Its answers therefore depend on what an example is batched with: see bundle.model.predict_logits.

    Args:
        graph: fp32.
        kept: nodes that stay in fp32, by name.

    Raises:
        ModelError: it cannot be quantized.
    """
    with _mapped(), tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
        ort_quantization.quantize_dynamic(
            onnx.load_from_string(graph),
            Path(folder) / "int8.onnx",
            op_types_to_quantize=list(DENSE),
            weight_type=ort_quantization.QuantType.QInt8,
            nodes_to_exclude=list(kept),
            per_channel=True,
        )
        return (Path(folder) / "int8.onnx").read_bytes()


def _quantized(model: onnx.ModelProto, spec: Input, kept: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes that become int8: heavy ones that are not kept, and cheap ones that follow an int8 node."""
    constants, made, nodes = set(_constants(model)), set[str](), []
    types = CONVOLUTIONAL if isinstance(spec, ImageInput) else DENSE
    for node in model.graph.node:
        if node.op_type not in types or node.name in kept:
            continue
        # int8 would round in a scaling by constants what the next convolution rounds anyway, by kernels that broadcast
        # slowly: in EfficientNet-Lite0 they took 4 of 12 ms.
        scaling = node.op_type in ("Add", "Mul") and constants.intersection(node.input)
        if not scaling and (node.op_type in HEAVY or made.intersection(node.input)):
            nodes.append(node)
            made.update(node.output)
    return nodes


def _activations(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> tuple[str, ...]:
    constants = _constants(model)
    return tuple(
        dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name and name not in constants)
    )


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _check(
    nodes: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], ranges: Ranges, wanted: Collection[str]
) -> None:
    """Refuse what the quantizer would not explain."""
    if not any(node.op_type in HEAVY for node in nodes):
        raise ModelError(f"the graph cannot be quantized: it has no {', '.join(HEAVY)} left to become int8.")
    for node in nodes:
        for name in (*node.input, *node.output):
            where = f"{node.op_type} {node.name!r} cannot be quantized"
            if name in wanted and not np.all(np.isfinite(ranges.get(name, (np.nan, np.nan)))):
                found = ranges.get(name, "missing")
                raise ModelError(f"{where}: the range of tensor {name!r} is {found}. Keep the node in fp32.")
            if name in constants and not np.isfinite(numpy_helper.to_array(constants[name])).all():
                raise ModelError(f"{where}: its weights {name!r} are not finite.")


def _tensor_data(least: float, greatest: float) -> TensorData:
    return TensorData(lowest=np.float32(min(least, 0)), highest=np.float32(max(greatest, 0)))


@contextmanager
def _mapped() -> Iterator[None]:
    """The quantizer's log silenced, and its many errors mapped."""
    onnxruntime.set_default_logger_severity(4)  # the quantizer's own sessions; those of bundle.session have their own
    try:
        with silenced():
            yield
    except EdgewardError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the graph cannot be quantized: {reason[0]}") from error

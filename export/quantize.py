"""The fp32 graph in int8: static by given ranges, dynamic, and weights alone. Which one ships is not decided here."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
from export import ranges
from export.correction import corrected as corrected
from export.dense import int8_products
from export.fusion import forget_shapes
from export.islands import hold_fp32
from export.nodes import attributes, constant_values, drop_unused, name_nodes
from export.placement import CONVOLUTIONAL, DENSE, HEAVY, activations, placed
from export.placement import Group as Group
from export.placement import groups as groups
from export.placement import leftovers as leftovers
from export.quiet import silenced
from export.stem import pack_stem
from export.stem import stem as stem
from export.stem import suits as suits

_NO_PRODUCT = f"the graph cannot be quantized: it has no {', '.join(DENSE)} of a tensor with a constant matrix."
Ranges = Mapping[str, tuple[float, float]]
"""Least and greatest value of activations, by tensor."""


def prepared(graph: bytes, *, packed: bool = False) -> bytes:
    """A graph as all static candidates start from it: constants folded, shapes inferred, every node named once.

    Args:
        graph: fp32.
        packed: whether its first convolution is rewritten for int8, see export.stem.

    Raises:
        ModelError: the runtime cannot load it.
    """
    model = onnx.load_from_string(optimized(graph, level="basic"))
    forget_shapes(model)  # of before the folding
    name_nodes(model.graph)
    _plain_biases(model.graph)
    if packed:
        pack_stem(model)
    with _mapped():
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        add_infer_metadata(model)
    return bytes(model.SerializeToString())


def _plain_biases(graph: onnx.GraphProto) -> None:
    """Constant biases of Gemm as the quantizers take them, one number for each column, in place."""
    known = constant_values(graph)
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or not {node.input[1], node.input[2]} <= known.keys():
            continue
        settings, bias = attributes(node), known[node.input[2]]
        columns = known[node.input[1]].shape[0 if settings.get("transB") else 1]
        alike = bias.size == 1 or (bias.size == columns and bias.shape[-1] == columns)  # for all rows
        if not alike or (bias.shape == (columns,) and settings.get("beta", 1) == 1):
            continue
        plain = np.broadcast_to(bias.reshape(-1) * bias.dtype.type(settings.get("beta", 1)), columns)
        node.input[2] = f"{node.name}.bias"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(plain), node.input[2]))
        rest = [each for each in node.attribute if each.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(rest)
    drop_unused(graph)


def int8_static(
    prepared: bytes,
    spec: Input,
    known: Ranges,
    *,
    per_channel: bool = True,
    signed: bool = False,
    kept: Collection[str] = (),
    qdq: bool = False,
) -> bytes:
    """Weights in int8, activations in 8 bits with given ranges.

    Which nodes become int8 is decided in export.placement. Graphs of images become QDQ, what is between two int8 nodes
    included; of all others only the inputs of the products become int8, see export.dense.

    Args:
        prepared: fp32, as `prepared` gives it.
        spec: of its input.
        known: ranges of the activations, as export.ranges gives them; zero is included.
        per_channel: one scale of the weights for each output channel, instead of one for all.
        signed: activations in int8, as arm64 wants them, instead of uint8; those miss the fast kernels of x86-64.
        kept: nodes that stay in fp32, by name.
        qdq: QDQ whatever the input is, for a provider that has no other int8.

    Raises:
        ModelError: nothing can be quantized, or a node cannot; it is named.
    """
    model = onnx.load_from_string(prepared)
    nodes = placed(model, spec, kept)
    wanted = activations(model, nodes)
    _check(model, nodes, known, wanted)
    if not qdq and not isinstance(spec, ImageInput):
        if not int8_products(model, {node.name for node in nodes}, known, per_channel=per_channel, signed=signed):
            raise ModelError(_NO_PRODUCT)
        return bytes(model.SerializeToString())
    with _mapped():
        found = {name: known[name] for name in wanted}
        model = _with_conversions(model, [node.name for node in nodes], found, per_channel=per_channel, signed=signed)
        if not qdq:
            hold_fp32(model)
        return bytes(model.SerializeToString())


def _with_conversions(
    model: onnx.ModelProto, nodes: Sequence[str], known: Ranges, *, per_channel: bool, signed: bool
) -> onnx.ModelProto:
    """QDQ of these nodes, by the ranges of what they take and give."""
    quantizer = QDQQuantizer(
        model,
        per_channel,
        False,
        ort_quantization.QuantType.QInt8,
        ort_quantization.QuantType.QInt8 if signed else ort_quantization.QuantType.QUInt8,
        TensorsData(
            ort_quantization.CalibrationMethod.MinMax, {name: _tensor_data(*each) for name, each in known.items()}
        ),
        nodes,
        [],
        list(CONVOLUTIONAL),
        {},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # it appends its conversions
    converted: onnx.ModelProto = quantizer.model.model
    return converted


def int8_minmax(graph: bytes, spec: Input, rows: Sequence[np.ndarray]) -> bytes:
    """Static int8 in one step, by every value seen in preprocessed training examples."""
    start = prepared(graph, packed=suits(signed=False))
    return int8_static(start, spec, ranges.ranges(ranges.observe(start, spec, rows), "minmax"))


def int8_dynamic(graph: bytes, *, per_channel: bool = True, kept: Collection[str] = ()) -> bytes:
    """Weights in int8; activations scaled at every run, over the whole batch.

    Its answers therefore depend on what an example is batched with: see bundle.model.predict_logits.

    Args:
        graph: fp32.
        per_channel: one scale of the weights for each output channel, instead of one for all.
        kept: nodes that stay in fp32, by name.

    Raises:
        ModelError: it cannot be quantized.
    """
    with _mapped():
        model = onnx.load_from_string(graph)
        name_nodes(model.graph)
        _plain_biases(model.graph)
        names = {node.name for node in model.graph.node if node.op_type in DENSE and node.name not in kept}
        if not int8_products(model, names, None, per_channel=per_channel):
            raise ModelError(_NO_PRODUCT)
        return bytes(model.SerializeToString())


def _check(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], known: Ranges, wanted: Collection[str]) -> None:
    """Refuse what the quantizer would not explain."""
    if not any(node.op_type in HEAVY for node in nodes):
        raise ModelError(f"the graph cannot be quantized: it has no {', '.join(HEAVY)} left to become int8.")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:
        for name in (*node.input, *node.output):
            where = f"{node.op_type} {node.name!r} cannot be quantized"
            if name in wanted and not np.isfinite(known.get(name, (np.nan,))).all():
                found = known.get(name, "missing")
                raise ModelError(f"{where}: the range of tensor {name!r} is {found}. Keep the node in fp32.")
            if name in weights and not np.isfinite(numpy_helper.to_array(weights[name])).all():
                raise ModelError(f"{where}: its weights {name!r} are not finite. Keep the node in fp32.")


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

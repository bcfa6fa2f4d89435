"""Bias correction: int8 moves the mean of each channel; what it moves is taken back from the bias.

Nagel et al. 2019, Data-free quantization through weight equalization and bias correction, section 4.2, in the empirical
form: both means are measured on calibration examples.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from bundle import preprocess
from bundle.manifest import Input
from bundle.session import Session
from export.placement import HEAVY
from export.ranges import with_outputs

EXAMPLES = 32


@dataclass(frozen=True)
class _Bias:
    """The constant that a heavy node adds, and the scale of its integers; 1 where it is in fp32."""

    tensor: onnx.TensorProto
    scale: np.ndarray


def corrected(quantized: bytes, prepared: bytes, spec: Input, rows: Sequence[np.ndarray]) -> bytes:
    """Static int8 whose heavy nodes give the fp32 graph's mean, channel by channel.

    One layer after the other, as a corrected one moves those behind it: all at once they would be corrected for the
    same error again and again. It takes as many runs over the examples as there are layers.

    Args:
        quantized: what quantize.int8_static made of `prepared`.
        prepared: fp32.
        spec: of its input.
        rows: preprocessed training examples, of which EXAMPLES are used.
    """
    model = onnx.load_from_string(quantized)
    biases = _biases(model)
    rows = rows[:EXAMPLES]
    wanted = _means(prepared, spec, rows, biases)
    for name, bias in biases.items():
        found = _means(bytes(model.SerializeToString()), spec, rows, (name,))
        _add(bias, wanted[name] - found[name])
    return bytes(model.SerializeToString())


def _add(bias: _Bias, change: np.ndarray) -> None:
    values = numpy_helper.to_array(bias.tensor)
    moved = values + change.reshape(values.shape) / bias.scale
    if values.dtype == np.int32:
        moved = np.clip(np.rint(moved), np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    bias.tensor.CopyFrom(numpy_helper.from_array(moved.astype(values.dtype), bias.tensor.name))


def _means(graph: bytes, spec: Input, rows: Sequence[np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """Mean of each output channel of these nodes, float64 (C,), over the examples and all positions."""
    nodes = {node.name: node for node in onnx.load_from_string(graph).graph.node if node.name in names}
    outputs = {name: node.output[0] for name, node in nodes.items()}
    session = Session(with_outputs(graph, outputs.values()), device="cpu")
    sums: dict[str, np.ndarray] = {}
    counts = dict.fromkeys(names, 0)
    for row in rows:
        values = session.run(preprocess.collate([row], spec))
        for name, output in outputs.items():
            channels = 1 if nodes[name].op_type == "Conv" else -1
            columns = np.moveaxis(values[output], channels, -1).reshape(-1, values[output].shape[channels])
            sums[name] = sums.get(name, 0) + columns.sum(axis=0, dtype=np.float64)
            counts[name] += len(columns)
    return {name: sums[name] / counts[name] for name in names}


def _biases(model: onnx.ModelProto) -> Mapping[str, _Bias]:
    """By heavy node in int8: the bias of a convolution or Gemm, or the constant that is added to a product."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, _Bias] = {}
    for node in model.graph.node:
        weights = makers.get(node.input[1]) if node.op_type in HEAVY else None
        if weights is None or weights.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        bias = makers.get(node.input[2])
        if bias is not None and bias.input[0] in constants:
            found[node.name] = _Bias(constants[bias.input[0]], numpy_helper.to_array(constants[bias.input[1]]))
    return found

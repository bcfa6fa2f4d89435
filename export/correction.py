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


def corrected(
    quantized: bytes, prepared: bytes, spec: Input, rows: Sequence[np.ndarray], *, known: bytes | None = None
) -> bytes:
    """Static int8 whose heavy nodes give the fp32 graph's mean, channel by channel.

    One layer after the other, as a corrected one moves those behind it: all at once they would be corrected for the
    same error again and again. It takes as many runs over the examples as there are layers.

    Args:
        quantized: what quantize.int8_static made of `prepared`.
        prepared: fp32.
        spec: of its input.
        rows: preprocessed training examples, of which EXAMPLES are used.
        known: the same model, corrected, with more layers in int8. Its biases are taken where the layer is as it is
            there: layers in front of it give the same means in both.
    """
    model = onnx.load_from_string(quantized)
    biases = _biases(model)
    if known is not None:
        biases = _unlike(biases, _biases(onnx.load_from_string(known)))
    rows = rows[:EXAMPLES]
    wanted = _means(prepared, spec, rows, biases)
    for name, bias in biases.items():
        found = _means(bytes(model.SerializeToString()), spec, rows, (name,))
        _add(bias, wanted[name] - found[name])
    return bytes(model.SerializeToString())


def _unlike(biases: Mapping[str, _Bias], known: Mapping[str, _Bias]) -> dict[str, _Bias]:
    """Those of which nothing is known; the others become what is known of them."""
    left = {}
    for name, bias in biases.items():
        like = known.get(name)
        if like is None or (like.tensor.data_type, like.tensor.dims) != (bias.tensor.data_type, bias.tensor.dims):
            left[name] = bias
        else:
            bias.tensor.CopyFrom(like.tensor)
    return left


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
    """By heavy node: the bias of a convolution or Gemm that is constant, in int8 or in fp32.

    A node in fp32 passes on, and may enlarge, what int8 before it has moved.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, _Bias] = {}
    for node in model.graph.node:
        if node.op_type not in HEAVY or len(node.input) < 3:
            continue
        values, *rest = makers[node.input[2]].input if node.input[2] in makers else node.input[2:]
        if values in constants:
            scale = numpy_helper.to_array(constants[rest[0]]) if rest else np.ones(1)
            found[node.name] = _Bias(constants[values], scale)
    return found

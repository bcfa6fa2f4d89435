"""Layers in fp32 between layers in int8, and how they stay what they are."""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bundle.errors import ModelError
from export.nodes import constant_values, drop_unused, taken

_QUANTIZED_AT_LOADING = ("Conv", "ConvTranspose", "Gemm")
_MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")


def hold_fp32(model: onnx.ModelProto) -> None:
    """Keep ONNX Runtime from making layers int8 that were left in fp32, in place.

    When it loads a graph, its WeightBiasQuantization gives every such layer between two conversions weights in int8,
    with one scale for all channels, which nobody measured: one depthwise convolution of EfficientNet-Lite0 that was to
    stay in fp32 took the KL divergence from 0.1 to 8.9. It leaves those alone whose input has a scale for each
    channel; so their inputs get one, the same for all.

    Args:
        model: QDQ, with the shapes of its tensors.

    Raises:
        ModelError: how many channels such an input has is not known.
    """
    graph = model.graph
    known = constant_values(graph)
    makers = {output: node for node in graph.node for output in node.output}
    dequantized: dict[str, onnx.NodeProto] = {}  # by the conversion that is replaced
    for node in list(graph.node):
        if node.op_type not in _QUANTIZED_AT_LOADING or node.input[1] not in known:
            continue
        reader, maker = node, makers.get(node.input[0])
        while maker is not None and maker.op_type in _MOVES:  # the runtime moves conversions behind these
            reader, maker = maker, makers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or known[maker.input[1]].size != 1:
            continue
        if maker.name not in dequantized:
            channels = _channels(model, makers[maker.input[0]].input[0], node)
            dequantized[maker.name] = _by_channel(graph, maker, channels)
            graph.node.append(dequantized[maker.name])
        reader.input[0] = dequantized[maker.name].output[0]
    _drop_unread(graph, dequantized)


def _channels(model: onnx.ModelProto, tensor: str, node: onnx.NodeProto) -> int:
    for value in (*model.graph.value_info, *model.graph.input):
        dimensions = value.type.tensor_type.shape.dim
        if value.name == tensor and len(dimensions) > 1 and dimensions[1].dim_value > 0:
            return dimensions[1].dim_value
    raise ModelError(f"{node.op_type} {node.name!r} cannot stay in fp32: the shape of tensor {tensor!r} is not known.")


def _by_channel(graph: onnx.GraphProto, scalar: onnx.NodeProto, channels: int) -> onnx.NodeProto:
    """The same conversion with a scale and a zero point for each channel."""
    known = constant_values(graph)
    name, (quantized, *parameters) = f"{scalar.name}_by_channel", scalar.input
    vectors = [f"{name}_{kind}" for kind in ("scales", "zero_points")]
    for parameter, vector in zip(parameters, vectors, strict=True):
        values = np.full(channels, known[parameter].reshape(()))
        graph.initializer.append(numpy_helper.from_array(values, vector))
    return helper.make_node("DequantizeLinear", [quantized, *vectors], [name], name, axis=1)


def _drop_unread(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Remove those of these nodes that nothing reads any more: the runtime would run them all the same."""
    read = {value.name for value in graph.output}.union(*(taken(node) for node in graph.node))
    nodes = [node for node in graph.node if node.name not in names or not read.isdisjoint(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)

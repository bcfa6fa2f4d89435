"""Layers in fp32 between layers in int8, and how they stay what they are."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bundle.errors import ModelError
from export.nodes import constant_values, prune

_QUANTIZED_AT_LOADING = ("Conv", "ConvTranspose", "Gemm")
_MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")


def hold_fp32(model: onnx.ModelProto) -> None:
    """Keep ONNX Runtime from making layers int8 that were left in fp32, in place.

    When it loads a graph, its WeightBiasQuantization gives every such layer between two conversions weights in int8,
    with one scale for all channels, which nobody measured: one depthwise convolution of EfficientNet-Lite0 that was to
    stay in fp32 took the KL divergence from 0.1 to 8.9. It leaves those alone whose input has a scale for each
    channel; so their inputs get one, the same for all.

    Args:
        model: QDQ, with the shapes of its tensors, its nodes behind those that they read.

    Raises:
        ModelError: how many channels such an input has is not known.
    """
    graph = model.graph
    known = constant_values(graph)
    makers = {output: node for node in graph.node for output in node.output}
    replaced: dict[str, onnx.NodeProto] = {}  # by the output of the conversion that it stands for
    for node in graph.node:
        if node.op_type not in _QUANTIZED_AT_LOADING or node.input[1] not in known:
            continue
        reader, maker = node, makers.get(node.input[0])
        while maker is not None and maker.op_type in _MOVES:  # the runtime moves conversions behind these
            reader, maker = maker, makers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or known[maker.input[1]].size != 1:
            continue
        (value,) = maker.output
        if value not in replaced:
            channels = _channels(model, makers[maker.input[0]].input[0], node)
            replaced[value] = _by_channel(graph, maker, [known[name] for name in maker.input[1:]], channels)
        reader.input[0] = replaced[value].output[0]
    nodes = [each for node in graph.node for each in (node, replaced.get(node.output[0])) if each is not None]
    del graph.node[:]
    graph.node.extend(nodes)
    prune(graph)


def _channels(model: onnx.ModelProto, tensor: str, node: onnx.NodeProto) -> int:
    for value in (*model.graph.value_info, *model.graph.input):
        dimensions = value.type.tensor_type.shape.dim
        if value.name == tensor and len(dimensions) > 1 and dimensions[1].dim_value > 0:
            return dimensions[1].dim_value
    raise ModelError(f"{node.op_type} {node.name!r} cannot stay in fp32: the shape of tensor {tensor!r} is not known.")


def _by_channel(
    graph: onnx.GraphProto, scalar: onnx.NodeProto, parameters: Sequence[np.ndarray], channels: int
) -> onnx.NodeProto:
    """The same conversion with a scale and a zero point for each channel."""
    name = f"{scalar.output[0]}_by_channel"
    vectors = [f"{name}_{kind}" for kind in ("scales", "zero_points")]
    for parameter, vector in zip(parameters, vectors, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.full(channels, parameter.reshape(())), vector))
    return helper.make_node("DequantizeLinear", [scalar.input[0], *vectors], [name], name, axis=1)

"""Embedding tables in int8: most of a small text model's bytes, and next to none of its time."""

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper

LARGE = 1 << 18
"""Numbers of a table, from which on it pays: a megabyte in fp32. A smaller one would cost more time than it saves."""


def quantized_embeddings(graph: bytes) -> bytes:
    """The large tables whose rows are looked up in int8, one scale for each column.

    A scale for each row would be as accurate but would itself have to be looked up; one for the whole table, as others
    have it, has a fifth more error in the logits of MiniLM. What was looked up is fp32 again.

    Args:
        graph: a serialised ONNX model. Left as they are: tables that are not float32 (V, D), that something else reads
            or that hold what is not finite.
    """
    model = onnx.load_from_string(graph)
    readers = defaultdict(list)
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers[name].append(_looks_up(node) and position == 0)
    for tensor in list(model.graph.initializer):
        if _is_table(tensor) and readers[tensor.name] and all(readers[tensor.name]):
            _quantize(model.graph, tensor)
    return bytes(model.SerializeToString())


def _looks_up(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and all(attribute.i == 0 for attribute in node.attribute)


def _is_table(tensor: onnx.TensorProto) -> bool:
    large = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= LARGE
    return bool(large and np.isfinite(numpy_helper.to_array(tensor)).all())


def _quantize(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    """Replace a table, and let a Cast and a Mul follow each node that reads it.

    DequantizeLinear with a scale for each column takes a number at a time, and twice as long.
    """
    table, name = numpy_helper.to_array(tensor), tensor.name
    scales = np.maximum(np.abs(table).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)
    int8 = np.rint(table / scales).clip(-127, 127).astype(np.int8)
    graph.initializer.remove(tensor)
    graph.initializer.append(numpy_helper.from_array(int8, f"{name}_int8"))
    graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        graph.node.append(node)
        if node.input[:1] == [name]:
            gathered, wanted = f"{node.output[0]}_int8", node.output[0]
            graph.node[-1].input[0], graph.node[-1].output[0] = f"{name}_int8", gathered
            numbers = f"{wanted}_numbers"
            graph.node.append(helper.make_node("Cast", [gathered], [numbers], f"{node.name}_numbers", to=1))
            graph.node.append(
                helper.make_node("Mul", [numbers, f"{name}_scales"], [wanted], f"{node.name}_dequantized")
            )

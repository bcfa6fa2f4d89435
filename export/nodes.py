"""What all that rewrite a graph ask of its nodes."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_QUANTIZED = ("QuantizeLinear", "DynamicQuantize", "QLinear", "QGemm", "QAttention")


def constant_values(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The values of the initializers, by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The values of a node's attributes, by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Those of a condition or a loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def taken(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, of values around it that its subgraphs read included."""
    names = set(node.input)
    for graph in subgraphs(node):
        names.update(value.name for value in graph.output)
        names.update(*(taken(inner) for inner in graph.node))
    return names


def is_quantized(graph: onnx.GraphProto) -> bool:
    """Whether some of it is computed in int8, whose answers hang on the kernels of the machine."""
    return any(
        "Integer" in node.op_type or node.op_type.startswith(_QUANTIZED) or any(map(is_quantized, subgraphs(node)))
        for node in graph.node
    )


def prune(graph: onnx.GraphProto) -> None:
    """Forget the nodes and initializers that no output needs, which the runtime would run all the same.

    Args:
        graph: its nodes stand behind those that they read.
    """
    needed, nodes = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed |= taken(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    drop_unused(graph)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Forget the initializers that nothing reads."""
    used = {value.name for value in graph.output}.union(*(taken(node) for node in graph.node))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own; a name that only one node has stays."""
    given = {node.name for node in graph.node}
    seen = {""}
    for place, node in enumerate(graph.node):
        if node.name in seen:
            base = node.name or node.op_type
            node.name = next(name for i in count(place) if (name := f"{base}_{i}") not in given | seen)
        seen.add(node.name)

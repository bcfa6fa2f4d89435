"""Which nodes become int8, and which of them belong together."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx

from bundle.manifest import ImageInput, Input
from bundle.session import optimized

DENSE = ("MatMul", "Gemm")
HEAVY = (*DENSE, "Conv")
CONVOLUTIONAL = (*HEAVY, "Relu", "Clip", "Add", "Mul", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat")
"""What ONNX Runtime's CPU provider really runs in int8. Other operators would become islands between conversions."""
_MOVES = ("Reshape", "Transpose")  # of numbers, whatever they are
_POOLS = ("GlobalAveragePool", "ReduceMean")


@dataclass(frozen=True)
class Group:
    """Nodes that become int8, or stay in fp32, as one.

    Attributes:
        name: that of its heavy nodes, for reports.
        nodes: names of all its nodes.
    """

    name: str
    nodes: tuple[str, ...]


def placed(model: onnx.ModelProto, spec: Input, kept: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The nodes that become int8: heavy ones that are not kept, and cheap ones that follow an int8 node.

    A heavy node is a convolution or a matrix product. Of all but images only those become int8: around a text encoder's
    softmax, layer norms and additions, and between the layers of a small network, everything stays fp32.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    made, nodes = set[str](), []
    types = CONVOLUTIONAL if isinstance(spec, ImageInput) else DENSE
    for node in model.graph.node:
        if node.op_type in _MOVES and node.input[0] in made:
            made.update(node.output)
        if node.op_type not in types or node.name in kept:
            continue
        # int8 would round in a scaling by constants what the next convolution rounds anyway, by kernels that broadcast
        # slowly: in EfficientNet-Lite0 they took 4 of 12 ms.
        scaling = node.op_type in ("Add", "Mul") and not ranks.keys().isdisjoint(node.input)
        batched = node.op_type == "MatMul" and any(ranks.get(name, 2) != 2 for name in node.input)
        if not scaling and not batched and (node.op_type in HEAVY or not made.isdisjoint(node.input)):
            nodes.append(node)
            made.update(node.output)
    return nodes


def activations(model: onnx.ModelProto, nodes: Collection[onnx.NodeProto]) -> tuple[str, ...]:
    """The tensors that these nodes take and give, in graph order."""
    known = constants(model)
    names = (name for node in nodes for name in (*node.input, *node.output))
    return tuple(dict.fromkeys(name for name in names if name and name not in known))


def constants(model: onnx.ModelProto) -> set[str]:
    """The names of all constant tensors."""
    return {tensor.name for tensor in model.graph.initializer}


def groups(prepared: bytes, spec: Input) -> tuple[Group, ...]:
    """All that can be int8, in graph order, cut so that no cut parts what the runtime runs as one.

    Heavy nodes that read the same tensor are one group, such as those of query, key and value, or the two branches of a
    block that halves the image; so are the two convolutions of a squeeze-and-excitation block. With them goes every
    cheap node that reads nothing else.

    Args:
        prepared: fp32, as quantize.prepared gives it.
        spec: of its input.
    """
    model = onnx.load_from_string(prepared)
    heavy = [node for node in placed(model, spec) if node.op_type in HEAVY]
    first = _joined(model, heavy)
    members: dict[str, list[str]] = {name: [] for name in dict.fromkeys(first.values())}
    known, owner = constants(model), dict[str, str]()
    for node in model.graph.node:
        owners = {owner.get(name) for name in node.input if name and name not in known}
        group = first.get(node.name) or (owners.pop() if len(owners) == 1 else None)
        if group is not None:
            owner |= dict.fromkeys(node.output, group)
            members[group].append(node.name)
    return tuple(Group(", ".join(name for name in names if name in first), tuple(names)) for names in members.values())


def _joined(model: onnx.ModelProto, heavy: Collection[onnx.NodeProto]) -> dict[str, str]:
    """Of each heavy node the first one of its group, by name."""
    known, names = constants(model), {node.name for node in heavy}
    first: dict[str, str] = {}
    readers: dict[str, str] = {}  # by tensor: the group that reads it
    pooled: dict[str, str | None] = {}  # by tensor that is one number a channel: the convolution that gave it
    for node in model.graph.node:
        inputs = [name for name in node.input if name and name not in known]
        squeezed = bool(inputs) and all(name in pooled for name in inputs)
        group = pooled[inputs[0]] if squeezed else None
        if node.name in names:
            group = (group if node.op_type == "Conv" else None) or readers.get(inputs[0]) or node.name
            first[node.name] = group
            readers |= dict.fromkeys(inputs, group)
        if node.op_type in _POOLS or (squeezed and node.op_type not in DENSE):
            pooled |= dict.fromkeys(node.output, group)
    return first


def leftovers(graph: bytes) -> int:
    """Conversions between int8 and fp32 that ONNX Runtime leaves in a graph, in front of and behind fp32 operators.

    Not counted are those of constants, the first on the way from an input and the last on the way to an output.
    """
    model = onnx.load_from_string(optimized(graph))
    known = constants(model)
    steps = [
        (node.op_type, [name for name in node.input if name not in known], list(node.output))
        for node in model.graph.node
    ]
    steps = [step for step in steps if step[1]]
    behind = _reached("QuantizeLinear", steps)
    ahead = _reached("DequantizeLinear", [(kind, given, taken) for kind, taken, given in reversed(steps)])
    again = [kind == "QuantizeLinear" and taken[0] in behind for kind, taken, _ in steps]
    yet = [kind == "DequantizeLinear" and given[0] in ahead for kind, _, given in steps]
    return sum(again) + sum(yet)


def _reached(source: str, steps: Iterable[tuple[str, list[str], list[str]]]) -> set[str]:
    """The tensors that depend on a node of a kind; a step is a node's kind, what it depends on, what depends on it."""
    reached: set[str] = set()
    for kind, taken, given in steps:
        if kind == source or not reached.isdisjoint(taken):
            reached.update(given)
    return reached

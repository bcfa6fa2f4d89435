"""The first convolution of an image model, as the fast int8 kernel of x86-64 takes it.

That kernel multiplies four numbers of a pixel at once. A pixel has three, and so ONNX Runtime copies every window and
multiplies the copies: a tenth of the time of a whole network. But four pixels of a row are three groups of four
numbers, in the same memory. Read so, a window is some groups wide, with zeros as the weights of what is not its own;
one such window gives several neighbours as so many channels, which in turn are pixels in the same memory.

The factors of the scaling go into the weights. What is left of it is an addition, which int8 does in one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bundle.host import products_saturate
from export.nodes import attributes, constant_values
from export.scaling import CHANNELS_FIRST, chain

GROUP = 4  # numbers
COLOURS = 3
CHANNELS_LAST = [0, 2, 3, 1]
_STEPS = ("Reshape", "Cast", "Mul", "Add", "Reshape", "Transpose", "Conv")  # as export.scaling leaves them
_FEWEST_CHANNELS = 16  # that the kernel gives
_DEFAULTS: dict[str, Any] = {
    "group": 1,
    "auto_pad": b"NOTSET",
    "dilations": [1, 1],
    "strides": [1, 1],
    "pads": [0, 0, 0, 0],
}


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a convolution lie in a row of groups.

    Attributes:
        count: windows in a row.
        starts: of a window, where each of the neighbours that it gives begins, in numbers.
        step: groups from one window to the next.
        groups: its width.
        before: groups of zeros before the row.
        behind: the same behind it.
    """

    count: int
    starts: tuple[int, ...]
    step: int
    groups: int
    before: int
    behind: int

    def packed(self, weights: np.ndarray) -> np.ndarray:
        """Weights float32 (O, 3, height, width) as (neighbours · O, 4, height, groups)."""
        channels, _, height, width = weights.shape
        rows = weights.transpose(0, 2, 3, 1).reshape(channels, height, COLOURS * width)
        wide = np.zeros((len(self.starts), channels, height, GROUP * self.groups), np.float32)
        for neighbour, start in enumerate(self.starts):
            wide[neighbour, :, :, start : start + COLOURS * width] = rows
        return wide.reshape(-1, height, self.groups, GROUP).transpose(0, 3, 1, 2)


def suits(*, signed: bool) -> bool:
    """Whether this machine has that kernel, which takes no signed activations."""
    return not signed and not products_saturate()


def stem(model: onnx.ModelProto) -> str | None:
    """The name of the convolution that `pack_stem` rewrites, if there is one."""
    steps = chain(model.graph, _STEPS)
    return steps[-1].name if steps and _windows(model.graph, steps) else None


def pack_stem(model: onnx.ModelProto) -> None:
    """Rewrite the first convolution in place; one that is not as expected, or does not divide evenly, stays.

    Args:
        model: in float32; shapes that were noted in it are stale afterwards.
    """
    graph = model.graph
    steps = chain(graph, _STEPS)
    windows = _windows(graph, steps) if steps else None
    if steps is None or windows is None:
        return
    constants, nodes = constant_values(graph), list(graph.node)
    _, cast, multiply, add, pixels, _, convolution = steps
    factors, offsets = (constants[node.input[1]] for node in (multiply, add))
    weights = constants[convolution.input[1]] * factors[:COLOURS].reshape(-1, 1, 1)
    nodes[nodes.index(cast)] = _dequantize(graph, cast.input[0], np.float32(1), np.uint8(0), multiply.output[0])
    nodes[nodes.index(multiply)] = _dequantized(graph, offsets / factors, f"{add.name}.offsets")
    add.input[:] = [multiply.output[0], f"{add.name}.offsets"]
    pixels.input[1] = _constant(graph, f"{pixels.name}.groups", np.array([0, 0, len(offsets) // GROUP, GROUP]))
    last = _activation(graph, convolution)
    at = nodes.index(last) + 1
    nodes[at:at] = _neighbours(graph, last, windows, len(weights))
    _widen(graph, convolution, windows, weights)
    del graph.node[:]
    graph.node.extend(nodes)


def _windows(graph: onnx.GraphProto, steps: Sequence[onnx.NodeProto]) -> _Windows | None:
    """None: the steps are not what is expected, or the kernel would not take what comes of them."""
    _, _, multiply, add, _, transpose, convolution = steps
    constants = constant_values(graph)
    factors, offsets, weights = (constants.get(node.input[1]) for node in (multiply, add, convolution))
    if factors is None or offsets is None or weights is None or attributes(transpose).get("perm") != CHANNELS_FIRST:
        return None
    width = graph.input[0].type.tensor_type.shape.dim[2].dim_value
    found = _DEFAULTS | attributes(convolution)
    plain = found["group"] == 1 and found["auto_pad"] == b"NOTSET" and found["dilations"][1] == 1
    if not plain or weights.shape[1] != COLOURS or any(each.shape != (COLOURS * width,) for each in (factors, offsets)):
        return None
    return _laid(weights, width, found["strides"][1], found["pads"][1::2])


def _laid(weights: np.ndarray, width: int, stride: int, pads: Sequence[int]) -> _Windows | None:
    """The windows in a row of so many pixels; None: they do not come out even, or give too few channels."""
    size, numbers = weights.shape[3], COLOURS * width
    outputs = (width + sum(pads) - size) // stride + 1
    neighbours = lcm(GROUP, stride) // stride
    step = COLOURS * stride * neighbours // GROUP
    starts = [COLOURS * (stride * i - pads[0]) for i in range(neighbours)]
    before = -(starts[0] // GROUP)
    groups = before - (-(starts[-1] + COLOURS * size) // GROUP)
    count = outputs // neighbours
    behind = max(0, (count - 1) * step + groups - before - numbers // GROUP)
    even = numbers % GROUP == outputs % neighbours == 0
    fits = (before + numbers // GROUP + behind - groups) // step + 1 == count
    channels = neighbours * len(weights)
    if not even or not fits or channels < _FEWEST_CHANNELS or channels % GROUP:
        return None
    return _Windows(count, tuple(start + GROUP * before for start in starts), step, groups, before, behind)


def _widen(graph: onnx.GraphProto, convolution: onnx.NodeProto, windows: _Windows, weights: np.ndarray) -> None:
    found, constants = _DEFAULTS | attributes(convolution), constant_values(graph)
    top, _, bottom, _ = found["pads"]
    wide = {
        "kernel_shape": [weights.shape[2], windows.groups],
        "strides": [found["strides"][0], windows.step],
        "pads": [top, windows.before, bottom, windows.behind],
    }
    kept = [each for each in convolution.attribute if each.name not in wide]
    del convolution.attribute[:]
    convolution.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in wide.items())])
    convolution.input[1] = _constant(graph, f"{convolution.name}.weights", windows.packed(weights))
    if len(convolution.input) > 2:
        bias = np.tile(constants[convolution.input[2]], len(windows.starts))
        convolution.input[2] = _constant(graph, f"{convolution.name}.bias", bias)


def _neighbours(graph: onnx.GraphProto, last: onnx.NodeProto, windows: _Windows, channels: int) -> list[onnx.NodeProto]:
    """What makes pixels of the channels of each window."""
    given, neighbours = last.output[0], len(windows.starts)
    if neighbours == 1:
        return []
    last.output[0] = f"{given}.windows"
    shape = _constant(graph, f"{given}.shape", np.array([0, 0, windows.count * neighbours, channels]))
    names = [last.output[0], f"{given}.windows.last", f"{given}.pixels", given]
    return [
        helper.make_node("Transpose", [names[0]], [names[1]], name=names[1], perm=CHANNELS_LAST),
        helper.make_node("Reshape", [names[1], shape], [names[2]], name=names[2]),
        helper.make_node("Transpose", [names[2]], [names[3]], name=f"{given}.first", perm=CHANNELS_FIRST),
    ]


def _activation(graph: onnx.GraphProto, convolution: onnx.NodeProto) -> onnx.NodeProto:
    """What runs as one with a convolution, else itself."""
    readers = [node for node in graph.node if convolution.output[0] in node.input]
    return readers[0] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else convolution


def _dequantized(graph: onnx.GraphProto, values: np.ndarray, name: str) -> onnx.NodeProto:
    """A constant in uint8, to the nearest 255th of its range."""
    least, greatest = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = np.float32((greatest - least) / 255 or 1)
    zero = np.rint(-least / scale)
    integers = np.rint(values / scale + zero).astype(np.uint8)
    return _dequantize(graph, _constant(graph, f"{name}.uint8", integers), scale, np.uint8(zero), name)


def _dequantize(
    graph: onnx.GraphProto, integers: str, scale: np.float32, zero: np.uint8, output: str
) -> onnx.NodeProto:
    given = [
        _constant(graph, f"{output}.{name}", np.asarray(value)) for name, value in (("scale", scale), ("zero", zero))
    ]
    return helper.make_node("DequantizeLinear", [integers, *given], [output], name=f"{output}.float")


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name

"""int8 of matrix products: their inputs in 8 bits, by given ranges or by those of every run; what they give in fp32.

A text encoder adds what a product gives to what it had, and normalises the sum: 8 bits for it would cost accuracy and a
conversion. ONNX Runtime has kernels that add the bias as well: `com.microsoft.MatMulIntegerToFloat` and, for ranges of
every run, `DynamicQuantizeMatMul`.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.nodes import attributes, drop_unused, taken

SPREAD = 8.0
"""How many times the median column the largest one may be where one scale serves them all.

A scale for each column costs MiniLM 4% of its time, and only where columns differ more does it gain accuracy.
"""


@dataclass(frozen=True)
class _Product:
    """A product with constant weights, the addition of a bias behind it included.

    Attributes:
        node: the MatMul or Gemm.
        weights: float32 (K, N).
        bias: float32 (N,), or none.
        output: what the last of its nodes gives.
        nodes: names of all its nodes.
    """

    node: onnx.NodeProto
    weights: np.ndarray
    bias: np.ndarray | None
    output: str
    nodes: tuple[str, ...]


def int8_products(
    model: onnx.ModelProto,
    names: Collection[str],
    ranges: Mapping[str, tuple[float, float]] | None,
    *,
    per_channel: bool,
    signed: bool = False,
) -> int:
    """Make products int8, in place; those whose weights are not constant, or not a matrix, stay in fp32.

    Args:
        model: fp32, its nodes named.
        names: of the MatMul and Gemm nodes that may become int8.
        ranges: least and greatest value of their inputs, zero included; None: those of every run.
        per_channel: one scale a column of the weights where those differ much (see SPREAD), instead of one for all.
        signed: inputs in int8 instead of uint8, by given ranges only.

    Returns:
        How many there are.
    """
    products = {product.node.name: product for product in _products(model, names)}
    inside = {name for product in products.values() for name in product.nodes[1:]}
    nodes, quantized = [], set[str]()
    for node in model.graph.node:
        product = products.get(node.name)
        if product is None and node.name not in inside:
            nodes.append(_cheap(node) if products else node)
        if product is None:
            continue
        value = node.input[0]
        if ranges is not None and value not in quantized:
            quantized.add(value)
            nodes.append(_quantize(model, value, ranges[value], signed=signed))
        nodes.append(_product(model, product, per_channel=per_channel, static=ranges is not None))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model.graph)
    if all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(products)


def _products(model: onnx.ModelProto, names: Collection[str]) -> list[_Product]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in taken(node):
            readers[name].append(node)
    for value in model.graph.output:
        readers[value.name] += [onnx.NodeProto()] * 2  # nothing can be joined behind it
    found = []
    for node in model.graph.node:
        if node.name in names and node.input[1] in constants:
            product = _with_bias(node, constants, readers)
            if product is not None:
                found.append(product)
    return found


def _with_bias(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], readers: Mapping[str, list[onnx.NodeProto]]
) -> _Product | None:
    """The product of a node; None where this kernel cannot compute it."""
    settings = attributes(node)
    weights = numpy_helper.to_array(constants[node.input[1]])
    if settings.get("transA") or weights.ndim != 2:
        return None
    weights = (weights.T if settings.get("transB") else weights) * np.float32(settings.get("alpha", 1))
    output, size = node.output[0], weights.shape[1]
    if len(node.input) > 2:
        if node.input[2] not in constants:
            return None
        added = numpy_helper.to_array(constants[node.input[2]]) * np.float32(settings.get("beta", 1))
        return _Product(node, weights, added, output, (node.name,)) if added.shape == (size,) else None
    (after, *others) = readers[output] or [onnx.NodeProto()]
    bias = [name for name in after.input if name in constants and tuple(constants[name].dims) == (size,)]
    if after.op_type != "Add" or others or not bias:
        return _Product(node, weights, None, output, (node.name,))
    added = numpy_helper.to_array(constants[bias[0]])
    return _Product(node, weights, added, after.output[0], (node.name, after.name))


def _quantize(model: onnx.ModelProto, value: str, limits: tuple[float, float], *, signed: bool) -> onnx.NodeProto:
    kind = np.dtype(np.int8 if signed else np.uint8)
    least, greatest = limits
    scale = max((greatest - least) / 255, float(np.finfo(np.float32).tiny))
    zero = np.rint(np.iinfo(kind).min - least / scale).astype(kind)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(scale, np.float32), f"{value}_scale"),
            numpy_helper.from_array(np.array(zero), f"{value}_zero_point"),
        ]
    )
    names = [value, f"{value}_scale", f"{value}_zero_point"]
    return helper.make_node("QuantizeLinear", names, [f"{value}_quantized"], f"{value}_QuantizeLinear")


def _product(model: onnx.ModelProto, product: _Product, *, per_channel: bool, static: bool) -> onnx.NodeProto:
    name, value = product.node.name, product.node.input[0]
    columns = np.abs(product.weights).max(axis=0)
    alike = not per_channel or columns.max() <= SPREAD * np.median(columns)
    scales = np.maximum(columns.max() if alike else columns, np.finfo(np.float32).tiny) / np.float32(127)
    int8 = np.rint(product.weights / scales).clip(-127, 127).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(int8, f"{name}_int8"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(scales, np.float32), f"{name}_scales"))
    # Said, though it is 0: where products saturate, ONNX Runtime turns the weights to uint8 and writes it there.
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), f"{name}_zero_point"))
    taken = [value, f"{name}_int8", f"{name}_scales", f"{name}_zero_point"]
    if static:
        taken = [f"{value}_quantized", f"{name}_int8", f"{value}_scale", f"{name}_scales"]
        taken += [f"{value}_zero_point", f"{name}_zero_point"]
    if product.bias is not None:
        model.graph.initializer.append(numpy_helper.from_array(product.bias.astype(np.float32), f"{name}_bias"))
        taken.append(f"{name}_bias")
    kernel = "MatMulIntegerToFloat" if static else "DynamicQuantizeMatMul"
    return helper.make_node(kernel, taken, [product.output], name, domain="com.microsoft")


def _cheap(node: onnx.NodeProto) -> onnx.NodeProto:
    """A GELU by the hyperbolic tangent, which differs by less than int8 rounds and takes two thirds of the time."""
    if node.op_type == "Gelu" and not node.domain:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))
    return node

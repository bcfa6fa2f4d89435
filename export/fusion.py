"""Self-attention as one operator, which ONNX Runtime does not find in torch's graphs; and what it fused by itself.

onnxscript finds the attention. What is added here: the mask as the tokens that are padding, instead of a matrix of
length by length for every example, and query, key and value as one matrix product.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.utils
from onnxscript import ir, optimizer
from onnxscript.rewriter.ort_fusions.mha import fuse_mha1, fuse_mha2
from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
from onnxscript.rewriter.ort_fusions.shape_optimization import rules as constant_shapes

from bundle.log import log
from bundle.session import Session, optimized

ATTENTION = "MultiHeadAttention"
MASK = "attention_mask"  # the graph's input, 1 for tokens and 0 for padding
MASKED = float(np.finfo(np.float32).min)  # what PyTorch adds to a score that does not count
_KEY_PADDING, _BIAS = 4, 5  # inputs of MultiHeadAttention
_TRIED = ((1, 1), (3, 2), (2, 17), (1, 700))  # batches and lengths; local attention shows at the longest
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
_FUSED_STANDARD = ("LayerNormalization", "Gelu", "Attention")  # one operator each since opsets 17, 20 and 23
_LAYOUT = ("ReorderInput", "ReorderOutput")


def fused(graph: bytes) -> tuple[bytes, dict[str, int]]:
    """Attention as com.microsoft's MultiHeadAttention, and the mean of each channel as GlobalAveragePool.

    Args:
        graph: as torch.onnx.export gives it, with the shapes that it knows (value_info).

    Returns:
        The graph, and how many of what were fused: attentions; those whose mask became the padding alone; those whose
        query, key and value became one product; poolings. What is not understood stays as it came.
    """
    model = ir.from_proto(onnx.load_from_string(graph))
    counts = {**_fuse_attention(model), "GlobalAveragePool": _fuse_pooling(model)}
    optimizer.optimize(model)
    return bytes(ir.to_proto(model).SerializeToString()), {kind: count for kind, count in counts.items() if count}


def fusions(graph: bytes) -> dict[str, int]:
    """How many operators of each kind, as ONNX Runtime runs the graph on the CPU, stand for several of ONNX's.

    Those of com.microsoft are named as there; `NCHWc Conv` is a convolution in blocks of channels.
    """
    counts: Counter[str] = Counter()
    for node in onnx.load_from_string(optimized(graph)).graph.node:
        if node.domain in _STANDARD:
            counts[node.op_type] += node.op_type in _FUSED_STANDARD
        elif node.op_type not in _LAYOUT:
            counts["NCHWc " * node.domain.endswith("nchwc") + node.op_type] += 1
    return dict(sorted((+counts).items()))


def forget_shapes(model: onnx.ModelProto) -> None:
    """Drop the noted shapes, in place, which inference trips over where they are stale.

    Those of other operators than ONNX's are kept: nobody could infer them again, nor what follows from them.
    """
    known = {name for node in model.graph.node if node.domain not in _STANDARD for name in node.output}
    shapes = [value for value in model.graph.value_info if value.name in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)


def _fuse_attention(model: ir.Model) -> dict[str, int]:
    softmaxes = sum(node.op_type == "Softmax" for node in model.graph)
    if not softmaxes:
        return {}
    optimizer.optimize(model)
    constant_shapes.apply_to_model(model)
    fuse_sdpa(model, apply_shape_inference=True)
    fuse_mha1(model)
    fuse_mha2(model)
    nodes = [node for node in model.graph if node.op_type == ATTENTION]
    if len(nodes) < softmaxes:
        log.warning("not all attention was fused", softmax=softmaxes, fused=len(nodes))
    padding, packed = _mask_padding(model, nodes), sum(_pack(model, node) for node in nodes)
    return {ATTENTION: len(nodes), "KeyPadding": padding, "PackedQKV": packed}


def _fuse_pooling(model: ir.Model) -> int:
    """Means over height and width, which have neither an int8 kernel nor one for blocks of channels."""
    pooled = 0
    for node in model.graph:
        shape = node.inputs[0].shape if node.op_type == "ReduceMean" and node.inputs[0] is not None else None
        axes = node.inputs[1].const_value if shape is not None and len(node.inputs) > 1 and node.inputs[1] else None
        if axes is None or shape is None or len(shape) != 4 or node.attributes.get_int("keepdims", 1) == 0:
            continue
        if {axis % 4 for axis in axes.numpy().tolist()} == {2, 3}:
            pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [pool], node.outputs, pool.outputs)
            pooled += 1
    return pooled


def _mask_padding(model: ir.Model, nodes: Sequence[ir.Node]) -> int:
    """Give attentions the mask itself where their bias says no more than which tokens are padding."""
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    biased = [(node, node.inputs[_BIAS]) for node in nodes if len(node.inputs) > _BIAS]
    padding = {bias for bias in {bias for _, bias in biased} if mask and bias and _is_padding(model, bias)}
    if not padding:
        return 0
    cast = ir.node("Cast", [mask], attributes={"to": ir.DataType.INT32}, name="key_padding")
    cast.outputs[0].name = "key_padding"
    model.graph.insert_before(model.graph[0], cast)
    masked = [node for node, bias in biased if bias in padding]
    for node in masked:
        node.replace_input_with(_KEY_PADDING, cast.outputs[0])
        node.replace_input_with(_BIAS, None)
        node.attributes["mask_filter_value"] = ir.AttrFloat32("mask_filter_value", MASKED)
    return len(masked)


def _is_padding(model: ir.Model, bias: ir.Value) -> bool:
    """Whether a bias is 0 for tokens and MASKED for padding, whatever the query.

    It is run on masks of several sizes, not read: every version of transformers makes it in another way.
    """
    names = [str(value.name) for value in model.graph.inputs]
    part = onnx.utils.Extractor(ir.to_proto(model)).extract_model(names, [str(bias.name)])
    session = Session(part.SerializeToString(), device="cpu", threads=1)
    random = np.random.default_rng(0)
    for size in _TRIED:
        feeds = {name: random.integers(0, 2, size) for name in names}
        expected = np.where(feeds[MASK], 0, np.float32(MASKED))[:, None, None]
        found = session.run(feeds)[str(bias.name)]
        if found.ndim != 4 or not (found == expected).all():
            return False
    return True


def _pack(model: ir.Model, attention: ir.Node) -> bool:
    """Make one product of those of query, key and value, if all three are linear layers of the same tensor."""
    layers = [_linear(value) for value in attention.inputs[:3]]
    known = [layer for layer in layers if layer is not None]
    if len(known) < 3 or len({layer[0] for layer in known}) > 1:
        return False
    inputs, weights, biases = zip(*known, strict=True)
    name = f"{attention.name}.qkv"
    parameters = [
        _initializer(model, f"{name}.weight", np.concatenate(weights, axis=1)),
        _initializer(model, f"{name}.bias", np.concatenate(biases)),
    ]
    product = ir.node("MatMul", [inputs[0], parameters[0]], name=name)
    added = ir.node("Add", [product.outputs[0], parameters[1]], name=f"{name}.add")
    sizes = _initializer(model, f"{name}.sizes", np.array([len(bias) for bias in biases]))
    split = ir.node("Split", [added.outputs[0], sizes], {"axis": -1}, num_outputs=3, name=f"{name}.split")
    model.graph.insert_before(attention, (product, added, split))
    for i, part in enumerate(split.outputs):
        attention.replace_input_with(i, part)
    return True


def _linear(value: ir.Value | None) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """The input, weight (in, out) and bias (out,) of the linear layer that gives a value to one reader alone."""
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add" or len(add.outputs[0].uses()) > 1:
        return None
    bias, product = sorted(add.inputs, key=lambda each: each is None or each.const_value is None)
    node = product.producer() if product is not None else None
    if node is None or node.op_type != "MatMul" or len(node.outputs[0].uses()) > 1 or bias is None:
        return None
    x, weight = node.inputs
    if x is None or weight is None or weight.const_value is None or bias.const_value is None:
        return None
    return x, weight.const_value.numpy(), bias.const_value.numpy()


def _initializer(model: ir.Model, name: str, values: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    model.graph.register_initializer(value)
    return value

"""fp32 -> fp16 for GPUs, with islands of fp32 where float16 has not the range or the digits."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes

from bundle.session import Session

LARGEST = float(np.finfo(np.float16).max)  # of a constant: 65504
LARGEST_SEEN = 512.0  # of an activation on a few examples: on others it may be 128 times as large
SUMS = {  # of many numbers, or exponentials: they lose digits or overflow where their inputs do not
    *("Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "Exp", "Pow"),
    "SkipLayerNormalization",
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "ReduceProd", "Sqrt"),
}


def fp16(graph: bytes, feeds: Iterable[Mapping[str, np.ndarray]] = ()) -> bytes:
    """The graph in float16, which takes and gives what it did, by ONNX Runtime's converter.

    In float32 stay sums, norms and exponentials; what has a constant beyond LARGEST; and what takes or gives more than
    LARGEST_SEEN on the examples, as in ModelOpt's AutoCast.

    Args:
        graph: fp32.
        feeds: real examples, as the graph takes them.
    """
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load_from_string(graph)
    _type(model)
    for position, node in enumerate(model.graph.node):
        node.name = f"{position}.{node.name}"  # the converter goes by names
    large = {name for name, values in _constants(model) if (np.abs(values) > LARGEST).any()}
    large |= _large_activations(model, feeds)
    kept = [node.name for node in model.graph.node if node.op_type in SUMS or large & {*node.input, *node.output}]
    half = float16.convert_float_to_float16(model, keep_io_types=True, node_block_list=kept)
    _drop_repeated(half)
    _join_islands(half)
    OnnxModel(half).topological_sort()  # the converter appends its casts
    onnx.checker.check_model(half)
    return bytes(half.SerializeToString())


def _type(model: ModelProto) -> None:
    """Leave as types what ONNX cannot infer: fused operators of the runtime's own give float32, of any shape."""
    del model.graph.value_info[:]  # torch leaves stale ones
    fused = (name for node in model.graph.node if node.domain == "com.microsoft" for name in node.output if name)
    model.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fused)


def _constants(model: ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """Those in float32, by name."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].t.data_type == TensorProto.FLOAT:
            yield node.output[0], numpy_helper.to_array(node.attribute[0].t)


def _large_activations(model: ModelProto, feeds: Iterable[Mapping[str, np.ndarray]]) -> set[str]:
    """Names of what exceeds LARGEST_SEEN on some example."""
    seen = infer_shapes(model)
    outputs = {output.name for output in seen.graph.output}
    seen.graph.output.extend(
        value
        for value in seen.graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in outputs
    )
    session, large = None, set()
    for each in feeds:
        session = session or Session(seen.SerializeToString(), device="cpu", optimize=False)
        values = {**each, **session.run(each)}
        large |= {
            name for name, value in values.items() if value.dtype == np.float32 and (np.abs(value) > LARGEST_SEEN).any()
        }
    return large


def _drop_repeated(model: ModelProto) -> None:
    """The converter casts a tensor once for each use that stays in float32, under the same name."""
    nodes = {tuple(node.output): node for node in model.graph.node}
    unique = list(nodes.values())
    del model.graph.node[:]
    model.graph.node.extend(unique)


def _join_islands(model: ModelProto) -> None:
    """Take float16 out from between two neighbours that stay in float32: what it cannot hold would be lost there."""
    narrow = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.name.startswith("graph_input_cast") or node.name.endswith("_cast_to_fp16_node")
    }
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in narrow and node.attribute[0].i == TensorProto.FLOAT:
            node.op_type, node.input[0] = "Identity", narrow[node.input[0]]
            del node.attribute[:]

"""Graphs that other exporters wrote: unnamed nodes, odd biases, subgraphs; their int8 answers what their fp32 does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import ModelError
from bundle.manifest import VectorInput
from bundle.session import Session
from export import placement, quantize
from export.nodes import drop_unused, name_nodes, taken

RANDOM = np.random.default_rng(0)
SPEC = VectorInput(column="x", size=16)
X = RANDOM.uniform(-1, 1, (32, 16)).astype(np.float32)
WEIGHTS = RANDOM.uniform(-1, 1, (16, 6)).astype(np.float32)
KNOWN = {name: (-8.0, 8.0) for name in ("x", "h", "y")}


def graph_of(nodes, **constants):
    """From x, float32 (batch, 16), to y."""
    inside = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(inside, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def run(graph):
    return Session(graph, device="cpu", threads=1).run({"x": X})["y"]


def kinds(graph):
    return [node.op_type for node in onnx.load_from_string(graph).graph.node]


@pytest.mark.parametrize("beta", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
@pytest.mark.parametrize("qdq", [False, True])
def test_biases_of_any_shape_are_quantized(beta, shape, qdq):
    """A factor before a bias, and a bias that is broadcast, are part of what int8 answers."""
    bias = RANDOM.uniform(2, 4, shape).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], beta=beta)
    graph = graph_of([gemm], w=WEIGHTS, b=bias)
    static = quantize.int8_static(quantize.prepared(graph), SPEC, KNOWN | {"y": (-16.0, 16.0)}, qdq=qdq)
    assert not {"MatMulIntegerToFloat", "QuantizeLinear"}.isdisjoint(kinds(static))
    assert np.abs(run(static) - run(graph)).max() < 0.4
    if not qdq:
        dynamic = quantize.int8_dynamic(graph)
        assert "DynamicQuantizeMatMul" in kinds(dynamic)
        assert np.abs(run(dynamic) - run(graph)).max() < 0.1


def test_a_bias_for_each_row_stays_as_it_is():
    """What is not the same for all rows is no bias of columns."""
    square = RANDOM.uniform(-1, 1, (16, 32)).astype(np.float32)
    rows = RANDOM.uniform(-1, 1, (32, 1)).astype(np.float32)
    graph = graph_of([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], w=square, b=rows)
    np.testing.assert_allclose(run(quantize.prepared(graph)), run(graph), atol=1e-6)


def test_static_int8_without_a_single_product_is_refused():
    """What is called int8 has int8 in it."""
    product = helper.make_node("MatMul", ["w", "t"], ["m"])  # its left side is the constant
    nodes = [helper.make_node("Transpose", ["x"], ["t"]), product, helper.make_node("Transpose", ["m"], ["y"])]
    start = quantize.prepared(graph_of(nodes, w=np.ascontiguousarray(WEIGHTS.T)))
    with pytest.raises(ModelError, match="has no MatMul, Gemm of a tensor with a constant matrix"):
        quantize.int8_static(start, SPEC, {name: (-8.0, 8.0) for name in ("x", "t", "m", "y")})


def test_names_that_are_made_meet_no_other():
    """A node without a name gets one that no other node has, before or behind it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="MatMul_1"),
        helper.make_node("MatMul", ["h", "v"], ["g"]),
        helper.make_node("Relu", ["g"], ["r"], name="MatMul_2"),
        helper.make_node("Neg", ["r"], ["y"], name="MatMul_1"),
    ]
    graph = graph_of(nodes, w=WEIGHTS, v=RANDOM.uniform(-1, 1, (6, 6)).astype(np.float32))
    model = onnx.load_from_string(graph)
    name_nodes(model.graph)
    names = [node.name for node in model.graph.node]
    assert names[0] == "MatMul_1"
    assert names[2] == "MatMul_2"
    assert len(set(names)) == 4
    assert kinds(quantize.int8_dynamic(graph)).count("DynamicQuantizeMatMul") == 2


def test_what_only_a_subgraph_reads_is_kept():
    """The branches of a condition see the constants around them."""
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Add", ["h", constant], [name])], name, [], [value(name, TensorProto.FLOAT, None)]
        )
        for name, constant in (("then", "one"), ("else", "two"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["condition"]),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    row = np.arange(6, dtype=np.float32)
    graph = graph_of(nodes, w=WEIGHTS, one=row, two=-row, zero=np.float32(0), unread=row)
    model = onnx.load_from_string(graph)
    assert taken(model.graph.node[3]) == {"condition", "h", "one", "two", "then", "else"}
    drop_unused(model.graph)
    assert {tensor.name for tensor in model.graph.initializer} == {"w", "one", "two", "zero"}
    assert np.abs(run(quantize.int8_dynamic(graph)) - run(graph)).max() < 0.1


def test_a_stack_of_matrices_stays_in_fp32():
    """Per channel the runtime has no int8 product for it, and would fail when it runs."""
    nodes = [helper.make_node("MatMul", ["x", "stack"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    stack = RANDOM.uniform(-1, 1, (3, 16, 16)).astype(np.float32)
    model = onnx.load_from_string(quantize.prepared(graph_of(nodes, stack=stack, w=WEIGHTS)))
    assert [node.output[0] for node in placement.placed(model, SPEC)] == ["y"]

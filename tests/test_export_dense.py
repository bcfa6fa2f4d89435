"""Products in static int8 that give fp32: what becomes int8, how nearly, and what is left alone."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bundle.host import products_saturate
from bundle.runtime import onnxruntime
from bundle.session import Session, optimized
from export.dense import SPREAD, int8_products

RANGES = {"x": (-4.0, 4.0), "h": (-4.0, 4.0)}
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "alike": RANDOM.uniform(-1, 1, (16, 8)).astype(np.float32),
    "uneven": (RANDOM.uniform(-1, 1, (16, 8)) * np.geomspace(1, SPREAD**3, 8)).astype(np.float32),
    "turned": RANDOM.uniform(-1, 1, (8, 16)).astype(np.float32),
    "stacked": RANDOM.uniform(-1, 1, (3, 16, 8)).astype(np.float32),
    "bias": RANDOM.uniform(-1, 1, 8).astype(np.float32),
}


def graph_of(*nodes, shape=("batch", 16)):
    """From x, float32 of a shape, to y."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(*each[:3], name=f"{each[0]}_{i}", **each[3]) for i, each in enumerate(nodes)],
            "g",
            [helper.make_tensor_value_info("x", 1, shape)],
            [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    model = onnx.shape_inference.infer_shapes(model)
    assert model.graph.output[0].name == "y"
    return model


def quantized(model, *, per_channel=True, signed=False):
    made = onnx.ModelProto()
    made.CopyFrom(model)
    names = {node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    int8_products(made, names, RANGES, per_channel=per_channel, signed=signed)
    return made


def kinds(model):
    return [node.op_type for node in onnx.load_from_string(optimized(model.SerializeToString())).graph.node]


def run(model, rows=5, shape=(16,)):
    x = np.random.default_rng(1).uniform(-4, 4, (rows, *shape)).astype(np.float32)
    return Session(model.SerializeToString(), device="cpu", threads=1).run({"x": x})["y"]


PLAIN = [("MatMul", ["x", "alike"], ["h"], {}), ("Add", ["bias", "h"], ["y"], {})]
UNEVEN = [("MatMul", ["x", "uneven"], ["y"], {})]
GEMM = [("Gemm", ["x", "turned", "bias"], ["y"], {"transB": 1, "alpha": 0.5, "beta": 2.0})]


@pytest.mark.parametrize(
    "signed", [False, pytest.param(True, marks=pytest.mark.skipif(products_saturate(), reason="no exact kernel"))]
)
@pytest.mark.parametrize("nodes", [PLAIN, UNEVEN, GEMM])
def test_a_product_and_its_bias_are_one_kernel(nodes, signed):
    """Two nodes, a quantization and a product that gives fp32, and answers within what 8 bits round."""
    model = graph_of(*nodes)
    made = quantized(model, signed=signed)
    expected, found = run(model), run(made)

    assert kinds(made) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert (np.abs(found - expected).max(axis=0) < 0.05 * np.abs(expected).max(axis=0)).all()


def test_columns_that_differ_have_scales_of_their_own():
    """One scale where the columns are alike, or where one is asked for; else one a column."""
    sizes = {
        name: next(
            list(one.dims) for one in quantized(graph_of(*nodes), **how).graph.initializer if "scales" in one.name
        )
        for name, nodes, how in (
            ("alike", PLAIN, {}),
            ("uneven", UNEVEN, {}),
            ("asked for", UNEVEN, {"per_channel": False}),
        )
    }
    assert sizes == {"alike": [], "uneven": [8], "asked for": []}


@pytest.mark.parametrize("nodes", [PLAIN, UNEVEN, GEMM])
def test_products_can_be_made_exact(nodes):
    """Where they saturate the runtime turns the weights to uint8, which takes a zero point, and answers the same."""
    made = quantized(graph_of(*nodes)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    exact = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).uniform(-4, 4, (5, 16)).astype(np.float32)

    assert all(node.input[5] for node in onnx.load_from_string(made).graph.node if node.domain == "com.microsoft")
    np.testing.assert_allclose(exact.run(None, {"x": x})[0], run(onnx.load_from_string(made)), rtol=1e-6)


def test_answers_do_not_depend_on_the_batch():
    """Bit for bit the same alone and among others."""
    made = quantized(graph_of(*PLAIN)).SerializeToString()
    session, rows = Session(made, device="cpu"), np.random.default_rng(1).uniform(-4, 4, (7, 16)).astype(np.float32)
    alone = np.concatenate([session.run({"x": row[None]})["y"] for row in rows])
    np.testing.assert_array_equal(session.run({"x": rows})["y"], alone)


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([("MatMul", ["x", "x"], ["y"], {})], ("batch", 16, 16)),
        ([("MatMul", ["x", "stacked"], ["y"], {})], (3, "batch", 16)),
        ([("Gemm", ["x", "uneven"], ["y"], {"transA": 1})], (16, "batch")),
    ],
)
def test_what_the_kernel_cannot_compute_stays_in_fp32(nodes, shape):
    """A product of two activations, a stack of weights, and a transposed input."""
    model = graph_of(*nodes, shape=shape)
    assert [node.op_type for node in quantized(model).graph.node] == [nodes[0][0]]


def test_a_sum_of_activations_is_no_bias():
    """What is added to a product is left where it is, and so is a bias whose product something else reads as well."""
    residual = [("MatMul", ["x", "alike"], ["h"], {}), ("Add", ["h", "h"], ["y"], {})]
    shared = [*PLAIN[:1], ("Add", ["bias", "h"], ["z"], {}), ("Mul", ["h", "z"], ["y"], {})]
    for nodes in (residual, shared):
        model = graph_of(*nodes)
        made = quantized(model)
        assert "Add" in [node.op_type for node in made.graph.node]
        assert np.abs(run(made) - run(model)).max() < 0.05 * np.abs(run(model)).max()


def test_a_gelu_becomes_the_cheaper_one():
    """By the hyperbolic tangent beside int8; nothing changes where nothing became int8."""
    nodes = [("MatMul", ["x", "alike"], ["h"], {}), ("Gelu", ["h"], ["y"], {})]
    model = graph_of(*nodes)
    gelu = quantized(model).graph.node[-1]
    assert helper.get_attribute_value(gelu.attribute[0]) == b"tanh"
    assert np.abs(run(quantized(model)) - run(model)).max() < 0.05 * np.abs(run(model)).max()
    alone = graph_of(("Gelu", ["x"], ["y"], {}))
    assert not quantized(alone).graph.node[0].attribute

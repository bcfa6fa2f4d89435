import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bundle import preprocess
from bundle.session import Session
from export import graph
from export.half import fp16
from tests.export_examples import TASKS, tiny

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
RANDOM = np.random.default_rng(0)


def layers(*nodes, width=8, **constants):
    """y (N, width) of x (N, width) through these nodes, the first of which takes x."""
    made = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=OPSETS, ir_version=10)
    return model.SerializeToString()


def run(data, feeds):
    return Session(data, device="cpu", threads=1).run(feeds)


def in_float16(data, x):
    """y of x with every step rounded to its type: on a CPU ONNX Runtime computes some of what is float16 in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        (y,) = ReferenceEvaluator(data).run(None, {"x": x})
    return y


def dtypes(data):
    return {tensor.name: tensor.data_type for tensor in onnx.load_from_string(data).graph.initializer}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_fp16_gives_what_fp32_gives(kind):
    """The same interface, weights of half the bytes, and logits equal to float16's digits."""
    network, spec, rows = tiny(kind)
    fp32 = graph.to_onnx(network, spec, TASKS, rows)
    feeds = preprocess.collate(rows[:4], spec)
    half = fp16(fp32, [feeds])

    expected, got = run(fp32, feeds), run(half, feeds)
    assert Session(half, device="cpu").inputs == Session(fp32, device="cpu").inputs
    assert TensorProto.FLOAT16 in dtypes(half).values()
    for name, values in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], values, atol=5e-3 * max(1, np.abs(values).max()))
        assert not np.array_equal(got[name], values)


def test_fused_operators_are_converted():
    """ONNX cannot infer the type of what follows the runtime's own operators; it is halved all the same, or kept."""
    data = layers(
        helper.make_node("FastGelu", ["x", "bias"], ["bent"], domain="com.microsoft"),
        helper.make_node("LayerNormalization", ["bent", "scale"], ["normal"]),
        helper.make_node("MatMul", ["normal", "weights"], ["y"]),
        bias=RANDOM.normal(size=8),
        scale=RANDOM.normal(size=8),
        weights=RANDOM.normal(size=(8, 8)),
    )
    x = RANDOM.normal(size=(3, 8)).astype(np.float32)
    half = fp16(data, [{"x": x}])

    assert dtypes(half) == {
        name: TensorProto.FLOAT if name == "scale" else TensorProto.FLOAT16 for name in ("bias", "scale", "weights")
    }
    np.testing.assert_allclose(run(half, {"x": x})["y"], run(data, {"x": x})["y"], atol=2e-2)


def test_constant_that_float16_cannot_hold_stays():
    """A mask of -3e38 would be cut to -65504, and what it hides would be seen again."""
    data = layers(
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"]),
        scale=np.full(8, 30000.0),
        mask=[0, 0, 0, 0, -3e38, -3e38, -3e38, -3e38],
    )
    x = RANDOM.normal(size=(3, 8)).astype(np.float32)
    half = fp16(data)

    assert dtypes(half) == {"scale": TensorProto.FLOAT16, "mask": TensorProto.FLOAT}
    assert (in_float16(half, x)[:, 4:] == 0).all()


@pytest.mark.parametrize("shown", [True, False])
def test_activation_that_grows_large_stays(shown):
    """Squares beyond 65504 overflow, unless an example showed them: then the whole way there and back stays."""
    data = layers(
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node("Mul", ["squares", "down"], ["small"]),
        helper.make_node("MatMul", ["small", "weights"], ["y"]),
        down=np.full(8, 1e-3),
        weights=RANDOM.normal(size=(8, 8)) / 10,
    )
    x = np.full((2, 8), 400, np.float32)
    half = fp16(data, [{"x": x}] if shown else [])

    assert np.isfinite(in_float16(half, x)).all() == shown
    assert dtypes(half)["weights"] == TensorProto.FLOAT16
    if shown:
        np.testing.assert_allclose(in_float16(half, x), in_float16(data, x), rtol=1e-2, atol=0.5)


def test_islands_keep_what_passes_between_them():
    """Two neighbours that stay in float32 hand on what float16 between them could not hold."""
    data = layers(
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("Sqrt", ["squares"], ["y"]),
        two=2.0,
    )
    x = np.full((1, 8), 1e-4, np.float32)  # float16 holds it, and not its square

    np.testing.assert_allclose(in_float16(fp16(data), x), x, rtol=1e-3)

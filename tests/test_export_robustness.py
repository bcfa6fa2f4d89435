"""What an answer may not depend on is tried on every kind of input, and a fault of each sort is found."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bundle.manifest import TextInput, VectorInput
from bundle.session import Session
from export import graph, quantize
from export.bench import Bench
from export.robustness import check_robustness
from tests.export_examples import KINDS, TASKS, tiny


@cache
def exported(kind):
    """The input of a network, a few examples, and its graph."""
    network, spec, rows = tiny(kind, count=24)
    return spec, rows, graph.to_onnx(network, spec, TASKS, rows)


def check(compiled, spec, rows, **arguments):
    return check_robustness(compiled, Session(compiled, device="cpu", threads=1), spec, rows, **arguments)


def own_graph(nodes, inputs, constants=()):
    """A graph of these nodes that gives `logits`, of two columns; its inputs have a free batch and length."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(values, name) for name, values in constants],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def vector_graph(*nodes, **constants):
    inputs = [("features", onnx.TensorProto.FLOAT, ["batch", 2])]
    return own_graph(nodes, inputs, [(name, np.array(value, np.float32)) for name, value in constants.items()])


VECTOR = VectorInput(column="features", size=2)
VECTORS = list(np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_the_extremes(kind):
    """Of all inputs the tiny fp32 graphs repeat themselves, and give finite logits for whatever could arrive."""
    spec, rows, fp32 = exported(kind)
    found = check(fp32, spec, rows)
    assert found.repeatable
    assert found.extremes is None


def test_dynamic_int8_follows_its_batch():
    """Its activations are scaled over the whole batch: a real dynamically quantized graph is found out."""
    spec, rows, fp32 = exported("vector")
    found = check(quantize.int8_dynamic(fp32), spec, rows)
    assert not found.batch_invariant
    assert found.padding_invariant
    assert found.repeatable


def test_what_looks_at_each_example_alone_is_invariant():
    """Negation rounds nothing, on any machine and with any number of threads."""
    found = check(vector_graph(helper.make_node("Neg", ["features"], ["logits"])), VECTOR, VECTORS)
    assert found.batch_invariant
    assert found.padding_invariant
    assert found.thread_invariant
    assert found.repeatable
    assert found.extremes is None


def test_chance_is_not_repeatable():
    """A graph that draws random numbers gives another answer at every run."""
    nodes = [
        helper.make_node("RandomUniformLike", ["features"], ["noise"]),
        helper.make_node("Add", ["features", "noise"], ["logits"]),
    ]
    assert not check(vector_graph(*nodes), VECTOR, VECTORS).repeatable


def texts(mask):
    """A graph that adds up the tokens of a text, of all places or of those that the mask names."""
    nodes = [helper.make_node("Cast", [name], [f"{name}.float"], to=1) for name in ("input_ids", "attention_mask")]
    nodes.append(helper.make_node("Mul", ["input_ids.float", "attention_mask.float"], ["known"]))
    nodes.append(helper.make_node("ReduceSum" if mask else "ReduceMean", ["known", "axes"], ["sum"], keepdims=1))
    nodes.append(helper.make_node("Concat", ["sum", "sum"], ["logits"], axis=1))
    inputs = [(name, onnx.TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
    return own_graph(nodes, inputs, [("axes", np.array([1]))])


@pytest.mark.parametrize("mask", [True, False])
def test_padding_that_counts_is_found(mask):
    """A mean over all places depends on how many there are, a sum of whole numbers under the mask does not."""
    spec = TextInput(column="text", max_length=16, pad_id=0, buckets=(8, 16))
    rows = [np.arange(1, 3 + i) for i in range(10)]
    found = check(texts(mask), spec, rows)
    assert found.padding_invariant == mask
    assert found.batch_invariant  # examples of equal length are not padded


@pytest.mark.parametrize("mask", [True, False])
def test_what_is_served_in_batches_depends_on_no_padding(mask):
    """Also where no batch of the examples shows it, as all are of one length: a variant runs as its report says."""
    spec = TextInput(column="text", max_length=16, pad_id=0, buckets=(8, 16))
    source = SimpleNamespace(spec=spec, sample=[np.arange(1 + i, 6 + i) for i in range(10)])
    measured = Bench._traits(SimpleNamespace(source=source, _target=SimpleNamespace(device="cpu")), texts(mask))
    assert measured.batch_invariant == mask


def test_extremes_that_overflow_are_named():
    """exp(1e4) is no float32; where the fp32 graph gives no number either, the candidate is not to blame."""
    steep = vector_graph(helper.make_node("Exp", ["features"], ["logits"]))
    assert check(steep, VECTOR, VECTORS).extremes == "all 10000"
    assert check(steep, VECTOR, VECTORS, reference=Session(steep, device="cpu", threads=1)).extremes is None

    tame = vector_graph(helper.make_node("Neg", ["features"], ["logits"]))
    found = check(steep, VECTOR, VECTORS, reference=Session(tame, device="cpu", threads=1))
    assert found.extremes == "all 10000"


def test_a_planted_nan_is_found():
    """0 / 0 is no number, though no real example shows it."""
    nodes = [helper.make_node("Div", ["features", "features"], ["logits"])]
    assert check(vector_graph(*nodes), VECTOR, VECTORS).extremes == "all 0"


def test_a_token_that_breaks_a_text_of_its_own_is_named():
    """The highest token alone has weight 0, whose logarithm is no number; beside others it does no harm."""
    spec = TextInput(column="text", max_length=16, pad_id=0, buckets=(8, 16))
    rows = [np.array([1, 2, 3]), np.array([4])]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked.up"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=1),
        helper.make_node("Mul", ["looked.up", "mask"], ["known"]),
        helper.make_node("ReduceSum", ["known", "axes"], ["sum"], keepdims=1),
        helper.make_node("Log", ["sum"], ["log"]),
        helper.make_node("Concat", ["log", "log"], ["logits"], axis=1),
    ]
    inputs = [(name, onnx.TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
    table = np.array([0, 1, 1, 1, 0], np.float32)
    constants = [("axes", np.array([1])), ("table", table)]
    assert check(own_graph(nodes, inputs, constants), spec, rows).extremes == "the highest token"

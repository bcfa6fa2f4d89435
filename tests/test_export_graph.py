"""Every kind of network becomes a graph with one output for each task, in fp32 and in int8, that computes the same."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from bundle import preprocess
from bundle.errors import GateFailed, ModelError
from bundle.manifest import ImageInput, Regression, TextInput
from bundle.model import MAX_ROWS, predict_logits
from bundle.session import Session
from export import graph, quantize
from export.batches import parity_sizes
from finetune import evaluate
from finetune.model import ImageNetwork
from tests.export_examples import KINDS, TASKS, tiny

WORDS = 50  # of the tiny networks' tables


@cache
def exported(kind):
    """A network, its input, a hundred examples, and its graph."""
    network, spec, rows = tiny(kind, count=100)
    return network, spec, rows, graph.to_onnx(network, spec, TASKS, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_is_an_output(kind):
    """Names, shapes and values of all outputs, for batches of any size and rows of any length."""
    network, spec, rows, fp32 = exported(kind)
    session = Session(fp32, device="cpu", threads=1)
    shapes = {output.name: output.shape for output in session.outputs}
    inputs = [(tensor.name, tensor.datatype, tensor.shape) for tensor in session.inputs]
    logits = predict_logits(session, spec, rows, batch_invariant=True)

    assert shapes == {"kind.logits": (-1, 3), "tags.logits": (-1, 2), "size.logits": (-1, 1)}
    assert inputs == [(tensor.name, tensor.datatype, tensor.shape) for tensor in preprocess.graph_inputs(spec)]
    np.testing.assert_allclose(graph.joined(logits, TASKS), evaluate.logits(network, rows, spec), atol=1e-5)
    assert graph.check_parity(fp32, network, spec, TASKS, rows).served < 1e-5


def test_one_task_has_a_bare_output():
    """The name of a single task is no part of the graph."""
    network, spec, rows = tiny("vector", TASKS[2:])
    session = Session(graph.to_onnx(network, spec, TASKS[2:], rows), device="cpu")
    assert [(output.name, output.shape) for output in session.outputs] == [("logits", (-1, 1))]


def test_nothing_is_in_the_graph_that_it_does_not_use():
    """The network's own head, which the tasks' layers replace, leaves no weights behind."""
    model = onnx.load_from_string(exported("image")[3])
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_any_output_fails_parity(kind):
    """One wrong weight of the last task's layer is caught, though the other tasks' logits are right."""
    network, spec, rows, fp32 = exported(kind)
    model = onnx.load_from_string(fp32)
    node = next(node for node in model.graph.node if "size.logits" in node.output)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(GateFailed, match="the exporter changes a logit"):
        graph.check_parity(model.SerializeToString(), network, spec, TASKS, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_of_the_backbone_fails_parity(kind):
    """One number of one channel, feature or word that the sample has is caught, in every kind of network."""
    network, spec, rows, fp32 = exported(kind)
    model = onnx.load_from_string(fp32)
    tensor = max(model.graph.initializer, key=lambda tensor: ("heads" not in tensor.name, np.prod(tensor.dims)))
    values = numpy_helper.to_array(tensor).copy()
    seen = next(row for row in rows if row.size).flat[0]
    values[seen if len(values) == WORDS else -1].flat[0] += 0.3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(GateFailed, match="the exporter changes a logit"):
        graph.check_parity(model.SerializeToString(), network, spec, TASKS, rows)


def wrong_when(fp32, name, axis, size):
    """A graph whose last output is wrong where this axis of an input has this size."""
    model = onnx.load_from_string(fp32)
    make = onnx.helper.make_node
    next(node for node in model.graph.node if "size.logits" in node.output).output[0] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.array([size]), "trigger"))
    model.graph.node.extend(
        [
            make("Shape", [name], ["found"], start=axis, end=axis + 1),
            make("Equal", ["found", "trigger"], ["matches"]),
            make("Cast", ["matches"], ["fault"], to=onnx.TensorProto.FLOAT),
            make("Add", ["right", "fault"], ["size.logits"]),
        ]
    )
    return model.SerializeToString()


@pytest.mark.parametrize("kind", ["text", "pair", "words"])
@pytest.mark.parametrize("length", [1, 8, 16, None])
def test_a_fault_at_any_length_fails_parity(kind, length):
    """The shortest and the longest example, a bucket and the greatest length, which no example has, are tried."""
    network, spec, rows, fp32 = exported(kind)
    name = preprocess.graph_inputs(spec)[0].name
    length = length or max(preprocess.length(row, spec) for row in rows)
    with pytest.raises(GateFailed, match="the exporter changes a logit"):
        graph.check_parity(wrong_when(fp32, name, 1, length), network, spec, TASKS, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, MAX_ROWS])
def test_a_fault_in_batches_of_one_size_fails_parity(kind, size):
    """Sizes at which a dimension may have been taken for a constant, and the largest that is served."""
    network, spec, rows, fp32 = exported(kind)
    name = preprocess.graph_inputs(spec)[0].name
    with pytest.raises(GateFailed, match="the exporter changes a logit"):
        graph.check_parity(wrong_when(fp32, name, 0, size), network, spec, TASKS, rows[:10])


def test_large_images_are_tried_in_smaller_batches():
    """The largest batch has about a million pixels, or 2048 tokens."""
    image = ImageInput(
        column="image", height=224, width=224, resize=256, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    text = TextInput(column="text", max_length=256, pad_id=0, buckets=(128, 256))
    assert parity_sizes(image, []) == (1, 2, 3, 8, 20)
    assert parity_sizes(text, [np.ones(200, int), np.ones(3, int)]) == (1, 2, 3, 8, 10)


def test_the_opset_is_the_one_that_was_asked_for(monkeypatch):
    """An exporter that stays at another opset without a word is an error."""
    network, spec, rows = tiny("vector")
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **given: export(*args, **{**given, "opset_version": 18}))
    with pytest.raises(ModelError, match="wrote opset 18 instead of 20"):
        graph.to_onnx(network, spec, TASKS, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_int8(kind):
    """Dense layers of every kind run in int8, dynamic and static, near the fp32 answers; only images need more."""
    network, spec, rows, fp32 = exported(kind)
    expected = evaluate.logits(network, rows, spec)
    static = quantize.int8_minmax(fp32, spec, rows)
    inputs = {tensor.name: tensor.shape for tensor in preprocess.graph_inputs(spec)}
    for compiled in (static, quantize.int8_dynamic(fp32)):
        session = Session(compiled, device="cpu", threads=1)
        got = graph.joined(predict_logits(session, spec, rows, batch_invariant=False), TASKS)
        error = np.sqrt(np.mean((got - expected) ** 2, axis=0)) / expected.std(axis=0)
        assert error.max() < 0.15
        assert {tensor.name: tensor.shape for tensor in session.inputs} == inputs

    nodes = onnx.load_from_string(static).graph.node
    dequantized = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    fed = {node.op_type for node in nodes if node.input and node.input[0] in dequantized}
    assert ({"Conv", "Gemm"} <= fed) == (kind == "image")
    assert ("MatMulIntegerToFloat" in {node.op_type for node in nodes}) == (kind != "image")
    assert "Mul" not in fed


def test_invariance_looks_at_every_output():
    """A graph of which one output follows the batch is found out."""
    _, spec, rows, fp32 = exported("vector")
    model = onnx.load_from_string(fp32)
    assert graph.is_batch_invariant(Session(model.SerializeToString(), device="cpu", threads=1), spec, rows[:16])

    node = next(node for node in model.graph.node if "size.logits" in node.output)
    node.output[0] = "own"
    model.graph.node.append(onnx.helper.make_node("ReduceMean", ["own"], ["mean"], keepdims=1))
    model.graph.node.append(onnx.helper.make_node("Add", ["own", "mean"], ["size.logits"]))
    assert not graph.is_batch_invariant(Session(model.SerializeToString(), device="cpu", threads=1), spec, rows[:16])


def test_a_head_is_appended_task_by_task():
    """The features' graph with a new head gives what the same head gives in PyTorch."""
    network, spec, rows = tiny("words")
    features = graph.to_onnx(network, spec, (), rows, features=True)
    assert [output.name for output in Session(features, device="cpu").outputs] == [graph.FEATURES]

    random = np.random.default_rng(0)
    weight, bias = (random.normal(size=shape).astype(np.float32) for shape in ((6, 8), 6))
    network.head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    whole = graph.with_head(features, weight, bias, TASKS)
    assert graph.check_parity(whole, network, spec, TASKS, rows).exported < 1e-4


def test_constant_logits_are_no_failure():
    """An output that is the same for all examples has no deviation to be held to, only float32's rounding."""
    network, spec, rows = tiny("vector", (Regression(name="size", mean=0, std=1),))
    network.head.load_state_dict({"weight": torch.zeros(1, 8), "bias": torch.tensor([0.3])})
    tasks = (Regression(name="size", mean=0.0, std=1.0),)
    assert graph.check_parity(graph.to_onnx(network, spec, tasks, rows), network, spec, tasks, rows).served == 0


def test_rows_of_pixels_are_scaled_as_planes_would_be(monkeypatch):
    """The first steps are rewritten for speed; every logit stays as it was, bit for bit."""
    network, spec, rows, by_rows = exported("image")
    monkeypatch.setattr(graph, "scale_rows", lambda model: False)
    by_planes = graph.to_onnx(network, spec, TASKS, rows)
    first = [[node.op_type for node in onnx.load_from_string(each).graph.node][:3] for each in (by_rows, by_planes)]
    logits = [
        graph.joined(predict_logits(Session(each, device="cpu"), spec, rows, batch_invariant=True), TASKS)
        for each in (by_rows, by_planes)
    ]

    assert first == [["Reshape", "Cast", "Mul"], ["Transpose", "Cast", "Mul"]]
    np.testing.assert_array_equal(*logits)


class _Odd(nn.Module):
    def forward(self, pixels):
        return torch.linalg.qr(pixels)[0]


class _Backbone(nn.Module):
    """A convolution, and a layer that cannot be exported."""

    def __init__(self, odd):
        super().__init__()
        self.convolution, self.odd = nn.Conv2d(3, 8, 3), odd

    def forward(self, pixels):
        return self.odd(self.convolution(pixels)).mean((2, 3))


class _Branch(nn.Module):
    def forward(self, pixels):
        return pixels * 2 if pixels.sum() > 0 else pixels


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (_Odd(), r"ONNX has nothing for the operator aten\.linalg_qr\.default, which backbone\.odd \(_Odd\) uses"),
        (_Branch(), r"depends on the values of the data, in .*test_export_graph\.py, line \d+: return pixels"),
    ],
)
def test_what_cannot_be_exported_is_named(odd, words):
    """The error says which operator, in which layer, or which line looks at the data; not what torch would do next."""
    _, spec, rows = tiny("image")
    network = ImageNetwork(_Backbone(odd), 8, 6, spec).eval()
    with pytest.raises(ModelError, match=words):
        graph.to_onnx(network, spec, TASKS, rows)

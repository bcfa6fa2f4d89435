"""Static int8 of one pass over the examples: what is measured, what becomes int8, and what is put right again."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from bundle import preprocess
from bundle.errors import ModelError
from bundle.manifest import ImageInput, Multiclass, VectorInput
from bundle.session import Session, optimized
from export import graph, quantize, ranges
from export.islands import hold_fp32
from finetune.model import ImageNetwork

TASKS = (Multiclass(name="kind", labels=("a", "b", "c")),)


class Block(nn.Module):
    """A convolution, squeeze and excitation, and two branches that halve the image."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return torch.relu(self.left(x) + self.right(x)).mean((2, 3))


@cache
def prepared():
    """The network's graph, its input, and examples."""
    half = (0.5, 0.5, 0.5)
    spec = ImageInput(column="image", height=12, width=12, resize=12, interpolation="bilinear", mean=half, std=half)
    rows = list(np.random.default_rng(0).integers(0, 256, (12, 12, 12, 3), dtype=np.uint8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageNetwork(Block(), 8, 3, spec).eval()
    return quantize.prepared(graph.to_onnx(network, spec, TASKS, rows)), spec, rows


@cache
def statistics():
    return ranges.observe(*prepared())


def logits(compiled):
    _, spec, rows = prepared()
    session = Session(compiled, device="cpu", threads=1)
    return np.concatenate([session.run(preprocess.collate([row], spec))["logits"] for row in rows])


def test_a_histogram_widens_without_losing_a_value():
    """Whatever the order and the size of the values, each is counted, between the least and the greatest."""
    histogram, random = ranges.Histogram(), np.random.default_rng(0)
    parts = [np.float32([5.0]), np.zeros(9, np.float32), random.normal(size=500) * 1e-3, random.normal(size=500) * 1e3]
    for part in parts:
        histogram.add(part.astype(np.float32))
    values = np.concatenate(parts).astype(np.float32)

    assert (histogram.least, histogram.greatest) == (values.min(), values.max())
    np.testing.assert_array_equal(histogram.counts, np.histogram(values, histogram.edges)[0])
    assert histogram.counts.sum() == len(values)
    assert np.count_nonzero(histogram.counts) > 100


def test_ranges_are_what_the_runtime_would_calibrate(tmp_path):
    """Least and greatest are those of onnxruntime.quantization's own calibrator."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    model, spec, rows = prepared()
    (tmp_path / "model.onnx").write_bytes(model)

    class Reader(CalibrationDataReader):
        feeds = iter([preprocess.collate([row], spec) for row in rows])

        def get_next(self):
            return next(self.feeds, None)

    peer = MinMaxCalibrater(tmp_path / "model.onnx", ["Conv"], str(tmp_path / "augmented.onnx"))
    peer.augment_graph()
    peer.create_inference_session()
    peer.collect_data(Reader())
    expected = {name: data.range_value for name, data in peer.compute_data().items()}
    found = ranges.ranges(statistics(), "minmax")

    assert len(expected) >= 5
    for name, (least, greatest) in expected.items():
        # the calibrator's own graph is not optimised, so that sums may be rounded otherwise
        assert found[name] == pytest.approx((min(least.item(), 0), max(greatest.item(), 0)), rel=1e-5, abs=1e-6)


def test_a_percentile_leaves_out_what_is_rare():
    """One value of a million on each side does not decide the range; the bulk of them does."""
    histogram = ranges.Histogram()
    for _ in range(300):
        histogram.add(np.linspace(-1, 2, 8001, dtype=np.float32))
    histogram.add(np.float32([-50, 90]))
    least, greatest = ranges.ranges({"x": histogram}, "percentile")["x"]

    assert ranges.ranges({"x": histogram}, "minmax")["x"] == (-50, 90)
    assert least == pytest.approx(-1, abs=0.2)
    assert greatest == pytest.approx(2, abs=0.2)


def test_what_is_not_finite_cannot_be_quantized():
    """A NaN that a calibration example makes is an error that names the tensor."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Log", ["features"], ["log"]), helper.make_node("MatMul", ["log", "w"], ["logits"])],
            "g",
            [helper.make_tensor_value_info("features", 1, ["batch", 2])],
            [helper.make_tensor_value_info("logits", 1, ["batch", 3])],
            [numpy_helper.from_array(np.ones((2, 3), np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    spec = VectorInput(column="features", size=2)
    start = quantize.prepared(model.SerializeToString())
    with pytest.raises(ModelError, match="'log' is not finite"):
        ranges.observe(start, spec, [np.float32([-1, 1])])
    with pytest.raises(ModelError, match=r"MatMul '.*' cannot be quantized: the range of tensor 'log' is missing"):
        quantize.int8_static(start, spec, {})


def test_one_pass_serves_every_candidate():
    """Per tensor or per channel, either sign: near the fp32 answers, and no two graphs are equal."""
    start, spec, _ = prepared()
    expected, known = logits(start), ranges.ranges(statistics(), "minmax")
    made = {
        quantize.int8_static(start, spec, known, per_channel=per_channel, signed=signed)
        for per_channel in (True, False)
        for signed in (True, False)
    }
    assert len(made) == 4
    for compiled in made:
        assert np.abs(logits(compiled) - expected).max() < 0.2 * np.abs(expected).max()


def test_groups_cut_between_what_runs_as_one():
    """Branches of the same tensor, and the two layers of squeeze and excitation, are one group with what follows."""
    start, spec, _ = prepared()
    types = {node.name: node.op_type for node in onnx.load_from_string(start).graph.node}
    found = [sorted(types[name] for name in group.nodes) for group in quantize.groups(start, spec)]
    heavy = [[kind for kind in kinds if kind in ("Conv", "Gemm")] for kinds in found]

    assert heavy == [["Conv"], ["Conv", "Conv"], ["Conv", "Conv"], ["Gemm"]]
    assert "Relu" in found[0]
    assert {"Relu", "Sigmoid"} <= set(found[1])
    assert len({name for group in quantize.groups(start, spec) for name in group.nodes}) == sum(map(len, found))


def test_what_is_kept_runs_in_fp32():
    """With all but one group kept the answers are nearly those of fp32; with all there is nothing to do."""
    start, spec, _ = prepared()
    known = ranges.ranges(statistics(), "minmax")
    first, *others = quantize.groups(start, spec)
    compiled = quantize.int8_static(start, spec, known, kept=[name for group in others for name in group.nodes])
    np.testing.assert_allclose(logits(compiled), logits(start), atol=0.02)
    with pytest.raises(ModelError, match="left to become int8"):
        quantize.int8_static(start, spec, known, kept=[*first.nodes, *(n for one in others for n in one.nodes)])


def operators(model):
    """What the runtime runs."""
    return [node.op_type for node in onnx.load_from_string(optimized(model.SerializeToString())).graph.node]


def test_what_is_kept_between_int8_layers_stays_fp32_in_the_runtime():
    """ONNX Runtime gives fp32 layers behind a conversion int8 weights of its own; those that are to stay, stay."""
    start, spec, rows = prepared()
    known = ranges.ranges(statistics(), "minmax")
    every = operators(onnx.load_from_string(quantize.int8_static(start, spec, known))).count("QLinearConv")
    for group in quantize.groups(start, spec):
        compiled = quantize.int8_static(start, spec, known, kept=group.nodes)
        kept = sum("conv2d" in name for name in group.nodes)
        assert operators(onnx.load_from_string(compiled)).count("QLinearConv") == every - kept
        plain = Session(compiled, device="cpu", threads=1, optimize=False)
        as_is = np.concatenate([plain.run(preprocess.collate([row], spec))["logits"] for row in rows])
        assert np.abs(logits(compiled) - as_is).max() < 0.02


def test_a_kept_layer_behind_a_reshaped_tensor_stays_fp32():
    """The runtime moves conversions behind what only moves numbers, and would find the layer there."""
    weights = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    parts = {"weights": weights, "bias": np.zeros(4, np.float32), "scale": np.float32(0.1), "zero": np.uint8(3)}
    parts["shape"] = np.array([0, -1])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "d"),
        helper.make_node("Reshape", ["d", "shape"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["g"], "gemm"),
        helper.make_node("QuantizeLinear", ["g", "scale", "zero"], ["g_q"], "g_q"),
        helper.make_node("DequantizeLinear", ["g_q", "scale", "zero"], ["y"], "y"),
    ]
    value = onnx.helper.make_tensor_value_info
    inside = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 3, 4])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in parts.items()],
    )
    model = helper.make_model(inside, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert "QGemm" in operators(model)  # without it
    hold_fp32(model)
    assert "Gemm" in operators(model)


def test_leftovers_are_counted_between_the_edges():
    """An fp32 layer between two int8 ones takes a conversion on each side."""
    start, spec, _ = prepared()
    known = ranges.ranges(statistics(), "minmax")
    every = quantize.leftovers(quantize.int8_static(start, spec, known))
    branches = quantize.groups(start, spec)[2]
    assert quantize.leftovers(start) == 0
    assert quantize.leftovers(quantize.int8_static(start, spec, known, kept=branches.nodes)) > every


def test_corrected_scales_restore_what_a_channel_gives():
    """A channel whose weights are a fifth too large gives what it gave."""
    start, spec, rows = prepared()
    compiled = quantize.int8_static(start, spec, ranges.ranges(statistics(), "minmax"))
    model = onnx.load_from_string(compiled)
    scales = next(
        each for each in model.graph.initializer if "stem" in each.name and each.name.endswith("weight_scale")
    )
    before = numpy_helper.to_array(scales)
    scales.CopyFrom(numpy_helper.from_array((before * 1.2).astype(np.float32), scales.name))
    wrong = model.SerializeToString()
    right = quantize.corrected(wrong, start, spec, rows)
    after = {each.name: numpy_helper.to_array(each) for each in onnx.load_from_string(right).graph.initializer}

    np.testing.assert_allclose(after[scales.name], before, rtol=0.03)
    off, left = (np.abs(logits(each) - logits(start)).mean() for each in (wrong, right))
    assert left < off / 3


def test_corrected_biases_restore_the_mean():
    """What rounding of coarse ranges does to the means of the logits is put right again, mostly."""
    start, spec, rows = prepared()
    wide = {name: (80 * low, 80 * high) for name, (low, high) in ranges.ranges(statistics(), "minmax").items()}
    wide |= {name: (-1.0, 1.0) for name in wide if name == "logits"}
    expected = logits(start).mean(axis=0)
    plain = quantize.int8_static(start, spec, wide)
    shift, left = (
        np.abs(logits(compiled).mean(axis=0) - expected).max()
        for compiled in (plain, quantize.corrected(plain, start, spec, rows))
    )
    assert shift > 0.005
    assert left < shift / 2

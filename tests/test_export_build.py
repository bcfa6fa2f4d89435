"""Export: what ships is proved, what is not proved does not ship, and nothing is left half-written."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from bundle import preprocess
from bundle.errors import BundleError, CheckpointError, DataError, EdgewardError, GateFailed, ModelError, OutputExists
from bundle.manifest import to_json
from bundle.model import load_model
from bundle.session import Session
from bundle.store import open_bundle
from export import graph, quantize, source, timing
from export.build import REPORT, ExportConfig, export_checkpoint
from export.report import Report, render
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.data import load_dataset
from tests.export_examples import clock


def examples(checkpoint, split):
    """Raw examples, true labels and positions of a split."""
    spec = checkpoint.spec.input
    dataset = load_dataset(checkpoint.splits.data, "text" if spec.column == "text" else "image")
    indices = checkpoint.splits.indices(dataset, split)
    return [dataset.raw(int(i)) for i in indices], dataset.targets[0].values[indices]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_served_answers_are_pytorchs(kind, request, tmp_path):
    """An fp32 bundle gives the logits of the PyTorch network within the parity that its manifest records."""
    path = request.getfixturevalue(f"{kind}_checkpoint")
    result = export_checkpoint(ExportConfig(path, out=tmp_path / "b", variant="fp32", threads=1), timer=clock(1.0))
    model, checkpoint = load_model(tmp_path / "b", device="cpu"), load_checkpoint(path)
    raws, _ = examples(checkpoint, "gate")
    rows = [checkpoint.encode(raw) for raw in raws]

    difference = np.abs(
        model.predict(raws)["logits"] - evaluate.logits(checkpoint.network, rows, checkpoint.spec.input)
    )
    assert difference.max() <= result.report.parity.tolerance
    assert result.report.parity.served == model.variant.parity <= result.report.parity.tolerance
    assert model.variant.gate is None
    assert result.report.served == pytest.approx(result.report.pytorch, rel=1e-4)


def test_report_is_what_is_served(text_bundle, text_checkpoint):
    """Accuracy and F1 in the report are those of the answers that the bundle gives to the gate split."""
    from sklearn.metrics import accuracy_score, f1_score

    report = msgspec.json.decode((text_bundle / REPORT).read_bytes(), type=Report)
    model, checkpoint = load_model(text_bundle, device="cpu"), load_checkpoint(text_checkpoint)
    raws, truth = examples(checkpoint, "gate")
    labels = [label.decode() for label in model.predict(raws)["label"][:, 0]]
    expected = [checkpoint.spec.tasks[0].labels[i] for i in truth]

    assert report.served["accuracy"] == pytest.approx(accuracy_score(expected, labels))
    assert report.served["macro_f1"] == pytest.approx(f1_score(expected, labels, average="macro"))
    assert report.gate == (model.variant.gate,) == report.comparison
    assert report.examples["gate"] == len(raws) == report.gate[0].examples


def test_dynamic_int8_runs_alone(text_bundle, text_checkpoint):
    """Its scales span the batch, so it is marked, and an answer does not depend on its neighbours."""
    model = load_model(text_bundle, device="cpu")
    raws, _ = examples(load_checkpoint(text_checkpoint), "gate")
    assert not model.variant.batch_invariant

    together = model.predict(raws[:7])["logits"]
    alone = [model.predict([raw])["logits"][0] for raw in raws[:7]]
    np.testing.assert_array_equal(together, alone)


def test_static_int8_is_int8_and_smaller(image_bundle):
    """Convolutions run on int8 weights between quantized activations."""
    bundle = open_bundle(image_bundle)
    model = onnx.load_from_string(bundle.read(bundle.manifest.variants[0].file))
    weights = [numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer if len(tensor.dims) > 1]

    assert {node.op_type for node in model.graph.node} >= {"Conv", "QuantizeLinear", "DequantizeLinear"}
    assert weights.count(np.int8) == 3  # two convolutions and the head


def test_goldens_show_every_label_and_both_formats(image_bundle, image_checkpoint):
    """Tensors of PNG are held exactly, those of JPEG to a tolerance, and each label comes once before any twice."""
    bundle = open_bundle(image_bundle)
    label_of = dict(zip(*examples(load_checkpoint(image_checkpoint), "selection"), strict=True))
    labels = {label_of[bundle.read(golden.file)] for golden in bundle.manifest.goldens}

    assert len(bundle.manifest.goldens) == len(labels) == 8
    assert {golden.exact for golden in bundle.manifest.goldens} == {True, False}
    assert all(bundle.read(g.file).startswith(b"\x89PNG") == g.exact for g in bundle.manifest.goldens)


@pytest.mark.parametrize(
    ("ratios", "shipped"),
    [((1.0, 0.5, 0.4), "int8-static"), ((1.0, 0.4, 0.5), "int8-dynamic"), ((1.0, 0.98, 1.3), "fp32")],
)
def test_fastest_that_passes_ships(ratios, shipped, text_checkpoint, tmp_path):
    """Of the variants within the budget the fastest ships, and fp32 when none is clearly faster."""
    config = ExportConfig(text_checkpoint, out=tmp_path / "b", max_drop=30, effort="fast", threads=1)
    result = export_checkpoint(config, timer=clock(*ratios))

    assert result.report.shipped == shipped
    assert [v.name for v in open_bundle(tmp_path / "b").manifest.variants] == [shipped]
    assert (result.report.gate == ()) == (shipped == "fp32")
    assert [c.outcome for c in result.report.candidates].count("shipped") == 1
    assert "ships" in str(render(result.report).renderables[2]) or shipped != "fp32"


def test_unproved_int8_gives_way_to_fp32(unproved_checkpoint, tmp_path):
    """What the selection split lets through but the gate does not pass is replaced, and the report says so."""
    config = ExportConfig(unproved_checkpoint, out=tmp_path / "b", max_drop=10, effort="fast", threads=1)
    result = export_checkpoint(config, timer=clock(1.0, 0.5))
    outcomes = {one.name: one.outcome for one in result.report.candidates}

    assert result.report.shipped == "fp32"
    assert [record.verdict for record in result.report.gate] == ["INCONCLUSIVE"]
    needed = result.report.gate[0].examples_needed
    assert needed is None or needed > result.report.gate[0].examples
    assert outcomes.pop("fp32") == "shipped"
    assert sorted(outcomes.values()) == ["less accurate", "not passed"]  # of two that run the same kernels
    assert load_model(tmp_path / "b", device="cpu").variant.gate is None
    assert "INCONCLUSIVE" in str(render(result.report).renderables[2])


def test_variant_asked_for_by_name_must_pass(unproved_checkpoint, tmp_path):
    """Otherwise nothing is written but the report that was asked for."""
    config = ExportConfig(
        unproved_checkpoint,
        out=tmp_path / "b",
        variant="int8-static",
        max_drop=0.01,
        report=tmp_path / "report.json",
        threads=1,
    )
    with pytest.raises(GateFailed, match=r"INCONCLUSIVE|FAIL"):
        export_checkpoint(config, timer=clock(1.0, 0.5))

    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_bytes())["gate"][0]["verdict"] != "PASS"


@pytest.mark.parametrize("kind", ["text", "image"])
def test_one_wrong_weight_fails_parity(kind, request):
    """A planted change of one row of weights by their own spread is caught."""
    checkpoint = load_checkpoint(request.getfixturevalue(f"{kind}_checkpoint"))
    spec = checkpoint.spec.input
    rows = [checkpoint.encode(raw) for raw in examples(checkpoint, "selection")[0][:32]]
    exported = graph.to_onnx(checkpoint.network, spec, checkpoint.spec.tasks, rows)
    graph.check_parity(exported, checkpoint.network, spec, checkpoint.spec.tasks, rows)

    model = onnx.load_from_string(exported)
    tensor = max((t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] > 3), key=lambda t: t.dims[1])
    if kind == "image":
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values[2] += values.std()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(GateFailed, match="the exporter changes a logit"):
        graph.check_parity(model.SerializeToString(), checkpoint.network, spec, checkpoint.spec.tasks, rows)


def test_graph_takes_any_batch_and_length(text_checkpoint):
    """Batch and length are named dynamic dimensions, and both ends of their ranges run."""
    checkpoint = load_checkpoint(text_checkpoint)
    rows = [checkpoint.encode(b"one two three"), checkpoint.encode(b"four five")]
    exported = graph.to_onnx(checkpoint.network, checkpoint.spec.input, checkpoint.spec.tasks, rows)
    model = onnx.load_from_string(exported)
    names = [[axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert names == [["batch", "length"], ["batch", "length"]]

    session = Session(exported, device="cpu")
    for batch, length in [(1, 2), (1, 48), (64, 48), (2, 3)]:
        feeds = {"input_ids": np.ones((batch, length), np.int64), "attention_mask": np.ones((batch, length), np.int64)}
        with torch.inference_mode():
            expected = checkpoint.network(*map(torch.from_numpy, feeds.values())).numpy()
        np.testing.assert_allclose(session.run(feeds)["logits"], expected, atol=1e-5)


def test_calibration_uses_training_examples_only(image_checkpoint):
    """No held-out example has a say in the ranges of static int8."""
    checkpoint = load_checkpoint(image_checkpoint)
    dataset = load_dataset(checkpoint.splits.data, "image")
    rows = source.calibration_rows(checkpoint, dataset, 50)

    assert len(rows) == 50
    assert {checkpoint.splits.assignment[dataset.hashes[i]] for i in rows.indices} == {"train"}


def test_quantizer_errors_are_ours():
    """A graph that cannot be quantized is one clear error."""
    with pytest.raises(ModelError, match="cannot be quantized"):
        quantize.int8_dynamic(b"not a graph")


def test_out_is_never_replaced(image_checkpoint, tmp_path):
    """An existing directory is refused before anything is computed, and left as it is."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("mine")
    with pytest.raises(OutputExists, match="left as it is"):
        export_checkpoint(ExportConfig(image_checkpoint, out=tmp_path / "b", threads=1))
    assert (tmp_path / "b" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"confidence": 95}, "--confidence is 95; it must be between 0.5 and 1"),
        ({"max_drop": float("nan")}, "--max-drop is nan; it must be 0 or more"),
        ({"calibration": 0}, "--calibration is 0; it must be 1 or more"),
        ({"report": Path("r.txt")}, "--report r.txt says no format"),
    ],
)
def test_a_wrong_option_is_named(option, says, tmp_path):
    """Alone, with its value and what it may be."""
    with pytest.raises(BundleError, match=f"^{says}"):
        export_checkpoint(ExportConfig(tmp_path / "none", out=tmp_path / "b", **option))


def test_out_that_cannot_be_written_is_refused_first(tmp_path):
    """Before the checkpoint is opened, not after the search."""
    (tmp_path / "file").touch()
    with pytest.raises(EdgewardError, match="Choose another --out"):
        export_checkpoint(ExportConfig(tmp_path / "none", out=tmp_path / "file" / "b"))


@pytest.mark.parametrize(
    ("report", "says"),
    [("file/r.html", "Choose another --report"), ("folder.json", "is a folder: name a file in it")],
)
def test_report_that_cannot_be_written_is_refused_first(report, says, tmp_path):
    """Else the search were lost with it."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    config = ExportConfig(tmp_path / "none", out=tmp_path / "b", report=tmp_path / report)
    with pytest.raises(EdgewardError, match=says):
        export_checkpoint(config)


@pytest.mark.parametrize("report", ["b/report.html", "b/deep/../r.json", "b"])
def test_report_inside_out_is_refused_first(report, tmp_path):
    """It would be there before the bundle, which could then not be written: that is said before the search."""
    config = ExportConfig(tmp_path / "none", out=tmp_path / "b", report=tmp_path / report)
    with pytest.raises(BundleError, match="lies in --out"):
        export_checkpoint(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"name": "mine"}, {"version": 2}, {"goldens": Path("some.csv")}])
def test_what_a_bundle_has_already_is_not_given_with_add_to(option, tmp_path):
    """Name, version and golden examples are the bundle's; an option that would be ignored is refused."""
    with pytest.raises(BundleError, match="--add-to"):
        export_checkpoint(ExportConfig(tmp_path / "none", out=tmp_path / "b", add_to=tmp_path / "a", **option))


def test_other_data_is_refused(text_checkpoint, tmp_path):
    """A gate on examples that the model may have been trained on proves nothing."""
    from tests.finetune_examples import write_tweets

    other = write_tweets(tmp_path / "tweets.csv", 300)
    with pytest.raises(DataError, match="is not the data that was split"):
        export_checkpoint(ExportConfig(text_checkpoint, out=tmp_path / "b", data=str(other), threads=1))
    assert not (tmp_path / "b").exists()


def test_moved_data_is_found_where_told(text_checkpoint, tmp_path):
    """The same examples in another place and another order are the same data, and what is remembered follows them."""
    here = load_checkpoint(text_checkpoint).splits.data
    header, *lines = Path(here).read_bytes().decode().split("\r\n")
    (tmp_path / "moved.csv").write_text("\r\n".join([header, *sorted(lines)[1:]]), encoding="utf-8", newline="")
    config = ExportConfig(text_checkpoint, out=tmp_path / "a", variant="fp32", threads=1)
    first = export_checkpoint(config, timer=clock(1.0)).report
    moved = replace(config, out=tmp_path / "b", data=str(tmp_path / "moved.csv"))
    second = export_checkpoint(moved, timer=clock(1.0)).report

    assert second.provenance.data == str(tmp_path / "moved.csv")
    assert second.pytorch == pytest.approx(first.pytorch)
    assert second.candidates[0].selection == pytest.approx(first.candidates[0].selection)


@pytest.mark.parametrize(("name", "version"), [("bad name", 1), ("../up", 1), ("good", 0)])
def test_impossible_names_are_refused_first(name, version, tmp_path):
    """A name that no server could answer to is refused before the checkpoint is read."""
    with pytest.raises(BundleError):
        export_checkpoint(ExportConfig(tmp_path / "none", out=tmp_path / "b", name=name, version=version, threads=1))


def test_missing_checkpoint_is_one_line(tmp_path):
    """There is nothing to export."""
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export_checkpoint(ExportConfig(tmp_path / "none", out=tmp_path / "b", threads=1))


def test_threads_are_measured_and_served(text_checkpoint, tmp_path):
    """A variant that is faster on one thread than on two says so in its manifest, and starts with one."""
    config = ExportConfig(text_checkpoint, out=tmp_path / "b", variant="int8-dynamic", max_drop=20, threads=2)
    export_checkpoint(config, timer=clock(1.0, 1.1, 1.3, 0.9, 0.8, 0.7, 0.9))
    model = load_model(tmp_path / "b", device="cpu")

    assert (model.variant.latency.threads, model.variant.latency.ratio) == (1, 0.7)
    assert model.session.threads == 1
    assert load_model(tmp_path / "b", device="cpu", threads=2).session.threads == 2


@pytest.mark.parametrize(("upper", "threads"), [(1.01, 2), (0.99, 1)])
def test_fewer_threads_are_taken_only_if_surely_faster(upper, threads):
    """A lucky moment against the reference is not enough: side by side one thread must beat all of them."""
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    made = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=9,
    ).SerializeToString()
    reference = Session(made, device="cpu", threads=2)

    def timer(candidate, other, feeds):
        ratio = {2: 1.0, 1: 0.5}[candidate.threads]
        return timing.Timing(1.0, 1.0, ratio, 0.4, ratio if other is reference else upper)

    _, session = timing.fastest(made, reference, [{"x": np.ones(1, np.float32)}], timer, threads=2)
    assert session.threads == threads


def test_timer_interleaves_and_compares():
    """A session that does more work is slower than itself with less, by the clock of this machine."""
    feeds = [{"x": np.random.default_rng(0).random((300, 300), np.float32)}]
    node = [onnx.helper.make_node("MatMul", ["x", "x"], ["y0"])]
    node += [onnx.helper.make_node("MatMul", [f"y{i}", "x"], [f"y{i + 1}"]) for i in range(15)]

    def session(count):
        value = [onnx.helper.make_tensor_value_info(n, 1, [300, 300]) for n in ("x", f"y{count - 1}")]
        model = onnx.helper.make_model(
            onnx.helper.make_graph(node[:count], "g", value[:1], value[1:]),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=9,
        )
        return Session(model.SerializeToString(), device="cpu", threads=1)

    measured = timing.interleaved(session(16), session(2), feeds)
    assert measured.ratio > 1.5
    assert measured.ratio <= measured.ratio_upper


def test_report_round_trips(text_bundle):
    """The report in the bundle is the record, and writing it again gives the same bytes."""
    data = (text_bundle / REPORT).read_bytes()
    assert to_json(msgspec.json.decode(data, type=Report)) == data


def test_invariance_is_measured_on_real_batches(image_checkpoint, text_bundle):
    """A graph whose answers follow their neighbours is found out."""
    checkpoint = load_checkpoint(image_checkpoint)
    rows = [checkpoint.encode(raw) for raw in examples(checkpoint, "selection")[0][:16]]
    fp32 = graph.to_onnx(checkpoint.network, checkpoint.spec.input, checkpoint.spec.tasks, rows)
    dynamic = quantize.int8_dynamic(fp32)

    assert not graph.is_batch_invariant(Session(dynamic, device="cpu"), checkpoint.spec.input, rows)
    assert preprocess.graph_inputs(checkpoint.spec.input)[0].datatype == "UINT8"

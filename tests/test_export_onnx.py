import csv
import re

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bundle import preprocess
from bundle.errors import DataError, ModelError
from bundle.manifest import ImageInput, Multiclass, Multilabel, NamedTensor, Regression, TensorsInput, VectorInput
from bundle.model import load_model
from bundle.outputs import sigmoid, softmax
from bundle.session import Session
from bundle.store import open_bundle
from export import nodes, onnx_graph, quantize
from export.build import export_checkpoint
from export.config import ExportConfig
from export.onnx_source import open_onnx
from tests.export_examples import clock
from tests.serve_bundles import MOOD, TASKS, TEXT, tensors_graph, text_graph, tokenizer_json

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(200, 4)).astype(np.float32)
W = RANDOM.normal(size=(4, 3)).astype(np.float32)
Y = (X @ W).argmax(axis=1)


def node(operator, inputs, output, name="", **attributes):
    return helper.make_node(operator, inputs.split(), output.split(), name or output, **attributes)


def model(nodes, constants=(), inputs=(("x", FLOAT, ["n", 4]),), outputs=(("out", FLOAT, ["n", 3]),), opset=17):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": W, **dict(constants)}.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("com.acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


LINEAR = [node("MatMul", "x w", "out")]


@pytest.fixture
def config(tmp_path):
    """Writes a model and arrays, and gives the options to export them."""

    def write(of, labels=None, given=None, **arrays):
        onnx.save(of, tmp_path / "model.onnx")
        np.savez(tmp_path / "data.npz", **arrays)
        if labels is not None:
            (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        data = str(tmp_path / "data.npz")
        options = {
            "data": data,
            "labels": None if labels is None else tmp_path / "labels.txt",
            "cache": False,
            **(given or {}),
        }
        return ExportConfig(tmp_path / "model.onnx", out=tmp_path / "out", **options)

    write.folder = tmp_path
    return write


def run(source, rows=None):
    """The graph's outputs for preprocessed rows, by default those of the selection split."""
    rows = list(source.selection.rows if rows is None else rows)
    return Session(source.graph, device="cpu").run(preprocess.collate(rows, source.spec))


def inputs_of(source):
    return preprocess.collate(list(source.selection.rows), source.spec)


def test_a_model_is_held_to_itself(config):
    """Task, splits, reference and parity follow from the model and the arrays; another name is all that changes."""
    source = open_onnx(config(model(LINEAR), x=X, y=Y))

    assert source.spec == TensorsInput(tensors=(NamedTensor(name="x", datatype="FP32", shape=(4,)),))
    assert source.tasks == (Multiclass(name="y", labels=("0", "1", "2")),)
    assert (source.parity.exported, source.parity.served) == (0, 0)
    assert (source.model, source.refit, source.files) == ("model.onnx", None, {})
    rows = source.selection.indices
    np.testing.assert_array_equal(source.selection.logits, run(source)["logits"])
    np.testing.assert_allclose(source.selection.logits, X[rows] @ W, rtol=1e-5)
    np.testing.assert_array_equal(source.selection.targets[0].values, Y[rows])
    assert source.raw(7) == X[7].tobytes()


def test_splits_follow_from_the_contents(config):
    """Every example is in one split, in proportion, whatever the order of the rows."""
    source = open_onnx(config(model(LINEAR), x=X, y=Y))
    turned = open_onnx(config(model(LINEAR), x=X[::-1], y=Y[::-1]))

    selection, gate = source.selection, source.held_out()
    calibration = {row.tobytes() for row in source.calibration}
    held_out = [{row.tobytes() for row in split.rows} for split in (selection, gate)]
    assert [len(calibration), *map(len, held_out)] == pytest.approx([40, 60, 100], abs=3)
    assert len(calibration.union(*held_out)) == 200
    assert source.gate_size == len(gate)
    assert {row.tobytes() for row in turned.selection.rows} == held_out[0]
    assert source.data_sha256 == turned.data_sha256


def test_a_model_that_was_quantized_before_is_int8(config):
    """Its answers hang on the machine's kernels, whatever the variant is called, and the manifest says so."""
    of = onnx.load_from_string(quantize.int8_dynamic(model(LINEAR).SerializeToString()))
    assert nodes.is_quantized(of.graph)
    given = {"variant": "fp32", "threads": 1}
    bundle = export_checkpoint(config(of, given=given, x=X, y=Y), timer=clock(1.0)).bundle
    variant = open_bundle(bundle).manifest.variants[0]

    assert (variant.name, variant.precision) == ("fp32", "int8")
    assert not nodes.is_quantized(model(LINEAR).graph)


def test_remembered_answers_are_of_the_same_rows(config):
    """The same examples in another order have their own answers, not those that were kept of the first order."""
    for rows in (np.arange(len(X)), np.arange(len(X))[::-1]):
        source = open_onnx(config(model(LINEAR), given={"cache": True}, x=X[rows], y=Y[rows]))
        for split in (source.selection, source.held_out()):
            np.testing.assert_allclose(split.logits, X[rows][split.indices] @ W, rtol=1e-5)


@pytest.mark.parametrize("between", [[], ["Identity"], ["Identity", "Cast"]])
def test_a_softmax_at_the_end_is_taken_off(config, between):
    """Its answers are the model's probabilities, and the logits are what it took."""
    nodes, value = [node("MatMul", "x w", "before"), node("Softmax", "before", "p0", axis=1)], "p0"
    for i, operator in enumerate(between, start=1):
        nodes.append(node(operator, value, f"p{i}", **({"to": FLOAT} if operator == "Cast" else {})))
        value = f"p{i}"
    of = model(nodes, outputs=[(value, FLOAT, ["n", 3])])
    source = open_onnx(config(of, x=X, y=Y))

    as_it_came = Session(of.SerializeToString(), device="cpu").run(inputs_of(source))[value]
    np.testing.assert_allclose(softmax(run(source)["logits"]), as_it_came, atol=1e-6)
    assert [each.op_type for each in onnx.load_from_string(source.graph).graph.node] == ["MatMul"]


def test_probabilities_from_elsewhere_become_logarithms(config):
    """Probabilities of 0, too, keep their order, and scores are what the model gave."""
    nodes = [
        node("MatMul", "x w", "z"),
        node("Relu", "z", "r"),
        node("Add", "r tiny", "s"),
        node("ReduceSum", "s last", "total"),
        node("Div", "s total", "out"),
    ]
    of = model(nodes, {"tiny": np.array([0, 0, 1e-6], np.float32), "last": np.array([1])})
    source = open_onnx(config(of, x=X, y=Y))

    as_it_came = Session(of.SerializeToString(), device="cpu").run(inputs_of(source))["out"]
    assert (as_it_came == 0).any()
    logits = run(source)["logits"]
    np.testing.assert_allclose(softmax(logits), as_it_came, atol=1e-6)
    np.testing.assert_allclose(source.selection.logits, logits, rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=1), as_it_came.argmax(axis=1))


def test_logits_that_happen_to_be_small_are_left(config):
    """What does not sum to 1 is no distribution, even between 0 and 1."""
    of = model(
        [node("MatMul", "x w", "z"), node("Clip", "z low high", "out")], {"low": np.float32(0), "high": np.float32(1)}
    )
    source = open_onnx(config(of, x=X, y=Y))

    assert 0 <= source.selection.logits.min() <= source.selection.logits.max() <= 1


def test_names_that_clash_are_moved_aside(config):
    """A value inside is called logits, and a branch sees it from within; inputs and answers are the model's own."""
    branches = {
        f"{which}_branch": helper.make_graph(
            [node(operator, "logits out0", "result")], which, [], [helper.make_tensor_value_info("result", FLOAT, None)]
        )
        for which, operator in {"then": "Add", "else": "Sub"}.items()
    }
    nodes = [
        node("MatMul", "x w", "logits"),
        node("Relu", "logits", "out0"),
        node("Identity", "yes", "condition"),
        node("If", "condition", "out", **branches),
        node("Neg", "unused", "dead"),
    ]
    of = model(nodes, {"yes": np.array(True), "unused": np.ones(9, np.float32)})
    source = open_onnx(config(of, x=X, y=Y))

    expected = X[source.selection.indices] @ W
    np.testing.assert_allclose(run(source)["logits"], expected + np.maximum(expected, 0), rtol=1e-4)
    assert b"unused" not in source.graph


def test_inputs_of_several_types_become_tensors(config):
    """Of any rank; wider numbers are converted when they fit, and sizes that the model leaves open are the data's."""
    nodes = [
        node("Gather", "table ids", "vectors"),
        node("ReduceSum", "vectors middle", "sum", keepdims=0),
        node("Unsqueeze", "scale middle", "column"),
        node("Mul", "sum column", "scaled"),
        node("MatMul", "scaled w", "out"),
    ]
    table = RANDOM.normal(size=(9, 4)).astype(np.float32)
    inputs = [("ids", TensorProto.INT32, ["n", "length"]), ("scale", FLOAT, ["n"])]
    ids, scale = RANDOM.integers(0, 9, (60, 5)), RANDOM.uniform(1, 2, 60)
    of = model(nodes, {"table": table, "middle": np.array([1])}, inputs)
    source = open_onnx(config(of, ids=ids, scale=scale, y=np.arange(60) % 3))

    assert [(one.name, one.datatype, one.shape) for one in source.spec.tensors] == [
        ("ids", "INT32", (5,)),
        ("scale", "FP32", ()),
    ]
    rows = source.selection.indices
    expected = table[ids[rows]].sum(axis=1) * scale[rows, None] @ W
    np.testing.assert_allclose(run(source)["logits"], expected, rtol=1e-4, atol=1e-4)
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in onnx.load_from_string(source.graph).graph.input
    ]
    assert shapes == [["batch", 5], ["batch"]]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_outputs_of_other_floats_become_float32(config, kind):
    """The answers of the protocol are float32."""
    of = model([node("MatMul", "x w", "z"), node("Cast", "z", "out", to=kind)], outputs=[("out", kind, ["n", 3])])
    source = open_onnx(config(of, x=X, y=Y))

    assert run(source)["logits"].dtype == np.float32
    np.testing.assert_array_equal(run(source)["logits"], source.selection.logits)


@pytest.mark.parametrize("shape", [["n"], ["n", 1]])
def test_one_number_is_a_regression(config, shape):
    """The graph's value is the value, whether the model gives it in a column or not."""
    nodes = [node("MatMul", "x w", "z"), node("ReduceSum", "z last", "out", keepdims=len(shape) - 1)]
    y = X.sum(axis=1)
    source = open_onnx(config(model(nodes, {"last": np.array([1])}, outputs=[("out", FLOAT, shape)]), x=X, y=y))

    assert source.tasks == (Regression(name="y", mean=0, std=1),)
    expected = (X[source.selection.indices] @ W).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(run(source)["logits"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(source.selection.targets[0].values, y[source.selection.indices])


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_a_matrix_of_0_and_1_is_sets_of_labels(config, dtype):
    """A sigmoid at the end is taken off: the scores have it anyway."""
    of = model([node("MatMul", "x w", "z"), node("Sigmoid", "z", "out")])
    y = (X @ W > 0).astype(dtype)
    source = open_onnx(config(of, labels=["a", "b", "c"], x=X, y=y))

    assert source.tasks == (Multilabel(name="y", labels=("a", "b", "c")),)
    np.testing.assert_array_equal(source.selection.targets[0].values, y[source.selection.indices])
    as_it_came = Session(of.SerializeToString(), device="cpu").run(inputs_of(source))["out"]
    np.testing.assert_allclose(sigmoid(run(source)["logits"]), as_it_came, atol=1e-6)


@pytest.mark.parametrize(("y", "labels"), [(Y == 0, None), ((Y == 0) * 1, None), ((Y == 0) * 1, ["spam"])])
def test_one_column_answers_yes_or_no(config, y, labels):
    """Truth values or 0 and 1 for it are a set of one label, which is the 1."""
    of = model(
        [node("MatMul", "x w", "z"), node("Sigmoid", "z", "out")], {"w": W[:, :1]}, outputs=[("out", FLOAT, ["n", 1])]
    )
    source = open_onnx(config(of, labels=labels, x=X, y=y))

    assert source.tasks == (Multilabel(name="y", labels=tuple(labels or ["1"])),)
    np.testing.assert_array_equal(source.selection.targets[0].values[:, 0], y[source.selection.indices])


@pytest.mark.parametrize(
    ("y", "labels", "expected", "values"),
    [
        (Y, ["c", "b", "a"], ("c", "b", "a"), Y),
        (np.array(["a", "b", "c"])[Y], ["c", "b", "a"], ("c", "b", "a"), 2 - Y),
        (np.array(["a", "b", "c"])[Y], None, ("a", "b", "c"), Y),
        (np.array(["2", "1", "0"])[Y], ["2", "1", "0"], ("2", "1", "0"), Y),
        (Y % 2, None, ("0", "1", "2"), Y % 2),
        (Y[:, None].astype(np.uint8), None, ("0", "1", "2"), Y),
    ],
    ids=["numbers", "text", "text in alphabetical order", "labels that are numbers", "a class unseen", "a column"],
)
def test_labels_are_in_the_order_of_the_columns(config, y, labels, expected, values):
    """A line of --labels is a column of the output; numbers are columns."""
    source = open_onnx(config(model(LINEAR), labels=labels, x=X, y=y))

    assert source.tasks[0].labels == expected
    np.testing.assert_array_equal(source.selection.targets[0].values, values[source.selection.indices])


def test_labels_called_as_outputs_are_tasks(config):
    """Several outputs are several tasks; one without labels is left out, with what only it needs."""
    nodes = [node("MatMul", "x w", "kind"), node("ReduceSum", "kind last", "size"), node("Tanh", "kind", "features")]
    outputs = [("size", FLOAT, ["n", 1]), ("features", FLOAT, ["n", 3]), ("kind", FLOAT, ["n", 3])]
    of = model(nodes, {"last": np.array([1])}, outputs=outputs)
    source = open_onnx(config(of, x=X, kind=Y, size=X.sum(axis=1)))

    assert [(type(task), task.name) for task in source.tasks] == [(Regression, "size"), (Multiclass, "kind")]
    given = run(source)
    assert set(given) == {"size.logits", "kind.logits"}
    np.testing.assert_array_equal(
        source.selection.logits, np.concatenate([given["size.logits"], given["kind.logits"]], axis=1)
    )
    assert "Tanh" not in {each.op_type for each in onnx.load_from_string(source.graph).graph.node}


def test_outputs_of_scikit_learn_are_understood(config):
    """A label beside dictionaries of probabilities, as skl2onnx writes a classifier."""
    nodes = [
        node("MatMul", "x w", "z"),
        node("Softmax", "z", "p", axis=1),
        node("ArgMax", "p", "label", axis=1, keepdims=0),
        node("ZipMap", "p", "maps", domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    of = model(nodes, outputs=[("label", INT64, ["n"])])
    of.graph.output.append(
        helper.make_value_info("maps", helper.make_sequence_type_proto(helper.make_map_type_proto(
            INT64, helper.make_tensor_type_proto(FLOAT, None))))
    )  # fmt: skip
    source = open_onnx(config(of, x=X, y=Y))

    np.testing.assert_allclose(run(source)["logits"], X[source.selection.indices] @ W, rtol=1e-4, atol=1e-5)


def test_weights_beside_the_model_are_read(config, tmp_path):
    """And belong to its digest."""
    options = config(model(LINEAR), x=X, y=Y)
    digests = []
    for factor in (1, 2):
        of = model(LINEAR, {"w": W * factor})
        (tmp_path / "weights").unlink(missing_ok=True)
        onnx.save(of, options.checkpoint, save_as_external_data=True, location="weights", size_threshold=0)
        source = open_onnx(options)
        digests.append(source.sha256)
        np.testing.assert_allclose(run(source)["logits"], X[source.selection.indices] @ W * factor, rtol=1e-4)
    assert digests[0] != digests[1]

    (tmp_path / "weights").unlink()
    with pytest.raises(ModelError, match=r"cannot be read as an ONNX model.*weights"):
        open_onnx(options)


def test_a_bundle_of_it_answers_as_the_model_does(config):
    """Three tasks on tensors of three types, one of them called what no file may be: exported and self-tested."""
    n = 60
    arrays = {
        "counts:0": RANDOM.integers(0, 9, (n, 2, 3)).astype(np.int32),
        "scale": RANDOM.normal(size=n).astype(np.float32),
        "known": RANDOM.random((n, 2)) < 0.7,
    }
    labels = {
        "mood.logits": RANDOM.integers(0, 3, n),
        "tags.logits": RANDOM.integers(0, 2, (n, 2)),
        "length.logits": RANDOM.normal(size=n),
    }
    of = onnx.load_from_string(tensors_graph(TASKS))
    export_checkpoint(config(of, given={"variant": "fp32", "effort": "fast"}, **arrays, **labels))
    served = load_model(config.folder / "out", device="cpu")
    answers = served.predict(preprocess.raw_examples(served.manifest.input, arrays))

    as_it_came = Session(of.SerializeToString(), device="cpu").run(arrays)
    np.testing.assert_array_equal(answers["mood.logits.logits"], as_it_came["mood.logits"])
    np.testing.assert_array_equal(answers["length.logits.value"], as_it_came["length.logits"])
    np.testing.assert_array_equal(answers["tags.logits.score"], sigmoid(as_it_came["tags.logits"]))


# With preprocessing.


def write_texts(folder):
    """Texts whose label follows from their length."""
    texts = [" ".join(words) for words in RANDOM.choice(["good", "bad", "film", "is"], (60, 5))]
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, MOOD.labels[len(text) % 3]] for text in texts)])
    (folder / "input.json").write_bytes(msgspec.json.encode(TEXT))
    (folder / "tokenizer.json").write_bytes(tokenizer_json())


def test_texts_with_a_tokenizer_go_through_preprocessing(config, tmp_path):
    """The data is what fine-tuning reads; a line of labels is a column."""
    write_texts(tmp_path)
    given = {"data": str(tmp_path / "data.csv"), "preprocess": tmp_path / "input.json"}
    of = onnx.load_from_string(text_graph((MOOD,)))
    source = open_onnx(config(of, labels=MOOD.labels, given=given))

    assert source.spec == TEXT
    assert source.tasks == (Multiclass(name="label", labels=MOOD.labels),)
    assert source.files == {"tokenizer.json": tokenizer_json()}
    place = source.selection.indices[0]
    assert MOOD.labels[source.selection.targets[0].values[0]] == MOOD.labels[len(source.raw(place)) % 3]
    alone = run(source, source.selection.rows[:1])["logits"]
    np.testing.assert_array_equal(alone, source.selection.logits[:1])


def test_a_single_input_may_be_called_anything(config, tmp_path):
    """A vector's is renamed to what the bundle expects."""
    (tmp_path / "input.json").write_bytes(msgspec.json.encode(VectorInput(column="x", size=4)))
    source = open_onnx(config(model(LINEAR), given={"preprocess": tmp_path / "input.json"}, x=X, y=Y))

    assert [value.name for value in onnx.load_from_string(source.graph).graph.input] == ["features"]
    np.testing.assert_allclose(run(source)["logits"], X[source.selection.indices] @ W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        (VectorInput(column="x", size=5), ModelError, "takes 'x' FP32 [-1, 4]; the vector preprocessing gives"),
        (TEXT, DataError, "tokenizer.json"),
        (b'{"type": "sound"}', DataError, "is not the input of a manifest, with its files: Invalid value 'sound'"),
        (b"{}", DataError, "is not the input of a manifest"),
        (
            TensorsInput(tensors=(NamedTensor(name="x", datatype="FP32", shape=(4,)),)),
            ModelError,
            "tensors has no preprocessing",
        ),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(config, tmp_path, spec, kind, words):
    """What is missing or wrong is named."""
    (tmp_path / "input.json").write_bytes(spec if isinstance(spec, bytes) else msgspec.json.encode(spec))
    with pytest.raises(kind, match=re.escape(words)):
        open_onnx(config(model(LINEAR), given={"preprocess": tmp_path / "input.json"}, x=X, y=Y))


# Refusals.

BAKED = model([node("Reshape", "x shape", "row"), node("MatMul", "row w", "out")], {"shape": np.array([1, 4])})
SIGMOIDS = model([node("MatMul", "x w", "z"), node("HardSigmoid", "z", "out")])
MODELS = {
    "a fixed batch": (
        model(LINEAR, inputs=[("x", FLOAT, [1, 4])], outputs=[("out", FLOAT, [1, 3])]),
        "input 'x' has the fixed shape [1, 4]; its first axis must be a batch of any size",
    ),
    "a batch of one inside": (BAKED, "Is a batch size baked in?"),
    "an operator that there is not": (
        model([node("Splat", "x w", "out", name="layer7")]),
        "the operator Splat in node 'layer7', which ai.onnx 17 does not have",
    ),
    "an opset that there is not": (model(LINEAR, opset=99), "is of opset 99, and"),
    "an operator of somebody's own": (
        model([node("Splat", "x w", "out", name="layer7", domain="com.acme")]),
        "com.acme:Splat in node 'layer7'",
    ),
    "probabilities of sets": (SIGMOIDS, "lies between 0 and 1, and comes from no Sigmoid"),
    "strings": (
        model(
            [node("Identity", "x", "out")], {}, [("x", TensorProto.STRING, ["n"])], [("out", TensorProto.STRING, ["n"])]
        ),
        "input 'x' takes strings",
    ),
    "labels alone": (
        model([*LINEAR, node("ArgMax", "out", "label", axis=1)], outputs=[("label", INT64, ["n", 1])]),
        "gives 'label' INT64 [-1, 1]: no output of floats is called 'y'",
    ),
    "two outputs": (
        model([*LINEAR, node("Neg", "out", "b")], outputs=[("out", FLOAT, ["n", 3]), ("b", FLOAT, ["n", 3])]),
        "no output of floats is called 'y'. Where there are several",
    ),
    "an image": (
        model([node("Unsqueeze", "x last", "out")], {"last": np.array([2])}, outputs=[("out", FLOAT, ["n", 4, 1])]),
        "output 'out' is float32 [32, 4, 1]; expected floats (N, C)",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_compiled_is_one_line(config, case):
    """The input, output, operator or node is named."""
    of, words = MODELS[case]
    y = Y[:, None] == np.arange(3) if of is SIGMOIDS else Y
    with pytest.raises(ModelError, match=re.escape(words)):
        open_onnx(config(of, x=X, y=y))


def test_what_is_no_model_is_refused(config):
    """An empty file, something else, or nothing."""
    options = config(model(LINEAR), x=X, y=Y)
    for data in (b"", b"no model", None):
        if data is None:
            options.checkpoint.unlink()
        else:
            options.checkpoint.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.onnx"):
            open_onnx(options)


def test_a_model_beyond_the_limit_is_refused(config, monkeypatch):
    """Before it is read."""
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 100)
    with pytest.raises(ModelError, match="the limit is 100"):
        open_onnx(config(model(LINEAR), x=X, y=Y))


def broken(array, value):
    array = array.copy()
    array[3] = value
    return array


ARRAYS = {
    "no input": ({"z": X, "y": Y}, "no array for the input 'x' FP32 [-1, 4]; its arrays are z, y"),
    "no labels": ({"x": X}, "no array 'y' of labels, nor one called as an output, 'out'"),
    "another size": ({"x": X[:, :3], "y": Y}, "array 'x' has shape [200, 3]; expected [-1, 4]"),
    "another type": ({"x": X.astype(str), "y": Y}, "expected FP32"),
    "another length": ({"x": X, "y": Y[:-1]}, "differing lengths: 200 'x', 199 'y'"),
    "not finite": ({"x": broken(X, np.nan), "y": Y}, "example 3 of"),
    "too few": ({"x": X[:19], "y": Y[:19]}, "has 19 different examples; comparing models takes 20 or more"),
    "the same again": ({"x": X[[0] * 200], "y": Y[[0] * 200]}, "has 1 different examples"),
    "a column too many": ({"x": X, "y": broken(Y, 3)}, "has the label '3', and the model 3 columns: --labels FILE"),
    "negative": ({"x": X, "y": broken(Y, -1)}, "has the label '-1'"),
    "floats": ({"x": X, "y": X[:, 0]}, "holds floats, and the model gives 3 columns"),
    "a matrix of another width": ({"x": X, "y": Y[:, None] == np.arange(2)}, "has 2 columns, and the model gives 3"),
    "a matrix of 2": ({"x": X, "y": broken(np.zeros((200, 3)), 2)}, "example 3 of"),
    "three axes": ({"x": X, "y": X[:, :, None]}, "has shape (200, 4, 1)"),
    "missing text": ({"x": X, "y": broken(np.array(["a", "b", "c"])[Y], "")}, "example 3 of"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit_are_one_line(config, case):
    """What was expected and what was found."""
    arrays, words = ARRAYS[case]
    with pytest.raises(DataError, match=re.escape(words)):
        open_onnx(config(model(LINEAR), **arrays))


@pytest.mark.parametrize(
    ("labels", "y", "words"),
    [
        (["a", "b"], Y, "--labels names 2 columns"),
        (["a", "b", "a"], Y, "each once; 'a' is not that"),
        (["a", "", "c"], Y, "an empty line"),
        ([], Y, "must have a label on each line"),
        (["a", "b", "c"], np.array(["a", "b", "d"])[Y], "has the label 'd', and the model 3 columns: the labels that"),
        (None, np.array(["1", "2", "3"])[Y], "has the label '3', and the model 3 columns: --labels FILE says"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(config, labels, y, words):
    """Numbers are never guessed at: a column too far is not the last."""
    with pytest.raises(DataError, match=re.escape(words)):
        open_onnx(config(model(LINEAR), labels=labels, x=X, y=y))


@pytest.mark.parametrize("data", [None, "missing.npz", "."])
def test_a_model_needs_examples(config, data):
    """Nothing is compiled without them."""
    with pytest.raises(DataError, match=r"--data FILE\.npz|is no \.npz file of tensors"):
        open_onnx(config(model(LINEAR), given={"data": data}, x=X, y=Y))


@pytest.fixture
def images(tmp_path):
    """Two classes of plain images with the preprocessing of 2 × 2 pixels."""
    spec = ImageInput(
        column="i", height=2, width=2, resize=2, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    (tmp_path / "input.json").write_bytes(msgspec.json.encode(spec))
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            colour = (i * 9, 200 * (label == "a"), 50)
            Image.new("RGB", (2, 2), colour).save(tmp_path / "images" / label / f"{i}.png")
    return {"preprocess": tmp_path / "input.json", "data": str(tmp_path / "images")}


def test_images_may_be_taken_as_pixels(config, images):
    """A model that scales them itself is compiled as it is, and one that takes something else is told what there is."""
    with pytest.raises(ModelError, match=re.escape("takes 'x' FP32 [-1, 4]; the image preprocessing gives 'image'")):
        open_onnx(config(model(LINEAR), given=images))
    nodes = [node("Cast", "x", "f", to=FLOAT), node("ReduceMean", "f", "out", axes=[1, 2], keepdims=0)]
    of = model(nodes, {}, [("x", TensorProto.UINT8, ["n", 2, 2, 3])])
    source = open_onnx(config(of, labels=["b", "a", "c"], given=images))

    assert source.tasks[0].labels == ("b", "a", "c")
    pixels = np.stack(list(source.selection.rows)).astype(np.float32)
    np.testing.assert_allclose(run(source)["logits"], pixels.mean(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("size", [2, "side"])
def test_images_may_be_taken_scaled(config, images, size):
    """Channels first, by the mean and std of the preprocessing, as torchvision's models take them."""
    of = model(
        [node("ReduceMean", "image", "out", axes=[2, 3], keepdims=0)], {}, [("image", FLOAT, ["n", 3, size, size])]
    )
    source = open_onnx(config(of, labels=["b", "a", "c"], given=images))

    pixels = np.stack(list(source.selection.rows)) / 255
    expected = ((pixels - source.spec.mean) / source.spec.std).mean(axis=(1, 2))
    np.testing.assert_allclose(run(source)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_token_types_of_single_texts_are_zeros(config, tmp_path):
    """Most exports of BERT take them although there is one text."""
    write_texts(tmp_path)
    given = {"data": str(tmp_path / "data.csv"), "preprocess": tmp_path / "input.json"}
    of = onnx.load_from_string(text_graph((MOOD,), types="token_type_ids"))
    source = open_onnx(config(of, labels=MOOD.labels, given=given))

    row = source.selection.rows[0]
    feeds = preprocess.collate([row], source.spec)
    whole = Session(of.SerializeToString(), device="cpu").run({**feeds, "token_type_ids": 0 * feeds["input_ids"]})
    np.testing.assert_array_equal(run(source, [row])["logits"], whole["logits"])

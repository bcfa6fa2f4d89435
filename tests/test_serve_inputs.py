"""Pairs, words, vectors and tensors, and tasks of mixed kinds, over a real socket: answers, refusals, the shell."""

import io
import json
import shutil

import grpc
import msgspec
import numpy as np
import pytest

from bundle.errors import BadInput, BundleDamaged, SelfTestFailed
from bundle.model import load_model
from bundle.outputs import sigmoid, softmax
from bundle.preprocess import raw_examples
from bundle.store import open_bundle, seal
from bundle.tensor import NUMPY_TYPES, TensorSpec
from bundle.text import join_pair
from edgeward.__main__ import run
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.client import Client
from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import (
    FLOWER,
    TASKS,
    identity,
    write_pair_bundle,
    write_tensors_bundle,
    write_text_bundle,
    write_vector_bundle,
    write_words_bundle,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PAIRS = [("is the film good", "good"), ("", ""), ("né", b"bad bad film"), ("the " * 50, "a")]
REVIEWS = ["这部电影很好", "", "Film 难看", "谁知道", "\u3000\n", "好" * 300]
VECTORS = np.array([[0.5, -1, 2], [0, 0, 0], [-1e3, 1e-3, 7]], np.float32)
PLOTS = {
    "counts:0": np.array([[[1, -2, 3], [4, 5, 6]], [[0] * 3] * 2, [[7] * 3, [2**20, 0, 1]]], np.int32),
    "scale": np.array([0.5, 0, -1e3], np.float32),
    "known": np.array([[True, False], [False, False], [True, True]]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_pair_bundle(root / "b" / "answers", tasks=TASKS)
    write_words_bundle(root / "b" / "reviews", tasks=TASKS)
    write_vector_bundle(root / "b" / "flowers")
    write_tensors_bundle(root / "b" / "plots")
    write_text_bundle(root / "b" / "mood")
    (root / "echo.onnx").write_bytes(identity(np.float32, [None, 3]))
    return root


@pytest.fixture(scope="module")
def server(models):
    server = start(ServeConfig(paths=(models / "b", models / "echo.onnx"), port=0, device="cpu", threads=1))
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()


def raws(name, examples):
    """The raw examples of bundle.model.Model.predict."""
    if name == "answers":
        return [join_pair(*(as_bytes(text).decode() for text in pair)) for pair in examples]
    return [row.astype("<f4").tobytes() if name == "flowers" else as_bytes(row) for row in examples]


EXAMPLES = {"answers": PAIRS, "reviews": REVIEWS, "flowers": VECTORS}


# Answers.


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("answers", (TensorSpec("question", "BYTES", (-1, 1)), TensorSpec("answer", "BYTES", (-1, 1)))),
        ("reviews", (TensorSpec("review", "BYTES", (-1, 1)),)),
        ("flowers", (TensorSpec("flower", "FP32", (-1, 3)),)),
        (
            "plots",
            (
                TensorSpec("counts:0", "INT32", (-1, 2, 3)),
                TensorSpec("scale", "FP32", (-1,)),
                TensorSpec("known", "BOOL", (-1, 2)),
            ),
        ),
    ],
)
def test_metadata_names_the_columns(client, stub, name, inputs):
    """A tensor for each column of an example; in the configuration without the batch axis."""
    assert client.metadata(name).inputs == inputs
    config = stub.ModelConfig(pb.ModelConfigRequest(name=name)).config
    assert [tuple(spec.dims) for spec in config.input] == [spec.shape[1:] for spec in inputs]
    assert config.max_batch_size == 1024


@pytest.mark.parametrize("name", EXAMPLES)
def test_answers_of_mixed_tasks_are_those_of_the_predict_path(client, models, name):
    """Bit for bit what bundle.model gives, each example as if it were alone, in the datatypes of the metadata."""
    model = load_model(models / "b" / name, device="cpu", threads=1)
    expected = model.predict(raws(name, EXAMPLES[name]))

    answer = client.predict(name, EXAMPLES[name])

    assert list(answer) == [spec.name for spec in client.metadata(name).outputs]
    assert list(answer) == [
        *("mood.label", "mood.score", "mood.logits", "tags.predicted", "tags.score", "length.value")
    ]
    for spec in client.metadata(name).outputs:
        assert answer[spec.name].dtype == NUMPY_TYPES[spec.datatype]
        assert answer[spec.name].shape == (len(EXAMPLES[name]), spec.shape[1])
        np.testing.assert_array_equal(answer[spec.name], expected[spec.name])
    for i, example in enumerate(EXAMPLES[name]):
        for output, array in client.predict(name, [example]).items():
            np.testing.assert_array_equal(array[0], answer[output][i])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_batch_without_examples_is_answered(client, name):
    """No rows are answered with no rows, also where an example is a vector or two texts."""
    assert {len(array) for array in client.predict(name, []).values()} == {0}


def test_answers_of_vectors_can_be_worked_out_by_hand(client, models):
    """Three tasks of three kinds, each of its own columns of the graph."""
    logits = load_model(models / "b" / "flowers", device="cpu").session.run({"features": VECTORS})
    answer = client.predict("flowers", VECTORS)

    labels = [b"good", b"bad", "neither — é".encode()]
    assert answer["mood.label"][:, 0].tolist() == [labels[i] for i in logits["mood.logits"].argmax(axis=1)]
    np.testing.assert_array_equal(answer["mood.score"], softmax(logits["mood.logits"]))
    np.testing.assert_array_equal(answer["tags.score"], sigmoid(logits["tags.logits"]))
    np.testing.assert_array_equal(answer["tags.predicted"], answer["tags.score"] >= 0.5)
    np.testing.assert_array_equal(answer["length.value"], logits["length.logits"] * 3 + 2)


def test_a_text_without_known_words_is_the_zero_vector(client):
    """An unknown word is no error: the graph sees no word at all, as with an empty text."""
    answer = client.predict("reviews", ["谁知道", "", " ", "unknown words"])

    for array in answer.values():
        assert (array == array[0]).all()
    np.testing.assert_array_equal(answer["mood.logits"], np.zeros((4, 3)))
    np.testing.assert_array_equal(answer["length.value"], np.full((4, 1), 2))


def test_which_text_a_word_is_in_matters(client):
    """The types of the tokens reach the graph."""
    answer = client.predict("answers", [("good", "bad"), ("good bad", "")])

    assert not np.array_equal(answer["mood.logits"][0], answer["mood.logits"][1])


@pytest.mark.parametrize(
    "vectors",
    [VECTORS.tolist(), list(VECTORS), VECTORS.astype(np.float64), VECTORS.astype(">f4"), np.asfortranarray(VECTORS)],
    ids=["lists", "arrays", "float64", "big-endian", "column-major"],
)
def test_vectors_may_be_any_array_of_numbers(client, vectors):
    """They are sent as float32."""
    expected = client.predict("flowers", VECTORS)
    for output, array in client.predict("flowers", vectors).items():
        np.testing.assert_array_equal(array, expected[output])


def test_tensors_are_answered_as_the_bundle_answers_them(client, models):
    """Three tensors of three types and ranks; the answers are those of the predict path, and of the sums by hand."""
    model = load_model(models / "b" / "plots", device="cpu")
    expected = model.predict(raw_examples(model.manifest.input, PLOTS))
    answer = client.predict("plots", PLOTS)

    for name, array in expected.items():
        np.testing.assert_array_equal(answer[name], array)
    sums = PLOTS["counts:0"].sum(axis=2) * PLOTS["known"]
    features = np.concatenate([sums, PLOTS["scale"][:, None]], axis=1).astype(np.float32)
    weights = np.random.default_rng(5).integers(-8, 8, (3, 3)).astype(np.float32)
    np.testing.assert_allclose(answer["mood.logits"], features @ weights, rtol=1e-5)


def test_tensors_alone_and_together_are_answered_alike(client):
    """An answer does not hang on the other rows, and no rows are answered with no rows."""
    answer = client.predict("plots", PLOTS)
    for i in range(3):
        alone = client.predict("plots", {name: array[i : i + 1] for name, array in PLOTS.items()})
        for output, array in alone.items():
            np.testing.assert_array_equal(array[0], answer[output][i])
    none = client.predict("plots", {name: array[:0] for name, array in PLOTS.items()})
    assert {len(array) for array in none.values()} == {0}


@pytest.mark.parametrize(
    "change",
    [
        {"counts:0": PLOTS["counts:0"].tolist()},
        {"counts:0": PLOTS["counts:0"].astype(">i8"), "scale": PLOTS["scale"].astype(np.float64)},
        {"scale": [0.5, 0, -1000]},
        {"known": np.asfortranarray(PLOTS["known"])},
    ],
    ids=["lists", "wider types", "whole numbers as floats", "column-major"],
)
def test_tensors_may_be_any_arrays_that_mean_the_same(client, change):
    """The client converts what loses nothing."""
    expected = client.predict("plots", PLOTS)
    for output, array in client.predict("plots", {**PLOTS, **change}).items():
        np.testing.assert_array_equal(array, expected[output])


def test_vectors_may_be_sent_by_name(client):
    """A vector is a tensor whose name is its column."""
    expected = client.predict("flowers", VECTORS)
    for output, array in client.predict("flowers", {"flower": VECTORS}).items():
        np.testing.assert_array_equal(array, expected[output])


def test_bare_graphs_take_what_preprocessing_gives(client, models):
    """Next to each bundle its graph is served, with the names of bundle-format.md."""
    names = {"answers": ("input_ids", "attention_mask", "token_type_ids"), "reviews": ("word_ids", "word_mask")}
    for name, expected in {**names, "flowers": ("features",)}.items():
        assert tuple(spec.name for spec in client.metadata(f"{name}.onnx").inputs) == expected

    answer = client.infer("flowers.onnx", {"features": VECTORS})
    assert set(answer) == {"mood.logits", "tags.logits", "length.logits"}


# Refusals.


def texts(model, **columns):
    message = pb.ModelInferRequest(model_name=model)
    for name, rows in columns.items():
        tensor = message.inputs.add(name=name, datatype="BYTES", shape=[len(rows), 1])
        tensor.contents.bytes_contents.extend(rows)
    return message


def numbers(rows, shape=None, datatype="FP32", name="flower"):
    array = np.array(rows, NUMPY_TYPES[datatype])
    message = pb.ModelInferRequest(model_name="flowers", raw_input_contents=[array.tobytes()])
    message.inputs.add(name=name, datatype=datatype, shape=array.shape if shape is None else shape)
    return message


def tensors(leave_out=(), **changes):
    message = pb.ModelInferRequest(model_name="plots")
    for name, array in {
        **PLOTS,
        **{name.replace("counts", "counts:0"): array for name, array in changes.items()},
    }.items():
        if name not in leave_out:
            datatype = next(key for key, dtype in NUMPY_TYPES.items() if dtype == array.dtype)
            message.inputs.add(name=name, datatype=datatype, shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
    return message


GOOD = {
    "answers": texts("answers", question=[b"a"], answer=[b"b"]),
    "reviews": texts("reviews", review=[b"a"]),
    "flowers": numbers([[1, 2, 3]]),
    "plots": tensors(),
}
MALFORMED = {
    "half a pair": (texts("answers", question=[b"a"]), "input 'answer' is missing: expected 2 inputs, got 1"),
    "a third text": (
        texts("answers", question=[b"a"], answer=[b"b"], more=[b"c"]),
        "unexpected input 'more'; the model takes 'question', 'answer'",
    ),
    "a pair of other length": (
        texts("answers", question=[b"a", b"b"], answer=[b"c"]),
        "the inputs differ in rows: 'question' has 2, 'answer' has 1; expected the same number",
    ),
    "first text that is not UTF-8": (
        texts("answers", question=[b"a", b"\xff"], answer=[b"c", b"d"]),
        "input 'question' and 'answer', example 1: text 'question' is not UTF-8: invalid start byte at byte 0 of 1",
    ),
    "second text that is not UTF-8": (
        texts("answers", question=[b"a"], answer=[b"\xed\xa0\x80"]),
        "input 'question' and 'answer', example 0: text 'answer' is not UTF-8",
    ),
    "text of a pair that is too long": (
        texts("answers", question=[b"a"], answer=[b"x" * 1001]),
        "input 'question' and 'answer', example 0: text 'answer' has 1001 bytes; the limit is 1000",
    ),
    "too many pairs": (
        texts("answers", question=[b"a"] * 1025, answer=[b"a"] * 1025),
        "'question' has 1025 rows; expected at most 1024",
    ),
    "words that are not UTF-8": (
        texts("reviews", review=[b"a", b"caf\xe9"]),
        "input 'review', example 1: text is not UTF-8: unexpected end of data at byte 3 of 4",
    ),
    "words that are too long": (
        texts("reviews", review=["好".encode() * 334]),
        "input 'review', example 0: text has 1002 bytes; the limit is 1000",
    ),
    "vector too short": (numbers([[1, 2]]), "input 'flower' has shape [1, 2]; expected [-1, 3]"),
    "vector too long": (numbers([[1, 2, 3, 4]]), "input 'flower' has shape [1, 4]; expected [-1, 3]"),
    "vector without batch axis": (numbers([1, 2, 3]), "input 'flower' has shape [3]; expected [-1, 3]"),
    "vector cut off": (numbers([[1, 2]], shape=[1, 3]), "input 'flower' has 8 raw bytes; expected 12"),
    "vector of float64": (numbers([[1, 2, 3]], datatype="FP64"), "input 'flower' has datatype 'FP64'; expected FP32"),
    "vector of texts": (texts("flowers", flower=[b"1"]), "input 'flower' has datatype 'BYTES'; expected FP32"),
    "vector by another name": (numbers([[1, 2, 3]], name="features"), "unexpected input 'features'"),
    "a tensor too few": (tensors(leave_out=["scale"]), "input 'scale' is missing: expected 3 inputs, got 2"),
    "a tensor too many": (
        tensors(more=PLOTS["scale"]),
        "unexpected input 'more'; the model takes 'counts:0', 'scale', 'known'",
    ),
    "tensors of other lengths": (
        tensors(scale=PLOTS["scale"][:2]),
        "the inputs differ in rows: 'counts:0' has 3, 'scale' has 2, 'known' has 3",
    ),
    "a tensor of another shape": (
        tensors(counts=PLOTS["counts:0"].reshape(3, 3, 2)),
        "input 'counts:0' has shape [3, 3, 2]; expected [-1, 2, 3]",
    ),
    "a tensor without its batch axis": (tensors(known=PLOTS["known"][0]), "'known' has shape [2]; expected [-1, 2]"),
    "a tensor of another type": (
        tensors(counts=PLOTS["counts:0"].astype(np.int64)),
        "input 'counts:0' has datatype 'INT64'; expected INT32",
    ),
    "a tensor that is not finite": (
        tensors(scale=np.array([0, np.nan, 0], np.float32)),
        "input 'counts:0' and 'scale' and 'known', example 1: tensor 'scale' is not finite: element [] is nan",
    ),
    "a truth value of two": (tensors(known=np.full((3, 2), 2, np.uint8).view(bool)), "other than 0 and 1"),
    "too many rows": (
        tensors(
            **{name.removesuffix(":0"): np.resize(array, (1025, *array.shape[1:])) for name, array in PLOTS.items()}
        ),
        "'counts:0' has 1025 rows; expected at most 1024",
    ),
    "too many vectors": (numbers(np.zeros((1025, 3))), "'flower' has 1025 rows; expected at most 1024"),
    **{
        f"vector with {value}": (
            numbers([[1, 2, 3], [4, 5, value]]),
            f"input 'flower', example 1: vector is not finite: number 2, 'stem', is {value}",
        )
        for value in (np.nan, np.inf, -np.inf)
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong_and_harms_nobody(stub, case):
    """Its message names the input, the example, what was expected and what came, and the next one is answered."""
    message, words = MALFORMED[case]

    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(message)

    assert refused.value.code() is INVALID, refused.value.details()
    assert words in refused.value.details()
    assert stub.ModelInfer(GOOD[message.model_name]).outputs[0].name == "mood.label"


@pytest.mark.parametrize(
    ("model", "examples", "words"),
    [
        ("mood", "one text", "the examples are one str; expected a list, each of it a text"),
        ("mood", b"one text", "the examples are one bytes; expected a list"),
        ("mood", ["good", 1], "example 1 is of type int; expected a text"),
        ("mood", [("good", "bad")], "example 0 is of type tuple; expected a text"),
        ("answers", ["ab"], "example 0 is no pair of texts"),
        ("answers", [("a", "b"), ("a",)], "example 1 is no pair of texts"),
        ("answers", [("a", "b", "c")], "example 0 is no pair of texts"),
        ("answers", [("a", "b"), ("a", None)], "example 1 is of type NoneType; expected a pair of texts"),
        ("answers", "ab", "example 0 is no pair of texts"),
        ("answers", [7], "example 0 is no pair of texts"),
        ("flowers", [[1, 2]], "the vectors are int64 [1, 2]; expected numbers of shape [-1, 3]"),
        ("flowers", [1.0, 2.0, 3.0], "the vectors are float64 [3]; expected numbers of shape [-1, 3]"),
        ("flowers", [[1, 2, 3], [1, 2]], "the vectors are no array"),
        ("flowers", [["1", "2", "3"]], "expected numbers of shape [-1, 3]"),
        ("flowers", ["1,2,3"], "expected numbers of shape [-1, 3]"),
        ("flowers", {"x": VECTORS}, "the examples are 'x'; expected arrays by name: 'flower'"),
        ("mood", {"text": ["good"]}, "the examples are one dict; expected a list, each of it a text"),
        ("plots", [], "the examples are one list; expected arrays by name: 'counts:0', 'scale', 'known'"),
        ("plots", {"scale": [1]}, "the examples are 'scale'; expected arrays by name"),
        ("plots", {**PLOTS, "counts:0": [[1, 2, 3]]}, "input 'counts:0' has shape [1, 3]; expected [-1, 2, 3]"),
        ("plots", {**PLOTS, "counts:0": PLOTS["counts:0"] + 0.5}, "input 'counts:0' holds float64; expected INT32"),
        (
            "plots",
            {**PLOTS, "counts:0": PLOTS["counts:0"] + np.int64(2**40)},
            "holds 1099511627777, which INT32 cannot",
        ),
        ("plots", {**PLOTS, "scale": [[1], [1, 2]]}, "input 'scale' is no array"),
        ("plots", {**PLOTS, "scale": ["1", "2", "3"]}, "input 'scale' holds <U1; expected FP32"),
        ("flowers.onnx", [[1, 2, 3]], "takes no raw examples but 'features' FP32 [-1, 3]"),
        ("echo", [[1, 2, 3]], "takes no raw examples but 'x' FP32 [-1, 3]"),
    ],
)
def test_examples_of_another_kind_are_refused_before_they_are_sent(client, model, examples, words):
    """The client knows what the model takes."""
    with pytest.raises(BadInput) as refused:
        client.predict(model, examples)
    assert words in str(refused.value)


# Starting: a bundle is held to its golden examples, whatever its input is.


def reseal(path, manifest=None, **changes):
    seal(path, msgspec.structs.replace(manifest or open_bundle(path).manifest, **changes))


@pytest.fixture
def copy(models, tmp_path):
    return lambda name: shutil.copytree(models / "b" / name, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("answers", "token_type_ids"),
        ("answers", "input_ids"),
        ("reviews", "word_ids"),
        ("reviews", "word_mask"),
        ("flowers", "features"),
        ("plots", "counts:0"),
        ("plots", "scale"),
    ],
)
@pytest.mark.parametrize("kind", ["value", "shape", "type"])
def test_other_tensor_fails_the_self_test(copy, name, tensor, kind):
    """A golden tensor is reproduced in value, shape and type; not even the last bit of a number may differ."""
    path = copy(name)
    manifest, file = open_bundle(path).manifest, path / f"golden0.{tensor.replace(':', '_')}.npy"
    values = np.load(file)
    other = np.nextafter(values, np.float32(9)) if values.dtype == np.float32 else 1 - values
    np.save(file, {"value": other, "shape": values[None], "type": values.astype(np.float64)}[kind])
    reseal(path, manifest)

    with pytest.raises(SelfTestFailed, match=f"golden0 is preprocessed to another {tensor}"):
        load_model(path, device="cpu")


@pytest.mark.parametrize(
    ("file", "data"),
    [("jieba.txt", "好 9\n电影很好 900\n这部 20\n"), ("vocabulary.txt", "好\n电影\n难看\nfilm\n很\n")],
)
def test_other_words_fail_the_self_test(copy, file, data):
    """Another dictionary or another order of the vocabulary is another preprocessing, even when it is sealed."""
    path = copy("reviews")
    manifest = open_bundle(path).manifest
    (path / file).write_text(data)
    reseal(path, manifest)

    with pytest.raises(SelfTestFailed, match="golden0 is preprocessed to another word_"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("change", [{"lowercase": False}, {"max_words": 3, "buckets": (3,)}])
def test_other_rules_for_words_fail_the_self_test(copy, change):
    """Case folding and limits are part of what was gated."""
    path = copy("reviews")
    manifest = open_bundle(path).manifest
    (path / "golden1").write_bytes("FILM 这部 好好好 FILM".encode())
    spec = msgspec.structs.replace(manifest.input, **change)
    for name, row in {"word_ids": [3, 1, 1, 1], "word_mask": [1, 1, 1, 1]}.items():
        np.save(path / f"golden1.{name}.npy", np.array(row))
    reseal(path, manifest, input=spec)

    with pytest.raises(SelfTestFailed, match="golden1 is preprocessed to another word_ids"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("file", ["jieba.txt", "vocabulary.txt"])
def test_words_bundle_without_a_file_is_damage(copy, file):
    """What the input needs must be listed."""
    path = copy("reviews")
    manifest = open_bundle(path).manifest
    (path / file).unlink()
    reseal(path, manifest)

    with pytest.raises(BundleDamaged, match=rf"does not list {file}"):
        load_model(path, device="cpu")


def test_graph_of_pairs_takes_the_types(copy):
    """A graph without token_type_ids would answer a pair as one text."""
    path = copy("answers")
    spec = msgspec.structs.replace(open_bundle(path).manifest.input, pair=None)
    reseal(path, input=spec)

    with pytest.raises(BundleDamaged, match=r"takes .*token_type_ids.* by its manifest it takes"):
        load_model(path, device="cpu")


def test_vector_of_another_size_fails_the_self_test(copy):
    """The golden examples hold the size."""
    path = copy("flowers")
    reseal(path, input=msgspec.structs.replace(FLOWER, size=4, names=()))

    with pytest.raises(SelfTestFailed, match="golden0 cannot be read here: vector has 12 bytes; expected 16"):
        load_model(path, device="cpu")


# The shell.


@pytest.fixture
def infer(server, monkeypatch, capsys):
    """`edgeward infer`: exit code, stdout (an object with --json) and stderr."""
    monkeypatch.setattr("edgeward.__main__.configure_log", lambda **kwargs: None)

    def call(*arguments, json_too=True):
        code = run(["infer", server.address, *arguments, *(["--json"] if json_too else [])])
        out, err = capsys.readouterr()
        return code, json.loads(out) if json_too and code == 0 else out, err

    return call


def test_vectors_are_numbers_with_commas(infer, client):
    """Negative ones need no quoting tricks."""
    expected = client.predict("flowers", [[-1.5, 2, 3e2], [0, 0, 0]])
    code, answer, _ = infer("flowers", "-1.5,2, 3e2", "0,0,0")

    assert code == 0
    assert answer["length.value"] == expected["length.value"].tolist()
    assert answer["mood.label"] == [[label.decode()] for [label] in expected["mood.label"]]


@pytest.mark.parametrize("kind", ["npy", "npz", "npz of x and y", "csv", "stdin"])
def test_vectors_come_from_files(infer, client, tmp_path, monkeypatch, kind):
    """A file holds any number of vectors."""
    path = tmp_path / f"v.{kind[:3]}"
    lines = b"0.5,-1,2\n0,0,0\n\n-1e3,1e-3,7\n"
    match kind:
        case "npy":
            np.save(path, VECTORS.astype(np.float64))
        case "npz":
            np.savez(path, anything=VECTORS)
        case "npz of x and y":
            np.savez(path, x=VECTORS, y=np.arange(3))
        case "csv":
            path.write_bytes(lines)
        case "stdin":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
            path = "-"
    expected = np.concatenate([client.predict("flowers", VECTORS)["length.value"], np.array([[2]])])

    code, answer, err = infer("flowers", str(path), "0,0,0")

    assert code == 0, err
    np.testing.assert_array_equal(answer["length.value"], expected)


def test_one_vector_may_be_a_whole_file(infer, tmp_path, monkeypatch):
    """An array of one axis is one vector."""
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", VECTORS[0])
    code, out, _ = infer("flowers", "v.npy", json_too=False)

    assert code == 0
    assert "v.npy" in out


def test_tensors_come_from_npz_files(infer, client, tmp_path):
    """Arrays named as the inputs, any number of rows, and others beside them that do not matter."""
    np.savez(tmp_path / "a.npz", **PLOTS, y=np.arange(3))
    np.savez(tmp_path / "b.npz", **{name: array[1:2] for name, array in PLOTS.items()})
    expected = client.predict("plots", {name: array[[0, 1, 2, 1]] for name, array in PLOTS.items()})
    code, answer, err = infer("plots", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))

    assert code == 0, err
    assert answer["length.value"] == expected["length.value"].tolist()
    assert infer("plots", str(tmp_path / "b.npz"), json_too=False)[0] == 0


def test_vectors_come_from_the_array_of_their_name(infer, client, tmp_path):
    """Before one called x."""
    np.savez(tmp_path / "v.npz", x=np.zeros((1, 7)), flower=VECTORS)
    code, answer, err = infer("flowers", str(tmp_path / "v.npz"))

    assert code == 0, err
    assert answer["length.value"] == client.predict("flowers", VECTORS)["length.value"].tolist()


def test_pairs_are_inputs_two_by_two(infer, client, tmp_path):
    """Each text or a file of it."""
    (tmp_path / "answer.txt").write_text("bad film")
    code, answer, _ = infer("answers", "is the film good", "good", "a film", str(tmp_path / "answer.txt"))

    expected = client.predict("answers", [("is the film good", "good"), ("a film", "bad film")])
    assert code == 0
    assert answer["mood.label"] == [[label.decode()] for [label] in expected["mood.label"]]
    assert "a film | good" in infer("answers", "a film", "good", json_too=False)[1]


def test_chinese_is_taken_raw(infer):
    """The segmenter runs on the server."""
    code, answer, _ = infer("reviews", "这部电影很好")

    assert code == 0
    assert answer["mood.label"][0][0] in ("good", "bad", "neither — é")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["answers", "one", "two", "three"], 1, "'question' and 'answer': two inputs for each example; got 3"),
        (["flowers", "1,2"], 1, "input '1,2' is float64 [1, 2]; the model takes vectors of 3 numbers"),
        (["flowers", "1,2,three"], 1, "input '1,2,three' is neither a file nor numbers with commas"),
        (["flowers", "missing.csv"], 1, "input 'missing.csv' is neither a file nor numbers"),
        (["flowers", "missing.npy"], 1, "missing.npy cannot be read as arrays"),
        (["flowers", "FOLDER/text.npy"], 1, "text.npy cannot be read as arrays"),
        (["flowers", "FOLDER/text.npz"], 1, "text.npz cannot be read as arrays"),
        (["flowers", "FOLDER/pickle.npy"], 1, "pickle.npy cannot be read as arrays"),
        (["flowers", "FOLDER/many.npz"], 1, "many.npz has no array 'flower' or 'x', only a, b"),
        (["flowers", "FOLDER/words.npy"], 1, "the model takes vectors of 3 numbers"),
        (["flowers", "FOLDER/empty.csv"], 1, "the model takes vectors of 3 numbers"),
        (["flowers", "FOLDER/ragged.csv"], 1, "is neither a file nor numbers with commas"),
        (["flowers", "1,2,nan"], 1, "example 0: vector is not finite: number 2, 'stem', is nan"),
        (["flowers", "1,2,1e39"], 1, "example 0: vector is not finite: number 2, 'stem', is inf"),
        (["plots", "FOLDER/many.npz"], 1, "many.npz has a, b; the model takes 'counts:0' INT32 [-1, 2, 3], 'scale'"),
        (["plots", "FOLDER/words.npy"], 1, "words.npy has no named arrays; the model takes 'counts:0'"),
        (["plots", "FOLDER/text.npz"], 1, "text.npz cannot be read as arrays"),
        (["plots", "1,2,3"], 1, "1,2,3 cannot be read as arrays"),
        (["plots", "FOLDER/other.npz"], 1, "array 'counts:0' of"),
        (["plots", "FOLDER/ragged.npz"], 1, "differ in rows: 3 'counts:0', 2 'scale', 3 'known'"),
        (
            ["echo", "1,2,3"],
            1,
            "takes no raw examples but 'x' FP32 [-1, 3], and this command sends raw",
        ),
        (["echo", "x.npz"], 1, "Send tensors from Python, with infer of serve.client.Client."),
        (["mood", "good", "--jsn"], 2, "There is no option '--jsn'"),
    ],
)
def test_what_cannot_be_sent_is_one_line(infer, tmp_path, arguments, code, words):
    """No traceback, and the input is named."""
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "ragged.csv").write_text("1,2,3\n1,2\n")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array([["a", "b", "c"]]))
    np.savez(tmp_path / "many.npz", a=VECTORS, b=VECTORS)
    np.savez(tmp_path / "other.npz", **{**PLOTS, "counts:0": VECTORS})
    np.savez(tmp_path / "ragged.npz", **{**PLOTS, "scale": PLOTS["scale"][:2]})

    got, _, err = infer(*(each.replace("FOLDER", str(tmp_path)) for each in arguments))

    assert got == code, err
    assert words in err.replace("\n", " ")
    assert "Traceback" not in err

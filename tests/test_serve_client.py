"""Both clients and the server: one exception class, one look-up of the input, arrays in and out."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from bundle.errors import BadInput, EdgewardError
from bundle.tensor import TensorSpec
from edgeward.__main__ import run
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.client import Client
from serve.client.calls import Class, Health
from serve.client.columns import MAX_BYTES, ModelMetadata, cut, to_columns
from serve.client.region import Region
from serve.config import ServeConfig
from serve.errors import ServerError
from serve.server import start
from tests.blocking import BlockingAioClient
from tests.certificates import write_certificates
from tests.serve_bundles import identity, model_bytes, png, write_image_bundle, write_text_bundle, write_vector_bundle

TOKEN = "correct-horse-battery-staple"
BY_NAME = ("ready", "health", "metadata", "config", "statistics", "load", "unload")
TEXT, MORE = (TensorSpec(name, "BYTES", (-1, 1)) for name in ("text", "more"))
METADATA = {
    "raw": ModelMetadata("mood", (1,), "edgeward_bundle", (TEXT,), ()),
    "pair": ModelMetadata("answers", (1,), "edgeward_bundle", (TEXT, MORE), ()),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "mood" / "1")
    write_image_bundle(root / "colour" / "1")
    for name, dtype in (("echo", np.float32), ("words", object)):
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.onnx").write_bytes(identity(dtype, [None, 2]))
    for version, operator in (("1", "Identity"), ("2", "Neg")):
        x, y = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
        (root / "two" / version).mkdir(parents=True)
        graph = model_bytes([helper.make_node(operator, ["x"], ["y"])], [x], [y])
        (root / "two" / version / "model.onnx").write_bytes(graph)
    return root


@pytest.fixture(scope="module")
def server(models):
    options = {"device": "cpu", "threads": 1, "versions": "all", "admin": True, "shared_memory": True}
    server = start(ServeConfig((models,), port=0, **options))
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module", params=[Client, BlockingAioClient], ids=["sync", "asyncio"])
def client(server, request):
    with request.param(server.address) as client:
        yield client


@pytest.mark.parametrize("kind", [Client, BlockingAioClient])
def test_ready_is_false_where_nobody_answers(kind):
    """A server that is not there is not ready, which is no error."""
    with kind("127.0.0.1:1") as client:
        assert not client.ready()


def test_server_and_models_are_ready(client):
    """A model that is not served is not, which is no error either."""
    assert client.ready()
    assert client.ready("mood", "1")
    assert not client.ready("other")
    assert client.health("mood") is Health.SERVING


def test_a_server_tells_about_itself(client):
    """Metadata, configuration, index and statistics are the protocol's own messages."""
    assert client.server_metadata().name == "edgeward"
    assert client.config("mood").max_batch_size == 1024
    assert ("echo", "1", "READY") in [(model.name, model.version, model.state) for model in client.index(ready=True)]
    client.infer("words", {"x": np.array([["a", "b"]])})
    assert client.statistics("words")[0].inference_count > 0


def test_a_model_is_unloaded_and_loaded(client):
    """By its name, and only then is it called again; meanwhile it is in the index, but not among what is ready."""
    client.unload("words")
    assert not client.ready("words")
    assert ("words", "UNAVAILABLE") in [(model.name, model.state) for model in client.index()]
    assert "words" not in [model.name for model in client.index(ready=True)]
    client.load("words")
    assert client.ready("words")


def test_nothing_depends_on_a_model_that_is_unloaded(server):
    """So the protocol's one parameter is accepted without effect, and any other is refused."""
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = pb.RepositoryModelUnloadRequest(model_name="colour")
        request.parameters["now"].bool_param = True
        with pytest.raises(grpc.RpcError, match="unload parameter 'now' is not known") as refused:
            stub.RepositoryModelUnload(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert stub.ModelReady(pb.ModelReadyRequest(name="colour")).ready

        del request.parameters["now"]
        request.parameters["unload_dependents"].bool_param = True
        stub.RepositoryModelUnload(request)
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="colour"))


def test_the_version_that_is_named_is_asked(client):
    """Whatever is asked of it; where none is named, the highest answers, or all do."""
    x = np.float32([1, -2])
    assert client.infer("two", {"x": x}, "1")["y"].tolist() == [1, -2]
    assert client.infer("two", {"x": x})["y"].tolist() == [-1, 2]
    assert client.classify("two", {"x": x}, "y", 1, "1") == [[Class(1, 0, None)]]
    assert client.classify("two", {"x": x}, "y", 1) == [[Class(2, 1, None)]]

    assert [each.version for each in client.statistics("two", "1")] == ["1"]
    assert [each.version for each in client.statistics("two")] == ["1", "2"]
    assert client.metadata("two", "1").versions == (1,)
    assert [client.ready("two", version) for version in ("1", "3")] == [True, False]


def test_metadata_is_read_into_our_own_types(client):
    """Names, integer versions, specs."""
    metadata = client.metadata("colour")

    assert (metadata.name, metadata.versions, metadata.platform) == ("colour", (1,), "edgeward_bundle")
    assert metadata.inputs == (TensorSpec("photo", "BYTES", (-1, 1)),)
    assert metadata.outputs[1] == TensorSpec("score", "FP32", (-1, 2))


def test_texts_may_be_str_or_bytes(client):
    """A str is sent as its UTF-8."""
    answer = client.predict("mood", ["né good", "né good".encode()])

    assert answer["label"].shape == (2, 1)
    np.testing.assert_array_equal(answer["logits"][0], answer["logits"][1])


def test_images_are_sent_as_they_are(client):
    """The input's name comes from the model's metadata."""
    assert client.predict("colour", [png("red"), png("blue")])["label"].shape == (2, 1)


@pytest.mark.parametrize("kind", [Client, BlockingAioClient])
def test_what_a_new_version_takes_is_not_refused_for_the_old_one(tmp_path, kind):
    """What the client remembers of a model refuses nothing before it was looked up again."""
    write_text_bundle(tmp_path / "mood" / "1")
    server = start(ServeConfig((tmp_path,), port=0, device="cpu", threads=1, admin=True))
    try:
        with kind(server.address) as client:
            client.predict("mood", ["good"])
            write_vector_bundle(tmp_path / "mood" / "2", name="mood", version=2)
            client.load("mood")
            (size,) = client.metadata("mood").inputs[0].shape[1:]

            assert client.predict("mood", [[0.5] * size])
            with pytest.raises(BadInput, match="expected numbers of shape"):
                client.predict("mood", ["good"])
    finally:
        server.stop(drain_s=0)


@pytest.mark.parametrize("examples", ["raw", "pair"])
def test_examples_that_come_one_by_one_are_bad_input(examples):
    """Such as zip gives: they can be read only once. A list of them is taken."""
    texts = ["né", "b"]
    metadata, raws = METADATA[examples], {"raw": texts, "pair": list(zip(texts, texts, strict=True))}[examples]
    columns = to_columns(raws, metadata)

    assert [column.tolist() for column in columns.values()] == [[["né".encode()], [b"b"]]] * len(metadata.inputs)
    for given in (iter(raws), (raw for raw in raws), np.array("a"), 7):
        with pytest.raises(BadInput, match=f"the examples are one {type(given).__name__}; expected a list"):
            to_columns(given, metadata)


@pytest.mark.parametrize(
    ("examples", "raws", "words"),
    [
        ("raw", ["a", "\ud83d"], "example 1 has a text that is not UTF-8: surrogates not allowed at 0"),
        ("pair", [("a", "b"), ("a", "b\ud83d")], "example 1 has a text that is not UTF-8: surrogates not allowed at 1"),
        ("pair", [{"a": 1, "b": 2}], "example 0 is no pair of texts"),
        ("pair", [{"a", "b"}], "example 0 is no pair of texts"),
        ("pair", [np.array("a")], "example 0 is no pair of texts"),
    ],
)
def test_what_is_no_text_or_pair_is_bad_input_that_names_it(examples, raws, words):
    """As everything that cannot be sent."""
    with pytest.raises(BadInput, match=words):
        to_columns(raws, METADATA[examples])


def test_predict_of_a_graph_points_to_infer(client):
    """A model that takes tensors cannot be given raw examples."""
    with pytest.raises(BadInput, match=r"takes no raw examples but 'x' FP32 \[-1, 2\]"):
        client.predict("echo", ["text"])


@pytest.mark.parametrize(
    "array",
    [
        np.array([["a", "é"]]),
        *([np.array([["a", "é"]], np.dtypes.StringDType())] if hasattr(np.dtypes, "StringDType") else []),  # numpy 2
        np.array([[b"a", "é".encode()]]),
        np.array([["a", b"b"]], object),
    ],
)
def test_texts_of_any_numpy_kind_are_bytes_on_the_wire(client, array):
    """The server then says what it expected."""
    with pytest.raises(ServerError, match="datatype 'BYTES'; expected FP32"):
        client.infer("echo", {"x": array})


def test_byte_order_and_layout_do_not_matter(client):
    """Arrays are sent little-endian and row-major, whatever they are in memory."""
    array = np.arange(6, dtype=">f4").reshape(2, 3).T

    np.testing.assert_array_equal(client.infer("echo", {"x": array})["y"], array)


def test_a_dtype_that_the_protocol_lacks_is_bad_input(client):
    """Before anything is sent."""
    with pytest.raises(BadInput, match="complex64"):
        client.infer("echo", {"x": np.zeros((1, 2), np.complex64)})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1.0, 2.0]], "is a list; expected an array of numpy"),
        (np.array([["a", 1]], object), "has an element of type int; expected str or bytes"),
        (np.array([["a", None]], object), "has an element of type NoneType"),
        (np.array([[b"a", bytearray(b"b")]], object), "has an element of type bytearray"),
        (np.array([["a", "\ud800"]], object), "has a text that is not UTF-8: surrogates not allowed at 0"),
    ],
)
def test_what_is_no_tensor_is_bad_input_that_names_the_input(client, value, words):
    """On the wire, in a stream and in shared memory."""
    with pytest.raises(BadInput, match=f"input 'x' {words}"):
        client.infer("words", {"x": value})
    with pytest.raises(BadInput, match=f"input 'x' {words}"):
        list(client.stream("words", [{"x": value}]))
    with client.shared_memory(64) as region, pytest.raises(BadInput, match=f"a tensor in shared memory {words}"):
        region.put(value)


@pytest.mark.parametrize("value", [np.int64(1), np.bool_(True), None, b"a", 2**63, -(2**63) - 1, "\ud800"])
def test_what_is_no_parameter_is_bad_input_that_names_it(client, value):
    """Of a type that the protocol does not have, or beyond 64 bits."""
    with pytest.raises(BadInput, match=r"parameter 'note' is .*; expected a bool, an int of 64 bits"):
        client.infer("echo", {"x": np.zeros((1, 2), np.float32)}, parameters={"note": value})


def test_more_classes_than_can_be_asked_for_are_bad_input(client):
    """Their number is a parameter, too; any integer of numpy is one."""
    x = np.zeros((1, 2), np.float32)

    assert len(client.classify("echo", {"x": x}, "y", np.int64(2))[0]) == 2
    for count in (2**63, 0, 2.5):
        with pytest.raises(BadInput, match=f"count is {count}; expected"):
            client.classify("echo", {"x": x}, "y", count)


NAME = "\ud83d"


@pytest.mark.parametrize(
    "call",
    [
        lambda client, x: client.infer(NAME, {"x": x}),
        lambda client, x: client.infer("echo", {NAME: x}),
        lambda client, x: client.infer("echo", {"x": x}, NAME),
        lambda client, x: client.infer("echo", {"x": x}, outputs=[NAME]),
        lambda client, x: client.infer("echo", {"x": x}, into={NAME: None}),
        lambda client, x: client.classify("echo", {"x": x}, NAME, 1),
        lambda client, x: list(client.stream("echo", [{NAME: x}])),
        lambda client, x: client.predict(NAME, ["a"]),
        *(lambda client, x, method=method: getattr(client, method)(NAME) for method in BY_NAME),
    ],
)
def test_a_name_that_is_not_utf8_is_bad_input(client, call):
    """Of a model, a version, an input or an output."""
    with pytest.raises(BadInput, match="is not UTF-8: surrogates not allowed at 0"):
        call(client, np.zeros((1, 2), np.float32))


def test_outputs_are_a_list_of_names_and_room_is_in_shared_memory(client):
    """A text would be a name for each of its letters, and an array of numpy is not shared."""
    x = np.zeros((1, 2), np.float32)

    with pytest.raises(BadInput, match="outputs is 'y'; expected a list of names"):
        client.infer("echo", {"x": x}, outputs="y")
    with pytest.raises(BadInput, match="outputs is 'y'; expected a list of names"):
        list(client.stream("echo", [{"x": x}], outputs="y"))
    with pytest.raises(BadInput, match="room for output 'y' is a ndarray; expected a tensor in shared memory"):
        client.infer("echo", {"x": x}, into={"y": x})


def test_a_refusal_is_one_exception_with_status_and_details(client, server):
    """One line for people, two attributes for programs."""
    with pytest.raises(ServerError) as refused:
        client.predict("other", ["text"])

    assert isinstance(refused.value, EdgewardError)
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    assert refused.value.details == "Request for unknown model: 'other' is not found"
    assert str(refused.value) == f"{server.address} answered NOT_FOUND: {refused.value.details}"


def test_no_server_is_the_same_exception():
    """UNAVAILABLE, with gRPC's own words."""
    with Client("127.0.0.1:1", attempts=1) as client, pytest.raises(ServerError) as refused:
        client.predict("mood", ["text"])

    assert refused.value.code is grpc.StatusCode.UNAVAILABLE


def test_many_examples_have_the_answers_of_each_alone(server):
    """More than one request of the server may hold."""
    texts = ["the film is good", "bad bad film", "", "né"] * 300
    with Client(server.address, max_rows=100) as client:
        alone = [client.predict("mood", [text])["score"][0] for text in texts[:4]]
        together = client.predict("mood", texts)

    assert together["label"].shape == (1200, 1)
    np.testing.assert_allclose(together["score"], np.tile(alone, (300, 1)), rtol=0, atol=1e-6)


def test_requests_are_cut_by_rows_and_by_bytes():
    """A row that is larger than a request should be goes alone."""
    large = np.array([[b"x" * (MAX_BYTES - 8)], [b"y"], [b"z"], [b"x" * MAX_BYTES], [b"y"]], object)

    assert cut({"x": np.zeros((5, 3))}, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert cut({"x": large}, 10) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]
    assert cut({"x": np.zeros((0, 3))}, 2) == [slice(0, 0)]
    assert cut({"x": np.zeros((1, 3)), "y": np.zeros((4, 3))}, 2) == [slice(0, 4)]


def test_the_best_classes_of_each_row(client):
    """By value, with the index, and the label where the model has some; a plain graph has no rows."""
    texts = ["the film is good", "bad"]
    answer = client.predict("mood", texts)
    classes = client.classify("mood", {"text": np.array([[text] for text in texts])}, "score", 2)

    assert [len(row) for row in classes] == [2, 2]
    assert [row[0].index for row in classes] == answer["score"].argmax(axis=1).tolist()
    assert [row[0].label.encode() for row in classes] == answer["label"].ravel().tolist()
    array = np.array([[0.5, 2], [3, -1]], np.float32)
    assert client.classify("echo", {"x": array}, "y", 2) == [[Class(3, 2, None), Class(2, 1, None)]]


def test_parameters_are_sent_in_their_own_types(client):
    """The server refuses a priority that is no number."""
    tensors = {"x": np.zeros((1, 2), np.float32)}
    client.infer("echo", tensors, parameters={"priority": 1, "timeout": 10**7, "mine": True, "ratio": 0.5, "note": "a"})

    with pytest.raises(ServerError, match="'priority'"):
        client.infer("echo", tensors, parameters={"priority": "high"})


def test_a_stream_is_answered_by_the_server(client):
    """Raw examples, in their order; what cannot be used is an error in its place."""
    answers = list(client.stream("mood", [["good"], [b"\xff"], ["bad", "film"]], outputs=["label"]))

    assert [type(answer) for answer in answers] == [dict, ServerError, dict]
    assert [answers[i]["label"].shape for i in (0, 2)] == [(1, 1), (2, 1)]


def test_tensors_pass_in_shared_memory(client):
    """Inputs without their bytes, outputs as views of the region, of numbers and of texts."""
    with client.shared_memory(4096) as region:
        sent, room = region.tensor((3, 2), np.float32), region.tensor((3, 2), np.float32)
        for step in range(2):
            sent.array[:] = np.arange(6).reshape(3, 2) + step
            answer = client.infer("echo", {"x": sent}, into={"y": room})["y"]
            np.testing.assert_array_equal(answer, sent.array)
            assert np.shares_memory(answer, room.array)
        words = region.put(np.array([["né", b"b"]], object))
        answer = client.infer("words", {"x": words}, into={"y": region.tensor((64,), np.uint8)})
        assert answer["y"].tolist() == [["né".encode(), b"b"]]
        name = region.name

    assert not Path("/dev/shm", name).exists()
    with pytest.raises(ServerError) as refused:
        client.infer("echo", {"x": sent})
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    assert answer["y"].tolist() == [["né".encode(), b"b"]]


def test_shared_memory_of_a_client_that_died_is_forgotten(server, client):
    """With the next region that is registered; those of living clients stay."""
    program = f"""
import os
from serve.client import Client
with Client({server.address!r}).shared_memory(64) as region:
    print(region.name, flush=True)
    os._exit(1)
"""

    def known():
        return {region.name for region in server._service._regions.status("")}

    with client.shared_memory(64) as living:
        died = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True).stdout.strip()
        assert {living.name, died} <= known()
        with client.shared_memory(64) as another:
            assert known() >= {living.name, another.name}
            assert died not in known()


def test_nothing_is_left_of_shared_memory_that_the_server_refuses(models, client):
    """A server that does not allow it has nothing to clean up, and neither has the client."""
    server = start(ServeConfig((models / "echo" / "1" / "model.onnx",), port=0, device="cpu", threads=1))
    before = set(Path("/dev/shm").glob("edgeward-*"))
    try:
        with Client(server.address) as other, pytest.raises(ServerError) as refused, other.shared_memory(64):
            pass
    finally:
        server.stop(drain_s=0)
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert set(Path("/dev/shm").glob("edgeward-*")) <= before


def test_a_region_has_only_the_room_that_it_has():
    """Tensors lie side by side until it is full, or cleared."""
    region = Region(200)
    region.remove_name()
    first, second = region.put(np.arange(3, dtype=np.int8)), region.tensor((2,), np.float64)

    assert (first.offset, second.offset) == (0, 64)
    np.testing.assert_array_equal(first.array, [0, 1, 2])
    with pytest.raises(BadInput, match="100 bytes do not fit: 72 of the region's 200 are left"):
        region.tensor((100,), np.uint8)
    region.clear()
    assert region.tensor((200,), np.uint8).offset == 0
    with pytest.raises(BadInput, match="complex64"):
        region.tensor((1,), np.complex64)


@pytest.mark.parametrize("shape", [(-1, 2), (2, -1), (-2, -2), (2.5,), ("2",), (1 << 63, 0)])
def test_a_tensor_in_shared_memory_has_a_shape(shape):
    """Metadata says -1 for any length; here it is one. The room of the others stays theirs."""
    region = Region(200)
    region.remove_name()
    region.tensor((2,), np.float32)

    with pytest.raises(BadInput, match="a length of the shape is"):
        region.tensor(shape, np.float32)
    assert region.tensor((np.int64(2), 0, 3), np.float32).shape == (2, 0, 3)
    assert region.tensor((2,), np.float32).offset == 64


@pytest.mark.parametrize(
    ("size", "error"), [(0, BadInput), (1e6, BadInput), (1 << 63, BadInput), (1 << 60, EdgewardError)]
)
def test_memory_that_cannot_be_had_is_one_error(size, error):
    """And leaves no name behind."""
    before = set(Path("/dev/shm").glob("edgeward-*"))

    with pytest.raises(error, match="bytes"):
        Region(size)
    assert set(Path("/dev/shm").glob("edgeward-*")) <= before


def test_an_interrupt_leaves_no_shared_memory_behind(monkeypatch):
    """Memory of some size takes a while to be had."""
    before = set(Path("/dev/shm").glob("edgeward-*"))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Region(64)
    assert set(Path("/dev/shm").glob("edgeward-*")) <= before


@pytest.fixture
def infer(monkeypatch, capsys):
    """`edgeward infer`: its exit code, and the labels or what stderr says."""
    monkeypatch.setattr("edgeward.__main__.configure_log", lambda **kwargs: None)

    def call(address, *options):
        capsys.readouterr()
        code = run(["infer", address, "mood", "the film is good", "--json", *map(str, options)])
        out, err = capsys.readouterr()
        return code, json.loads(out)["label"] if code == 0 else err

    return call


def test_the_command_proves_who_it_is(models, tmp_path, infer):
    """TLS on both sides and a token; without one of them it is told why, in one line."""
    files = write_certificates(tmp_path / "certificates")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# of the gateway\n\n{TOKEN}\n")
    ca, cert, key = (files / name for name in ("ca.pem", "client.pem", "client.key"))
    server = start(
        ServeConfig(
            (models / "mood",),
            port=0,
            device="cpu",
            threads=1,
            tls_cert=files / "server.pem",
            tls_key=files / "server.key",
            tls_client_ca=ca,
            token_file=tokens,
        )
    )
    mutual = ("--tls-ca", ca, "--tls-cert", cert, "--tls-key", key)
    try:
        answered = infer(server.address, *mutual, "--token-file", tokens)
        no_token = infer(server.address, *mutual)
        plain = infer("10.0.0.1:1", "--token-file", tokens)
    finally:
        server.stop(drain_s=0)

    assert answered == (0, [["neither — é"]])
    assert (no_token[0], no_token[1].count("\n"), "answered UNAUTHENTICATED" in no_token[1]) == (1, 1, True)
    assert plain[0] == 1
    assert "in plain text" in plain[1]
    assert TOKEN not in plain[1]


def test_the_command_asks_through_a_socket(models, tmp_path, infer):
    """Of the unix domain, by its path."""
    server = start(ServeConfig((models / "mood",), socket=tmp_path / "s", device="cpu", threads=1))
    try:
        assert infer(f"unix:{tmp_path}/s") == (0, [["neither — é"]])
    finally:
        server.stop(drain_s=0)

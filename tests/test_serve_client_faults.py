"""Both clients, where servers and networks fail: attempts, deadlines, order, credentials, answers that are none."""

import asyncio
import copy
import pickle
import socket
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.client import Client
from serve.client.calls import Class, Health
from serve.client.channel import Tls
from serve.errors import ServerError
from tests.blocking import BlockingAioClient
from tests.certificates import write_certificates
from tests.protocol_server import serving

ALWAYS = 10**6


@pytest.fixture(params=[Client, BlockingAioClient], ids=["sync", "asyncio"])
def kind(request):
    return request.param


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def client(kind, server):
    with kind(server.address, timeout_s=20) as client:
        yield client


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return write_certificates(tmp_path_factory.mktemp("tls") / "certificates")


def texts(*values):
    return {"text": np.array([[value] for value in values], object)}


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as refused:
        call(*arguments, **options)
    return refused.value


def test_what_is_unavailable_is_asked_again(client, server):
    """The caller sees the answer alone."""
    server.refusals = 2

    assert client.infer("m", texts(b"a"))["text"].tolist() == [[b"a"]]
    assert server.calls["ModelInfer"] == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.ready(),
        lambda client: client.infer("m", texts(b"a")),
        lambda client: client.predict("m", ["a"]),
        lambda client: client.predict("m", ["a", "b"]),
        lambda client: list(client.stream("m", [["a"]])),
        lambda client: list(client.watch()),
    ],
    ids=["ready", "infer", "predict", "predict of several", "stream", "watch"],
)
def test_a_client_that_was_closed_calls_nobody(kind, server, call):
    """It says so as it says everything else."""
    with kind(server.address, max_rows=1) as client:
        client.predict("m", ["a"])
        client.close()
        server.calls.clear()
        refused = refusal(call, client)

    assert (refused.code, refused.details) == (grpc.StatusCode.CANCELLED, "the client was closed")
    assert not server.calls


def test_a_large_request_is_asked_again_too(client, server):
    """It is above what gRPC keeps for another attempt by default."""
    server.refusals = 1
    array = np.zeros(1 << 20, np.uint8)

    assert client.infer("m", {"x": array})["x"].shape == array.shape


def test_what_no_message_can_hold_is_bad_input(client, server, monkeypatch):
    """Protobuf would look for room until the deadline."""
    monkeypatch.setattr("serve.client.calls.MAX_BYTES", 10)
    x = np.zeros(5, np.uint8)
    client.infer("m", {"x": x, "y": x})

    with pytest.raises(BadInput, match="the tensors have 11 bytes up to input 'z'; one request holds 10"):
        client.infer("m", {"x": x, "y": x, "z": np.zeros(1, np.uint8)})
    assert server.calls["ModelInfer"] == 1


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "INTERNAL", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED"])
def test_nothing_else_is_asked_again(client, server, code):
    """Another attempt would fail as well, or do harm."""
    server.refusals, server.status = 1, grpc.StatusCode[code]

    assert refusal(client.infer, "m", texts(b"a")).code is grpc.StatusCode[code]
    assert server.calls["ModelInfer"] == 1


def test_a_refusal_reaches_another_process():
    """A pool of processes pickles what its workers raise, and waits for ever for what cannot be read again."""
    error = ServerError("127.0.0.1:1", grpc.StatusCode.UNAVAILABLE, "gone")
    error.add_note("of shard 3")

    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(again) == str(error) == "127.0.0.1:1 answered UNAVAILABLE: gone"
        assert vars(again) == vars(error)
        assert (again.address, again.code, again.details) == error.args


def test_a_model_is_not_loaded_twice(client, server):
    """The first attempt may have been at work when the connection broke."""
    server.refusals = 1

    assert refusal(client.load, "m").code is grpc.StatusCode.UNAVAILABLE
    assert server.calls["RepositoryModelLoad"] == 1


def test_ready_is_answered_at_once(client, server):
    """Whoever asks wants to know how it is now."""
    server.refusals = 1

    assert not client.ready()
    assert client.ready()


def test_who_takes_a_connection_and_says_nothing_is_not_ready(kind):
    """Such as a process that is stopped: its system still accepts."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with kind(f"127.0.0.1:{port}", timeout_s=0.1) as client:
            assert not client.ready()
            assert not client.ready("m")


def test_one_attempt_is_one_attempt(kind, server):
    """A client that is told so sees every refusal."""
    server.refusals = ALWAYS
    with kind(server.address, attempts=1) as client:
        assert refusal(client.infer, "m", texts(b"a")).details == "Exceeds maximum queue size"
        assert server.calls["ModelInfer"] == 1


def test_repeated_attempts_are_a_tenth_of_the_calls(kind, server):
    """A server that is overloaded is not asked twice as much: beside ten at the start, calls that succeed earn them."""
    server.refusals = ALWAYS
    with kind(server.address, attempts=2) as client:
        for _ in range(20):
            refusal(client.infer, "m", texts(b"a"))
        assert 20 < server.calls["ModelInfer"] <= 30

        server.refusals = 0
        for _ in range(130):
            client.infer("m", texts(b"a"))
        server.refusals, before = 1, server.calls["ModelInfer"]
        client.infer("m", texts(b"a"))
        assert server.calls["ModelInfer"] == before + 2


def test_the_deadline_is_of_all_attempts_together(client, server):
    """Every attempt has what the ones before have left of it."""
    server.refusals = 2
    client.infer("m", texts(b"a"), timeout_s=5)

    assert 5.1 > server.left_s[0] > server.left_s[2] + 0.1  # after two pauses; on the wire it is rounded


def test_a_call_ends_with_its_deadline(client, server):
    """Though the server could be asked again."""
    server.refusals = ALWAYS

    assert refusal(client.infer, "m", texts(b"a"), timeout_s=0.05).code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("timeout_s", [1e12, np.float32(np.inf), 10**30])
def test_a_call_may_take_as_long_as_it_likes(kind, server, timeout_s):
    """By the client's own deadline, and by the call's."""
    with kind(server.address, timeout_s=timeout_s) as client:
        client.predict("m", ["a"])
        client.infer("m", texts(b"a"), timeout_s=timeout_s)
        assert len(list(client.stream("m", [["a"]], timeout_s=timeout_s))) == 1


@pytest.mark.parametrize("timeout_s", [float("nan"), 0, -1.5, "5"])
def test_a_deadline_that_is_none_is_bad_input(client, kind, server, timeout_s):
    """It would have passed before anything is sent."""
    for call in (
        lambda: kind(server.address, timeout_s=timeout_s),
        lambda: client.predict("m", ["a"], timeout_s=timeout_s),
        lambda: client.infer("m", texts(b"a"), timeout_s=timeout_s),
        lambda: client.load("m", timeout_s=timeout_s),
        lambda: list(client.stream("m", [["a"]], timeout_s=timeout_s)),
    ):
        with pytest.raises(BadInput, match=f"timeout_s is {timeout_s!r}; expected seconds, more than 0"):
            call()
    assert not server.calls


def test_many_examples_go_side_by_side_and_come_back_in_order(kind, server):
    """The server answers no request before it has three of them."""
    server.together = type(server.together)(3)
    raws = [str(i) for i in range(18)]
    with kind(server.address, max_rows=2, parallel=3) as client:
        answer = client.predict("m", raws)

    assert answer["text"].ravel().tolist() == [raw.encode() for raw in raws]
    assert [list(request.inputs[0].shape) for request in server.requests] == [[2, 1]] * 9


def test_no_examples_are_one_request(client, server):
    """The answer then has the shapes of no rows."""
    assert client.predict("m", [])["text"].shape == (0, 1)
    assert len(server.requests) == 1


def test_requests_of_one_predict_share_its_deadline(kind, server, monkeypatch):
    """Each is given what the ones before have left; here, time goes by in steps of four seconds."""
    clock = SimpleNamespace(monotonic=count(0, 4).__next__)
    monkeypatch.setattr("serve.client.blocking.time", clock)
    monkeypatch.setattr("serve.client.aio.time", clock)
    with kind(server.address, max_rows=1, parallel=1) as client:
        client.predict("m", ["a", "b", "c"], timeout_s=20)

    most_s = (16, 12, 8, 4)  # the first of them looks up the input
    assert all(left_s < limit_s + 0.5 for left_s, limit_s in zip(server.left_s, most_s, strict=True))


def test_a_refused_request_says_where_its_examples_begin(kind, server):
    """The server counts from the request's first example, the caller from the first of all."""
    server.refuses = lambda request: b"bad" in request.raw_input_contents[0]
    with kind(server.address, max_rows=2, parallel=1) as client:
        first = refusal(client.predict, "m", ["bad", "b", "c"])
        later = refusal(client.predict, "m", ["a", "b", "bad"])

    assert first.details == "example 0 is bad"
    assert later.details == "example 0 is bad (of the request that begins with example 2)"


@pytest.mark.parametrize(
    ("version", "classes", "code", "says"),
    [
        ("2", 2, "UNAVAILABLE", "versions 1 and 2 have answered some of the examples each"),
        ("2", 3, "UNAVAILABLE", "versions 1 and 2 have answered some of the examples each"),
        ("1", 3, "UNKNOWN", "an answer that cannot be read"),
    ],
)
def test_one_predict_is_answered_by_one_version(kind, server, version, classes, code, says):
    """Nobody could tell whose scores stand in a row, and another version may have more of them."""
    versions = iter([("1", 2), (version, classes), (version, classes), (version, classes)])

    def answer(request):
        number, columns = next(versions)
        server.answer = pb.ModelInferResponse(model_version=number, raw_output_contents=[bytes(4 * columns)])
        server.answer.outputs.add(name="score", datatype="FP32", shape=[1, columns])

    server.refuses = answer
    with kind(server.address, max_rows=1, parallel=1) as client:
        refused = refusal(client.predict, "m", ["a", "b"])
        again = client.predict("m", ["a", "b"])

    assert refused.code is grpc.StatusCode[code]
    assert refused.details.startswith(says)
    assert again["score"].shape == (2, classes)


def test_the_input_is_looked_up_anew_after_a_refusal(client, server):
    """A version that came meanwhile may call it otherwise."""
    client.predict("m", ["a"])
    server.input, server.refuses = "review", lambda request: request.inputs[0].name == "text"
    refusal(client.predict, "m", ["a"])

    assert client.predict("m", ["a"]).keys() == {"review"}
    assert server.calls["ModelMetadata"] == 2


def test_a_stream_looks_the_input_up_anew_after_a_refusal(client, server):
    """As `predict` does; a stream may outlive many versions."""
    client.predict("m", ["a"])
    server.input, server.refuses = "review", lambda request: request.inputs[0].name == "text"
    (refused,) = client.stream("m", [["a"]])
    (answer,) = client.stream("m", [["a"]])

    assert isinstance(refused, ServerError)
    assert answer.keys() == {"review"}


@pytest.mark.parametrize(("datatype", "raw"), [("FP32", [b"abc"]), ("FP8", [b"a"]), ("BYTES", [b"\xff"]), ("FP32", [])])
def test_an_answer_that_is_none_is_the_same_exception(client, server, datatype, raw):
    """Whatever a server sends, the caller has one class to catch."""
    server.answer = pb.ModelInferResponse(raw_output_contents=raw)
    server.answer.outputs.add(name="y", datatype=datatype, shape=[1])
    refused = refusal(client.infer, "m", texts(b"a"))

    assert refused.code is grpc.StatusCode.UNKNOWN
    assert refused.details.startswith("an answer that cannot be read: ")


@pytest.mark.parametrize(
    ("shape", "elements", "expected"),
    [
        ([2, 0], [], [[], []]),
        ([0, 3], [], []),
        ([0], [], [[]]),
        ([], [b"0.500000:7"], [[Class(0.5, 7, None)]]),
        ([1, 2], [b"nan:0:a:b", b"-inf:1"], [[Class(np.nan, 0, "a:b"), Class(-np.inf, 1, None)]]),
        ([2], [b"9223372036854775807:0", b"-1:1"], [[Class(2**63 - 1, 0, None), Class(-1, 1, None)]]),
    ],
    ids=["no classes", "no rows", "one row of none", "scalar", "not finite", "integers"],
)
def test_classes_are_read_as_they_were_sent(client, server, shape, elements, expected):
    """Every row has a list, be it empty, and no integer is rounded."""
    raw = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    server.answer = pb.ModelInferResponse(raw_output_contents=[raw])
    server.answer.outputs.add(name="y", datatype="BYTES", shape=shape)

    got = client.classify("m", texts(b"a"), "y", 3)

    assert repr(got) == repr(expected)  # in which NaN is equal to itself, and 1 is not 1.0


def test_a_stream_answers_in_order_and_outlives_refusals(client, server):
    """A refused request has its error in its place. Examples and tensors may come in one stream."""
    server.refuses = lambda request: b"bad" in request.raw_input_contents[0]
    answers = list(client.stream("m", [["a", "b"], ["bad"], texts(b"c")]))

    assert [isinstance(answer, ServerError) for answer in answers] == [False, True, False]
    assert answers[0]["text"].tolist() == [[b"a"], [b"b"]]
    assert (answers[1].code, answers[1].details) == (grpc.StatusCode.UNKNOWN, "example 0 is bad")
    assert answers[2]["text"].tolist() == [[b"c"]]


def test_what_the_batches_of_a_stream_raise_comes_after_the_answers(client, server):
    """The caller's own exception, once all that was sent is answered."""

    def batches():
        yield ["a"]
        raise LookupError("the camera is gone")

    answers = client.stream("m", batches())

    assert next(answers)["text"].tolist() == [[b"a"]]
    with pytest.raises(LookupError, match="the camera is gone"):
        next(answers)


@pytest.mark.parametrize("kind", [Client], indirect=True)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_so_does_what_ends_a_thread(client, error):
    """It is the thread of gRPC that takes the batches."""

    def batches():
        yield ["a"]
        raise error

    answers = client.stream("m", batches(), timeout_s=20)

    assert next(answers)["text"].tolist() == [[b"a"]]
    with pytest.raises(type(error)) as raised:
        next(answers)
    assert raised.value is error


def test_a_stream_that_is_left_ends_at_the_server(client, server):
    """A generator that is closed cancels its call."""
    answers = client.stream("m", ([str(i)] for i in range(ALWAYS)))
    next(answers)
    answers.close()

    assert server.ended.wait(10)


def test_a_broken_stream_is_the_same_exception(client, server):
    """The answers that came before are given, then the status."""
    server.refusals, server.status = 1, grpc.StatusCode.RESOURCE_EXHAUSTED

    with pytest.raises(ServerError) as refused:
        next(client.stream("m", [["a"]]))
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_health_is_checked_and_watched(client, server):
    """Of the server, and of its models by their names; the watch hears every change."""
    server.health.set("m", 1)
    assert (client.health(), client.health("m")) == (Health.SERVING, Health.SERVING)
    assert refusal(client.health, "other").code is grpc.StatusCode.NOT_FOUND

    changes = client.watch("m")
    assert next(changes) is Health.SERVING
    server.health.set("m", 2)
    assert next(changes) is Health.NOT_SERVING
    changes.close()
    assert next(client.watch("other")) is Health.SERVICE_UNKNOWN


def test_over_tls_server_and_client_prove_who_they_are(kind, certificates):
    """mTLS: without a certificate, or with an authority that did not sign the server's, there is no connection."""
    ca, key, cert = (certificates / name for name in ("ca.pem", "client.key", "client.pem"))
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], ca.read_bytes(), require_client_auth=True)
    with serving(credentials=credentials) as server:
        with kind(server.address, tls=Tls(ca, cert, key)) as client:
            assert client.ready()
        for wrong in (Tls(ca), Tls(cert=cert, key=key), None):
            with kind(server.address, tls=wrong, attempts=1) as client:
                assert not client.ready()


def test_a_token_goes_over_tls_or_stays_on_this_machine(kind, certificates, tmp_path):
    """As bearer token of every call."""
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    for address, tls, credentials in [
        ("127.0.0.1:0", None, None),
        (f"unix:{tmp_path}/s", None, None),
        ("127.0.0.1:0", Tls(certificates / "ca.pem"), grpc.ssl_server_credentials([pair])),
    ]:
        with serving(address, credentials) as server, kind(server.address, tls=tls, token="s3cret") as client:
            assert client.ready()
            assert server.headers["authorization"] == "Bearer s3cret"
            list(client.stream("m", [["a"]]))
            assert server.headers["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:8001",
        "example.org:8001",
        "unix-gateway.example:8001",
        "unix.example:8001",
        "127.0.0.1,10.0.0.1:80",
        "dns:///localhost:1",
    ],
)
def test_a_token_never_crosses_a_network_in_plain_text(kind, address):
    """Nothing is sent, and the error does not say the token."""
    with pytest.raises(BadInput, match="in plain text") as refused:
        kind(address, token="s3cret")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("address", ["localhost:1", "127.1.2.3:1", "[::1]:1", "unix:/run/edgeward.sock"])
def test_a_token_may_stay_on_this_machine(address):
    """Loopback in every form, and sockets."""
    Client(address, token="s3cret").close()


@pytest.mark.parametrize(
    ("address", "options", "says"),
    [
        ("127.0.0.1", {}, "neither HOST:PORT nor unix:PATH"),
        ("http://127.0.0.1/", {}, "neither HOST:PORT nor unix:PATH"),
        ("127.0.0.1:1", {"token": "two words"}, "printable ASCII"),
        ("127.0.0.1:1", {"token": ""}, "empty"),
        ("127.0.0.1:1", {"attempts": 6}, "attempts is 6; expected 1 to 5"),
        ("127.0.0.1:1", {"attempts": 1.5}, "attempts is 1.5; expected an integer"),
        ("127.0.0.1:1", {"max_rows": 0}, "max_rows is 0"),
        ("127.0.0.1:1", {"max_rows": 1.5}, "max_rows is 1.5; expected an integer"),
        ("127.0.0.1:1", {"parallel": 0}, "parallel is 0"),
    ],
)
def test_what_no_client_can_use_is_bad_input(kind, address, options, says):
    """Before anything is sent."""
    with pytest.raises(BadInput, match=says):
        kind(address, **options)


def test_files_of_tls_are_read_at_once(tmp_path):
    """A path that is wrong is found where it was written."""
    (tmp_path / "notes.txt").write_text("no certificate")

    with pytest.raises(BadInput, match=r"missing\.pem cannot be read"):
        Client("a:1", tls=Tls(ca=tmp_path / "missing.pem"))
    with pytest.raises(BadInput, match=r"notes\.txt is no PEM file"):
        Client("a:1", tls=Tls(ca=tmp_path / "notes.txt"))
    with pytest.raises(BadInput, match="together or not at all"):
        Client("a:1", tls=Tls(cert=tmp_path / "notes.txt"))


def test_the_clients_need_grpcio_protobuf_and_numpy_alone():
    """Nothing else that the server or the command installs is imported."""
    others = ["PIL", "cyclopts", "grpc_health", "grpc_reflection", "msgspec", "onnxruntime", "prometheus_client"]
    others += ["rich", "tokenizers", "watchfiles"]
    program = f"import sys; sys.modules.update(dict.fromkeys({others})); import serve.client, serve.client.aio"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")

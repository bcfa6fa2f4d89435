import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import grpc
import numpy as np
import pytest
from hpack import Decoder, Encoder

from benchmarks import http2
from benchmarks.http2 import ACK, DATA, END_HEADERS, END_STREAM, HEADERS, PING, SETTINGS, WINDOW_UPDATE, Connection
from benchmarks.serve_load import Caller, Target
from tests.certificates import write_certificates

ECHO, FAULT = "/test.Test/Echo", "/test.Test/Fault"
SIZES = (0, 1, 300, 16_383, 70_000, 600_000)
REQUESTS = tuple(np.random.default_rng(size).bytes(size) for size in SIZES)


def fault(request, context):
    """Never answers."""
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")


@contextmanager
def echo(address, credentials=None):
    """grpcio's own server, which gives back what it gets; the address that it listens on."""
    methods = {"Echo": lambda request, context: request, "Fault": fault}
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", handlers)])
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield address.replace(":0", f":{port}")
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("transport", ["TCP", "unix", "TLS"])
def test_answers_belong_to_their_requests(transport, tmp_path):
    """Requests of all sizes, larger than any window too, come back as they were; one by one and at the same time."""
    address = f"unix:{tmp_path}/socket" if transport == "unix" else "127.0.0.1:0"
    ca = credentials = None
    if transport == "TLS":
        folder = write_certificates(tmp_path / "tls")
        ca, *pair = ((folder / name).read_bytes() for name in ("ca.pem", "server.key", "server.pem"))
        credentials = grpc.ssl_server_credentials([pair])
    with (
        echo(address, credentials) as listening,
        closing(Caller(Target(listening, REQUESTS * 3, ECHO, ca))) as caller,
    ):
        for in_flight in (1, 7):
            assert caller.answers(in_flight) == [*REQUESTS] * 3


def test_every_call_of_a_load_is_counted():
    """Closed and open loops end with a latency for each call; what is open comes as often as it is asked for."""
    with echo("127.0.0.1:0") as listening, closing(Caller(Target(listening, REQUESTS[:3], ECHO))) as caller:
        assert len(caller.closed(5, 0.02).latencies) >= 5
        load = caller.open(1000.0, 0.02)
        assert len(load.latencies) == 20
        assert (load.latencies > 0).all()


def test_status_that_is_not_ok_is_no_answer():
    """It is an error that says what the server said."""
    with (
        echo("127.0.0.1:0") as listening,
        closing(Caller(Target(listening, REQUESTS[:1], FAULT))) as caller,
        pytest.raises(ConnectionError, match="no such thing"),
    ):
        caller.answers(1)


class Server:
    """The other side of a socket, which sends what a test wants and keeps what it gets."""

    def __init__(self, settings):
        self.socket, self.client = socket.socketpair()
        self.send(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings.items()))
        self.encoder, self.decoder = Encoder(), Decoder()

    def send(self, kind, flags, stream, payload):
        """One frame."""
        self.socket.sendall(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    def answer(self, stream, *trailers):
        """Empty, after these header fields and the status."""
        self.send(HEADERS, END_HEADERS, stream, self.encoder.encode([(":status", "200")]))
        self.send(DATA, 0, stream, http2.framed(b""))
        block = self.encoder.encode([*trailers, ("grpc-status", "0")])
        self.send(HEADERS, END_HEADERS | END_STREAM, stream, block)

    def got(self, *kinds):
        """The next frame of one of these kinds: type, flags, stream, payload."""
        while True:
            head = self.socket.recv(9, socket.MSG_WAITALL)
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            payload = self.socket.recv(int.from_bytes(head[:3]), socket.MSG_WAITALL)
            if kind == HEADERS:
                payload = self.decoder.decode(payload)
            if kind in kinds and not (kind == SETTINGS and not flags & ACK):
                return kind, flags, stream, payload


@pytest.fixture
def connected(monkeypatch):
    """Makes a server with these settings and a connection to it."""
    made = []

    def connect(settings):
        server = Server(settings)
        monkeypatch.setattr(http2, "_connected", lambda address, ca: server.client)
        made.append(server)
        connection = Connection("localhost:1", ECHO)
        assert server.socket.recv(len(http2.PREFACE), socket.MSG_WAITALL) == http2.PREFACE
        return server, connection

    yield connect
    for server in made:
        server.socket.close()
        server.client.close()


def test_request_waits_for_windows(connected):
    """No frame is larger than the server takes, and no byte goes out before a window allows it."""
    server, connection = connected({http2.INITIAL_WINDOW_SIZE: 25_000, http2.MAX_FRAME_SIZE: 20_000})
    data = np.random.default_rng(0).bytes(100_000)
    connection.begin(data, "call")
    assert connection.ended(0) == []
    taken = [server.got(DATA)[3] for _ in range(2)]
    assert [len(each) for each in taken] == [20_000, 5_000]
    server.send(WINDOW_UPDATE, 0, 1, struct.pack(">I", 100_000))  # the connection's own is 65,535
    assert connection.ended(1) == []
    while sum(map(len, taken)) < 65_535:
        taken.append(server.got(DATA)[3])
    server.send(PING, 0, 0, b"12345678")
    assert connection.ended(1) == []
    assert server.got(PING, DATA) == (PING, ACK, 0, b"12345678")
    server.send(WINDOW_UPDATE, 0, 0, struct.pack(">I", 100_000))
    assert connection.ended(1) == []
    frames = [server.got(DATA) for _ in range(2)]
    assert [flags for _, flags, *_ in frames] == [0, END_STREAM]
    assert b"".join([*taken, *(frame[3] for frame in frames)]) == data
    server.answer(1)
    assert connection.ended(1) == [("call", b"")]


def test_later_calls_are_headed_as_the_first(connected):
    """The second call sends its header fields as indices, which mean the same."""
    server, connection = connected({})
    fields = []
    for stream in (1, 3, 5):
        connection.begin(http2.framed(b""), None)
        connection.ended(0)
        fields.append(server.got(HEADERS)[3])
        server.answer(stream)
        assert connection.ended() == [(None, b"")]
    assert dict(fields[0])[":path"] == ECHO
    assert fields[0] == fields[1] == fields[2]


def test_indices_are_read_anew_when_the_server_changes_them(connected):
    """Bytes that meant status 0 twice mean 13 once another field has been put into the table before it."""
    server, connection = connected({})
    index = b"\xbe"  # the newest field of the table
    blocks = [b"\x40\x0bgrpc-status\x010", index, index, b"\x40\x0bgrpc-status\x0213", index]
    for stream, trailers in zip((1, 3, 5, 7), blocks, strict=False):
        connection.begin(http2.framed(b""), None)
        server.send(HEADERS, END_HEADERS, stream, b"\x88")
        server.send(HEADERS, END_HEADERS | END_STREAM, stream, trailers)
        if stream < 7:
            assert connection.ended() == [(None, b"")]
    with pytest.raises(ConnectionError, match="'grpc-status': '13'"):
        connection.ended()
    with pytest.raises(ConnectionError, match="'grpc-status': '13'"):
        connection._check(index, "grpc-status", "0")


def test_calls_wait_for_the_server_to_take_more_streams(connected):
    """Two at the same time where it allows two; the third begins when one has ended."""
    server, connection = connected({http2.MAX_CONCURRENT_STREAMS: 2})
    for tag in "abc":
        connection.begin(http2.framed(b""), tag)
    assert connection.ended(0) == []
    assert [server.got(DATA)[2] for _ in range(2)] == [1, 3]
    server.answer(3)
    assert connection.ended() == [("b", b"")]
    assert server.got(DATA)[2] == 5
    server.answer(1)
    assert connection.ended() == [("a", b"")]
    server.answer(5)
    assert connection.ended() == [("c", b"")]


@pytest.mark.parametrize("kind", [http2.RST_STREAM, http2.GOAWAY])
def test_broken_calls_are_faults(connected, kind):
    """A stream that is reset, and a server that goes away."""
    server, connection = connected({})
    connection.begin(http2.framed(b""), None)
    server.send(kind, 0, 1, struct.pack(">I", 7))
    with pytest.raises(ConnectionError, match=f"type {kind}"):
        connection.ended()

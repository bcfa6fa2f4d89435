"""How each peer is asked and how it answers, and a load on those that speak HTTP."""

import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.serve_load import INFER, WARM_UP, Caller, Load, Target
from protos import inference_pb2 as pb

BENTOML = "/bentoml.grpc.v1.BentoService/Call"
END = b"\r\n\r\n"


def v2_request(model: str, x: np.ndarray, given: str) -> bytes:
    """Of the Open Inference Protocol."""
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    message.inputs.add(name=given, datatype="FP32", shape=x.shape)
    return message.SerializeToString()


def v2_answer(data: bytes) -> np.ndarray:
    """The one output."""
    return np.frombuffer(pb.ModelInferResponse.FromString(data).raw_output_contents[0], np.float32)


def bentoml_request(x: np.ndarray) -> bytes:
    """A bentoml.grpc.v1.Request: api_name is field 1, serialized_bytes field 2."""
    return _field(1, b"predict") + _field(2, x.tobytes())


def bentoml_answer(data: bytes) -> np.ndarray:
    """Of a bentoml.grpc.v1.Response, whose field 1 is an NDArray, whose field 3 are packed float32."""
    return np.frombuffer(_fields(_fields(data)[1])[3], np.float32)


def http_request(port: int, x: np.ndarray) -> bytes:
    """The tensor's bytes."""
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/octet-stream\r\n"
    return f"{head}Content-Length: {x.nbytes}\r\n\r\n".encode() + x.tobytes()


def http_answer(data: bytes) -> np.ndarray:
    """The tensor's bytes."""
    return np.frombuffer(data, np.float32)


def _varint(number: int) -> bytes:
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _fields(data: bytes) -> dict[int, bytes]:
    """By number, those that have a length; others are passed over."""
    found, at = {}, 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        size, at = _read_varint(data, at)
        if tag & 7 == 2:
            found[tag >> 3], at = data[at : at + size], at + size
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while data[at] > 127:
        number, shift, at = number | (data[at] & 127) << shift, shift + 7, at + 1
    return number | data[at] << shift, at + 1


class HttpCaller:
    """A closed loop over one connection for each call that is under way, kept alive; one process waits for them all."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request

    def answers(self, in_flight: int) -> list[bytes]:
        """To the request."""
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(self._request)
            return [received(connection)]

    def closed(self, in_flight: int, seconds: float) -> Load:
        """So many calls are always under way."""
        with selectors.DefaultSelector() as waiting:
            connections = [socket.create_connection(("127.0.0.1", self._port)) for _ in range(in_flight)]
            for connection in connections:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                waiting.register(connection, selectors.EVENT_READ)
            try:
                self._closed(waiting, connections, WARM_UP * seconds)
                return self._closed(waiting, connections, seconds)
            finally:
                for connection in connections:
                    connection.close()

    def _closed(self, waiting: selectors.BaseSelector, connections: list[socket.socket], seconds: float) -> Load:
        start, began, latencies = time.perf_counter(), {}, []
        for connection in connections:
            began[connection] = time.perf_counter()
            connection.sendall(self._request)
        while began:
            for key, _ in waiting.select():
                connection: Any = key.fileobj
                received(connection)
                now = time.perf_counter()
                latencies.append(now - began.pop(connection))
                if now < start + seconds:
                    began[connection] = time.perf_counter()
                    connection.sendall(self._request)
        return Load(np.array(latencies), time.perf_counter() - start)


def received(connection: socket.socket) -> bytes:
    """The body of one answer; a status other than 200 ends the program."""
    data = b""
    while END not in data:
        data += _more(connection)
    head, _, body = data.partition(END)
    assert head.split(b" ", 2)[1] == b"200", head.decode()
    size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < size:
        body += _more(connection)
    return body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the server closed the connection"
    return data


@dataclass(frozen=True)
class Wire:
    """One of "v2", "bentoml", "http", to a port, with the request that is sent."""

    kind: str
    port: int
    request: bytes

    def answer(self, data: bytes) -> np.ndarray:
        """The tensor that came, flat."""
        return {"v2": v2_answer, "bentoml": bentoml_answer, "http": http_answer}[self.kind](data)


def wire(kind: str, port: int, model: str, x: np.ndarray, given: str) -> Wire:
    """To ask a model for one row, float32; `given` is its input's name."""
    match kind:
        case "v2":
            return Wire(kind, port, v2_request(model, x, given))
        case "bentoml":
            return Wire(kind, port, bentoml_request(x))
        case _:
            return Wire(kind, port, http_request(port, x))


class Asker:
    """Asks a server, from a process of its own."""

    def __init__(self, to: Wire) -> None:
        self._wire = to
        self._caller: Caller | HttpCaller | None = None

    def first(self, limit_s: float) -> tuple[bytes, float] | str:
        """The first answer of a server that is starting, and the moment when it came; or what is wrong with it."""
        end, fault = time.perf_counter() + limit_s, "nobody listens"
        while time.perf_counter() < end:
            try:
                socket.create_connection(("127.0.0.1", self._wire.port)).close()
                self._caller = self._connected()
                return self._caller.answers(1)[0], time.perf_counter()
            except (OSError, AssertionError) as error:
                fault = str(error)
                time.sleep(0.01)
        return fault

    def _connected(self) -> Caller | HttpCaller:
        if self._wire.kind == "http":
            return HttpCaller(self._wire.port, self._wire.request)
        method = BENTOML if self._wire.kind == "bentoml" else INFER
        return Caller(Target(f"127.0.0.1:{self._wire.port}", (self._wire.request,), method))

    def closed(self, in_flight: int, seconds: float) -> Load | str:
        """So many calls are always under way; or what was wrong with one."""
        assert self._caller is not None
        try:
            return self._caller.closed(in_flight, seconds)
        except (OSError, AssertionError) as error:
            return str(error)

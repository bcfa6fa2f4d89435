"""Unary gRPC calls over HTTP/2 (RFC 9113) on a bare socket: as much of it as a load generator needs, and no more.

What does not change from call to call is prepared. A small call costs this side 20 to 50 µs of a core, as h2load of
nghttp2 does, and grpcio's own client 80 to 180, as much as a fast server takes: then half of what one measures is the
client. Anything that is not the answer to a call raises ConnectionError.
"""

import socket
import ssl
import struct
from collections import deque
from dataclasses import dataclass, field
from select import select
from typing import Any

from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 2, 3, 4, 5
WINDOW, MOST_WINDOW, MOST_STREAM = 65_535, 2**31 - 1, 2**31 - 1
GIVEN_BACK = 2**30  # bytes that were read before the connection's window is opened again
PREFIX = 5  # bytes of gRPC's own before a message
MOST_PIECES = 1024  # of a sendmsg (IOV_MAX)
READ = 1 << 16  # bytes at once; a record of TLS is never larger

_HEAD = struct.Struct(">HBBBI")  # of a frame: upper and lower bits of its length, type, flags, stream
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")


def framed(request: bytes) -> bytes:
    """As gRPC puts it into the data of a stream: not compressed, its length before it."""
    return b"\0" + _NUMBER.pack(len(request)) + request


@dataclass(slots=True)
class _Call:
    tag: Any
    unsent: memoryview
    window: int  # bytes that may be sent
    pieces: list[bytes] = field(default_factory=list)


class Connection:
    """One connection, over which any number of calls of one method are made at the same time, by one thread."""

    def __init__(self, address: str, method: str, ca: bytes | None = None) -> None:
        """Connect.

        Args:
            address: HOST:PORT, or unix:PATH.
            method: path of the method.
            ca: PEM, of a server that speaks TLS under the name localhost.
        """
        self._socket = _connected(address, ca)
        self._out: list[bytes | memoryview] = [PREFACE]
        self._unparsed = b""
        self._calls: dict[int, _Call] = {}
        self._waiting: deque[tuple[bytes, Any]] = deque()  # until the server allows another stream
        self._blocked: set[int] = set()  # streams that wait for a window
        self._window, self._first_window, self._frame, self._streams = WINDOW, WINDOW, 16_384, MOST_STREAM
        self._next = 1
        self._read = 0
        self._decoder = Decoder()
        self._known: dict[bytes, dict[str, str]] = {}
        self._settled = False
        fields = _fields(address, method, "https" if ca else "http")
        encoder = Encoder()
        self._headers, self._later_headers = (encoder.encode(fields, huffman=False) for _ in range(2))
        self._greet()

    @property
    def worn(self) -> bool:
        """Whether the numbers of its streams will soon run out."""
        return self._next > MOST_STREAM // 2

    def close(self) -> None:
        """Whatever is under way."""
        self._socket.close()

    def begin(self, message: bytes, tag: Any) -> None:
        """Make a call; it is sent by `ended`.

        Args:
            message: see `framed`.
            tag: which `ended` gives back.
        """
        if len(self._calls) >= self._streams:
            self._waiting.append((message, tag))
            return
        stream, self._next = self._next, self._next + 2
        call = self._calls[stream] = _Call(tag, memoryview(message), self._first_window)
        self._put(HEADERS, END_HEADERS, stream, self._headers)
        self._headers = self._later_headers
        self._write(stream, call)

    def ended(self, timeout: float | None = None) -> list[tuple[Any, bytes]]:
        """Send what was begun, and give tags and answers of calls that have ended.

        Args:
            timeout: seconds to wait for anything at all; None waits until at least one call has ended.
        """
        found: list[tuple[Any, bytes]] = []
        self._flush()
        while not found and (timeout is None or select([self._socket], [], [], timeout)[0]):
            self._receive(found)
            self._flush()
            if timeout is not None:
                break
        return found

    def _greet(self) -> None:
        """No pushes, and windows that never close."""
        settings = _SETTING.pack(ENABLE_PUSH, 0) + _SETTING.pack(INITIAL_WINDOW_SIZE, MOST_WINDOW)
        self._put(SETTINGS, 0, 0, settings)
        self._put(WINDOW_UPDATE, 0, 0, _NUMBER.pack(MOST_WINDOW - WINDOW))
        self._flush()
        while not self._settled:
            self._receive([])
        self._flush()

    def _put(self, kind: int, flags: int, stream: int, payload: bytes | memoryview) -> None:
        size = len(payload)
        self._out += (_HEAD.pack(size >> 8, size & 255, kind, flags, stream), payload)

    def _flush(self) -> None:
        """Large messages are not copied for it, unless TLS wants that."""
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.sendall(b"".join(self._out))
        else:
            for at in range(0, len(self._out), MOST_PIECES):
                some = self._out[at : at + MOST_PIECES]
                sent = self._socket.sendmsg(some)
                if sent < sum(map(len, some)):
                    self._socket.sendall(b"".join(some)[sent:])
        self._out.clear()

    def _write(self, stream: int, call: _Call) -> None:
        """As much of a request as the windows allow."""
        while size := min(len(call.unsent), self._frame, self._window, call.window):
            if size < 0:  # the server has made its windows smaller
                break
            payload, call.unsent = call.unsent[:size], call.unsent[size:]
            self._window -= size
            call.window -= size
            self._put(DATA, 0 if call.unsent else END_STREAM, stream, payload)
        if call.unsent:
            self._blocked.add(stream)
        else:
            self._blocked.discard(stream)

    def _receive(self, found: list[tuple[Any, bytes]]) -> None:
        """Wait for bytes, and take all frames that are whole."""
        data = self._socket.recv(READ)
        if not data:
            raise ConnectionError("the server closed the connection")
        data = self._unparsed + data
        at, whole = 0, len(data) - _HEAD.size
        while at <= whole:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + (high << 8 | low)
            if end > len(data):
                break
            payload, at = data[at + _HEAD.size : end], end
            if kind == DATA and flags == 0:
                self._calls[stream].pieces.append(payload)
                self._count(len(payload))
            elif kind == HEADERS and flags == END_HEADERS:
                self._check(payload, ":status", "200")
            elif kind == HEADERS and flags == END_HEADERS | END_STREAM:
                self._check(payload, "grpc-status", "0")
                found.append(self._end(stream))
            else:
                self._control(kind, flags, stream, payload)
        self._unparsed = data[at:]

    def _end(self, stream: int) -> tuple[Any, bytes]:
        call = self._calls.pop(stream)
        self._blocked.discard(stream)
        if self._waiting:
            self.begin(*self._waiting.popleft())
        return call.tag, b"".join(call.pieces)[PREFIX:]

    def _count(self, size: int) -> None:
        self._read += size
        if self._read >= GIVEN_BACK:
            self._put(WINDOW_UPDATE, 0, 0, _NUMBER.pack(self._read))
            self._read = 0

    def _check(self, block: bytes, name: str, value: str) -> None:
        """Header fields must say so."""
        fields = self._known.get(block) or self._decoded(block)
        if fields.get(name) != value:
            raise ConnectionError(f"expected {name} {value}, got {fields}")

    def _decoded(self, block: bytes) -> dict[str, str]:
        """Header fields of a block. It is remembered as long as no other one changes what its indices mean."""
        table = self._decoder.header_table
        before = table.maxsize, list(table.dynamic_entries)
        fields = {str(name): str(value) for name, value in self._decoder.decode(block)}
        if (table.maxsize, list(table.dynamic_entries)) == before:
            self._known[block] = fields
        else:
            self._known.clear()
        return fields

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """A frame that is not of an answer."""
        if kind == WINDOW_UPDATE:
            self._widen(stream, _NUMBER.unpack(payload)[0])
        elif kind == SETTINGS and not flags & ACK:
            self._set(dict(_SETTING.iter_unpack(payload)))
            self._put(SETTINGS, ACK, 0, b"")
        elif kind == PING and not flags & ACK:
            self._put(PING, ACK, 0, payload)
        elif kind not in (SETTINGS, PING) and not (kind == RST_STREAM and stream not in self._calls):
            raise ConnectionError(f"unexpected frame: type {kind}, flags {flags}, stream {stream}, {payload[:200]!r}")

    def _widen(self, stream: int, size: int) -> None:
        if stream == 0:
            self._window += size
        elif stream in self._calls:
            self._calls[stream].window += size
        self._write_blocked()

    def _set(self, settings: dict[int, int]) -> None:
        """What the server allows; a new window holds for streams that are open as well."""
        self._settled = True
        self._streams = settings.get(MAX_CONCURRENT_STREAMS, self._streams)
        self._frame = settings.get(MAX_FRAME_SIZE, self._frame)
        before, self._first_window = self._first_window, settings.get(INITIAL_WINDOW_SIZE, self._first_window)
        for call in self._calls.values():
            call.window += self._first_window - before
        self._write_blocked()

    def _write_blocked(self) -> None:
        for stream in sorted(self._blocked):
            self._write(stream, self._calls[stream])


def _connected(address: str, ca: bytes | None) -> socket.socket:
    """Sent at once, and with TLS where there is an authority."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host.strip("[]"), int(port)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if ca is None:
        return made
    context = ssl.create_default_context(cadata=ca.decode())
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(made, server_hostname="localhost")


def _fields(address: str, method: str, scheme: str) -> list[tuple[str, str]]:
    """Header fields of a request."""
    return [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", method),
        (":authority", "localhost" if address.startswith("unix:") else address),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "edgeward-benchmarks"),
    ]

"""The HTTP port: /metrics for Prometheus, /livez and /readyz for probes, and nothing else.

Connections are few and short: 16, one request each, five seconds without a byte. When one more comes, the oldest is cut
off, so that clients that send nothing cannot keep a probe out.
"""

import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import islice
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from bundle.log import log
from serve.errors import StartError

MAX_CONNECTIONS = 16
TIMEOUT_S = 5.0  # without a byte, and for the whole answer
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"


class HttpPort:
    """The HTTP port of a running server.

    Attributes:
        address: (host, port) that it really listens on.
        port: of these.
    """

    def __init__(self, host: str, port: int, *, metrics: Callable[[], bytes], ready: Callable[[], bool]) -> None:
        """Listen and answer, in a thread of its own.

        Args:
            host: address to listen on.
            port: 0 takes any that is free.
            metrics: gives what /metrics shows, in Prometheus' text format.
            ready: whether the server takes calls: False while it loads and while it drains.

        Raises:
            StartError: the port cannot be bound.
        """
        self._server = _bind(host, port, metrics, ready)
        address: tuple[str, int] = self._server.socket.getsockname()[:2]
        self.address = address
        self.port = address[1]
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._stopping = False
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopping:
            self._server.handle_request()  # sleeps until a client connects

    def stop(self) -> None:
        """Close the port and every connection."""
        self._stopping = True
        with suppress(OSError), socket.create_connection(self.address, TIMEOUT_S):
            self._thread.join(TIMEOUT_S)
        self._server.server_close()


def _bind(host: str, port: int, metrics: Callable[[], bytes], ready: Callable[[], bool]) -> "_Server":
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return _Server(family, address, metrics, ready)
    except OSError as error:
        raise StartError(
            f"the HTTP port {port} of {host} cannot be bound: {error.strerror}. Choose another --http-port; 0 takes "
            "any that is free."
        ) from error


class _Server(ThreadingMixIn, TCPServer):
    allow_reuse_address = True  # of connections that are closed but linger
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        family: socket.AddressFamily,
        address: Any,
        metrics: Callable[[], bytes],
        ready: Callable[[], bool],
    ) -> None:
        self.address_family = family
        self.metrics = metrics
        self.ready = ready
        self._open: dict[Any, None] = {}  # sockets, the oldest first
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # :: takes IPv4 too, as gRPC's does
        super().server_bind()

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:  # no file descriptor is left: the client goes on waiting, and so do we, without spinning
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            ending = len(self._open) - MAX_CONNECTIONS  # those that were cut off and whose threads have not ended
            full = ending >= MAX_CONNECTIONS
            if not full:
                self._open[request] = None
            if ending >= 0 and not full:
                _cut_off(next(islice(self._open, ending, None)))
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request in self._open:
                _cut_off(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the client went away, or was cut off
            log.error("HTTP request failed", exc_info=True)


def _cut_off(request: Any) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it, which then closes it


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT_S
    error_message_format = "%(message)s\n"
    error_content_type = _TEXT

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._metrics()
            case "/livez":
                self._answer(HTTPStatus.OK, b"ok\n")
            case "/readyz" if self.server.ready():
                self._answer(HTTPStatus.OK, b"ok\n")
            case "/readyz":
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"there are /metrics, /livez and /readyz\n")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET or HEAD\n", Allow="GET, HEAD")

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_POST

    def _metrics(self) -> None:
        try:
            text = self.server.metrics()
        except Exception as error:
            fault = secrets.token_hex(4)
            log.error("metrics failed", id=fault, exc_info=error)
            message = f"internal error {fault}; the server's log has its cause under this id.\n"
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, message.encode())
        else:
            self._answer(HTTPStatus.OK, text, _PROMETHEUS)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = _TEXT, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "edgeward"

    def log_message(self, format: str, *args: Any) -> None:
        """A probe every second is nothing to log."""

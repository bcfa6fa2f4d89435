"""A service behind a socket: start, drain, stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from bundle.log import log
from serve import completion_queue, security, spare, wire
from serve.admission import Admission, Traffic
from serve.config import ServeConfig
from serve.errors import StartError
from serve.repository import open_repository
from serve.service import Service
from serve.shared_memory import Regions

if TYPE_CHECKING:  # what only some servers need is imported by these
    from serve import transport
    from serve.http import HttpPort
    from serve.metrics import Metrics
    from serve.reload import Watcher
    from serve.tracing import OtlpTracer

_LAST_BYTES_S = 1.0  # for answers that are already on their way
_HEAR_S = 0.5  # between looks at whether a signal came


class Server:
    """A running server. `start` makes one.

    Attributes:
        address: host and port, or unix:PATH.
        port: the one that it really listens on.
        http_port: the same of /metrics; None: there is none.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Load and self-test every model, then listen.

        Raises:
            EdgewardError: a model cannot be served, an option cannot be met, or a port cannot be bound.
        """
        self._config = config
        self._ready = False
        self._metrics: Metrics | None = None
        with ExitStack() as opened:  # closed again when something below fails
            credentials, self._tokens = security.credentials(config), security.Tokens(config)
            self._tracer = _tracer(config)
            if self._tracer:
                opened.callback(self._tracer.close)
            self._http = self._open_http()
            if self._http:
                opened.callback(self._http.stop)
            self._repository = open_repository(config)
            opened.callback(self._repository.close, 0)
            self._admission = Admission(max_bytes=config.max_bytes, max_streams=config.max_streams)
            regions = Regions(enabled=config.shared_memory)
            self._service = Service(config, self._repository, regions, self._tracer)
            with _address(config) as address:
                self._transport = _transport(config)(
                    config,
                    self._service,
                    address=address,
                    credentials=credentials,
                    tokens=self._tokens,
                    admission=self._admission,
                )
            opened.pop_all()
        self.port = self._transport.port
        self.http_port = self._http.port if self._http else None
        self.address = address if config.socket else _host_and_port(config.host, self.port)
        self._metrics = self._make_metrics() if self._http else None
        self._announce()
        self._watcher = self._watch() if config.watch else None

    def _announce(self) -> None:
        """Tell who asks for health that all is well, and of changes from now on."""
        self._repository.on_change = self._transport.set_health
        for name in ["", *self._repository.names()]:
            self._transport.set_health(name, True)
        self._ready = True

    def _open_http(self) -> "HttpPort | None":
        port = self._config.http_port
        if port is None:
            return None
        from serve.http import HttpPort

        return HttpPort(self._config.host, port, metrics=self._shown, ready=lambda: self._ready)

    def _shown(self) -> bytes:
        return self._metrics.text() if self._metrics else b""

    def _make_metrics(self) -> "Metrics":
        from serve.metrics import Metrics

        def traffic() -> Traffic:
            now = self._admission.snapshot()
            return replace(now, refused={**now.refused, **self._tokens.refused})

        return Metrics(self._repository, traffic)

    def _watch(self) -> "Watcher":
        from serve.reload import Watcher

        return Watcher(self._config.paths, self._repository.refresh)

    def models(self) -> list[str]:
        """What is served, as NAME:VERSION."""
        return [f"{served.model.name}:{served.model.version}" for served in self._repository]

    def devices(self) -> list[str]:
        """That the models run on."""
        return sorted({served.model.device for served in self._repository})

    def stop(self, drain_s: float | None = None) -> bool:
        """Say that it is not ready, let running calls end and their answers be written, close the socket.

        Args:
            drain_s: how long calls may go on; by default what the config says. Later they are cut off.

        Returns:
            Whether all has ended: a model that runs cannot be stopped, nor one that is being loaded, or its second
            session made.
        """
        limit = self._config.drain_s if drain_s is None else drain_s
        self._ready = False
        self._transport.set_stopping()
        self._service.drain()
        if self._watcher:
            self._watcher.stop(0)
        drained = self._admission.wait(limit)
        if not drained:
            log.warning("calls cut off", drain_s=limit)
        ended = self._transport.stop(_LAST_BYTES_S if drained else 0)
        if self._watcher:
            ended &= self._watcher.stop(wire.END_S)
        ended &= self._repository.close(0)
        ended &= not spare.filling()
        if self._http:
            self._http.stop()
        if self._tracer:
            self._tracer.close()
        log.info("stopped", address=self.address)
        return ended


def start(config: ServeConfig) -> Server:
    """Load and self-test every model, then listen.

    Raises:
        EdgewardError: a model cannot be served, an option cannot be met, or a port cannot be bound.
    """
    security.warn_exposed(config)
    server = Server(config)
    _tell_ready(server)
    return server


def _tell_ready(server: Server) -> None:
    http = {"http_port": server.http_port} if server.http_port else {}
    log.info("ready", address=server.address, **http, models=server.models(), devices=server.devices())


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second one ends the process at once. Call it in the main thread.

    Raises:
        EdgewardError: see `start`.
    """
    if config.processes > 1:
        from serve.processes import serve_many

        serve_many(config, _serve)
    else:
        _serve(config)


def _serve(config: ServeConfig) -> None:
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.is_set() or not served:
            os._exit(128 + number)  # as the first process of a container, too, where no signal has a default action
        stopping.set()

    served = False
    heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    early = stop if os.getpid() == 1 else signal.SIG_DFL  # which ends a process also while a library keeps Python out
    previous = {each: signal.signal(each, early) for each in heard}
    try:
        security.warn_exposed(config)
        server = Server(config)
        served = True
        for each in heard:
            signal.signal(each, stop)
        _tell_ready(server)
        while not stopping.wait(_HEAR_S):  # Python hears of a signal that came to another thread when this one wakes
            pass
        log.info("draining", address=server.address, drain_s=config.drain_s)
        if not server.stop():
            _leave()
    finally:
        for each, before in previous.items():
            signal.signal(each, before)


def _leave() -> None:
    """End the process in spite of a thread that is in the runtime, for which Python would wait, or abort."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(0)


def _tracer(config: ServeConfig) -> "OtlpTracer | None":
    if config.otlp is None:
        return None
    from serve.tracing import OtlpTracer  # needs an extra

    return OtlpTracer(config.otlp)


def _transport(config: ServeConfig) -> "type[completion_queue.Transport] | type[transport.Transport]":
    if config.transport == "auto":
        return _fastest()
    if config.transport == "asyncio":
        return _on_asyncio()
    missing = completion_queue.missing()
    if missing:
        raise StartError(f"{missing}. Start with --transport asyncio, which needs only what is public of grpcio.")
    return completion_queue.Transport


def _fastest() -> "type[completion_queue.Transport] | type[transport.Transport]":
    missing = completion_queue.missing()
    if missing:
        log.info("transport chosen", transport="asyncio", because=missing)
        return _on_asyncio()
    log.info("transport chosen", transport="completion-queue")
    return completion_queue.Transport


def _on_asyncio() -> "type[transport.Transport]":
    from serve import transport

    return transport.Transport


@contextmanager
def _address(config: ServeConfig) -> Iterator[str]:
    """What to bind, within the block."""
    if config.socket is None:
        yield _host_and_port(config.host, config.port)
    else:
        with security.private_socket(config.socket) as address:
            yield address


def _host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

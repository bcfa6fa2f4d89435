"""Several servers on one port. The kernel gives each connection to one of them, for as long as it lasts."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from bundle.errors import EdgewardError
from bundle.host import cpu_count
from bundle.log import log
from serve import logs
from serve.config import ServeConfig
from serve.errors import StartError

_CLOSING_S = 10.0  # after the drain: more than a server takes to close what it has
_BEFORE_READY = {-signal.SIGTERM, 128 + signal.SIGTERM}  # exit codes of those told to end then
_MAX_TEXT = 1000  # characters of a reason: a pipe keeps up to 4 KiB apart from what others write


def serve_many(config: ServeConfig, serve: Callable[[ServeConfig], None]) -> None:
    """Start config.processes servers, and wait until they have ended. Call it in the main thread.

    SIGTERM and SIGINT reach all of them, and each drains; a second one ends all at once. When one ends by itself the
    others are stopped: whoever supervises this process starts them anew. When this process is gone they drain, too.

    Args:
        config: of each; the cores are shared out, and the HTTP ports are numbered from http_port on.
        serve: runs one server until its process is told to end; importable from a fresh process.

    Raises:
        StartError: the options cannot be shared by several processes, one of them cannot serve, or ended by itself.
        SystemExit: a signal came before they were ready.
    """
    _check(config)
    context = multiprocessing.get_context("spawn")  # a runtime's threads do not survive a fork
    told, tell = context.Pipe(duplex=False)
    with _reserved(config) as port, told, tell:
        shares = [_share(config, port.getsockname()[1], i) for i in range(config.processes)]
        servers = [
            context.Process(target=_attempt, args=(serve, share, tell), name=f"server {i}")
            for i, share in enumerate(shares)
        ]
        _supervise(servers, told, config.drain_s)


def _check(config: ServeConfig) -> None:
    if config.socket is not None:
        raise StartError("a Unix-domain socket has one server: leave out --processes, or give a port.")
    if not hasattr(socket, "SO_REUSEPORT"):
        raise StartError("this system lets no two processes share a port: leave out --processes.")
    if config.shared_memory or config.admin:
        raise StartError(
            "--admin and --shared-memory reach one of the processes only, whichever the connection belongs to: leave "
            "out --processes, or them."
        )


def _reserved(config: ServeConfig) -> socket.socket:
    """A socket that holds the port, and takes no connections."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    port = socket.socket(family, socket.SOCK_STREAM)
    try:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port.bind((config.host, config.port))
    except OSError as error:
        port.close()
        raise StartError(f"{config.host}:{config.port} cannot be bound: {error.strerror}.") from error
    return port


def _share(config: ServeConfig, port: int, i: int) -> ServeConfig:
    """What one of the processes is told."""
    http = config.http_port + i if config.http_port else config.http_port
    threads = config.threads or max(1, cpu_count() // config.processes)
    return replace(config, port=port, http_port=http, threads=threads, instances=config.instances or 1)


def _attempt(serve: Callable[[ServeConfig], None], config: ServeConfig, tell: "Connection[str, str]") -> None:
    """In a process of its own: serve, or tell the first process why that cannot be."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        _run(serve, config)
    except (EdgewardError, OSError) as error:
        tell.send(str(error)[:_MAX_TEXT])
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(serve: Callable[[ServeConfig], None], config: ServeConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the first process tells the others
    logs.configure(requests=config.log_requests)
    serve(config)


def _supervise(servers: Sequence[BaseProcess], told: "Connection[str, str]", drain_s: float) -> None:
    heard: list[int] = []
    reader, writer = os.pipe()

    def stop(number: int, frame: object) -> None:
        if heard:
            for server in multiprocessing.active_children():
                server.kill()
            os._exit(128 + number)
        heard.append(number)
        os.write(writer, b"x")  # wakes the wait below

    previous = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        for server in servers:
            server.start()
        wait([server.sentinel for server in servers] + [reader])
        _end(servers, drain_s)
    finally:
        for each, before in previous.items():
            signal.signal(each, before)
        os.close(reader)
        os.close(writer)
    ended = {server.name: server.exitcode for server in servers if server.exitcode}
    if not heard and told.poll():
        raise StartError(told.recv())
    if not heard and ended:
        raise StartError(f"a process ended by itself, and the others were stopped: exit codes {ended}.")
    if not _BEFORE_READY.isdisjoint(ended.values()):
        raise SystemExit(128 + heard[0])


def _end(servers: Sequence[BaseProcess], drain_s: float) -> None:
    """Let all drain, side by side."""
    end = time.monotonic() + drain_s + _CLOSING_S
    for server in servers:
        server.terminate()
    for server in servers:
        server.join(max(0.0, end - time.monotonic()))
        if server.is_alive():
            log.warning("process killed", name=server.name, drain_s=drain_s)
            server.kill()
            server.join()

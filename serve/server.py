"""A service behind a socket: start, drain, stop."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve.config import ServeConfig
from serve.errors import StartError
from serve.repository import Repository, load_repository
from serve.service import Service, status

log = structlog.get_logger()

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_LAST_BYTES_S = 1.0  # for answers that are already on their way


class Server:
    """A running server.

    Attributes:
        address: host and port.
        port: the one that it really listens on.
    """

    def __init__(self, config: ServeConfig, repository: Repository) -> None:
        self._config = config
        self._service = Service(repository)
        self._health = health.HealthServicer()
        self._transport = _transport(config, self._service, self._health)
        self.port = _bind(self._transport, config.host, config.port)
        self.address = _address(config.host, self.port)
        for name in ["", *repository.names()]:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._transport.start()

    def stop(self, drain_s: float | None = None) -> None:
        """Say that it is not ready, let running calls end, close the socket.

        Args:
            drain_s: how long calls may go on; by default what the config says. Later they are cut off.
        """
        limit = self._config.drain_s if drain_s is None else drain_s
        self._health.enter_graceful_shutdown()
        drained = self._service.drain(limit)
        if not drained:
            log.warning("calls cut off", drain_s=limit)
        self._transport.stop(_LAST_BYTES_S if drained else 0).wait()
        log.info("stopped", address=self.address)


def start(config: ServeConfig) -> Server:
    """Load and self-test every model, then listen.

    Raises:
        EdgewardError: a model cannot be served, or the port cannot be bound.
    """
    repository = load_repository(
        config.paths, device=config.device, threads=config.threads, require_gate=config.require_gate
    )
    server = Server(config, repository)
    models = [f"{model.name}:{model.version}" for model in repository]
    log.info("ready", address=server.address, models=models, devices=sorted({model.device for model in repository}))
    return server


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Call it in the main thread; a second signal is not caught."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()
        for each, before in previous.items():
            signal.signal(each, before)

    previous = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    server = start(config)
    for each in previous:
        signal.signal(each, stop)
    stopping.wait()
    log.info("draining", address=server.address, drain_s=config.drain_s)
    server.stop()


def _transport(config: ServeConfig, service: Service, health_servicer: health.HealthServicer) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(config.workers, thread_name_prefix="call"),
        options=[
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
        ],
    )
    servicer = rpc.GRPCInferenceServiceServicer()  # what it is not given is UNIMPLEMENTED
    for method in _SERVICE.methods:
        if hasattr(service, method.name):
            setattr(servicer, method.name, _answer_with(getattr(service, method.name)))
    rpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (_SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


def _answer_with(call: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return call(request)
        except Exception as error:
            context.abort(*status(error))

    return answer


def _bind(server: grpc.Server, host: str, port: int) -> int:
    try:
        return int(server.add_insecure_port(_address(host, port)))
    except RuntimeError as error:
        raise StartError(
            f"{_address(host, port)} cannot be bound: the port is taken, or not allowed, or the host is not this "
            "machine's. Choose another --port; 0 takes any that is free."
        ) from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

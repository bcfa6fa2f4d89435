"""The calls of the protocol, message in, message out. No transport: it maps the errors to a status and moves bytes."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import grpc
import structlog

from bundle.errors import BadInput, EdgewardError
from protos import inference_pb2 as pb
from serve.configuration import model_config, model_metadata
from serve.errors import NotFound, NotReady, NotSupported, UnknownModel
from serve.inputs import read_inputs
from serve.outputs import read_outputs, write_outputs
from serve.parameters import read_request
from serve.repository import Repository
from serve.shared_memory import Regions

log = structlog.get_logger()

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "parameters")
MAX_DETAILS = 500  # characters; the status travels in headers, which have a limit of their own

_STATUS: dict[type[EdgewardError], grpc.StatusCode] = {
    BadInput: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    NotFound: grpc.StatusCode.NOT_FOUND,
    NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
}


def status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """What a client is told of an error. One that is not in the table is logged under an id, and only that is told."""
    code = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), None)
    if code is not None:
        return code, _cut(str(error))
    fault = secrets.token_hex(4)
    log.error("call failed", id=fault, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error {fault}; the server's log has its cause under this id."


def _cut(details: str) -> str:
    return details if len(details) <= MAX_DETAILS else f"{details[: MAX_DETAILS - 1]}…"


class Service:
    """The calls by their names in the protocol; each raises EdgewardError, which `status` translates."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._regions = Regions(enabled=False)
        self._version = version("edgeward")
        self._draining = False
        self._running = 0
        self._changed = threading.Condition()

    def ServerLive(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """True wherever it can be asked."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """False while the server drains."""
        return pb.ServerReadyResponse(ready=not self._draining)

    def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """False for a model that is not served, and while the server drains."""
        try:
            self._repository.find(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._draining)

    def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Name, version and what there is beyond the core of the protocol."""
        return pb.ServerMetadataResponse(name="edgeward", version=self._version, extensions=EXTENSIONS)

    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """What a model takes and gives; every version there is when none was named, else that one."""
        model = self._repository.find(request.name, request.version)
        versions = [model.version] if request.version else self._repository.versions(model.name)
        return model_metadata(model, versions)

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """How a model is run."""
        return pb.ModelConfigResponse(config=model_config(self._repository.find(request.name, request.version)))

    def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Tensors in, tensors out."""
        with self._call():
            model = self._repository.find(request.model_name, request.model_version)
            read_request(request.parameters)
            wanted = read_outputs(request, model.outputs, self._regions)
            arrays = model.infer(read_inputs(request, model.inputs, model.optional, self._regions))
            response = pb.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=request.id)
            write_outputs(response, wanted, arrays, model.labels, batched=model.max_batch > 0)
            return response

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            if self._draining:
                raise NotReady("the server is stopping and takes no new calls")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new inference calls and wait for the running ones; whether all of them ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)

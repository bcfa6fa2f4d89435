"""The calls of the protocol, message in, message out. No transport: it maps the errors to a status and moves bytes."""

import secrets
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import grpc

from bundle.errors import BadInput, EdgewardError
from bundle.log import log
from protos import inference_pb2 as pb
from serve import logs
from serve.config import ServeConfig
from serve.configuration import model_config, model_metadata
from serve.envelope import Request
from serve.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Exhausted,
    LimitReached,
    LoadFailed,
    NotFound,
    NotReady,
    NotSupported,
    PermissionDenied,
    Unauthenticated,
    UnknownModel,
    forget_frames,
)
from serve.inference import Inference, StepAside
from serve.queue import Outcome
from serve.repository import Repository
from serve.shared_memory import Regions
from serve.statistics import as_message

if TYPE_CHECKING:
    from serve.tracing import Tracer

Metadata = Iterable[tuple[str, str | bytes]]

CHANGES = 32  # of models, asked for at a time; each takes a thread, and waits for others, or for calls to end
MAX_DETAILS = 500  # characters; the status travels in headers, which have a limit of their own

_STATUS: dict[type[EdgewardError], grpc.StatusCode] = {
    BadInput: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    LoadFailed: grpc.StatusCode.INVALID_ARGUMENT,
    LimitReached: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of an error; INTERNAL for one that is not ours, CANCELLED for what ends a call from outside."""
    if not isinstance(error, Exception):
        return grpc.StatusCode.CANCELLED
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """What a client is told of an error, which then holds nothing of the request any more.

    One that is not in the table is logged under an id, and only that is told.
    """
    code = code_of(error)
    if code is not grpc.StatusCode.INTERNAL:
        forget_frames(error)
        return code, _cut(str(error))
    fault = secrets.token_hex(4)
    log.error("call failed", id=fault, exc_info=error)
    forget_frames(error)
    return grpc.StatusCode.INTERNAL, f"internal error {fault}; the server's log has its cause under this id."


def _cut(details: str) -> str:
    return details if len(details) <= MAX_DETAILS else f"{details[: MAX_DETAILS - 1]}…"


class Service:
    """The calls by their names in the protocol; each raises EdgewardError, which `status` translates."""

    def __init__(
        self, config: ServeConfig, repository: Repository, regions: Regions, tracer: "Tracer | None" = None
    ) -> None:
        self._config, self._repository, self._regions, self._tracer = config, repository, regions, tracer
        self._draining = False

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
        except (UnknownModel, NotReady):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._draining)

    def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Name, version and what there is beyond the core of the protocol."""
        return pb.ServerMetadataResponse(name="edgeward", version=_version(), extensions=extensions(self._config))

    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """What a model takes and gives; every version there is when none was named, else that one."""
        model = self._repository.find(request.name, request.version).model
        versions = [model.version] if request.version else self._repository.versions(model.name)
        return model_metadata(model, versions)

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """How a model is run."""
        return pb.ModelConfigResponse(config=model_config(self._repository.find(request.name, request.version).model))

    def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Of one version of a model, of all its versions, or of all models."""
        if request.version and not request.name:
            raise BadInput(f"version {request.version!r} is asked for without a name; expected both, or no version.")
        found = list(self._repository)
        if request.name:
            wanted = self._repository.find(request.name, request.version)
            found = [wanted] if request.version else [one for one in found if one.model.name == request.name]
        stats = [as_message(one.model.name, one.model.version, one.statistics.snapshot()) for one in found]
        return pb.ModelStatisticsResponse(model_stats=stats)

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version that is or could be served."""
        _only_repository(request.repository_name)
        found = [one for one in self._repository.index() if not request.ready or one.state == "READY"]
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[entry(name=one.name, version=str(one.version), state=one.state, reason=one.reason) for one in found]
        )

    def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, given_up: Callable[[], bool]
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model, or look whether there are new versions of it; blocks until it can be called.

        It is not loaded when the call was given up before its turn came.
        """
        _only_repository(request.repository_name)
        self._only_admin("loading models")
        for key in request.parameters:
            raise NotSupported(f"load parameter {key!r} is not supported: a model is loaded as it lies on disk.")
        self._repository.load(request.model_name, given_up)
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, given_up: Callable[[], bool]
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model; blocks until the calls that it is answering have ended.

        It is not unloaded when the call was given up before its turn came.
        """
        _only_repository(request.repository_name)
        self._only_admin("unloading models")
        for key in request.parameters.keys() - {"unload_dependents"}:  # nothing depends on a model
            raise BadInput(f"unload parameter {key!r} is not known; expected unload_dependents or none.")
        self._repository.unload(request.model_name, given_up)
        return pb.RepositoryModelUnloadResponse()

    def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest
    ) -> pb.SystemSharedMemoryStatusResponse:
        """One registered region, or all."""
        kind = pb.SystemSharedMemoryStatusResponse.RegionStatus
        regions = {
            one.name: kind(name=one.name, key=one.key, offset=one.offset, byte_size=one.byte_size)
            for one in self._regions.status(request.name)
        }
        return pb.SystemSharedMemoryStatusResponse(regions=regions)

    def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Open a region that a client on this machine made."""
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all; one in use is closed after its last use."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def CudaSharedMemoryStatus(self, request: pb.CudaSharedMemoryStatusRequest) -> pb.CudaSharedMemoryStatusResponse:
        """There is none."""
        return pb.CudaSharedMemoryStatusResponse()

    def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Not supported."""
        raise NotSupported("CUDA shared memory is not supported; register system shared memory, or send the bytes.")

    def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """There is nothing to forget; clients of shared memory call it all the same."""
        if not self._config.shared_memory:
            raise NotSupported("shared memory is not supported: the server was started without --shared-memory.")
        return pb.CudaSharedMemoryUnregisterResponse()

    def TraceSetting(self, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        """Not supported."""
        raise NotSupported("trace settings are not supported: traces are those of OpenTelemetry, set at the start.")

    def LogSettings(self, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        """What is logged, after the changes that the request asks for."""
        if request.settings:
            self._only_admin("changing log settings")
        return logs.log_settings(request)

    def _only_admin(self, what: str) -> None:
        if not self._config.admin:  # no other credential would help, as PERMISSION_DENIED would say
            raise NotSupported(f"{what} is switched off; start the server with --admin.")

    def begin(
        self,
        request: Request,
        metadata: Metadata,
        done: Callable[[Outcome], None],
        deadline: float | None,
        step_aside: StepAside | None = None,
    ) -> Inference:
        """A ModelInfer, or a request of a stream: queued, or run. What was begun is to be ended once.

        Args:
            request: as it came.
            metadata: of the call.
            done: called once, from any thread, perhaps before this returns, with what Inference.answer takes.
            deadline: time.monotonic() when nobody waits for the answer any more.
            step_aside: see Inference.

        Raises:
            EdgewardError: the server is stopping, there is no such model, or the request does not fit it; then nothing
                was begun.
        """
        inference = Inference(request, self._regions, done, deadline, step_aside)
        if self._tracer:
            inference.trace = self._tracer.begin(metadata)
        if self._draining:
            raise NotReady("the server is stopping and takes no new calls")
        try:
            self._repository.call(request.envelope.model_name, request.envelope.model_version, inference.queue)
        except BaseException as error:
            self.end(inference, error)
            raise
        return inference

    def end(self, inference: Inference, error: BaseException | None) -> None:
        """Log and trace what was begun, and what became of it."""
        if not (inference.trace or logs.logs_requests()):
            return
        call = inference.ended(_told(inference, error))
        if logs.logs_requests():
            logs.log_request(call)
        if self._tracer and inference.trace:
            self._tracer.end(inference.trace, call)

    def drain(self) -> None:
        """Refuse inference calls from now on."""
        self._draining = True


def _told(inference: Inference, error: BaseException | None) -> grpc.StatusCode:
    """What the client was told: gRPC itself ends a call whose deadline has passed, whatever comes of its run."""
    deadline = inference.job.deadline if inference.job else None
    if deadline is not None and time.monotonic() >= deadline:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return code_of(error) if error else grpc.StatusCode.OK


@cache
def _version() -> str:
    from importlib.metadata import version  # a megabyte, for those who ask

    return version("edgeward")


def extensions(config: ServeConfig) -> list[str]:
    """What ServerMetadata tells of; clients switch on it."""
    names = [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "parameters",
        "schedule_policy",
        "statistics",
    ]
    names += ["model_repository", "logging"] if config.admin else []
    names += ["system_shared_memory"] if config.shared_memory else []
    return sorted(names)


def _only_repository(name: str) -> None:
    if name:
        raise NotSupported(f"repository {name!r} is not there: the server has one, without a name.")

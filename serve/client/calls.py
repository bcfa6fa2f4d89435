"""The calls of the protocol as a client sees them: the message that is sent, and what is made of the one that comes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve.client.columns import ModelMetadata
from serve.client.limits import whole
from serve.client.region import Region, SharedTensor
from serve.errors import ServerError
from serve.tensors import datatype_of, from_raw, to_raw

Answer = TypeVar("Answer")
Tensors = Mapping[str, np.ndarray | SharedTensor]
Parameters = Mapping[str, bool | int | float | str]

MAX_BYTES = (1 << 31) - (1 << 20)  # of the tensors of one request; protobuf holds less than 2 GiB of all

_ALL = slice(0, None)
_KINDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One call, before it is made."""

    method: str  # an attribute of what `stub` gives
    request: Message
    read: Callable[[Any], Answer]


@dataclass(frozen=True)
class Part:
    """The answer for some of the examples, and the version of the model that gave it."""

    version: str
    arrays: dict[str, np.ndarray]


@contextmanager
def _in_utf8() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise BadInput(f"the name {error.object!r} is not UTF-8: {error.reason} at {error.start}.") from error


class Health(IntEnum):
    """What grpc.health.v1 says of a server, or of one of its models."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


@dataclass(frozen=True)
class Class:
    """One of the best classes of a row, as the classification extension names them."""

    value: float  # an int where the output holds integers
    index: int
    label: str | None


def stub(channel: Any) -> Any:
    """Every call of a channel, synchronous or asyncio.

    The messages of grpc.health.v1 have one field each, a string and an enum. Two of ours have the same bytes, so that a
    client needs no grpcio-health-checking, whose generated code asks for a grpcio as new as itself.
    """
    calls: Any = rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    send, receive = pb.ModelReadyRequest.SerializeToString, pb.StatisticDuration.FromString
    calls.Check = channel.unary_unary("/grpc.health.v1.Health/Check", send, receive)
    calls.Watch = channel.unary_stream("/grpc.health.v1.Health/Watch", send, receive)
    return calls


@dataclass(frozen=True)
class ClosedStub:
    """What a client calls after it was closed."""

    address: str

    def __getattr__(self, method: str) -> Any:
        """Raise ServerError: there is no call any more."""
        raise ServerError(self.address, grpc.StatusCode.CANCELLED, "the client was closed")


def read(call: Call[Answer], message: Any, address: str) -> Answer:
    """What a call answers.

    Raises:
        ServerError: the message is not what the protocol says.
    """
    with _read_from(address):
        return call.read(message)


@contextmanager
def failures_of(address: str, rows: slice = _ALL) -> Iterator[None]:
    """What gRPC raises in the block is a ServerError; one of a request with some of the examples says with which."""
    try:
        yield
    except grpc.RpcError as error:
        details = error.details() or ""
        if rows.start:
            details += f" (of the request that begins with example {rows.start})"
        raise ServerError(address, error.code(), details) from error


@contextmanager
def following(messages: Any, address: str) -> Iterator[None]:
    """A call that answers with many messages; it ends with the block."""
    try:
        with failures_of(address):
            yield
    finally:
        messages.cancel()


@contextmanager
def forgiving_absence() -> Iterator[None]:
    """A server that is not there any more need not forget anything."""
    try:
        yield
    except ServerError as error:
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            raise


def server_ready() -> Call[bool]:
    """Whether the server takes calls."""
    return Call("ServerReady", pb.ServerReadyRequest(), lambda answer: answer.ready)


@_in_utf8()
def model_ready(model: str, version: str) -> Call[bool]:
    """Whether a model can be called."""
    return Call("ModelReady", pb.ModelReadyRequest(name=model, version=version), lambda answer: answer.ready)


@_in_utf8()
def health(model: str) -> Call[Health]:
    """The health of a model, or with no name of the server."""
    return Call("Check", pb.ModelReadyRequest(name=model), lambda answer: Health(answer.count))


def server_metadata() -> Call[pb.ServerMetadataResponse]:
    """Name, version and extensions of the server."""
    return Call("ServerMetadata", pb.ServerMetadataRequest(), lambda answer: answer)


@_in_utf8()
def metadata(model: str, version: str) -> Call[ModelMetadata]:
    """What a model takes and gives."""
    return Call("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version), _metadata)


def _metadata(answer: pb.ModelMetadataResponse) -> ModelMetadata:
    return ModelMetadata(
        name=answer.name,
        versions=tuple(int(number) for number in answer.versions),
        platform=answer.platform,
        inputs=tuple(TensorSpec(spec.name, spec.datatype, tuple(spec.shape)) for spec in answer.inputs),
        outputs=tuple(TensorSpec(spec.name, spec.datatype, tuple(spec.shape)) for spec in answer.outputs),
    )


@_in_utf8()
def config(model: str, version: str) -> Call[pb.ModelConfig]:
    """How a model is run."""
    return Call("ModelConfig", pb.ModelConfigRequest(name=model, version=version), lambda answer: answer.config)


@_in_utf8()
def statistics(model: str, version: str) -> Call[tuple[pb.ModelStatistics, ...]]:
    """What models have answered, and how long each stage took."""
    request = pb.ModelStatisticsRequest(name=model, version=version)
    return Call("ModelStatistics", request, lambda answer: tuple(answer.model_stats))


def index(ready: bool) -> Call[tuple[pb.RepositoryIndexResponse.ModelIndex, ...]]:
    """Every version of every model, or those that can be called."""
    return Call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready), lambda answer: tuple(answer.models))


@_in_utf8()
def load(model: str) -> Call[None]:
    """Load a model of the repository."""
    return Call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=model), lambda _: None)


@_in_utf8()
def unload(model: str) -> Call[None]:
    """Unload a model."""
    return Call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=model), lambda _: None)


def register(region: Region) -> Call[None]:
    """Let the server open a region of shared memory."""
    request = pb.SystemSharedMemoryRegisterRequest(name=region.name, key=region.key, byte_size=region.byte_size)
    return Call("SystemSharedMemoryRegister", request, lambda _: None)


def unregister(region: Region) -> Call[None]:
    """Let the server forget it."""
    request = pb.SystemSharedMemoryUnregisterRequest(name=region.name)
    return Call("SystemSharedMemoryUnregister", request, lambda _: None)


@_in_utf8()
def infer(
    model: str,
    tensors: Tensors,
    version: str = "",
    outputs: Sequence[str] = (),
    into: Mapping[str, SharedTensor] | None = None,
    parameters: Parameters | None = None,
) -> Call[dict[str, np.ndarray]]:
    """Tensors in, tensors out: see Client.infer."""
    rooms = into or {}
    request = infer_request(model, tensors, version, outputs)
    for name in rooms:
        if name not in outputs:
            request.outputs.add(name=name)
    for output in request.outputs:
        if output.name in rooms:
            _refer(output.parameters, _room(output.name, rooms[output.name]))
    _set(request.parameters, parameters or {})
    return Call("ModelInfer", request, lambda answer: _arrays(answer, rooms))


def infer_part(model: str, tensors: Tensors, version: str) -> Call[Part]:
    """Some of the examples of a call that takes several requests."""
    request = infer_request(model, tensors, version, ())
    return Call("ModelInfer", request, lambda answer: Part(answer.model_version, _arrays(answer, {})))


def join(parts: Sequence[Part], address: str) -> dict[str, np.ndarray]:
    """The answers of several requests as those of one.

    Raises:
        ServerError: they are of several versions of the model, or do not fit together.
    """
    versions = dict.fromkeys(part.version for part in parts)
    if len(versions) > 1:
        raise ServerError(
            address,
            grpc.StatusCode.UNAVAILABLE,
            f"versions {' and '.join(versions)} have answered some of the examples each. Ask again for answers of one.",
        )
    with _read_from(address):
        return {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}


def classify(model: str, tensors: Tensors, output: str, count: int, version: str = "") -> Call[list[list[Class]]]:
    """The best classes of each row: see Client.classify."""
    request = infer_request(model, tensors, version, [output])
    _set(request.outputs[0].parameters, {"classification": whole("count", count, 1)})
    return Call("ModelInfer", request, lambda answer: _classes(_arrays(answer, {})[output]))


@_in_utf8()
def infer_request(model: str, tensors: Tensors, version: str, outputs: Sequence[str]) -> pb.ModelInferRequest:
    """The message of one inference.

    Raises:
        BadInput: a tensor is no array, or has a dtype or an element that the protocol does not have; a name is not
            UTF-8; the outputs are one name; the tensors have more than MAX_BYTES.
    """
    if isinstance(outputs, str):
        raise BadInput(f"outputs is {outputs!r}; expected a list of names.")
    request, size = pb.ModelInferRequest(model_name=model, model_version=version), 0
    for name, tensor in tensors.items():
        if isinstance(tensor, SharedTensor):
            _refer(request.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape).parameters, tensor)
            continue
        where = f"input {name!r}"
        datatype = datatype_of(tensor, where)
        request.inputs.add(name=name, datatype=datatype, shape=tensor.shape)
        raw = to_raw(tensor, datatype, where)
        size += len(raw)
        if size > MAX_BYTES:
            raise BadInput(
                f"the tensors have {size} bytes up to {where}; one request holds {MAX_BYTES}. Send fewer rows."
            )
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def streamed(message: pb.ModelStreamInferResponse, address: str) -> dict[str, np.ndarray] | ServerError:
    """One answer of a stream. An error there carries no status."""
    if message.error_message:
        return ServerError(address, grpc.StatusCode.UNKNOWN, message.error_message)
    with _read_from(address):
        return _arrays(message.infer_response, {})


@contextmanager
def _read_from(address: str) -> Iterator[None]:
    try:
        yield
    except (BadInput, KeyError, ValueError) as error:
        raise ServerError(address, grpc.StatusCode.UNKNOWN, f"an answer that cannot be read: {error}") from error


def _refer(parameters: Any, tensor: SharedTensor) -> None:
    parameters["shared_memory_region"].string_param = tensor.region.name
    parameters["shared_memory_offset"].int64_param = tensor.offset
    parameters["shared_memory_byte_size"].int64_param = tensor.byte_size


def _room(name: str, tensor: Any) -> SharedTensor:
    if not isinstance(tensor, SharedTensor):
        raise BadInput(f"room for output {name!r} is a {type(tensor).__name__}; expected a tensor in shared memory.")
    return tensor


def _set(parameters: Any, values: Parameters) -> None:
    for key, value in values.items():
        fields = [field for kind, field in _KINDS.items() if isinstance(value, kind)]
        try:
            setattr(parameters[key], fields[0], value)  # bool before int, which it is, too
        except (IndexError, ValueError) as error:
            raise BadInput(
                f"parameter {key!r} is {value!r}; expected a bool, an int of 64 bits, a float or a text in UTF-8."
            ) from error


def _arrays(answer: pb.ModelInferResponse, into: Mapping[str, SharedTensor]) -> dict[str, np.ndarray]:
    arrays = {}
    for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        shape = tuple(tensor.shape)
        if tensor.name in into:
            arrays[tensor.name] = into[tensor.name].read(tensor.datatype, shape, _shared_bytes(tensor))
        else:
            arrays[tensor.name] = from_raw(raw, tensor.datatype, shape, f"output {tensor.name!r}")
    return arrays


def _shared_bytes(tensor: pb.ModelInferResponse.InferOutputTensor) -> int:
    if "shared_memory_byte_size" in tensor.parameters:
        return tensor.parameters["shared_memory_byte_size"].int64_param
    return math.prod(tensor.shape) * NUMPY_TYPES[tensor.datatype].itemsize


def _classes(array: np.ndarray) -> list[list[Class]]:
    *rows, count = array.shape or (1,)  # a model without a batch axis has one row
    return [[_class(element) for element in row] for row in array.reshape(math.prod(rows), count)]


def _class(element: bytes) -> Class:
    value, index, *label = element.decode().split(":", 2)
    return Class(_number(value), int(index), label[0] if label else None)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)

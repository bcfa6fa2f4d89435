"""A small client: raw examples or tensors to a server, answers back. Needs grpcio, protobuf and numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import grpc
import numpy as np

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec, conform
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve.errors import ServerError
from serve.tensors import from_raw, to_raw

_DATATYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}


@dataclass(frozen=True)
class ModelMetadata:
    """What a served model is called, takes and gives."""

    name: str
    versions: tuple[int, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def examples(self) -> Literal["raw", "pair", "vector", "tensors"] | None:
        """What Client.predict takes: texts or images, pairs of texts, vectors, or named arrays; None: it refuses."""
        if self.platform != "edgeward_bundle":
            return None
        match self.inputs:
            case [TensorSpec(datatype="BYTES")]:
                return "raw"
            case [TensorSpec(datatype="BYTES"), TensorSpec(datatype="BYTES")]:
                return "pair"
            case [TensorSpec(datatype="FP32", shape=(_, _))]:
                return "vector"
        return "tensors"


class Client:
    """A connection to one server; calls may be made from several threads at once."""

    def __init__(self, address: str, *, timeout_s: float = 30.0) -> None:
        """Connect at the first call.

        Args:
            address: HOST:PORT.
            timeout_s: of every call.
        """
        self.address = address
        self.timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        )
        self._stub = rpc.GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def ready(self) -> bool:
        """Whether the server takes calls; False where none is reached.

        Raises:
            ServerError: what answers is no server of this protocol.
        """
        try:
            return bool(self._call(self._stub.ServerReady, pb.ServerReadyRequest()).ready)
        except ServerError as error:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                return False
            raise

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """What a model takes and gives.

        Raises:
            ServerError: there is no such model, or no answer.
        """
        answer = self._call(self._stub.ModelMetadata, pb.ModelMetadataRequest(name=model, version=version))
        return ModelMetadata(
            name=answer.name,
            versions=tuple(int(number) for number in answer.versions),
            platform=answer.platform,
            inputs=tuple(TensorSpec(spec.name, spec.datatype, tuple(spec.shape)) for spec in answer.inputs),
            outputs=tuple(TensorSpec(spec.name, spec.datatype, tuple(spec.shape)) for spec in answer.outputs),
        )

    def predict(
        self, model: str, raws: Sequence[Any] | np.ndarray | Mapping[str, Any], version: str = ""
    ) -> dict[str, np.ndarray]:
        """The answers of a bundle for raw examples. docs/protocol.md names them.

        The bundle's input is looked up once per model and version.

        Args:
            model: its name.
            raws: one each of: a text or the bytes of an image; a pair of texts, (first, second); a vector, or of
                all of them an array (N, numbers). Of tensors, and of vectors too, arrays by input name, each with
                one row for each example.
            version: "" for the highest.

        Raises:
            BadInput: the model is no bundle, or takes other examples.
            ServerError: an example cannot be used, there is no such model, or no answer.
        """
        if (model, version) not in self._metadata:
            self._metadata[model, version] = self.metadata(model, version)
        metadata = self._metadata[model, version]
        match metadata.examples:
            case "raw":
                columns = [_bytes_column(raws, "a text or the bytes of an image")]
            case "pair":
                columns = _pair_columns(raws)
            case "vector" if not isinstance(raws, Mapping):
                columns = [_vectors(raws, metadata.inputs[0].shape[1])]
            case "vector" | "tensors":
                columns = _tensors(raws, metadata.inputs)
            case None:
                takes = ", ".join(f"{spec.name!r} {spec}" for spec in metadata.inputs)
                raise BadInput(f"model {model!r} takes no raw examples but {takes}. Send tensors with infer.")
        names = [spec.name for spec in metadata.inputs]
        return self.infer(model, dict(zip(names, columns, strict=True)), version)

    def infer(
        self, model: str, tensors: Mapping[str, np.ndarray], version: str = "", outputs: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Tensors in, tensors out.

        Args:
            model: its name.
            tensors: by input name; the dtype decides the datatype, and str and bytes are BYTES.
            version: "" for the highest.
            outputs: names of those wanted, none for all.

        Returns:
            Arrays by output name, read-only; BYTES as objects that are bytes.

        Raises:
            BadInput: a tensor has a dtype that the protocol does not know.
            ServerError: the server refused, failed or was not reached.
        """
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        for name, array in tensors.items():
            datatype = _datatype(name, array)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(to_raw(array, datatype))
        for name in outputs:
            request.outputs.add(name=name)
        return self._read(self._call(self._stub.ModelInfer, request))

    def _read(self, answer: pb.ModelInferResponse) -> dict[str, np.ndarray]:
        try:
            return {
                tensor.name: from_raw(raw, tensor.datatype, tuple(tensor.shape), f"output {tensor.name!r}")
                for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
            }
        except (BadInput, KeyError, ValueError) as error:
            raise ServerError(
                self.address, grpc.StatusCode.UNKNOWN, f"an answer that cannot be read: {error}"
            ) from error

    def _call(self, call: Any, request: Any) -> Any:
        try:
            return call(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise ServerError(self.address, error.code(), error.details() or "") from error


def _bytes_column(raws: Sequence[Any] | np.ndarray | Mapping[str, Any], expected: str) -> np.ndarray:
    if isinstance(raws, str | bytes | Mapping):
        raise BadInput(f"the examples are one {type(raws).__name__}; expected a list, each of it {expected}.")
    column = np.empty((len(raws), 1), object)
    for i, raw in enumerate(raws):
        if not isinstance(raw, str | bytes):
            raise BadInput(f"example {i} is of type {type(raw).__name__}; expected {expected}.")
        column[i, 0] = raw
    return column


def _pair_columns(raws: Sequence[Any] | np.ndarray | Mapping[str, Any]) -> list[np.ndarray]:
    for i, raw in enumerate(raws):
        if isinstance(raw, str | bytes) or not hasattr(raw, "__len__") or len(raw) != 2:
            raise BadInput(f"example {i} is no pair of texts; expected (first, second).")
    return [_bytes_column([raw[side] for raw in raws], "a pair of texts") for side in (0, 1)]


def _vectors(raws: Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    try:
        array = np.asarray(raws)
    except ValueError as error:  # the vectors differ in length
        raise BadInput(f"the vectors are no array: {error}.") from error
    if array.shape == (0,):
        array = np.zeros((0, size), np.float32)
    if array.dtype.kind not in "biuf" or array.ndim != 2 or array.shape[1] != size:
        raise BadInput(f"the vectors are {array.dtype} {list(array.shape)}; expected numbers of shape [-1, {size}].")
    with np.errstate(over="ignore"):  # the server says which number is not finite
        return array.astype(np.float32)


def _tensors(arrays: Any, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
    names = [spec.name for spec in specs]
    if not isinstance(arrays, Mapping) or set(arrays) != set(names):
        got = ", ".join(map(repr, arrays)) if isinstance(arrays, Mapping) else f"one {type(arrays).__name__}"
        raise BadInput(f"the examples are {got or 'nothing'}; expected arrays by name: {', '.join(map(repr, names))}.")
    return [conform(arrays[spec.name], spec, f"input {spec.name!r}") for spec in specs]


def _datatype(name: str, array: np.ndarray) -> str:
    if array.dtype.kind in "OSU":
        return "BYTES"
    datatype = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise BadInput(f"input {name!r} has dtype {array.dtype}, which the protocol does not have.")
    return datatype

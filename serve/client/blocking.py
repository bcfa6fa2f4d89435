"""The client: raw examples or tensors to a server, answers back. Needs grpcio, protobuf and numpy only.

serve/client/aio.py is the same for asyncio.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.client import calls
from serve.client.calls import Answer, Call, Class, Health, Parameters, Part, Tensors
from serve.client.channel import ATTEMPTS, Tls, resolve
from serve.client.columns import ModelMetadata, Raws, check_batching, cut, to_columns
from serve.client.limits import seconds
from serve.client.region import Region, SharedTensor
from serve.errors import ServerError


class Client:
    """A connection to one server; calls may be made from several threads at once.

    What the server refuses, fails at or does not answer is a ServerError with the gRPC status. While it is
    UNAVAILABLE, calls that may be made twice are made again, within the call's deadline, with pauses that grow at
    random, and beside ten for at most a tenth of its calls (serve/client/channel.py).
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        tls: Tls | None = None,
        token: str | None = None,
        attempts: int = ATTEMPTS,
        max_rows: int = 64,
        parallel: int = 4,
    ) -> None:
        """Connect at the first call.

        Args:
            address: HOST:PORT, or unix:PATH of a socket.
            timeout_s: of every call with all its attempts, unless the call says otherwise.
            tls: by default plain text.
            token: bearer token, over TLS or to this machine.
            attempts: of one call, 1 to 5.
            max_rows: of one request of `predict`, which sends as many requests as it takes.
            parallel: requests that one `predict` has under way at the same time.

        Raises:
            BadInput: one of these cannot be, or the token would cross a network in plain text.
        """
        check_batching(max_rows, parallel)
        target = resolve(address, tls=tls, token=token, attempts=attempts)
        self.address = address
        self.timeout_s = seconds(timeout_s)
        self.max_rows = max_rows
        self.parallel = parallel
        self._headers = target.metadata
        self._channel = target.open(grpc)
        self._stub = calls.stub(self._channel)
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are under way or come later are a ServerError, CANCELLED."""
        self._stub = calls.ClosedStub(self.address)
        self._channel.close()

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or one of its models, takes calls; False where no server answers in time."""
        try:
            return self._run(calls.model_ready(model, version) if model else calls.server_ready())
        except ServerError as error:
            if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise

    def health(self, model: str = "") -> Health:
        """What grpc.health.v1 says of the server, or of one of its models. An unknown one is a ServerError."""
        return self._run(calls.health(model))

    def watch(self, model: str = "") -> Iterator[Health]:
        """The health now, and whenever it changes, until the connection is lost, which is a ServerError."""
        answers = self._stub.Watch(calls.health(model).request, metadata=self._headers)
        with calls.following(answers, self.address):
            for answer in answers:
                yield Health(answer.count)

    def server_metadata(self) -> pb.ServerMetadataResponse:
        """Name, version and extensions of the server."""
        return self._run(calls.server_metadata())

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """What a model takes and gives; its highest version where none is named, as in every call."""
        return self._run(calls.metadata(model, version))

    def config(self, model: str, version: str = "") -> pb.ModelConfig:
        """How a model is run. docs/protocol.md tells the fields."""
        return self._run(calls.config(model, version))

    def statistics(self, model: str = "", version: str = "") -> tuple[pb.ModelStatistics, ...]:
        """What each version of a model, or of all models, has answered, and how long each stage took."""
        return self._run(calls.statistics(model, version))

    def index(self, *, ready: bool = False) -> tuple[pb.RepositoryIndexResponse.ModelIndex, ...]:
        """Every version of every model and its state, or those that can be called."""
        return self._run(calls.index(ready))

    def load(self, model: str, *, timeout_s: float | None = None) -> None:
        """Load a model of the server's repository, or its new versions; returns when it can be called."""
        self._run(calls.load(model), timeout_s)

    def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Unload a model after the calls that it is answering."""
        self._run(calls.unload(model), timeout_s)

    def predict(
        self, model: str, raws: Raws, version: str = "", *, timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """The answers of a bundle for raw examples. docs/protocol.md names them.

        Many examples are sent in requests of `max_rows`, several at the same time; the answers keep their order. The
        bundle's input is looked up once per model and version, and again where it is refused.

        Args:
            model: its name.
            raws: one each of: a text or the bytes of an image; a pair of texts, (first, second); a vector, or of
                all of them an array (N, numbers). Of tensors, and of vectors too, arrays by input name, each with
                one row for each example.
            version: "" for the highest.
            timeout_s: of all the requests together.

        Raises:
            BadInput: the model is no bundle, or takes other examples.
            ServerError: an example cannot be used, there is no such model, or no answer; or two versions have
                answered, as one came meanwhile.
        """
        deadline = time.monotonic() + self._seconds(timeout_s)
        try:
            return self._predict(model, self._columns(model, raws, version, deadline), version, deadline)
        except ServerError:
            self._metadata.pop((model, version), None)  # a new version may take other inputs
            raise

    def infer(
        self,
        model: str,
        tensors: Tensors,
        version: str = "",
        outputs: Sequence[str] = (),
        *,
        into: Mapping[str, SharedTensor] | None = None,
        parameters: Parameters | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Tensors in, tensors out.

        Args:
            model: its name.
            tensors: by input name; the dtype decides the datatype, and str and bytes are BYTES. A tensor in shared
                memory is sent without its bytes.
            version: "" for the highest.
            outputs: names of those wanted, none for all.
            into: outputs, wanted too, that the server writes to shared memory; their arrays are that memory.
            parameters: of the request, such as priority, and timeout in the queue in µs.
            timeout_s: of the call.

        Returns:
            Arrays by output name, read-only; BYTES as objects that are bytes.

        Raises:
            BadInput: a tensor or a parameter is nothing that the protocol knows.
            ServerError: the server refused, failed or was not reached.
        """
        return self._run(calls.infer(model, tensors, version, outputs, into, parameters), timeout_s)

    def classify(
        self,
        model: str,
        tensors: Tensors,
        output: str,
        count: int,
        version: str = "",
        *,
        timeout_s: float | None = None,
    ) -> list[list[Class]]:
        """The `count` highest elements of each row of an output, the highest first, with their labels if it has some.

        The other arguments and errors are those of `infer`.
        """
        return self._run(calls.classify(model, tensors, output, count, version), timeout_s)

    def stream(
        self,
        model: str,
        batches: Iterable[Raws],
        version: str = "",
        outputs: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> Iterator[dict[str, np.ndarray] | ServerError]:
        """Answers to many requests over one stream, in their order, while they are still being sent.

        A request that the server refuses or fails at is answered by its ServerError, and the stream goes on.

        Args:
            model: its name.
            batches: each what `infer` takes (arrays by name), or what `predict` takes. Taken in another thread, as
                fast as the server reads.
            version: "" for the highest.
            outputs: names of those wanted, none for all.
            timeout_s: of the whole stream; by default it may last.

        Raises:
            BadInput: what `batches` raises and a batch that cannot be sent are raised after the answers before it.
            ServerError: the stream is broken.
        """
        left_s = None if timeout_s is None else seconds(timeout_s)
        failed: list[BaseException] = []
        unsent = iter(batches)

        def requests() -> Iterator[pb.ModelInferRequest]:
            while True:
                try:
                    tensors = self._tensors(model, next(unsent), version)
                    request = calls.infer_request(model, tensors, version, outputs)
                except StopIteration:
                    return
                except BaseException as error:  # gRPC's thread would end with SystemExit, say, and the stream never
                    failed.append(error)
                    return
                yield request

        answers = self._stub.ModelStreamInfer(requests(), timeout=left_s, metadata=self._headers)
        with calls.following(answers, self.address):
            for answer in answers:
                result = calls.streamed(answer, self.address)
                if isinstance(result, ServerError):
                    self._metadata.pop((model, version), None)
                yield result
        if failed:
            raise failed[0]

    @contextmanager
    def shared_memory(self, byte_size: int) -> Iterator[Region]:
        """A region of shared memory that the server knows until the block ends.

        That of a process that dies within the block is forgotten with the next region that anybody registers.

        Raises:
            BadInput: it would have no bytes.
            EdgewardError: there is none on this system, or not so much.
            ServerError: the server does not allow it, or is on another machine; the client was closed meanwhile.
        """
        region = Region(byte_size)
        try:
            self._run(calls.register(region))
        finally:
            region.remove_name()
        try:
            yield region
        finally:
            with calls.forgiving_absence():
                self._run(calls.unregister(region))

    def _tensors(self, model: str, batch: Raws, version: str) -> Tensors:
        if isinstance(batch, Mapping):
            return batch
        return self._columns(model, batch, version, time.monotonic() + self.timeout_s)

    def _columns(self, model: str, raws: Raws, version: str, deadline: float) -> dict[str, np.ndarray]:
        known = self._metadata.get((model, version))
        if known is not None:
            with suppress(BadInput):  # a new version may take them: it is looked up
                return to_columns(raws, known)
        known = self._ask(calls.metadata(model, version), deadline - time.monotonic())
        self._metadata[model, version] = known
        return to_columns(raws, known)

    def _predict(
        self, model: str, columns: Mapping[str, np.ndarray], version: str, deadline: float
    ) -> dict[str, np.ndarray]:
        parts = cut(columns, self.max_rows)
        if len(parts) == 1:
            return self._ask(calls.infer(model, columns, version), deadline - time.monotonic())
        answers, running = [], deque[tuple[slice, Call[Part], Any]]()
        try:
            for rows in parts:
                if len(running) == self.parallel:
                    answers.append(self._result(*running.popleft()))
                call = calls.infer_part(model, {name: column[rows] for name, column in columns.items()}, version)
                left_s = deadline - time.monotonic()
                future = self._stub.ModelInfer.future(call.request, timeout=left_s, metadata=self._headers)
                running.append((rows, call, future))
            while running:
                answers.append(self._result(*running.popleft()))
        finally:
            for _, _, future in running:
                future.cancel()
        return calls.join(answers, self.address)

    def _result(self, rows: slice, call: Call[Answer], future: Any) -> Answer:
        with calls.failures_of(self.address, rows):
            message = future.result()
        return calls.read(call, message, self.address)

    def _seconds(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else seconds(timeout_s)

    def _run(self, call: Call[Answer], timeout_s: float | None = None) -> Answer:
        return self._ask(call, self._seconds(timeout_s))

    def _ask(self, call: Call[Answer], left_s: float) -> Answer:
        with calls.failures_of(self.address):
            message = getattr(self._stub, call.method)(call.request, timeout=left_s, metadata=self._headers)
        return calls.read(call, message, self.address)

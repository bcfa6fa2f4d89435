"""The client of serve/client/blocking.py for asyncio: the same calls, to be awaited."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
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


class AioClient:
    """A connection to one server, for the tasks of the event loop that it was made in. All else is as in Client.

    A task that is cancelled cancels its call at the server.
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
        """Connect at the first call. Arguments and errors as of Client.

        Raises:
            RuntimeError: no event loop is running here.
        """
        asyncio.get_running_loop()  # else gRPC would take one that never runs
        check_batching(max_rows, parallel)
        target = resolve(address, tls=tls, token=token, attempts=attempts)
        self.address = address
        self.timeout_s = seconds(timeout_s)
        self.max_rows = max_rows
        self.parallel = parallel
        self._headers = target.metadata
        self._channel = target.open(grpc.aio)
        self._stub = calls.stub(self._channel)
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that are under way or come later are a ServerError, CANCELLED."""
        self._stub = calls.ClosedStub(self.address)
        await self._channel.close()

    async def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or one of its models, takes calls; False where no server answers in time."""
        try:
            return await self._run(calls.model_ready(model, version) if model else calls.server_ready())
        except ServerError as error:
            if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise

    async def health(self, model: str = "") -> Health:
        """What grpc.health.v1 says of the server, or of one of its models. An unknown one is a ServerError."""
        return await self._run(calls.health(model))

    async def watch(self, model: str = "") -> AsyncIterator[Health]:
        """The health now, and whenever it changes, until the connection is lost, which is a ServerError."""
        answers = self._stub.Watch(calls.health(model).request, metadata=self._headers)
        with _closing(self.address), calls.following(answers, self.address):
            async for answer in answers:
                yield Health(answer.count)

    async def server_metadata(self) -> pb.ServerMetadataResponse:
        """Name, version and extensions of the server."""
        return await self._run(calls.server_metadata())

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """What a model takes and gives; its highest version where none is named, as in every call."""
        return await self._run(calls.metadata(model, version))

    async def config(self, model: str, version: str = "") -> pb.ModelConfig:
        """How a model is run. docs/protocol.md tells the fields."""
        return await self._run(calls.config(model, version))

    async def statistics(self, model: str = "", version: str = "") -> tuple[pb.ModelStatistics, ...]:
        """What each version of a model, or of all models, has answered, and how long each stage took."""
        return await self._run(calls.statistics(model, version))

    async def index(self, *, ready: bool = False) -> tuple[pb.RepositoryIndexResponse.ModelIndex, ...]:
        """Every version of every model and its state, or those that can be called."""
        return await self._run(calls.index(ready))

    async def load(self, model: str, *, timeout_s: float | None = None) -> None:
        """Load a model of the server's repository, or its new versions; returns when it can be called."""
        await self._run(calls.load(model), timeout_s)

    async def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Unload a model after the calls that it is answering."""
        await self._run(calls.unload(model), timeout_s)

    async def predict(
        self, model: str, raws: Raws, version: str = "", *, timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """The answers of a bundle for raw examples, as Client.predict."""
        deadline = time.monotonic() + self._seconds(timeout_s)
        try:
            return await self._predict(model, await self._columns(model, raws, version, deadline), version, deadline)
        except ServerError:
            self._metadata.pop((model, version), None)  # a new version may take other inputs
            raise

    async def infer(
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
        """Tensors in, tensors out, as Client.infer."""
        return await self._run(calls.infer(model, tensors, version, outputs, into, parameters), timeout_s)

    async def classify(
        self,
        model: str,
        tensors: Tensors,
        output: str,
        count: int,
        version: str = "",
        *,
        timeout_s: float | None = None,
    ) -> list[list[Class]]:
        """The `count` highest elements of each row of an output, as Client.classify."""
        return await self._run(calls.classify(model, tensors, output, count, version), timeout_s)

    async def stream(
        self,
        model: str,
        batches: Iterable[Raws] | AsyncIterable[Raws],
        version: str = "",
        outputs: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[dict[str, np.ndarray] | ServerError]:
        """Answers to many requests over one stream, in their order, as Client.stream."""
        left_s = None if timeout_s is None else seconds(timeout_s)
        failed: list[Exception] = []

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            try:
                async for batch in _each(batches):
                    yield calls.infer_request(model, await self._tensors(model, batch, version), version, outputs)
            except Exception as error:
                failed.append(error)

        answers = self._stub.ModelStreamInfer(requests(), timeout=left_s, metadata=self._headers)
        with _closing(self.address), calls.following(answers, self.address):
            async for answer in answers:
                result = calls.streamed(answer, self.address)
                if isinstance(result, ServerError):
                    self._metadata.pop((model, version), None)
                yield result
        if failed:
            raise failed[0]

    @asynccontextmanager
    async def shared_memory(self, byte_size: int) -> AsyncIterator[Region]:
        """A region of shared memory that the server knows until the block ends, as Client.shared_memory."""
        region = Region(byte_size)
        try:
            await self._run(calls.register(region))
        finally:
            region.remove_name()
        try:
            yield region
        finally:
            with calls.forgiving_absence():
                await self._run(calls.unregister(region))

    async def _tensors(self, model: str, batch: Raws, version: str) -> Tensors:
        if isinstance(batch, Mapping):
            return batch
        return await self._columns(model, batch, version, time.monotonic() + self.timeout_s)

    async def _columns(self, model: str, raws: Raws, version: str, deadline: float) -> dict[str, np.ndarray]:
        known = self._metadata.get((model, version))
        if known is not None:
            with suppress(BadInput):  # a new version may take them: it is looked up
                return to_columns(raws, known)
        known = await self._ask(calls.metadata(model, version), deadline - time.monotonic())
        self._metadata[model, version] = known
        return to_columns(raws, known)

    async def _predict(
        self, model: str, columns: Mapping[str, np.ndarray], version: str, deadline: float
    ) -> dict[str, np.ndarray]:
        parts = cut(columns, self.max_rows)
        if len(parts) == 1:
            return await self._ask(calls.infer(model, columns, version), deadline - time.monotonic())
        answers, running = [], deque[tuple[slice, Call[Part], Any]]()
        try:
            for rows in parts:
                if len(running) == self.parallel:
                    answers.append(await self._result(*running.popleft()))
                call = calls.infer_part(model, {name: column[rows] for name, column in columns.items()}, version)
                left_s = deadline - time.monotonic()
                running.append(
                    (rows, call, self._stub.ModelInfer(call.request, timeout=left_s, metadata=self._headers))
                )
            while running:
                answers.append(await self._result(*running.popleft()))
        finally:
            for _, _, message in running:
                message.cancel()
        return calls.join(answers, self.address)

    async def _result(self, rows: slice, call: Call[Answer], message: Any) -> Answer:
        with _closing(self.address), calls.failures_of(self.address, rows):
            answer = await message
        return calls.read(call, answer, self.address)

    def _seconds(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else seconds(timeout_s)

    async def _run(self, call: Call[Answer], timeout_s: float | None = None) -> Answer:
        return await self._ask(call, self._seconds(timeout_s))

    async def _ask(self, call: Call[Answer], left_s: float) -> Answer:
        with _closing(self.address), calls.failures_of(self.address):
            message = await getattr(self._stub, call.method)(call.request, timeout=left_s, metadata=self._headers)
        return calls.read(call, message, self.address)


@contextmanager
def _closing(address: str) -> Iterator[None]:
    """A channel that is closed cancels its calls; only a task that was itself cancelled ends as cancelled."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ServerError(address, grpc.StatusCode.CANCELLED, "the client was closed") from error


async def _each(batches: Iterable[Raws] | AsyncIterable[Raws]) -> AsyncIterator[Raws]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch

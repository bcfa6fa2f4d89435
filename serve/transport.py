"""gRPC on asyncio, in a thread of its own: who may call, when to give up, what a client is told of an error."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import inference_pb2 as pb
from serve import wire
from serve.admission import Admission
from serve.config import ServeConfig
from serve.envelope import Request, parse_request, parser
from serve.health import CHECK, WATCH, Health
from serve.security import Tokens
from serve.service import CHANGES, Metadata, Service, status

Answer = TypeVar("Answer")
Call = Callable[[Any, Any], Awaitable[Any]]  # a request and its context -> the response

Context = Any  # grpc.aio.ServicerContext; grpcio is not typed


class Transport:
    """A listening server; its methods may be called from any thread.

    Attributes:
        port: the one that it really listens on; of a Unix-domain socket it says nothing.
    """

    def __init__(
        self,
        config: ServeConfig,
        service: Service,
        *,
        address: str,
        credentials: grpc.ServerCredentials | None,
        tokens: Tokens,
        admission: Admission,
    ) -> None:
        """Listen, and answer from then on.

        Raises:
            StartError: the address cannot be bound.
        """
        self._config, self._service, self._address, self._credentials = config, service, address, credentials
        self._admission, self._health = admission, Health()
        self._calls = _Calls(self._handlers(), tokens)
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(CHANGES, "blocking"))
        bound: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(bound,), name="grpc", daemon=True)
        self._thread.start()
        self.port = bound.result()

    def set_health(self, name: str, ready: bool) -> None:
        """What grpc.health.v1 says of a model; of the whole server by the name ""."""
        self._health.set(name, ready)

    def set_stopping(self) -> None:
        """From now on grpc.health.v1 says of everything that it is not served."""
        self._health.stop()

    def stop(self, grace_s: float) -> bool:
        """Close the socket; calls may go on for so many seconds, then they are cut off.

        Returns:
            Whether all has ended: a model that is being loaded cannot be stopped.
        """
        asyncio.run_coroutine_threadsafe(self._server.stop(grace_s), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(wire.END_S)
        return not self._thread.is_alive()

    def _run(self, bound: "Future[int]") -> None:
        asyncio.set_event_loop(self._loop)
        try:
            bound.set_result(self._loop.run_until_complete(self._listen()))
        except BaseException as error:
            bound.set_exception(error)
            return
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _listen(self) -> int:
        self._server = grpc.aio.server(options=wire.options(self._config))
        self._server.add_generic_rpc_handlers((self._calls,))
        port = self._bind()
        await self._server.start()
        return port

    def _soon(self, tell: Callable[..., None], *what: Any) -> None:
        """From any thread: tell it to a call, which runs on the loop."""
        with suppress(RuntimeError):  # the loop is closed: the call was cut off
            self._loop.call_soon_threadsafe(tell, *what)

    def _bind(self) -> int:
        try:
            if self._credentials is None:
                return int(self._server.add_insecure_port(self._address))
            return int(self._server.add_secure_port(self._address, self._credentials))
        except RuntimeError as error:
            raise wire.not_bound(self._address) from error

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By the path of each call."""
        handlers = {}
        for method in wire.SERVICE.methods:
            name, kind, response = method.name, method.input_type.name, getattr(pb, method.output_type.name)
            if name == "ModelStreamInfer":
                made = grpc.stream_stream_rpc_method_handler(self._stream, parse_request)
            elif name == "ModelInfer":
                made = grpc.stream_unary_rpc_method_handler(_answering(self._infer, bytes), parse_request)
            else:  # as a stream of one, so that it is called before the request has arrived
                call = _answering(self._plain(name), response)
                made = grpc.stream_unary_rpc_method_handler(call, parser(kind), _serialize)
            handlers[f"/{wire.SERVICE.full_name}/{name}"] = made
        handlers[CHECK] = grpc.stream_unary_rpc_method_handler(_answering(self._check, bytes))
        handlers[WATCH] = grpc.stream_stream_rpc_method_handler(self._watch)
        handlers[wire.REFLECTION] = _reflection()
        return handlers

    def _plain(self, name: str) -> Call:
        """A call that needs its request alone."""
        call = getattr(self._service, name)

        async def hand_over(request: Any, context: Context) -> Any:
            over = threading.Event()
            try:
                return await asyncio.to_thread(call, request, over.is_set)
            finally:
                over.set()

        async def answer(request: Any, context: Context) -> Any:
            return call(request)

        return hand_over if name in wire.BLOCKING else answer

    async def _check(self, data: bytes, context: Context) -> bytes:
        return self._health.check(data)

    async def _watch(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """The state of what the request names, now and whenever it changes."""
        states: asyncio.Queue[bytes] = asyncio.Queue()
        try:
            leave = self._health.watch(await _received(context), lambda state: self._soon(states.put_nowait, state))
        except Exception as error:
            _failed(error, context, None)
            return
        try:
            while True:
                yield await states.get()
        finally:
            leave()

    async def _infer(self, request: Request, context: Context) -> bytes:
        left = context.time_remaining()
        deadline = None if left is None else time.monotonic() + left
        hold = self._admission.request(request.size)
        context.add_done_callback(lambda _: hold.release())
        return await self._answered(request, context.invocation_metadata(), deadline)

    async def _admitted(self, request: Request, metadata: Metadata, held: ExitStack) -> bytes:
        """The answer to one request of a stream, which counts until `held` is closed."""
        held.enter_context(self._admission.request(request.size))
        return await self._answered(request, metadata, None)

    async def _answered(self, request: Request, metadata: Metadata, deadline: float | None) -> bytes:
        """The answer to one request that was let in; its work is dropped when the call is cancelled."""
        waiting: asyncio.Future[Any] = self._loop.create_future()
        done = partial(self._soon, _settle, waiting)
        inference = self._service.begin(request, metadata, done, deadline)
        try:
            answer = inference.answer(await waiting)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                inference.cancel()
            self._service.end(inference, error)
            raise
        self._service.end(inference, None)
        return answer

    async def _stream(self, requests: AsyncIterator[Request], context: Context) -> AsyncIterator[bytes]:
        """Requests are run side by side and answered in their order; an error is a message, or ends the stream."""
        metadata = context.invocation_metadata()
        ends = dict(metadata).get(wire.ENDS) == "true"
        started: asyncio.Queue[_Started | None] = asyncio.Queue(wire.WINDOW)

        async def read() -> None:
            try:
                async for request in requests:
                    held = ExitStack()
                    one = _Started(request.id, asyncio.create_task(self._admitted(request, metadata, held)), held)
                    try:
                        await started.put(one)
                    except asyncio.CancelledError:
                        one.drop()
                        raise
            finally:
                await started.put(None)

        try:
            with self._admission.stream():
                reader = asyncio.create_task(read())
                try:
                    while (one := await started.get()) is not None:
                        with one.held:
                            yield await _streamed(one, ends)  # which returns when it was written
                    await reader  # raises what ended it
                finally:
                    await _dropped(reader, started)
        except Exception as error:
            _failed(error, context, None)


def _reflection() -> grpc.RpcMethodHandler:
    return grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(wire.REFLECTED).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )


class _Calls(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds who answers a call, before its request has arrived: who may not call sends no bytes for nothing."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler], tokens: Tokens) -> None:
        self._handlers, self._tokens = handlers, tokens

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler = self._handlers.get(details.method)
        if handler is None:
            return None
        try:
            self._tokens.check(details.method, details.invocation_metadata)
        except Exception as error:
            return _refusal(error)
        return handler


def _refusal(error: Exception) -> grpc.RpcMethodHandler:
    async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
        _failed(error, context, None)

    return grpc.stream_stream_rpc_method_handler(refuse)  # of any kind of call: there is no message in the answer


def _answering(call: Call, response: type[Any]) -> Callable[[AsyncIterator[Any], Context], Awaitable[Any]]:
    """A handler that reads the one request of a call, and tells the client of every error by its status."""

    async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
        try:
            return await call(await _received(context), context)
        except Exception as error:
            return _failed(error, context, response())

    return answer


async def _received(context: Context) -> Any:
    try:
        async with asyncio.timeout(wire.RECEIVE_S):
            request = await context.read()
    except TimeoutError as error:
        raise wire.late_request() from error
    if request is grpc.aio.EOF:
        raise wire.no_request()
    return request


def _failed(error: Exception, context: Context, empty: Answer) -> Answer:
    """Set the status of a call, whose answer is then empty; abort() would keep the request until a collection."""
    code, details = status(error)
    context.set_code(code)
    context.set_details(details)
    return empty


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


@dataclass(frozen=True)
class _Started:
    """A request of a stream: its id, its answer, and what is held until that was written."""

    name: str
    answer: "asyncio.Task[bytes]"
    held: ExitStack

    def drop(self) -> None:
        self.answer.cancel()
        self.held.close()


async def _streamed(one: _Started, ends: bool) -> bytes:
    """One answer of a stream, marked as the only one to its request."""
    try:
        response = await one.answer
    except Exception as error:
        if ends:
            raise
        return wire.streamed_error(error, one.name)
    return wire.streamed(response)


async def _dropped(reader: "asyncio.Task[None]", started: "asyncio.Queue[_Started | None]") -> None:
    """Nobody reads the answers any more: what was begun is cancelled."""
    reader.cancel()
    while not started.empty():
        if (left := started.get_nowait()) is not None:
            left.drop()


def _settle(waiting: "asyncio.Future[Any]", outcome: Any) -> None:
    if not waiting.done():
        waiting.set_result(outcome)

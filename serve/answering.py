"""What each method of the server does with a call, without a loop of its own: answers come by callback."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from typing import Any

from serve import wire
from serve.admission import Admission, Hold
from serve.call import Call, Stream, nothing
from serve.envelope import Request, parse_request, parser
from serve.errors import forget_frames
from serve.health import CHECK, WATCH, Health
from serve.inference import Inference, StepAside
from serve.queue import Outcome
from serve.service import CHANGES, Metadata, Service

_LARGE = 1 << 20  # bytes of a request that takes long to read: every element may be an object, or in shared memory


class Answering:
    """Every method of the server.

    Attributes:
        unary: by path, those with one request and one answer: called with the call and the bytes of its request.
        streaming: by path, the others: called with the stream.
    """

    unary: Mapping[str, Callable[[Any, bytes | None], None]]
    streaming: Mapping[str, Callable[[Any], None]]

    def __init__(self, service: Service, admission: Admission, health: Health, step_aside: StepAside) -> None:
        """Nothing is asked yet.

        Args:
            service: that answers.
            admission: that lets requests in.
            health: what is said of models.
            step_aside: for a thread that hands over calls, to be asked before it runs a model.
        """
        self._service, self._admission, self._health, self._step_aside = service, admission, health, step_aside
        self._blocking = ThreadPoolExecutor(CHANGES, "blocking")  # its threads start with the first call
        self._blocked: set[Future[None]] = set()
        prefix = f"/{wire.SERVICE.full_name}/"
        plain = [method for method in wire.SERVICE.methods if method.name not in ("ModelInfer", "ModelStreamInfer")]
        self.unary = {
            **{prefix + method.name: self._plain(method.name, method.input_type.name) for method in plain},
            prefix + "ModelInfer": self._infer,
            CHECK: _answering(health.check),
        }
        self.streaming = {
            prefix + "ModelStreamInfer": self._stream,
            WATCH: self._watch,
            wire.REFLECTION: self._reflect,
        }

    def close(self, wait_s: float) -> bool:
        """Wait for what blocks, and say whether it has ended."""
        self._blocking.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._blocked), wait_s).not_done

    def _plain(self, name: str, kind: str) -> Callable[[Call, bytes | None], None]:
        """A call that needs its request alone."""
        parse, ask = parser(kind), getattr(self._service, name)

        def hand_over(call: Call, data: bytes | None) -> None:
            call.watch(nothing)
            answer = _answering(lambda data: ask(parse(data), call.over).SerializeToString())
            blocked = self._blocking.submit(answer, call, data)
            self._blocked.add(blocked)
            blocked.add_done_callback(self._blocked.discard)

        if name in wire.BLOCKING:
            return hand_over
        return _answering(lambda data: ask(parse(data)).SerializeToString())

    def _infer(self, call: Call, data: bytes | None) -> None:
        if data is None:
            raise wire.no_request()

        def answered(work: Work) -> None:
            if work.error:
                work.release()
                call.fail(work.error)
            else:
                call.finish(work.answer, sent=work.release)

        aside = len(data) > _LARGE and self._step_aside(False)
        request = parse_request(data)
        if request.size > _LARGE and not aside:  # of which most lies in shared memory
            aside = self._step_aside(False)
        work = Work(self._service, self._admission, answered, _aside if aside else self._step_aside)
        work.start(request, call.metadata, call.deadline)
        if not work.ended:
            call.watch(work.cancel)

    def _stream(self, stream: Stream) -> None:
        hold = self._admission.stream()
        _Inferences(self._service, self._admission, stream, hold.release, self._step_aside).read()

    def _watch(self, stream: Stream) -> None:
        def asked(data: bytes | None) -> None:
            if data is None:
                raise wire.no_request()
            stream.watch(self._health.watch(data, stream.send))

        stream.receive(asked)

    def _reflect(self, stream: Stream) -> None:
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        known = reflection.ReflectionServicer(wire.REFLECTED)

        def asked(data: bytes | None) -> None:
            if data is None:
                stream.finish()
                return
            request = reflection_pb2.ServerReflectionRequest.FromString(data)
            for answer in known.ServerReflectionInfo(iter([request]), None):
                stream.send(answer.SerializeToString())

        stream.on_sent(lambda: stream.receive(asked))  # to each request there is one answer, which is to be taken first
        stream.receive(asked)


def _answering(answer: Callable[[bytes], bytes]) -> Callable[[Call, bytes | None], None]:
    def handle(call: Call, data: bytes | None) -> None:
        try:
            if data is None:
                raise wire.no_request()
            call.finish(answer(data))
        except Exception as error:
            call.fail(error)

    return handle


class Work:
    """One request for inference, on whatever call it came.

    Attributes:
        answer: a ModelInferResponse, once the model has answered.
        error: why there is none.
        ended: whether there is one of them.
    """

    def __init__(
        self, service: Service, admission: Admission, answered: Callable[["Work"], None], step_aside: StepAside
    ) -> None:
        """Nothing yet.

        Args:
            service: that answers.
            admission: that lets requests in.
            answered: called once, from any thread, also by `start`.
            step_aside: see Answering.
        """
        self.answer: bytes | None = None
        self.error: Exception | None = None
        self.ended = False
        self._service, self._admission, self._answered, self._step_aside = service, admission, answered, step_aside
        self._inference: Inference | None = None
        self._outcome: Outcome | None = None
        self._hold: Hold | None = None
        self._arrivals = count()

    def start(self, request: Request, metadata: Metadata, deadline: float | None) -> None:
        """Queue a request, or run it.

        Args:
            request: by parse_request.
            metadata: of the call.
            deadline: of the call, in time.monotonic().
        """
        try:
            self._hold = self._admission.request(request.size)
            self._inference = self._service.begin(request, metadata, self._done, deadline, self._step_aside)
        except Exception as error:
            self._end(None, error)
        else:
            self._arrive()

    def cancel(self) -> None:
        """Nobody waits any more: drop it, unless it runs already."""
        inference = self._inference  # which another thread may forget meanwhile
        if inference is not None:
            inference.cancel()

    def release(self) -> None:
        """Its bytes are in work no more; those of the answer count as they do until the client has taken it."""
        if self._hold:
            self._hold.release()

    def drop(self) -> None:
        """Nobody will be told of it, now that it has ended."""
        forget_frames(self.error)
        self.release()

    def _done(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._arrive()

    def _arrive(self) -> None:
        """The end of `start` and the outcome: whichever comes last answers, in its thread."""
        if not next(self._arrivals):
            return
        assert self._inference is not None
        assert self._outcome is not None
        answer, failure = None, None
        try:
            answer = self._inference.answer(self._outcome)
        except Exception as error:
            failure = error
        try:
            self._service.end(self._inference, failure)
        finally:  # whoever waits is answered, whatever becomes of logs and traces
            self._end(answer, failure)

    def _end(self, answer: bytes | None, error: Exception | None) -> None:
        self.answer, self.error, self.ended = answer, error, True
        self._answered(self)
        self._inference = self._outcome = None  # the arrays, which a call that is being written need not keep


class _Inferences:
    """A stream of requests: run side by side, answered in their order; an error is a message, or ends the stream."""

    def __init__(
        self,
        service: Service,
        admission: Admission,
        stream: Stream,
        ended: Callable[[], None],
        step_aside: StepAside,
    ) -> None:
        self._service, self._admission, self._stream, self._ended = service, admission, stream, ended
        self._step_aside = step_aside
        self._ends = dict(stream.metadata).get(wire.ENDS) == "true"
        self._works: deque[tuple[str, Work]] = deque()
        self._unsent: deque[Work] = deque()  # whose answers the client has not taken
        self._dropped: list[Work] = []  # that are to be cancelled
        self._reading = self._more = True
        self._closed = False
        self._fault: Exception | None = None  # the client's, told after the answers
        self._lock = threading.RLock()
        stream.watch(self._cancel)
        stream.on_sent(self._sent)

    def read(self) -> None:
        """Take the next request."""
        self._stream.receive(self._received)

    def _received(self, data: bytes | None) -> None:
        if data is not None and len(data) > _LARGE:
            self._step_aside(False)
        try:
            request = None if data is None else parse_request(data)
        except Exception as error:
            request, self._fault = None, error
        if request is None:
            with self._lock:
                self._reading = self._more = False
                self._advance()
            self._cancel_dropped()
            return
        if request.size > _LARGE:
            self._step_aside(False)
        work = Work(self._service, self._admission, self._answered, self._stay)
        with self._lock:
            self._works.append((request.id, work))
        work.start(request, self._stream.metadata, None)
        with self._lock:
            self._reading = False
        self._read_on()

    def _stay(self, short: bool) -> bool:
        """Another thread is to run what takes long: the next request is read when this one is done with this one."""
        return short and self._step_aside(short)

    def _read_on(self) -> None:
        with self._lock:
            if self._reading or not self._more or len(self._works) + self._stream.unsent >= wire.WINDOW:
                return
            self._reading = True
        self.read()

    def _sent(self) -> None:
        with self._lock:
            if self._unsent:  # else it was given up meanwhile
                self._unsent.popleft().release()
        self._read_on()

    def _answered(self, work: Work) -> None:
        with self._lock:
            if self._closed:
                work.drop()
            self._advance()
        self._cancel_dropped()

    def _advance(self) -> None:
        """Send the answers whose turn it is, and the status after the last."""
        while not self._closed and self._works and self._works[0][1].ended:
            name, work = self._works.popleft()
            if work.error and self._ends:
                work.release()
                self._close(work.error)
                return
            self._unsent.append(work)
            self._stream.send(_streamed(name, work))
        if not (self._closed or self._more or self._works):
            self._close(self._fault)

    def _close(self, error: Exception | None) -> None:
        self._drop()
        if error:
            self._stream.fail(error)
        else:
            self._stream.finish()

    def _cancel(self) -> None:
        with self._lock:
            self._drop()
            while self._unsent:
                self._unsent.popleft().release()
        self._cancel_dropped()

    def _drop(self) -> None:
        """Nobody reads the answers any more: what was begun is to be cancelled."""
        self._more, self._closed = False, True
        self._dropped += [work for _, work in self._works]
        self._works.clear()
        self._ended()

    def _cancel_dropped(self) -> None:
        """Not under the lock: where models keep an order, others are told, whose lock may be held by who wants ours."""
        while self._dropped:
            with self._lock:
                dropped, self._dropped = self._dropped, []
            for work in dropped:
                work.cancel()
                if work.ended:
                    work.drop()


def _aside(short: bool) -> bool:
    """This thread has stepped aside."""
    return True


def _streamed(name: str, work: Work) -> bytes:
    if work.error:
        return wire.streamed_error(work.error, name)
    assert work.answer is not None
    return wire.streamed(work.answer)

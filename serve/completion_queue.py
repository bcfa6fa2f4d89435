"""gRPC on grpcio's own completion queue: one thread takes every event, so that no call waits for another thread.

Two threads take turns in that. The one that has taken a request runs the model at once, if it is free; where that takes
long, it lets the other one take the events meanwhile (D. C. Schmidt et al., Leader/Followers, PLoP 2000), and where it
takes long unexpectedly, the other one takes them over. Answers that it gives one after the other are sent together,
before it waits for the next event: to wake who waits for them takes longer than to make one, and is then needed once.

grpcio's own server is written on this interface, but it is not public: `missing` says what of it is not there.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc

from bundle.log import log
from serve import wire
from serve.admission import Admission
from serve.answering import Answering, Sent, nothing
from serve.config import ServeConfig
from serve.health import Health
from serve.security import Tokens
from serve.service import Service, status

try:
    from grpc._cython import cygrpc
except ImportError:
    cygrpc = None

Event = Any  # of cygrpc, as are calls and operations

_TOGETHER = 8  # answers; each has taken scheduler.HAND_OVER_NS at most, as longer runs are not waited for
_AWAITED = 32  # calls; those that come together are told of together, and dealt with while their code is in the caches
_IN_TURN = 16  # messages of streams between two looks at the sockets, which the queue takes only when it is empty
_TURN_S = 1.0  # between looks at requests that do not arrive
_LOOK_S = 0.2  # between looks of the other thread at one that runs a model
_AWAY_S = 0.05  # that a run may take that was expected to be short
_NEVER = time.time() + 1e9  # seconds; what has 30 years and more has no deadline


def missing() -> str | None:
    """Why this grpcio cannot be used so; None: it can."""
    try:
        cygrpc.SendInitialMetadataOperation(None, 0)
        cygrpc.SendMessageOperation(b"", 0)
        cygrpc.SendStatusFromServerOperation(None, 0, "", 0)
        cygrpc.ReceiveMessageOperation(0)
        cygrpc.ReceiveCloseOnServerOperation(0)
        for method in ("add_http2_port", "cancel_all_calls", "destroy", "register_completion_queue", "request_call"):
            getattr(cygrpc.Server, method)
        event = cygrpc.CompletionQueue().poll(time.time())
        if event.completion_type != cygrpc.CompletionType.queue_timeout:
            return f"grpcio {grpc.__version__} has another completion queue: {event.completion_type}"
    except (AttributeError, TypeError) as error:
        return f"grpcio {grpc.__version__} has another completion queue: {error}"
    return None


class Call:
    """One call of a client. Every method may be called from any thread, and does nothing when the call has ended.

    Attributes:
        metadata: that came with it.
        began: when, in time.monotonic().
        waits: whether its one request has not arrived.
    """

    __slots__ = ("_call", "_calls", "_deadline", "_headed", "_lock", "_watched", "began", "metadata", "waits")

    def __init__(self, event: Event, began: float, calls: "Calls") -> None:
        self.metadata: Sequence[tuple[str, str | bytes]] = event.invocation_metadata
        self.began = began
        self.waits = False
        self._call = event.call
        self._deadline: float = event.call_details.deadline
        self._calls = calls
        self._lock = threading.RLock()
        self._headed = self._watched = False
        calls.open.add(self)

    @property
    def deadline(self) -> float | None:
        """In time.monotonic()."""
        if self._deadline > _NEVER:
            return None
        return time.monotonic() + self._deadline - time.time()

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Call `then` with the next message of the client, or None when there will be none; errors end the call."""

        def received(event: Event) -> None:
            self.waits = False
            try:
                then(event.batch_operations[0].message())
            except Exception as error:
                self.fail(error)

        self._start((cygrpc.ReceiveMessageOperation(0),), received)

    def watch(self, cancelled: Callable[[], None]) -> None:
        """Call `cancelled` when the client gives up, its deadline passes or the connection breaks."""

        def closed(event: Event) -> None:
            if event.batch_operations[0].cancelled():
                with self._lock:
                    self._end()
                cancelled()

        with self._lock:
            self._watched = True
            self._start((cygrpc.ReceiveCloseOnServerOperation(0),), closed)

    def finish(self, message: bytes | None = None, code: int = 0, details: str = "", *, sent: Sent = nothing) -> None:
        """Send a last message and the status, and call `sent` when the client has it or never will."""
        with self._lock:
            if self._call is None:
                sent()
                return
            operations = self._head()
            if message is not None:
                operations.append(cygrpc.SendMessageOperation(message, 0))
            operations.append(cygrpc.SendStatusFromServerOperation(None, code, details, 0))
            if not self._watched:  # a call that is not asked for its end never ends well
                operations.append(cygrpc.ReceiveCloseOnServerOperation(0))
            core, self._call = self._call, None
            self._calls.send(self, core, operations, lambda event: sent())

    def fail(self, error: Exception) -> None:
        """Send the status of an error."""
        code, details = status(error)
        self.finish(None, code.value[0], details)

    def _head(self) -> list[Any]:
        if self._headed:
            return []
        self._headed = True
        return [cygrpc.SendInitialMetadataOperation(None, 0)]

    def _start(self, operations: Sequence[Any], tag: Callable[[Event], None]) -> None:
        """Operations hold what the core writes to: they are made for each batch anew."""
        with self._lock:
            if self._call is not None:
                self._call.start_server_batch(operations, tag)

    def _end(self) -> None:
        self._call = None  # the server is not shut down before every call is let go
        self._calls.open.discard(self)


class Stream(Call):
    """A call with any number of messages in both directions; they are sent one after the other."""

    __slots__ = ("_last", "_outgoing", "_sending", "_sent")

    def __init__(self, event: Event, began: float, calls: "Calls") -> None:
        super().__init__(event, began, calls)
        self._outgoing: deque[bytes] = deque()
        self._sending = False
        self._last: Sent | None = None
        self._sent: Sent = nothing

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """As of any call; now and then other clients come first, of whom a stream that brings enough keeps us."""
        self._calls.receive(partial(super().receive, then))

    def on_sent(self, sent: Sent) -> None:
        """Call `sent` after each message that was sent."""
        self._sent = sent

    @property
    def unsent(self) -> int:
        """Messages that the client has not taken."""
        return len(self._outgoing) + self._sending

    def send(self, message: bytes) -> None:
        """Send a message after those before."""
        with self._lock:
            self._outgoing.append(message)
            self._push()

    def finish(self, message: bytes | None = None, code: int = 0, details: str = "", *, sent: Sent = nothing) -> None:
        """Send the status after all messages."""
        with self._lock:
            if message is not None:
                self._outgoing.append(message)
            self._last = self._last or partial(super().finish, None, code, details, sent=sent)
            self._push()

    def _push(self) -> None:
        if self._sending:
            return
        if self._outgoing:
            self._sending = True
            self._start([*self._head(), cygrpc.SendMessageOperation(self._outgoing.popleft(), 0)], self._written)
        elif self._last:
            self._last()

    def _written(self, event: Event) -> None:
        with self._lock:
            self._sending = False
            self._push()
        self._sent()


class Calls:
    """The calls that have not ended, and the ends that wait to be sent.

    Attributes:
        open: those that have not ended.
    """

    def __init__(self) -> None:
        self.open: set[Call] = set()
        self._leader = 0  # the thread that takes the events, whose answers wait for each other; 0: there is none
        self._away = 0.0  # since when it has run a model, in time.monotonic(); 0: it does not, or is back
        self._leading = threading.Lock()  # guards the change of these two
        self._held: list[tuple[Any, Sequence[Any], Callable[[Event], None]]] = []  # of the leader alone
        self._streamed = 0
        self._later: list[Callable[[], None]] = []  # of the leader alone

    def lead(self, thread: int) -> None:
        """This thread, or with 0 none, takes the events from now on."""
        self._leader = thread

    def leads(self) -> bool:
        """Whether this thread takes the events; if it does, it is back from where it was."""
        me = threading.get_ident()
        if self._away and self._leader == me:
            with self._leading:
                if self._leader == me:
                    self._away = 0.0
        return self._leader == me

    def go_away(self) -> None:
        """The thread that takes the events, which asks, uses nothing here until it asks whether it leads still."""
        self._away = time.monotonic()

    def take_over(self) -> bool:
        """Take the events from now on, if the thread that does has been away for too long."""
        with self._leading:
            if not self._away or time.monotonic() < self._away + _AWAY_S:
                return False
            self._leader, self._away = threading.get_ident(), 0.0
            return True

    def send(self, call: Call, core: Any, operations: Sequence[Any], tag: Callable[[Event], None]) -> None:
        """Start the last batch of a call: now, or where more calls are to be answered with theirs."""
        if not self.leads():
            try:
                core.start_server_batch(operations, tag)
            finally:
                self.open.discard(call)  # not before: the leader shuts the queue down when it sees none open
            return
        self.open.discard(call)
        self._held.append((core, operations, tag))
        if len(self._held) >= _TOGETHER or not self.open:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        held, self._held = self._held, []
        for core, operations, tag in held:
            core.start_server_batch(operations, tag)

    def receive(self, start: Callable[[], None]) -> None:
        """Begin to receive a message of a stream: now, or when `resume` is called."""
        self._streamed += 1
        if not self.leads() or (self._streamed % _IN_TURN and not self._later):
            start()
        else:
            self._later.append(start)

    def resume(self) -> None:
        """Go on with the streams."""
        later, self._later = self._later, []
        for start in later:
            start()

    @property
    def held(self) -> bool:
        """Whether anything waits."""
        return bool(self._held or self._later)


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
        self._tokens = tokens
        self._health = Health()
        self._answering = Answering(service, admission, self._health, self._step_aside)
        self._calls = Calls()
        self._shut = False
        self._look_at = 0.0
        self._empty = False  # whether the last look at the queue found nothing
        self._ended = threading.Event()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(wire.options(config), False)
        self._server.register_completion_queue(self._queue)
        self.port = self._bind(address, credentials)
        self._server.start(backup_queue=False)
        for _ in range(_AWAITED):
            self._request()
        self._lead = threading.Lock()  # held while a thread takes the events
        self._follows: dict[int, bool] = {}  # by thread, each of which writes its own entry
        self._over = False
        self._threads = [threading.Thread(target=self._run, name=f"grpc-{i}", daemon=True) for i in range(2)]
        for thread in self._threads:
            thread.start()

    def set_health(self, name: str, ready: bool) -> None:
        """What grpc.health.v1 says of a model; of the whole server by the name ""."""
        self._health.set(name, ready)

    def set_stopping(self) -> None:
        """From now on grpc.health.v1 says of everything that it is not served."""
        self._health.stop()

    def stop(self, grace_s: float) -> bool:
        """Close the socket; calls may go on for so many seconds, then they are cut off.

        Returns:
            Whether all has ended: a model that runs cannot be stopped, nor one that is being loaded.
        """
        self._server.shutdown(self._queue, self._stopped)
        if not self._ended.wait(grace_s):
            self._server.cancel_all_calls()
        over = time.monotonic() + wire.END_S
        for thread in self._threads:
            thread.join(max(0.0, over - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._server.destroy()
        return self._answering.close(max(0.0, over - time.monotonic()))

    def _bind(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        secret = () if credentials is None else (credentials._credentials,)
        port = int(self._server.add_http2_port(address.encode(), *secret))
        if not port:
            raise wire.not_bound(address)
        return port

    def _request(self) -> None:
        """Be told of the next call."""
        try:
            self._server.request_call(self._queue, self._queue, self._called)
        except ValueError:  # it is being shut down
            return

    def _run(self) -> None:
        me = threading.get_ident()
        while not self._over:
            self._follows[me] = True
            if self._lead.acquire(timeout=_LOOK_S):
                self._calls.lead(me)
            elif not self._calls.take_over():
                continue
            self._follows[me] = False
            while self._calls.leads() and not self._over:
                self._over = self._turn() or self._over
            if self._calls.leads():
                self._step_down()

    def _step_aside(self, short: bool) -> bool:
        """Let the other thread take the events: now, or, from a run that should be short, if it is not.

        False: it is not there, or this thread does not take them.
        """
        if not (self._calls.leads() and any(list(self._follows.values()))):
            return False
        if short:
            self._calls.go_away()
        else:
            self._calls.flush()
            self._step_down()
        return True

    def _step_down(self) -> None:
        self._calls.lead(0)
        self._lead.release()  # of who leads, whichever thread has taken it

    def _turn(self) -> bool:
        """One event, which is let go with this frame; whether it was the last."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _TURN_S
            self._refuse_late()
        if self._shut and not self._calls.open:
            self._shut = False
            self._calls.flush()
            self._queue.shutdown()  # from here on no batch may begin; those that have begun still end
        event = self._queue.poll(0 if self._calls.held else time.time() + _TURN_S)
        if event.tag is None:  # nothing has happened, or nothing ever will
            self._calls.flush()
            if self._empty:  # the sockets were read; gRPC may come back once before it has looked at them
                self._calls.resume()
            self._empty = True
            return bool(event.completion_type == cygrpc.CompletionType.queue_shutdown)
        self._empty = False
        try:
            event.tag(event)
        except Exception as error:
            log.error("event lost", exc_info=error)
        return False

    def _called(self, event: Event) -> None:
        if not event.success:  # there will be no more
            return
        self._request()
        method = event.call_details.method.decode(errors="replace")
        answer = self._answering.unary.get(method)
        if answer is None:
            self._streaming(event, method)
            return
        call = Call(event, time.monotonic(), self._calls)
        if self._may(call, method):
            call.waits = True
            call.receive(partial(answer, call))

    def _streaming(self, event: Event, method: str) -> None:
        stream = Stream(event, time.monotonic(), self._calls)
        answer = self._answering.streaming.get(method)
        if answer is None:
            stream.finish(None, grpc.StatusCode.UNIMPLEMENTED.value[0], "Method not found!")
        elif self._may(stream, method):
            try:
                answer(stream)
            except Exception as error:
                stream.fail(error)

    def _may(self, call: Call, method: str) -> bool:
        try:
            self._tokens.check(method, call.metadata)
        except Exception as error:
            call.fail(error)
            return False
        return True

    def _refuse_late(self) -> None:
        before = time.monotonic() - wire.RECEIVE_S
        for call in list(self._calls.open):
            if call.waits and call.began < before:
                call.fail(wire.late_request())

    def _stopped(self, event: Event) -> None:
        self._shut = True
        self._ended.set()

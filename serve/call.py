"""Calls on grpcio's completion queue: what one thread sends for another, and what waits to be sent together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from serve.service import status

try:
    from grpc._cython import cygrpc
except ImportError:
    cygrpc = None

Event = Any  # of cygrpc, as are calls and operations
Sent = Callable[[], None]

_TOGETHER = 8  # answers; each has taken scheduler.HAND_OVER_NS at most, as longer runs are not waited for
_AWAY_S = 0.05  # that a run may take that was expected to be short
_IN_TURN = 16  # messages of streams between two looks at the sockets, which the queue takes only when it is empty
_NEVER = time.time() + 1e9  # seconds; what has 30 years and more has no deadline


def nothing() -> None:
    """What is to be done when there is nothing to be done."""


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

    def over(self) -> bool:
        """Whether it has ended."""
        return self._call is None

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
        """Call `sent` after each message that was sent, until the call ends."""
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
            self._forget()

    def _written(self, event: Event) -> None:
        sent = self._sent
        with self._lock:
            self._sending = False
            self._push()
        sent()

    def _end(self) -> None:
        super()._end()
        self._forget()

    def _forget(self) -> None:
        """Messages, and who is told of them and holds this stream: else the garbage collector finds them, some day."""
        self._outgoing.clear()
        self._last, self._sent = None, nothing


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

"""gRPC on grpcio's own completion queue: one thread takes every event, so that no call waits for another thread.

Two threads take turns in that. The one that has taken a request runs the model at once, if it is free; where that takes
long, it lets the other one take the events meanwhile (D. C. Schmidt et al., Leader/Followers, PLoP 2000), and where it
takes long unexpectedly, the other one takes them over. Answers that it gives one after the other are sent together,
before it waits for the next event: to wake who waits for them takes longer than to make one, and is then needed once.

grpcio's own server is written on this interface, but it is not public: `missing` says what of it is not there.
"""

import threading
import time
from functools import partial

import grpc

from bundle.log import log
from serve import wire
from serve.admission import Admission
from serve.answering import Answering
from serve.call import Call, Calls, Event, Stream
from serve.config import ServeConfig
from serve.health import Health
from serve.security import Tokens
from serve.service import Service

try:
    from grpc._cython import cygrpc
except ImportError:
    cygrpc = None

_OF_SERVER = (
    "add_http2_port",
    "cancel_all_calls",
    "destroy",
    "register_completion_queue",
    "request_call",
    "shutdown",
    "start",
)
_AWAITED = 32  # calls; those that come together are told of together, and dealt with while their code is in the caches
_TURN_S = 1.0  # between looks at requests that do not arrive
_LOOK_S = 0.2  # between looks of the other thread at one that runs a model


def missing() -> str | None:
    """Why this grpcio cannot be used so; None: it can."""
    try:
        cygrpc.SendInitialMetadataOperation(None, 0)
        cygrpc.SendMessageOperation(b"", 0)
        cygrpc.SendStatusFromServerOperation(None, 0, "", 0)
        cygrpc.ReceiveMessageOperation(0)
        cygrpc.ReceiveCloseOnServerOperation(0)
        for method in _OF_SERVER:
            getattr(cygrpc.Server, method)
        event = cygrpc.CompletionQueue().poll(time.time())
        if event.completion_type != cygrpc.CompletionType.queue_timeout:
            return f"grpcio {grpc.__version__} has another completion queue: {event.completion_type}"
    except (AttributeError, TypeError) as error:
        return f"grpcio {grpc.__version__} has another completion queue: {error}"
    return None


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

"""grpc.health.v1 without a transport: what is served, and who is told when that changes."""

import threading
from collections.abc import Callable

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from bundle.errors import BadInput
from serve.errors import UnknownModel

_STATES = health_pb2.HealthCheckResponse

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"

_MAX_BYTES = 4096  # of a question; a name that is watched is kept

Tell = Callable[[bytes], None]  # takes a HealthCheckResponse, serialised


class Health:
    """The state of each model by its name, and of the whole server by ""; thread-safe."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {"": _STATES.SERVING}
        self._watching: dict[str, list[Tell]] = {}
        self._stopping = False
        self._lock = threading.Lock()

    def set(self, name: str, ready: bool) -> None:
        """Change the state of a model, and tell those who watch it."""
        with self._lock:
            if not self._stopping:
                self._set(name, _STATES.SERVING if ready else _STATES.NOT_SERVING)

    def stop(self) -> None:
        """From now on nothing is served."""
        with self._lock:
            self._stopping = True
            for name in self._states:
                self._set(name, _STATES.NOT_SERVING)

    def check(self, data: bytes) -> bytes:
        """The answer to a HealthCheckRequest.

        Raises:
            BadInput: the bytes are no such message, or too many.
            UnknownModel: there is no such model.
        """
        name = _name(data)
        state = self._states.get(name)
        if state is None:
            raise UnknownModel(f"service {name!r} is not known.")
        return _answer(state)

    def watch(self, data: bytes, tell: Tell) -> Callable[[], None]:
        """Tell the state of what a HealthCheckRequest names now, and whenever it changes.

        Returns:
            To be called when nobody listens any more.

        Raises:
            BadInput: the bytes are no such message, or too many.
        """
        name = _name(data)
        with self._lock:
            self._watching.setdefault(name, []).append(tell)
            tell(_answer(self._states.get(name, _STATES.SERVICE_UNKNOWN)))

        def leave() -> None:
            with self._lock:
                self._watching[name].remove(tell)
                if not self._watching[name]:
                    del self._watching[name]

        return leave

    def _set(self, name: str, state: int) -> None:
        self._states[name] = state
        for tell in self._watching.get(name, ()):
            tell(_answer(state))


def _name(data: bytes) -> str:
    if len(data) > _MAX_BYTES:
        raise BadInput(f"the name of the service is too long; expected a request of at most {_MAX_BYTES} bytes.")
    try:
        name: str = health_pb2.HealthCheckRequest.FromString(data).service
    except DecodeError as error:
        raise BadInput("the bytes are no HealthCheckRequest.") from error
    return name


def _answer(state: int) -> bytes:
    answer: bytes = _STATES(status=state).SerializeToString()
    return answer

"""How much work is let in: bytes of requests, and streams. What is too much is refused at once and never waits."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from serve.errors import Exhausted

Kind = Literal["bytes", "streams"]


@dataclass(frozen=True)
class Traffic:
    """What is in work at one moment, and what was refused before.

    Attributes:
        requests: for inference that have not been answered, on streams too.
        bytes: of their messages.
        streams: that are open.
        refused: calls that never reached a model, by reason, since the start.
    """

    requests: int = 0
    bytes: int = 0
    streams: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


class Admission:
    """Counts what is in work; thread-safe.

    Waiting requests are counted too: the queues of the models bound how many they are, this bounds how large.
    """

    def __init__(self, max_bytes: int, max_streams: int) -> None:
        """Let nothing in that would go beyond a limit.

        Args:
            max_bytes: of all requests in work together.
            max_streams: open at the same time.
        """
        self._limits: dict[Kind, int] = {"bytes": max_bytes, "streams": max_streams}
        self._held: dict[Kind, int] = {"bytes": 0, "streams": 0}
        self._refused: dict[str, int] = {"bytes": 0, "streams": 0}
        self._requests = 0
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # a request is let in no more, while somebody waits for that
        self._awaited = False

    def request(self, size: int) -> "Hold":
        """Let a request in; its bytes count until the hold is released.

        Args:
            size: bytes of the message.

        Raises:
            Exhausted: with these there would be more bytes in work than may be.
        """
        return self._take("bytes", size)

    def stream(self) -> "Hold":
        """Let a stream in; it counts until the hold is released.

        Raises:
            Exhausted: there are as many as may be.
        """
        return self._take("streams", 1)

    def snapshot(self) -> Traffic:
        """All counts at one moment."""
        with self._lock:
            return Traffic(self._requests, self._held["bytes"], self._held["streams"], dict(self._refused))

    def wait(self, timeout_s: float) -> bool:
        """Until no request is in work, and their answers are written; whether that came in time."""
        with self._ended:
            self._awaited = True
            return self._ended.wait_for(lambda: not self._requests, timeout_s)

    def _take(self, kind: Kind, amount: int) -> "Hold":
        with self._lock:
            held, limit = self._held[kind], self._limits[kind]
            if held + amount <= limit:
                self._held[kind] = held + amount
                self._requests += kind == "bytes"
                return Hold(self, kind, amount)
            self._refused[kind] += 1
        if kind == "streams":
            raise Exhausted(f"{held} streams are open, and there may be {limit}. Close one, or try again later.")
        raise Exhausted(
            f"the request takes {amount} bytes, and {held} are in work, of which there may be {limit}. "
            + ("Send smaller requests." if amount > limit else "Try again later.")
        )

    def _give(self, hold: "Hold") -> None:
        with self._lock:
            if hold.released:
                return
            hold.released = True
            self._held[hold.kind] -= hold.amount
            self._requests -= hold.kind == "bytes"
            if self._awaited:
                self._ended.notify_all()


class Hold:
    """What was let in, until it is released: by the end of `with`, or by a callback from any thread."""

    __slots__ = ("_admission", "amount", "kind", "released")

    def __init__(self, admission: Admission, kind: Kind, amount: int) -> None:
        self._admission = admission
        self.kind = kind
        self.amount = amount
        self.released = False

    def release(self) -> None:
        """Count it no more; once, however often this is called."""
        self._admission._give(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

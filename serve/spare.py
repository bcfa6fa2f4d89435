"""A second session of a model, with one thread, for runs side by side."""

import threading
from collections.abc import Callable

from bundle.errors import EdgewardError
from bundle.host import trim_memory
from bundle.log import log
from bundle.session import Session

_NAME = "spare-"  # of the threads


def filling() -> bool:
    """Whether a session is being made, which cannot be stopped."""
    return any(thread.name.startswith(_NAME) for thread in threading.enumerate())


class Spare:
    """Made in the background when it is first asked for: a model whose requests never meet does without its memory."""

    def __init__(self, name: str, make: Callable[[], Session]) -> None:
        """Nothing yet.

        Args:
            name: of the model, for the log.
            make: called once, from a thread of its own.
        """
        self._name, self._make = name, make
        self._session: Session | None = None
        self._asked = False
        self._lock = threading.Lock()

    def get(self) -> Session | None:
        """The session, once there is one; never waits."""
        if self._session is None and not self._asked:
            with self._lock:
                first, self._asked = not self._asked, True
            if first:
                self._begin()
        return self._session

    def _begin(self) -> None:
        try:
            threading.Thread(target=self._fill, name=f"{_NAME}{self._name}", daemon=True).start()
        except RuntimeError as error:  # the system has no thread left; whoever asks has a request in its hands
            self._none(error)

    def _fill(self) -> None:
        try:
            self._session = self._make()
        except (EdgewardError, OSError, MemoryError) as error:
            self._none(error)
        else:
            log.info("runs side by side", model=self._name)
            trim_memory()  # the bytes that the session was made of, and what the runtime packed anew

    def _none(self, error: Exception) -> None:
        log.warning("runs one at a time", model=self._name, because=str(error) or "no memory is left")

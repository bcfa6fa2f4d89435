"""SIGTERM as an exception, as Ctrl-C is, so that what is open is closed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 0.02
_SIGNALS: dict[type[BaseException], signal.Signals] = {
    SystemExit: signal.SIGTERM,
    KeyboardInterrupt: signal.SIGINT,
}


@contextmanager
def terminable() -> Iterator[None]:
    """In the block SIGTERM raises SystemExit(143), once; a second one does not disturb what is being closed.

    Python drops an exception that a signal raises while it runs a destructor or the callback of a weak reference; then
    the signal comes again, that of Ctrl-C too. Only the main thread can handle signals: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, _stop), sys.unraisablehook

    def send_again(dropped: "sys.UnraisableHookArgs") -> None:
        number = _SIGNALS.get(dropped.exc_type)
        if number is None:
            hook(dropped)
            return
        if number == signal.SIGTERM:
            signal.signal(number, _stop)
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)

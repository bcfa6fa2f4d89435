"""What happens, as events with fields: lines on stderr, for people or as one JSON object each.

Structured logging in the standard library alone: a server keeps what it imports for as long as it runs.
"""

import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from select import select
from typing import Any, Literal

Level = Literal["info", "warning", "error"]
Event = dict[str, Any]

_COLORS: dict[str, str] = {"info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_PLAIN = "\x1b[0m"
_EVENT_WIDTH = 30  # so that the fields of lines stand below each other
_WORD = re.compile(r"[\w./:+-]+")
_PIECE = 4096  # bytes (PIPE_BUF), which a pipe takes whole where it takes anything
_PATIENCE_S = 0.1  # with a reader who does not read, once


class Log:
    """Tells events. One that `bind` gives adds fields of its own to each."""

    def __init__(self, **bound: Any) -> None:
        self._bound = bound

    def bind(self, **fields: Any) -> "Log":
        """The same with these fields in every event."""
        return Log(**{**self._bound, **fields})

    def info(self, event: str, /, **fields: Any) -> None:
        """What is as it should be."""
        _tell("info", event, {**self._bound, **fields})

    def warning(self, event: str, /, **fields: Any) -> None:
        """What somebody may want to change."""
        _tell("warning", event, {**self._bound, **fields})

    def error(self, event: str, /, **fields: Any) -> None:
        """What did not work. `exc_info` is an exception whose traceback is told, or True for the one being handled."""
        _tell("error", event, {**self._bound, **fields})

    def exception(self, event: str, /, **fields: Any) -> None:
        """What did not work, with the traceback of the exception being handled."""
        self.error(event, exc_info=True, **fields)


log = Log()


def configure(
    *, json: bool = False, wanted: Callable[[Level], bool] = lambda level: True, patient: bool = True
) -> None:
    """How events are told from now on in this process.

    Args:
        json: one JSON object a line, not a line for people.
        wanted: whether events of a level are told.
        patient: whether to wait for a reader of stderr who does not read, such as a pager; else that line is lost.
    """
    global _wanted, _write, _patient
    _wanted, _write, _patient = wanted, _for_machines if json else _for_people, patient


def is_terminal() -> bool:
    """Whether stderr is read by people."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@contextmanager
def captured() -> Iterator[list[Event]]:
    """The events within the block, all of them, in a list instead of on stderr."""
    global _wanted, _write
    before, events = (_wanted, _write), list[Event]()
    _wanted, _write = (lambda level: True), events.append
    try:
        yield events
    finally:
        _wanted, _write = before


def _tell(level: Level, event: str, fields: Event) -> None:
    if _wanted(level):
        _write({"event": event, "level": level, **fields})


def _for_machines(event: Event) -> None:
    _line(json.dumps({"timestamp": _now(), **_explained(event)}, default=repr))


def _for_people(event: Event) -> None:
    fields = _explained(event)
    name, level, cause = fields.pop("event"), fields.pop("level"), fields.pop("exception", "")
    color, plain = (_COLORS[level], _PLAIN) if is_terminal() else ("", "")
    told = " ".join(f"{key}={_shown(fields[key])}" for key in sorted(fields))
    line = f"{_now()} [{color}{level:<8}{plain}] {name:<{_EVENT_WIDTH}} {told}".rstrip()
    _line(f"{line}\n{cause}" if cause else line)


def _shown(value: Any) -> str:
    """A word as it is; else as Python writes it, so that no text from elsewhere begins a field or a line of its own."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else repr(value)


def _explained(event: Event) -> Event:
    """The event with the traceback of its exception: of the frames, not their variables, which hold what is secret."""
    fields = dict(event)
    error = fields.pop("exc_info", None)
    if error is True:
        error = sys.exception()
    if error is not None:
        fields["exception"] = "".join(traceback.format_exception(error)).rstrip()
    return fields


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _line(text: str) -> None:
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):  # nobody reads, the disk is full, it is closed: what is told of goes on
        if _patient:
            _put(f"{text}\n")  # a line and its end in one write: processes share stderr
        else:
            _put_if_read(f"{text}\n")


def _put(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _put_if_read(text: str) -> None:
    """As much as goes without waiting."""
    global _stalled
    length = _PIECE if text.isascii() else _PIECE // 4  # of UTF-8, at most
    with _putting:  # room that was seen is not taken by another thread
        for start in range(0, len(text), length):
            _stalled = not _has_room(0.0 if _stalled else _PATIENCE_S)
            if _stalled:
                return
            _put(text[start : start + length])


def _has_room(wait_s: float) -> bool:
    try:
        file = sys.stderr.fileno()
    except OSError:  # what stands in for it is no file
        return True
    return bool(select((), (file,), (), wait_s)[1])


_patient = True
_stalled = False
_putting = threading.Lock()
_wanted: Callable[[Level], bool] = lambda level: True  # noqa: E731
_write: Callable[[Event], None] = _for_people

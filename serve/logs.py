"""What the server logs, and how: to stderr, as lines for people on a terminal, else as one JSON object each.

What a client can change of it while the server runs is process-wide, as the log is.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from bundle import log as events
from bundle.errors import BadInput
from bundle.log import log
from protos import inference_pb2 as pb
from serve.errors import NotSupported
from serve.queue import Times

MAX_TEXT = 200  # characters of a name or an id that a client chose

_GONE = "ExecuteBatchError"  # of grpc.aio: it could not write a message of a stream, as nobody reads it any more

_Value = bool | int | str

_DEFAULTS: Mapping[str, _Value] = {  # Triton's names
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,  # from 1 on, a line for every request
    "log_format": "default",
}
_FORMATS = ("default", "ISO8601")  # every line's time is ISO 8601 in both
_KINDS: Mapping[type[_Value], str] = {bool: "bool_param", int: "uint32_param", str: "string_param"}

_settings = _DEFAULTS


def configure(*, json: bool | None = None, requests: bool = False) -> None:
    """Log to stderr from now on, also what libraries say through Python's own logging.

    Args:
        json: one JSON object a line; by default where stderr is no terminal.
        requests: a line for every request.
    """
    global _settings
    _settings = {**_DEFAULTS, "log_verbose_level": int(requests)}
    events.configure(json=not events.is_terminal() if json is None else json, wanted=_wanted, patient=False)
    logging.basicConfig(handlers=[_Library()], level=logging.WARNING)


def _wanted(level: events.Level) -> bool:
    return bool(_settings[f"log_{level}"])


class _Library(logging.Handler):
    """Hands the records of Python's logging on, but for those of clients who have gone."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if type(error).__name__ == _GONE:
            return
        write = log.error if record.levelno >= logging.ERROR else log.warning
        cause = {"exc_info": error} if error else {}
        write("library", name=record.name, message=record.getMessage(), **cause)


def logs_requests() -> bool:
    """Whether `log_request` writes anything; ask it before making its arguments."""
    return _settings["log_verbose_level"] != 0


@dataclass(frozen=True)
class Ended:
    """A request of which a log or a collector is told.

    Attributes:
        model: the name that it asked for.
        version: that answered; what was asked for where none did.
        id: that the client gave it.
        rows: 0 where they are not known.
        code: what the client was told.
        times: of its job, when it had one.
    """

    model: str
    version: str
    id: str
    rows: int
    code: grpc.StatusCode
    times: Times | None = None

    def stages(self) -> dict[str, tuple[int, int]]:
        """When each stage that it went through began and ended, in time.perf_counter_ns()."""
        return self.times.stages() if self.times else {}


def log_request(ended: Ended) -> None:
    """One line for one request; the durations of its stages are in milliseconds."""
    durations = {f"{stage}_ms": round((end - start) / 1e6, 3) for stage, (start, end) in ended.stages().items()}
    model, id = _cut(ended.model), _cut(ended.id)
    log.info("request", model=model, version=ended.version, id=id, rows=ended.rows, code=ended.code.name, **durations)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def log_settings(request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
    """Change what is logged, all that is asked for or, when a part of it is refused, nothing; tell what holds then.

    Raises:
        BadInput: there is no such setting, or its value has another type.
        NotSupported: the log is to go into a file: the server opens no path that a client chose.
    """
    global _settings
    _settings = {**_settings, **{name: _read(name, value) for name, value in request.settings.items()}}
    answer = pb.LogSettingsResponse()
    answer.settings["log_file"].string_param = ""
    for name, value in _settings.items():
        setattr(answer.settings[name], _KINDS[type(value)], value)
    return answer


def _read(name: str, value: pb.LogSettingsRequest.SettingValue) -> _Value:
    if name == "log_file":
        raise NotSupported("log file location can not be updated through network protocol")
    if name not in _DEFAULTS:
        raise BadInput(f"unknown log setting {name!r}; there are {', '.join(_DEFAULTS)}.")
    kind, expected = value.WhichOneof("parameter_choice"), _KINDS[type(_DEFAULTS[name])]
    if kind != expected:
        raise BadInput(f"log setting {name!r} has {kind or 'no value'}; expected {expected}.")
    given: _Value = getattr(value, kind)
    if name == "log_format" and given not in _FORMATS:
        raise BadInput(f"log setting 'log_format' is {given!r}; expected {' or '.join(_FORMATS)}.")
    return given

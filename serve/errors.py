"""What serve adds to bundle.errors.

EdgewardError
├── UnknownModel        no model of that name and version is served
├── NotReady            the server is stopping, or the model cannot be called now
│   ├── QueueFull        too many requests wait for the model
│   ├── Closed           the version was unloaded
│   └── TimedOut         it waited in the queue for as long as it may
├── DeadlineExceeded     the call's deadline passed before the model ran
├── Cancelled            the caller gave up before the model ran
├── NotFound             nothing of that name is registered
├── AlreadyExists        the name is taken
├── LimitReached         there are as many of them as may be
├── Unauthenticated      the call brings no valid token
├── PermissionDenied     its token may not make this call
├── Exhausted            more bytes or streams are in work than may be
├── NotSupported        a part of the protocol that this server does not have
├── StartError          the server cannot start as it was asked to
│   ├── ConfigRefused    a config.pbtxt contradicts its graph, or asks for what is not done here
│   └── GateNotPassed    no accuracy gate has passed it, and the server asks for one
├── LoadFailed           a model was not loaded; what was served is served still
└── ServerError         a client's view: the server refused, failed or was not reached
"""

import grpc

from bundle.errors import EdgewardError


class UnknownModel(EdgewardError):
    """No model of that name and version is served."""


class NotReady(EdgewardError):
    """The server is stopping and takes no new calls, or the model is there and cannot be called."""


class QueueFull(NotReady):
    """Too many requests wait for the model already."""


class Closed(NotReady):
    """The version of the model was unloaded, or the server is stopping."""


class TimedOut(NotReady):
    """The request waited in the queue for as long as it may."""


class DeadlineExceeded(EdgewardError):
    """The call's deadline passed before the model ran; nothing was run."""


class Cancelled(EdgewardError):
    """The caller gave up before the model ran; nothing was run."""


class NotFound(EdgewardError):
    """Nothing of that name is registered."""


class AlreadyExists(EdgewardError):
    """The name is taken."""


class LimitReached(EdgewardError):
    """There are as many of them as the server allows; nothing was added."""


class Unauthenticated(EdgewardError):
    """The call brings no token, or none that is valid."""


class PermissionDenied(EdgewardError):
    """The call's token is valid, but not for this call."""


class Exhausted(EdgewardError):
    """More bytes or streams would be in work than may be; nothing was begun."""


class NotSupported(EdgewardError):
    """The request uses a part of the protocol that this server does not have."""


class StartError(EdgewardError):
    """The server cannot start as it was asked to: paths, names, gates or the port."""


class ConfigRefused(StartError):
    """A config.pbtxt contradicts itself or its graph, or asks for what is not done here. Its text names no path."""


class GateNotPassed(StartError):
    """No accuracy gate has passed the model, and the server was started with --require-gate."""


class LoadFailed(EdgewardError):
    """A model was not loaded; what was served is served still. Its text is for clients: it names no path."""


class ServerError(EdgewardError):
    """The server refused a call, failed, or was not reached.

    Attributes:
        address: of the server, as the client was told it.
        code: the gRPC status.
        details: the server's words.
    """

    def __init__(self, address: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(address, code, details)  # its `args`, from which a copy or another process makes it again
        self.address = address
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return f"{self.address} answered {self.code.name}: {self.details}"


def forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error that is kept, and of its causes: all that their variables name would be kept, too."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__

"""What serve adds to bundle.errors.

EdgewardError
├── UnknownModel        no model of that name and version is served
├── NotReady            the server is stopping
├── NotSupported        a part of the protocol that this server does not have
├── StartError          the server cannot start as it was asked to
└── ServerError         a client's view: the server refused, failed or was not reached
"""

import grpc

from bundle.errors import EdgewardError


class UnknownModel(EdgewardError):
    """No model of that name and version is served."""


class NotReady(EdgewardError):
    """The server is stopping and takes no new calls."""


class NotSupported(EdgewardError):
    """The request uses a part of the protocol that this server does not have."""


class StartError(EdgewardError):
    """The server cannot start as it was asked to: paths, names, gates or the port."""


class ServerError(EdgewardError):
    """The server refused a call, failed, or was not reached.

    Attributes:
        code: the gRPC status.
        details: the server's words.
    """

    def __init__(self, address: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{address} answered {code.name}: {details}")
        self.code = code
        self.details = details

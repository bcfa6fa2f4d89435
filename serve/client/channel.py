"""How a client reaches a server: its address, TLS, a token, and calls that are made again."""

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.client.limits import whole

ATTEMPTS = 5  # of one call; gRPC allows no more

# Asking twice does no harm, and the answer is not whether somebody is there. No streams: with a retry policy grpcio
# 1.85 never ends one whose server dies before the first answer.
_AGAIN = (
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
    "RepositoryIndex",
    "SystemSharedMemoryStatus",
)


@dataclass(frozen=True)
class Tls:
    """Files of a client that speaks TLS, all PEM."""

    ca: Path | None = None
    """Certificates of those who sign the server's; by default the public authorities that gRPC brings."""
    cert: Path | None = None
    """The client's own certificate chain, for a server that asks for one (mTLS); with `key`."""
    key: Path | None = None
    """Its private key."""


@dataclass(frozen=True)
class Target:
    """Everything that a channel and its calls need."""

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]  # of every call
    options: tuple[tuple[str, Any], ...]

    def open(self, api: ModuleType) -> Any:
        """A channel that connects at its first call.

        Args:
            api: grpc or grpc.aio.
        """
        if self.credentials is None:
            return api.insecure_channel(self.address, options=self.options)
        return api.secure_channel(self.address, self.credentials, options=self.options)


def resolve(address: str, *, tls: Tls | None = None, token: str | None = None, attempts: int = ATTEMPTS) -> Target:
    """What a client was told, checked.

    Args:
        address: HOST:PORT, or unix:PATH of a socket.
        tls: None: plain text.
        token: bearer token. Over TLS it is a call credential; in plain text it is sent to this machine alone.
        attempts: of one call, while the server is UNAVAILABLE.

    Raises:
        BadInput: the address is none, a file cannot be read, or the token would cross a network in plain text.
    """
    if not re.fullmatch(r"unix(-abstract)?:.+|.+:\d{1,5}", address):
        raise BadInput(f"the address {address!r} is neither HOST:PORT nor unix:PATH.")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise BadInput("the token is empty or has characters other than printable ASCII without spaces.")
    local = _is_local(address)
    options = _options(attempts, local)
    if tls is not None:
        return Target(address, _credentials(tls, token), (), options)
    if token is not None and not local:
        raise BadInput(f"the token would go to {address} in plain text. Use TLS, a loopback address or a unix socket.")
    return Target(address, None, (("authorization", f"Bearer {token}"),) if token else (), options)


def _is_local(address: str) -> bool:
    if re.match("unix(-abstract)?:", address):  # and not a host whose name begins so
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(tls: Tls, token: str | None) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        raise BadInput("a client's certificate and its private key are given together or not at all.")
    ca, key, cert = (None if path is None else _pem(path) for path in (tls.ca, tls.key, tls.cert))
    channel = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
    if token is None:
        return channel
    return grpc.composite_channel_credentials(channel, grpc.access_token_call_credentials(token))


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    if b"-----BEGIN " not in data:
        raise BadInput(f"{path} is no PEM file: it has no line -----BEGIN …-----.")
    return data


def _options(attempts: int, local: bool) -> tuple[tuple[str, Any], ...]:
    attempts = whole("attempts", attempts, 1, ATTEMPTS)
    return (
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),  # by default a server that is back is not tried for two minutes
        ("grpc.enable_http_proxy", int(not local)),
        ("grpc.enable_retries", int(attempts > 1)),
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),  # by default a request above 256 KiB is never sent again
        *((("grpc.service_config", json.dumps(_service_config(attempts))),) if attempts > 1 else ()),
    )


def _service_config(attempts: int) -> dict[str, Any]:
    """The retries that gRPC itself has (gRFC A6): exponential backoff with jitter, within the call's deadline.

    The budget is a bucket of 20 tokens for each channel: a failed attempt takes one, a call that succeeds brings a
    tenth, and nothing is sent again while half of them or more are gone. So beside ten at the start, a tenth of a
    client's calls at most.
    """
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {
        "methodConfig": [
            {"name": [{"service": service, "method": method} for method in _AGAIN], "retryPolicy": policy}
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
    }

"""Who may call: TLS, bearer tokens, and a Unix-domain socket that only its owner can open."""

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from bundle.log import log
from serve.config import ServeConfig
from serve.errors import PermissionDenied, StartError, Unauthenticated
from serve.tls import Certificate, read_certificate

T = TypeVar("T")

MIN_TOKEN = 16  # characters; shorter ones can be guessed
CHECKED_EVERY_S = 1.0  # token files; certificates are looked at with every new connection
SOCKET_PATH = 107  # bytes, of sockaddr_un

_PROTOCOL = "/inference.GRPCInferenceService/"
OPEN = frozenset(
    {_PROTOCOL + "ServerLive", _PROTOCOL + "ServerReady"}
    | {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}  # probes and balancers have no token
)
ADMIN = frozenset(
    _PROTOCOL + name
    for name in (
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    )
)


class _Fresh(Generic[T]):
    """What files hold, read again when they change; when that fails it is logged, and the last good value stays."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._look()
        self._lock = threading.Lock()
        self.value = read()

    def refresh(self) -> bool:
        """Read the files again if they changed; whether there is a new value."""
        if self._look() == self._stamp or not self._lock.acquire(blocking=False):
            return False
        try:
            self._stamp = self._look()  # before reading, so that what changes meanwhile is read next time
            self.value = self._read()
        except StartError as error:
            log.error("changed file not used", because=str(error), remains="what was read before")
            return False
        finally:
            self._lock.release()
        log.info("changed file read", paths=[str(path) for path in self._paths])
        return True

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """TLS as the config asks for it; None without it. A certificate that is replaced on disk is used from then on.

    Raises:
        StartError: a file cannot be read, is not what it should be, does not match or has expired; it is named. Or
            the options do not go together.
    """
    cert, key, authority = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None and key is None and authority is None:
        return None
    if cert is None or key is None:
        raise StartError(
            "TLS needs --tls-cert and --tls-key together; --tls-client-ca asks clients for theirs as well."
        )
    if config.socket is not None:  # a client would check the certificate for the path as the server's name
        raise StartError(
            "a Unix-domain socket takes no TLS, and needs none: leave out --socket, or the options of TLS."
        )
    paths = [cert, key, *([authority] if authority else [])]
    fresh = _Fresh(paths, lambda: _described(read_certificate(cert, key, authority)))
    _warn_if_readable(key)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(fresh.value) if fresh.refresh() else None

    return grpc.dynamic_ssl_server_credentials(_configuration(fresh.value), changed, authority is not None)


def _described(certificate: Certificate) -> Certificate:
    log.info("certificate", subject=certificate.subject, expires=certificate.expires)
    return certificate


def _configuration(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)], certificate.authorities)


class Tokens:
    """Bearer tokens of the clients; both files are read again when they change.

    Of a token only its SHA-256 is kept, and every known one is compared, in constant time.

    Attributes:
        refused: calls since the start, by why: unauthenticated, permission_denied.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Read the files of the config; without any, every call is allowed.

        Raises:
            StartError: a file holds no token, or one that cannot be used, or what --admin allows is nobody's.
        """
        if config.token_file and (config.admin or config.shared_memory) and not config.admin_token_file:
            raise StartError("with --token-file, --admin and --shared-memory need an --admin-token-file as well.")
        self._inference = _tokens(config.token_file)
        self._admin = _tokens(config.admin_token_file)
        self._checked = time.monotonic()
        self.refused: Counter[str] = Counter()

    def check(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Whether a call may be made. Calls of health and liveness always may; what nobody knows needs a token.

        Args:
            method: of the call, such as /inference.GRPCInferenceService/ModelInfer.
            metadata: that came with it; the token in `authorization: Bearer TOKEN`.

        Raises:
            Unauthenticated: no token, or none that is valid.
            PermissionDenied: a token for inference, on a call that needs one for administration.
        """
        needed = self._admin if method in ADMIN and self._admin else self._inference
        if needed is None or method in OPEN:
            return
        self._refresh()
        token = _bearer(metadata)
        if token and self._admin and _is_known(token, self._admin.value):
            return
        if not token or not (self._inference and _is_known(token, self._inference.value)):
            self.refused["unauthenticated"] += 1
            raise Unauthenticated("the call needs a valid token, as metadata `authorization: Bearer TOKEN`.")
        if needed is self._admin:
            self.refused["permission_denied"] += 1
            raise PermissionDenied("the token is valid for inference; this call needs one for administration.")

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECKED_EVERY_S:
            return
        self._checked = now
        for fresh in (self._inference, self._admin):
            if fresh:
                fresh.refresh()


def _tokens(path: Path | None) -> _Fresh[list[bytes]] | None:
    if path is None:
        return None
    fresh = _Fresh([path], lambda: _read_tokens(path))
    _warn_if_readable(path)
    return fresh


def _read_tokens(path: Path) -> list[bytes]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path} cannot be read: {error}") from error
    digests = []
    for number, line in enumerate(lines, 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < MIN_TOKEN or not all("!" <= character <= "~" for character in token):
            raise StartError(
                f"{path}, line {number}, is no token: expected at least {MIN_TOKEN} printable ASCII characters without "
                "spaces. `openssl rand -hex 32` makes one."
            )
        digests.append(_digest(token))
    if not digests:
        raise StartError(f"{path} holds no token; expected one a line. `openssl rand -hex 32` makes one.")
    return digests


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _is_known(token: str, digests: Sequence[bytes]) -> bool:
    given = _digest(token)
    return any([hmac.compare_digest(given, known) for known in digests])  # a list: all of them, whichever matches


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _warn_if_readable(path: Path) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        log.warning("secret readable by everybody", path=str(path), remedy=f"chmod o-rwx {path}")


def warn_exposed(config: ServeConfig) -> None:
    """Log what others on the network can do: call without a token or certificate, or read tokens on their way."""
    if config.socket is not None or _is_loopback(config.host):
        return
    if not (config.token_file or config.tls_client_ca):
        log.warning("anybody in the network may call", host=config.host, remedy="--token-file or --tls-client-ca")
    if config.admin and not (config.admin_token_file or config.tls_client_ca):
        log.warning("anybody in the network may load and unload models", host=config.host, remedy="--admin-token-file")
    if config.tls_cert is None:
        tokens = bool(config.token_file or config.admin_token_file)
        log.warning("plain text in the network", host=config.host, tokens=tokens, remedy="--tls-cert and --tls-key")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # whoever binds it will say so
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


@contextmanager
def private_socket(path: Path) -> Iterator[str]:
    """The address of a Unix-domain socket, to be bound within the block: its owner alone can open it (mode 0600).

    A socket that an ended server left behind is removed; gRPC removes this one when the server stops. The mode comes
    from the umask of the process: no other thread should make files meanwhile.

    Yields:
        unix:PATH, absolute.

    Raises:
        StartError: a server listens there, something else than a socket lies there, or none can be made.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > SOCKET_PATH:
        raise StartError(f"{path} is longer than the {SOCKET_PATH} bytes that a socket's path may have.")
    if not path.parent.is_dir():
        raise StartError(f"{path.parent} is not a folder; make it first, for the server's user alone.")
    _remove_stale(path)
    before = os.umask(0o177)
    try:
        yield f"unix:{path}"
    finally:
        os.umask(before)


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise StartError(f"{path} is there and is no socket; it was left as it is. Choose another --socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # nobody listens any more
            path.unlink()
            return
        except OSError as error:
            raise StartError(f"{path} is a socket that cannot be opened: {error}. Choose another --socket.") from error
    raise StartError(f"{path} is in use: a server listens there. Stop it, or choose another --socket.")

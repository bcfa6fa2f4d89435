"""A server's certificate, checked before anybody relies on it."""

import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.errors import StartError

_ED25519 = bytes.fromhex("06032b6570")  # its object identifier in DER, 1.3.101.112


@dataclass(frozen=True)
class Certificate:
    """What gRPC needs for TLS, PEM, and what the log says of it."""

    subject: str
    expires: str  # ISO 8601, UTC
    chain: bytes
    key: bytes = field(repr=False)
    authorities: bytes | None = None


def read_certificate(cert: Path, key: Path, authority: Path | None) -> Certificate:
    """Read the files and prove that they work: one handshake with oneself, in memory.

    Args:
        cert: the server's certificate, then those that lead to its authority.
        key: its private key, not encrypted.
        authority: those who sign the clients' certificates; None asks clients for no certificate.

    Raises:
        StartError: a file cannot be read or used, the two do not belong together, or a certificate is not valid now.
    """
    pem = {path: _read(path) for path in (cert, key, *([authority] if authority else []))}
    found = _handshake(cert, key)
    if authority:
        _check_authority(authority)
    names = [value for part in found["subject"] for name, value in part]
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(found["notAfter"]), UTC)
    return Certificate(", ".join(names), until.isoformat(), pem[cert], pem[key], pem[authority] if authority else None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}.") from error


def _handshake(cert: Path, key: Path) -> dict[str, Any]:
    """What a client that trusts this one certificate sees of it; such a client also checks the dates."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # the clients know by which name they call
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate need not be its own authority
    _load_pair(server, cert, key)
    client.load_verify_locations(cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    try:
        for _ in range(4):  # flights of a handshake
            for side in (theirs, ours):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise StartError(f"{cert} cannot be used: {error.verify_message}.") from error
    except ssl.SSLError as error:
        raise StartError(f"{cert} and {key} give no TLS connection: {error.reason}.") from error
    if _ED25519 in (theirs.getpeercert(binary_form=True) or b""):
        raise StartError(f"{cert} has an Ed25519 key, which gRPC's TLS does not take. Use ECDSA or RSA.")
    return theirs.getpeercert() or {}


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def no_password() -> str:
        raise StartError(f"{key} is encrypted; `openssl pkey` writes it without a password.")

    try:
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"{key} is not the key of the first certificate in {cert}.") from error
        raise StartError(
            f"{cert} is no certificate or {key} no private key in PEM that can be used: {error.reason or error}."
        ) from error


def _check_authority(path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"{path} holds no certificate in PEM: {error.reason or error}.") from error
    until = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    if not until:
        raise StartError(f"{path} holds no certificate of an authority, so it could have signed none of a client.")
    if max(until) < time.time():
        raise StartError(f"{path} cannot be used: every authority in it has expired.")

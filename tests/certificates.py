"""Certificates for tests, by the openssl command: an authority, a server on 127.0.0.1 and localhost, a client."""

import subprocess

NAMES = "subjectAltName=IP:127.0.0.1,DNS:localhost"


def write_certificates(folder):
    """`ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key` and `ca.key` in the folder, which is made."""
    folder.mkdir()
    _openssl(folder, "req", "-x509", *_new_key("ca"), "-subj", "/CN=authority", "-days", "2", "-out", "ca.pem")
    for name in ("server", "client"):
        _openssl(folder, "req", *_new_key(name), "-subj", f"/CN={name}", "-addext", NAMES, "-out", f"{name}.csr")
        signed = [
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-copy_extensions",
            "copy",
        ]
        _openssl(folder, "x509", "-req", *signed, "-days", "2", "-out", f"{name}.pem")
    return folder


def _new_key(name):
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", f"{name}.key"]


def _openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

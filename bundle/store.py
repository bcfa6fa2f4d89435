"""Directories that are whole or not there: written beside, flushed, renamed; opened only when every hash agrees."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bundle.errors import BundleDamaged, BundleError, BundleUnsupported, OutputExists
from bundle.manifest import FORMAT, FORMAT_VERSION, FileEntry, Manifest, to_json

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
MAX_FILE_BYTES = 8 << 30
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A fresh directory beside `out` that is renamed to `out` when the block ends, and removed when it fails.

    Raises:
        OutputExists: `out` is there already; it is left as it is.
    """
    if out.exists():
        raise OutputExists(f"{out} exists already and was left as it is. Choose another --out, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp gives 0700, which a server under another user could not read
        _flush(beside)
        try:
            beside.rename(out)
        except OSError as error:
            raise OutputExists(f"{out} appeared while it was being written; nothing was replaced.") from error
        _flush_one(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        _flush_one(path)
    _flush_one(directory)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Every file below a directory, by its path relative to it."""
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def seal(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, with every file now in the directory in it, and last its digest."""
    data = to_json(msgspec.structs.replace(manifest, files=list_files(directory)))
    (directory / MANIFEST).write_bytes(data)
    (directory / DIGEST).write_bytes(_digest_line(data))


def _digest_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()  # `sha256sum -c` reads it


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose every file has been verified once."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified again, so that what is used is what was sealed."""
        data = _read(self.path, name)
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise BundleDamaged(f"{self.path / name} is not the file that the manifest names: its sha256 differs.")
        return data


def open_bundle(path: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BundleError: there is no bundle at `path`.
        BundleDamaged: a file is missing, unlisted or changed, the manifest included.
        BundleUnsupported: the format version is unknown, or a limit is exceeded.
    """
    manifest = _read_manifest(path)
    _verify_files(path, manifest)
    return Bundle(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}.")
    if (path / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleUnsupported(f"{path / MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes.")
    data = (path / MANIFEST).read_bytes()
    if _read(path, DIGEST) != _digest_line(data):
        raise BundleDamaged(f"{path / MANIFEST} does not have the sha256 that {DIGEST} gives.")
    try:
        header = msgspec.json.decode(data)
        if header.get("format") != FORMAT:
            raise BundleUnsupported(f"{path / MANIFEST} has format {header.get('format')!r}, not {FORMAT!r}.")
        if header.get("format_version") != FORMAT_VERSION:
            raise BundleUnsupported(
                f"{path} has bundle format version {header.get('format_version')!r}; "
                f"this edgeward reads version {FORMAT_VERSION} (docs/bundle-format.md)."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, AttributeError) as error:
        raise BundleDamaged(f"{path / MANIFEST} is not a manifest: {error}.") from error
    if not NAME_PATTERN.fullmatch(manifest.name) or manifest.version < 1:
        raise BundleDamaged(f"{path} is called {manifest.name!r} version {manifest.version}, which no bundle may be.")
    return manifest


def _verify_files(path: Path, manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleUnsupported(f"{path} lists {len(manifest.files)} files; the limit is {MAX_FILES}.")
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    unlisted = present - manifest.files.keys() - {MANIFEST, DIGEST}
    if unlisted:
        raise BundleDamaged(f"{path} holds files that its manifest does not list: {', '.join(sorted(unlisted)[:5])}.")
    for name, entry in manifest.files.items():
        if not FILE_PATTERN.fullmatch(name):
            raise BundleDamaged(f"{path / MANIFEST} lists {name!r}, which no file of a bundle may be called.")
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleDamaged(f"{file} is missing, or not a plain file.")
        size = file.stat().st_size
        if size != entry.bytes:
            raise BundleDamaged(f"{file} has {size} bytes; the manifest says {entry.bytes}.")
        if size > MAX_FILE_BYTES:
            raise BundleUnsupported(f"{file} has {size} bytes; the limit is {MAX_FILE_BYTES}.")
        if sha256_file(file) != entry.sha256:
            raise BundleDamaged(f"{file} is not the file that the manifest names: its sha256 differs.")


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise BundleDamaged(f"{path / name} cannot be read: {error.strerror}.") from error

"""Directories that are whole or not there: written beside, flushed, renamed; opened only when every hash agrees."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec

from bundle import outputs
from bundle.errors import BundleDamaged, BundleError, BundleUnsupported, EdgewardError, OutputExists
from bundle.manifest import FORMAT, FORMAT_VERSION, READ_VERSIONS, FileEntry, Manifest, Regression, Task, to_json

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
MAX_FILE_BYTES = 8 << 30
MAX_VERSION = 2**31 - 1
MAX_NAME = 255  # characters of a path in the bundle
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def check_new(out: Path) -> None:
    """Refuse, before any work, what new_directory could not write.

    Raises:
        OutputExists: `out` is there already; it is left as it is.
        EdgewardError: nothing can be written there.
    """
    _check_absent(out)
    check_writable(out, "--out")


def check_writable(out: Path, option: str) -> None:
    """Refuse, before any work, a place where nothing can be written; a folder is made beside it and removed.

    Args:
        out: a file or a folder, which need not be there.
        option: that names it.

    Raises:
        EdgewardError: nothing can be written there.
    """
    from tempfile import mkdtemp  # as below

    present = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    try:
        Path(mkdtemp(prefix=f".{out.name}.", dir=present)).rmdir()
    except OSError as error:
        raise EdgewardError(
            f"{out} cannot be written: no folder can be made in {present} ({error.strerror}). Choose another {option}."
        ) from error


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):  # a dangling link is something, too
        raise OutputExists(f"{out} exists already and was left as it is. Choose another --out, or remove it first.")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A fresh directory beside `out` that is renamed to `out` when the block ends, and removed when it fails.

    Raises:
        OutputExists: `out` is there already; it is left as it is.
        EdgewardError: the system says no: the disk is full, or cannot be written.
    """
    from shutil import rmtree  # half a megabyte, of which a server has no need
    from tempfile import mkdtemp

    _check_absent(out)
    beside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield beside
        beside.chmod(_folder_mode())  # mkdtemp gives 0700, which a server under another user could not read
        _flush(beside)
        try:
            beside.rename(out)
        except OSError as error:
            if not os.path.lexists(out):
                raise
            raise OutputExists(f"{out} appeared while it was being written; nothing was replaced.") from error
        _flush_one(out.parent)
    except OSError as error:
        raise EdgewardError(
            f"{out} was not written, and nothing is left of it: {error}. Make room, or choose another place."
        ) from error
    finally:
        if beside:
            rmtree(beside, ignore_errors=True)


def _folder_mode() -> int:
    """That of any folder that the process makes, as its umask says."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o777 & ~mask


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
    """Every file below a directory, by its path relative to it, but for a manifest that lies in it."""
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path not in (directory / MANIFEST, directory / DIGEST)
    }


def seal(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, of the newest version and with every file now in the directory in it, and last its digest.

    Raises:
        BundleError: the result could not be opened: a name that no file may have, a NaN, a golden example left out.
    """
    data = to_json(msgspec.structs.replace(manifest, format_version=FORMAT_VERSION, files=list_files(directory)))
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleUnsupported(
            f"{directory / MANIFEST} would have {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}."
        )
    _verify_files(directory, _parse(directory, data))
    (directory / MANIFEST).write_bytes(data)
    (directory / DIGEST).write_bytes(digest_line(MANIFEST, data))


def digest_line(name: str, data: bytes) -> bytes:
    """The line that `sha256sum -c` reads to check that file `name` holds `data`."""
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose every file has been verified once."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified again, so that what is used is what was sealed."""
        if name not in self.manifest.files:
            raise BundleDamaged(f"{self.path / MANIFEST} does not list {name}, which it needs.")
        data = _read(self.path, name, self.manifest.files[name].bytes)
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
    manifest = read_manifest(path)
    _verify_files(path, manifest)
    return Bundle(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, found to be as it was sealed; no other file is looked at.

    Raises:
        BundleError: as `open_bundle`.
    """
    if not os.path.lexists(path / MANIFEST):
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}.")
    if (path / MANIFEST).is_file() and (path / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleUnsupported(f"{path / MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes.")
    data = _read(path, MANIFEST, MAX_MANIFEST_BYTES)
    expected = digest_line(MANIFEST, data)
    if _read(path, DIGEST, len(expected)) != expected:
        raise BundleDamaged(f"{path / MANIFEST} does not have the sha256 that {DIGEST} gives.")
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        header = json.loads(data, object_pairs_hook=_object)
        if header.get("format") != FORMAT:
            raise BundleUnsupported(f"{path / MANIFEST} has format {header.get('format')!r}, not {FORMAT!r}.")
        if header.get("format_version") not in READ_VERSIONS:
            raise BundleUnsupported(
                f"{path} has bundle format version {header.get('format_version')!r}; this edgeward reads versions "
                f"{', '.join(map(str, READ_VERSIONS))} (docs/bundle-format.md)."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        _check(manifest)
    except (ValueError, AttributeError, RecursionError) as error:  # msgspec's errors are ValueErrors, too
        raise BundleDamaged(f"{path / MANIFEST} is not a manifest: {error}.") from error
    return manifest


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Of a key that is there twice, one reader takes the first and another the last.
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return dict(pairs)


def _check(manifest: Manifest) -> None:
    """Refuse what each key allows for itself, but not together with the others."""
    if not NAME_PATTERN.fullmatch(manifest.name) or not 1 <= manifest.version <= MAX_VERSION:
        raise ValueError(f"no bundle may be called {manifest.name!r} version {manifest.version}")
    for task in manifest.tasks:
        _check_labels(task)
    for kind, names in {"task": manifest.tasks, "variant": manifest.variants}.items():
        if not names or "" in {each.name for each in names} or len({each.name for each in names}) < len(names):
            raise ValueError(f"there must be a {kind}, and each must have its own name")
    if not manifest.goldens:
        raise ValueError("there must be a golden example, or no self-test could hold the bundle to anything")
    if any(variant.tolerance < 0 for variant in manifest.variants):
        raise ValueError("a tolerance is negative")
    gated = {variant.gate.task for variant in manifest.variants if variant.gate} - {None}
    if gated - {task.name for task in manifest.tasks}:
        raise ValueError("a gate is of a task that there is not")
    named = {variant.file for variant in manifest.variants}
    widths = outputs.logits_widths(manifest.tasks)
    for golden in manifest.goldens:
        named |= {golden.file, *golden.tensors.values()}
        for variant in manifest.variants:
            rows = golden.logits.get(variant.name, {})
            if {name: len(row) for name, row in rows.items()} != widths:
                raise ValueError(f"golden example {golden.file} needs logits {widths} of variant {variant.name}")
    if named - manifest.files.keys():
        raise ValueError(f"files does not list {', '.join(sorted(named - manifest.files.keys())[:5])}")


def _check_labels(task: Task) -> None:
    if isinstance(task, Regression):
        return
    if not task.labels or len(set(task.labels)) < len(task.labels):
        raise ValueError(f"task {task.name!r} must have labels, each once")


def _check_names(path: Path, manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleUnsupported(f"{path} lists {len(manifest.files)} files; the limit is {MAX_FILES}.")
    for name, entry in manifest.files.items():
        if not FILE_PATTERN.fullmatch(name) or len(name) > MAX_NAME:
            raise BundleDamaged(f"{path / MANIFEST} lists {name[:200]!r}, which no file of a bundle may be called.")
        if entry.bytes > MAX_FILE_BYTES:
            raise BundleUnsupported(f"{path / name} has {entry.bytes} bytes; the limit is {MAX_FILE_BYTES}.")


def _verify_files(path: Path, manifest: Manifest) -> None:
    _check_names(path, manifest)
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    unlisted = present - manifest.files.keys() - {MANIFEST, DIGEST}
    if unlisted:
        raise BundleDamaged(f"{path} holds files that its manifest does not list: {', '.join(sorted(unlisted)[:5])}.")
    for name, entry in manifest.files.items():
        with _open(path, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise BundleDamaged(f"{path / name} has {size} bytes; the manifest says {entry.bytes}.")
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise BundleDamaged(f"{path / name} is not the file that the manifest names: its sha256 differs.")


@contextmanager
def _open(path: Path, name: str) -> Iterator[BufferedReader]:
    file = path / name
    try:
        # A link could lead out of the bundle, and a pipe would be waited on for ever.
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise BundleDamaged(f"{file} is not a plain file.")
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise BundleDamaged(f"{file} cannot be read: {error.strerror}.") from error


def _read(path: Path, name: str, limit: int) -> bytes:
    with _open(path, name) as file:
        return file.read(limit + 1)  # one more, so that a file that is too long differs

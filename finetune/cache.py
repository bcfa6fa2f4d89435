"""What was computed before, kept between runs under `$XDG_CACHE_HOME/edgeward`, keyed by all that it depends on."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from bundle.log import log

MAX_BYTES = 2 << 30  # of all entries of a kind; those that were used longest ago go first
_DIGEST_BYTES = 32


def cached(key: str, compute: Callable[[], np.ndarray], *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The features of this key; see kept.

    Args:
        key: hex digest of everything that the array depends on.
        compute: makes the array.
        max_bytes: of all features together.
    """
    computed: list[np.ndarray] = []

    def encoded() -> bytes:
        computed.append(compute())
        return array_bytes(computed[0])

    data = kept("features", key, encoded, max_bytes=max_bytes)
    if computed:
        return computed[0]
    array = bytes_array(data)
    log.info("features found in the cache", rows=len(array))
    return array


def kept(kind: str, key: str, compute: Callable[[], bytes], *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of this key: from their file, or computed and then kept.

    A file that is not as it was written is computed again. A folder that cannot be written is only warned about.

    Args:
        kind: of thing, such as features: the name of the folder.
        key: hex digest of everything that the bytes depend on.
        compute: makes them.
        max_bytes: of all entries of this kind together.
    """
    path = cache_folder(kind) / f"{key}.{kind}"
    found = _read(path)
    if found is not None:
        return found
    data = compute()
    try:
        _write(path, data)
        _shrink(path.parent, f"*.{kind}", max_bytes)
    except OSError as error:
        log.warning(f"{kind} were not cached", path=str(path), because=str(error))
    return data


def array_bytes(array: np.ndarray) -> bytes:
    """An array as an .npy file."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def bytes_array(data: bytes) -> np.ndarray:
    """The array of an .npy file."""
    array: np.ndarray = np.load(BytesIO(data), allow_pickle=False)
    return array


def cache_folder(name: str) -> Path:
    """Where a kind of things is kept between runs; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root.startswith("/") else Path.home() / ".cache") / "edgeward" / name


def _read(path: Path) -> bytes | None:
    """What was kept, or None when there is no file or it is damaged: sha256 (32 bytes), then the bytes."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            log.warning("damaged cache entry, computed again", path=str(path))
            return None
        os.utime(path)  # used now
    except OSError:
        return None
    return data[_DIGEST_BYTES:]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _shrink(folder: Path, pattern: str, max_bytes: int) -> None:
    entries = sorted(folder.glob(pattern), key=lambda entry: entry.stat().st_mtime)
    total = sum(entry.stat().st_size for entry in entries)
    for entry in entries:
        if total <= max_bytes:
            return
        total -= entry.stat().st_size
        entry.unlink(missing_ok=True)

"""Computed features, kept between runs under `$XDG_CACHE_HOME/edgeward/features`, keyed by all that they depend on."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import structlog

log = structlog.get_logger()

MAX_BYTES = 2 << 30  # of all entries; those that were used longest ago go first
_SUFFIX = ".features"
_DIGEST_BYTES = 32


def cached(key: str, compute: Callable[[], np.ndarray], *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The array of this key: from its file, or computed and then kept.

    A file that is not as it was written is computed again. A folder that cannot be written is only warned about.

    Args:
        key: hex digest of everything that the array depends on.
        compute: makes the array.
        max_bytes: of all entries together.
    """
    path = cache_folder("features") / f"{key}{_SUFFIX}"
    array = _read(path)
    if array is not None:
        log.info("features found in the cache", path=str(path), rows=len(array))
        return array
    array = compute()
    try:
        _write(path, array)
        _shrink(path.parent, max_bytes)
    except OSError as error:
        log.warning("features were not cached", path=str(path), because=str(error))
    return array


def cache_folder(name: str) -> Path:
    """Where a kind of things is kept between runs; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root.startswith("/") else Path.home() / ".cache") / "edgeward" / name


def _read(path: Path) -> np.ndarray | None:
    """The file's array, or None when there is no file or it is damaged: sha256 (32 bytes), then an .npy file."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            log.warning("damaged cache entry, computed again", path=str(path))
            return None
        os.utime(path)  # used now
    except OSError:
        return None
    array: np.ndarray = np.load(BytesIO(data[_DIGEST_BYTES:]), allow_pickle=False)
    return array


def _write(path: Path, array: np.ndarray) -> None:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _shrink(folder: Path, max_bytes: int) -> None:
    entries = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda entry: entry.stat().st_mtime)
    total = sum(entry.stat().st_size for entry in entries)
    for entry in entries:
        if total <= max_bytes:
            return
        total -= entry.stat().st_size
        entry.unlink(missing_ok=True)

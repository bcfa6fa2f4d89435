"""Changes on disk: when something happened below the served paths, they are looked at again."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from watchfiles import watch

from bundle.log import log
from serve.layout import is_utf8

DEPTH = 2  # folders NAME/VERSION below a path
QUIET_MS, LONGEST_MS = 100, 1600  # a look follows so long after the last change, or after the first if they do not end
RETRY_S = 5.0
WAKE_MS = 100  # of the thread, to see whether it is to stop
POLL_MS = 1000  # only where the environment asks for polling


class Watcher:
    """A thread that calls `look` when something below the paths has changed.

    The kernel tells of changes. It tells of none that another machine makes on a network file system; with the
    environment variable WATCHFILES_FORCE_POLLING=1 there is a look every second besides.
    """

    def __init__(self, paths: Sequence[Path], look: Callable[[], None]) -> None:
        """Start to watch; at once `look` is called for what changed before.

        Args:
            paths: files, folders and links; they may vanish and come back.
            look: called in the thread, never twice at the same time; what it raises is logged.
        """
        self._paths = [path.absolute() for path in paths]
        self._look = look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self, wait_s: float = 10.0) -> bool:
        """Watch no longer, and say whether the thread has ended.

        Args:
            wait_s: how long to wait for a look that is under way. It is not cut off.
        """
        self._stop.set()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except Exception as error:  # watchfiles gives OSErrors and RuntimeErrors, such as too many folders
                log.warning("the disk cannot be watched", because=str(error), retry_s=RETRY_S)
                self._stop.wait(RETRY_S)

    def _watch(self) -> None:
        """Look once, at what changed before this watch began too, and return after the next change."""
        folders = sorted({str(folder) for path in self._paths for folder in _folders(path)})
        polling = bool(os.environ.get("WATCHFILES_FORCE_POLLING"))
        before = [_identity(path) for path in self._paths]
        seen = watch(
            *folders,
            watch_filter=None,
            debounce=LONGEST_MS,
            step=QUIET_MS,
            stop_event=self._stop,
            rust_timeout=WAKE_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            poll_delay_ms=POLL_MS,
            recursive=False,
            ignore_permission_denied=True,
        )
        next(seen, None)  # from here on it watches
        self._look_once()
        woken = time.monotonic()
        for changes in seen:
            if any(self._holds(Path(changed)) for _, changed in changes):
                return
            if [_identity(path) for path in self._paths] != before:  # a link or a folder on the way was replaced
                return
            if polling and time.monotonic() - woken >= POLL_MS / 1e3:
                return

    def _look_once(self) -> None:
        try:
            self._look()
        except Exception:
            log.exception("looking at the disk failed; what was served is served still")

    def _holds(self, changed: Path) -> bool:
        return any(path == changed or path in changed.parents for path in self._paths)


def _folders(path: Path) -> Iterator[Path]:
    """The folder that the path lies in, or would lie in, for its replacement; and the path with what is below it."""
    yield next(folder for folder in path.parents if folder.is_dir())
    if path.is_dir():
        yield from _below(path, DEPTH)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth:
        try:
            inside = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and _is_seen(entry.name)]
        except OSError as error:
            log.warning("folder cannot be watched", path=str(folder), because=error.strerror)
            return
        for each in inside:
            yield from _below(each, depth - 1)


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and is_utf8(name)  # watchfiles refuses others


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino

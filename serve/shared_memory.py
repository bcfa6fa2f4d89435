"""Regions of POSIX shared memory that clients on this machine have registered: tensors without their bytes on the wire.

Bytes are copied in and out by the kernel (pread, pwrite), never mapped. A mapping would end the process with SIGBUS
when a client shrinks the object, or when the shared memory of the machine is full; and what a client changes while a
model runs on it could not be checked. The copy costs some 0.3 ms for each MB, a fraction of what gRPC costs.
"""

import os
import stat
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bundle.errors import BadInput
from serve.errors import AlreadyExists, LimitReached, NotFound, NotSupported, StartError

FOLDER = Path("/dev/shm")  # where Linux has the objects of shm_open
MAX_REGIONS = 512  # each holds a file descriptor, of which a process has 1024 unless told otherwise
MAX_NAME = 255  # characters
MAX_PART = 0x7FFFF000  # bytes; Linux reads and writes no more at once
LOCKED = "edgeward-client-"  # begins the keys of objects that a client holds a lock on (flock) as long as it lives
_RESERVED = ("triton_python_backend_shm_region_", "sem.")  # Triton's own, and semaphores


@dataclass(frozen=True, eq=False)
class Region:
    """A region as it was registered. Its object stays open until nobody has the region any more.

    Attributes:
        name: what requests call it.
        key: of shm_open.
        offset: in the object, bytes.
        byte_size: bytes.
    """

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int = field(repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True)
class Part:
    """A part of a region that a request reads or writes, also after the region was unregistered.

    Attributes:
        region: that it is part of.
        offset: in the region, bytes.
        byte_size: bytes.
    """

    region: Region
    offset: int
    byte_size: int

    def read(self) -> bytes:
        """What the part holds now; later changes by the client are not seen.

        Raises:
            BadInput: the object has shrunk.
        """
        data = os.pread(self.region.descriptor, self.byte_size, self.region.offset + self.offset)
        if len(data) < self.byte_size:
            raise self._shrunk()
        return data

    def write(self, data: bytes | memoryview) -> int:
        """Write C-contiguous data (of an array: `array.data`) to the part's start; its size in bytes.

        Raises:
            BadInput: the part is too small, the object has shrunk, or the machine's shared memory is full.
        """
        size = memoryview(data).nbytes
        if size > self.byte_size:
            raise BadInput(
                f"shared memory region {self.region.name!r}: an output of {size} bytes does not fit into the "
                f"{self.byte_size} bytes that the request gives it; give it more."
            )
        start = self.region.offset + self.offset
        if os.fstat(self.region.descriptor).st_size < start + size:  # else the write would make it grow again
            raise self._shrunk()
        with suppress(OSError):
            if os.pwrite(self.region.descriptor, data, start) == size:
                return size
        raise BadInput(f"shared memory region {self.region.name!r} cannot be written; is the shared memory full?")

    def _shrunk(self) -> BadInput:
        return BadInput(
            f"shared memory region {self.region.name!r} has shrunk since it was registered; unregister it, and "
            "register it anew."
        )


class Regions:
    """The regions that are registered; safe to use from any thread.

    Who may register may read and write every shared memory object of this machine that the server's user may: it is for
    machines whose users trust each other.
    """

    def __init__(self, *, enabled: bool) -> None:
        """None yet.

        Args:
            enabled: otherwise nothing can be registered.

        Raises:
            StartError: enabled, and this is not Linux with /dev/shm.
        """
        if enabled and not (sys.platform == "linux" and FOLDER.is_dir()):
            raise StartError("--shared-memory needs Linux and its /dev/shm, which is not here; leave it out.")
        self._enabled = enabled
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Make part of a shared memory object known under a name, and forget those of clients that have died.

        Args:
            name: for requests; not yet taken.
            key: of shm_open, "/name" or "name".
            offset: in the object, bytes; of any alignment.
            byte_size: bytes, more than 0.

        Raises:
            NotSupported: shared memory is off.
            AlreadyExists: the name is taken.
            LimitReached: there are MAX_REGIONS.
            BadInput: the name or the key cannot be one, there is no such object, or it is smaller than that.
        """
        self._check_enabled()
        if not 0 < len(name) <= MAX_NAME:
            raise BadInput(f"a shared memory region needs a name of 1 to {MAX_NAME} characters; got {len(name)}.")
        file = _file(name, key)
        with self._lock:
            self._regions = {each: region for each, region in self._regions.items() if not _is_left(region)}
            if name in self._regions:
                raise AlreadyExists(f"shared memory region {name!r} already in manager; unregister it first.")
            if len(self._regions) == MAX_REGIONS:
                raise LimitReached(f"{MAX_REGIONS} shared memory regions are registered, the most; unregister some.")
            region = Region(name, key, offset, byte_size, _open(name, key, file))
            self._regions[name] = _checked(region)

    def unregister(self, name: str) -> None:
        """Forget a region, or all of them where the name is empty. One that is not there is no error, as with Triton.

        Requests that have a part of it may go on using it.

        Raises:
            NotSupported: shared memory is off.
        """
        self._check_enabled()
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def status(self, name: str) -> list[Region]:
        """The region of that name, or all of them where the name is empty.

        Raises:
            NotFound: there is none of that name.
        """
        with self._lock:
            if not name:
                return list(self._regions.values())
            if name not in self._regions:
                raise NotFound(f"Unable to find system shared memory region: {name!r}")
            return [self._regions[name]]

    def part(self, name: str, offset: int, byte_size: int) -> Part:
        """The part of a region that a request names.

        Args:
            name: of the region.
            offset: in the region, bytes.
            byte_size: bytes.

        Raises:
            NotSupported: shared memory is off.
            NotFound: no such region.
            BadInput: it is not within the region, or larger than MAX_PART.
        """
        self._check_enabled()
        with self._lock:
            region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: {name!r}")
        if not 0 <= offset <= region.byte_size:
            raise BadInput(
                f"Invalid offset for shared memory region: {name!r} has {region.byte_size} bytes, not {offset}."
            )
        if not 0 <= byte_size <= min(region.byte_size - offset, MAX_PART):
            raise BadInput(
                f"Invalid offset + byte size for shared memory region: {name!r} has {region.byte_size} bytes; got "
                f"offset {offset} and byte size {byte_size}, of which {MAX_PART} is the most."
            )
        return Part(region, offset, byte_size)

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise NotSupported("Client shared memory is disabled; start the server with --shared-memory.")


def _file(name: str, key: str) -> str:
    """The file of a key in FOLDER: never a path, and nothing that is reserved."""
    file = key.removeprefix("/")
    if file in ("", ".", "..") or "/" in file or "\0" in file or file.startswith(_RESERVED):
        raise BadInput(
            f"failed to register shared memory region {name!r}: invalid args: {key!r} is not the key of a shared "
            "memory object; expected '/name' without further slashes."
        )
    return file


def _open(name: str, key: str, file: str) -> int:
    """A descriptor of the object. Why there is none is not said: it would tell of other users' objects."""
    with suppress(OSError, UnicodeError):  # O_NONBLOCK: a pipe or a device would keep us waiting
        descriptor = os.open(FOLDER / file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise BadInput(
        f"Unable to open shared memory region: {key!r}, for region {name!r}. Create it first, readable and writable "
        "for the server's user, on the server's machine."
    )


def _is_left(region: Region) -> bool:
    """Whether its client has died: nobody else will unregister it."""
    if not region.key.removeprefix("/").startswith(LOCKED):
        return False
    import fcntl  # Windows has none, where clients import this module

    try:
        fcntl.flock(region.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _checked(region: Region) -> Region:
    size = os.fstat(region.descriptor).st_size
    if region.byte_size <= 0 or region.offset < 0 or region.offset + region.byte_size > size:
        raise BadInput(
            f"failed to register shared memory region {region.name!r}: invalid args: offset {region.offset} and byte "
            f"size {region.byte_size} are not within the object {region.key!r}."
        )
    return region

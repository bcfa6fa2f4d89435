"""Shared memory of a client: tensors that the server reads and writes in place. Linux, and a server on this machine."""

import math
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundle.errors import BadInput, EdgewardError
from bundle.tensor import NUMPY_TYPES
from serve.client.limits import whole
from serve.shared_memory import LOCKED
from serve.tensors import datatype_of, from_raw, to_raw

_SHM = Path("/dev/shm")  # where shm_open looks
_ALIGNMENT = 64  # bytes; a cache line, and what vector instructions like


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A place in a region: an input that is sent without its bytes, or room for an output."""

    region: "Region"
    offset: int  # bytes
    byte_size: int
    datatype: str
    shape: tuple[int, ...]

    @property
    def array(self) -> np.ndarray:
        """The memory itself, writable; of BYTES a copy. What is written here is what the next call sends."""
        return self.read(self.datatype, self.shape, self.byte_size)

    def read(self, datatype: str, shape: tuple[int, ...], byte_size: int) -> np.ndarray:
        """What a server wrote here: a view for numbers, a copy for BYTES.

        Raises:
            BadInput: it does not fit.
        """
        if byte_size > self.byte_size:
            raise BadInput(f"{byte_size} bytes of shared memory do not fit in {self.byte_size}.")
        memory = memoryview(self.region.memory)[self.offset : self.offset + byte_size]
        return from_raw(memory, datatype, shape, "shared memory")


class Region:
    """A region of shared memory, made by the client.

    Its memory is freed when the server has forgotten it and no array looks at it.

    Attributes:
        name: under which the server knows it.
        key: what the server opens.
        byte_size: of the region.
        memory: the mapping.
    """

    def __init__(self, byte_size: int) -> None:
        """Make it.

        Raises:
            BadInput: it is no number of bytes.
            EdgewardError: there is not so much shared memory, or none on this system.
        """
        self.name = f"{LOCKED}{secrets.token_hex(8)}"
        self.key = f"/{self.name}"
        self.byte_size = whole("the size of the region in bytes", byte_size, 1)
        self._end = 0
        try:
            self.memory = self._create()
        except OSError as error:
            self.remove_name()
            raise EdgewardError(
                f"{byte_size} bytes of shared memory cannot be had: {error.strerror}. {_SHM} has to be there and to "
                "have room."
            ) from error
        except BaseException:
            self.remove_name()
            raise

    def _create(self) -> mmap.mmap:
        import fcntl  # Windows has none

        file = os.open(_SHM / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)  # which the mapping keeps: so the server sees whether we live
            os.posix_fallocate(file, 0, self.byte_size)  # else memory that is not there is a SIGBUS later
            return mmap.mmap(file, self.byte_size)
        finally:
            os.close(file)

    def remove_name(self) -> None:
        """Nobody can open it any more; who has it open or mapped keeps it."""
        (_SHM / self.name).unlink(missing_ok=True)

    def tensor(self, shape: tuple[int, ...], dtype: np.dtype | type) -> SharedTensor:
        """Room for numbers, to be filled by way of its `array` or by the server.

        Raises:
            BadInput: there is no room left, a length is none (-1 in a model's metadata is any), or the protocol does
                not have the dtype.
        """
        lengths = tuple(whole("a length of the shape", length, 0) for length in shape)
        datatype = datatype_of(np.empty(0, dtype), "a tensor in shared memory")
        if datatype == "BYTES":
            raise BadInput("room for texts is a tensor of uint8, as many as their bytes and 4 for each.")
        byte_size = math.prod(lengths) * NUMPY_TYPES[datatype].itemsize
        return SharedTensor(self, self._take(byte_size), byte_size, datatype, lengths)

    def put(self, array: np.ndarray) -> SharedTensor:
        """A copy of an array of any datatype.

        Raises:
            BadInput: there is no room left, or the protocol does not have the dtype or an element.
        """
        datatype = datatype_of(array, "a tensor in shared memory")
        raw = to_raw(array, datatype, "a tensor in shared memory")
        offset = self._take(len(raw))
        self.memory[offset : offset + len(raw)] = raw
        return SharedTensor(self, offset, len(raw), datatype, array.shape)

    def clear(self) -> None:
        """Take the room of every tensor back; those that were made before are overwritten by what comes."""
        self._end = 0

    def _take(self, byte_size: int) -> int:
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if start + byte_size > self.byte_size:
            raise BadInput(
                f"{byte_size} bytes do not fit: {max(self.byte_size - start, 0)} of the region's {self.byte_size} are "
                "left. Make it larger, or clear it."
            )
        self._end = start + byte_size
        return start

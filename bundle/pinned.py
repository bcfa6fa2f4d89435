"""Copies between numpy arrays and a GPU, by CUDA's own runtime library, which onnxruntime has loaded.

Page-locked ("pinned") memory is what a GPU reads and writes by itself; of any other the driver makes a copy first.
onnxruntime's Python interface allocates none.
"""

import ctypes
import weakref
from collections.abc import Sequence
from math import prod

import numpy as np

from bundle.errors import ModelError
from bundle.runtime import onnxruntime

SMALLEST = 4096  # bytes of a block; larger ones are powers of two, so that few sizes serve all

_TO_DEVICE, _TO_HOST = 1, 2  # enum cudaMemcpyKind


class Memory:
    """Page-locked memory of this process, and copies to and from the memory of GPU 0.

    A block is used again when the last array that lies in it is gone, and never given back: there are as many as were
    ever needed at the same time. Any thread may call, and other threads run during a copy.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        """Take CUDA's runtime.

        Args:
            library: by default the one that this onnxruntime was built for.

        Raises:
            OSError: it is not there.
        """
        self._library = library or ctypes.CDLL(f"libcudart.so.{onnxruntime.cuda_version.split('.')[0]}")
        self._free: dict[int, list[int]] = {}  # addresses by size

    def from_device(self, address: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """A copy of what lies at an address of the GPU, in page-locked memory."""
        array = self.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)
        return array

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to an address of the GPU; done when this returns."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)
        # Of memory that is not page-locked the copy may still be on its way, and runs do not wait for this stream.
        self._check(self._library.cudaStreamSynchronize(None), "waiting for a copy to the GPU")

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array of any content.

        Raises:
            ModelError: there is no such memory left.
        """
        count = prod(shape)
        size = max(SMALLEST, 1 << (count * dtype.itemsize - 1).bit_length())
        free = self._free.setdefault(size, [])
        try:
            address = free.pop()
        except IndexError:
            address = self._allocate(size)
        block = memoryview((ctypes.c_char * size).from_address(address))
        flat: np.ndarray = np.frombuffer(block, dtype, count)  # which every view of the array holds
        weakref.finalize(flat, free.append, address).atexit = False
        return flat.reshape(shape)

    def _allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        status = self._library.cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(0))
        self._check(status, f"page-locking {size} bytes of memory")
        return pointer.value or 0

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        if size:
            status = self._library.cudaMemcpy(
                ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(kind)
            )
            self._check(status, f"copying {size} bytes")

    def _check(self, status: int, action: str) -> None:
        if status:
            raise ModelError(f"CUDA failed {action}: error {status}.")

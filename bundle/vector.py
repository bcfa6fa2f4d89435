"""Raw bytes -> vector of numbers: the only reading of vectors in the repository."""

import numpy as np

from bundle.errors import BadInput
from bundle.manifest import VectorInput

_DTYPE = np.dtype("<f4")


def decode(raw: bytes, spec: VectorInput) -> np.ndarray:
    """One vector, float32 (spec.size,), from its little-endian bytes.

    Raises:
        BadInput: there are more or fewer numbers, or one of them is not finite.
    """
    if len(raw) != spec.size * _DTYPE.itemsize:
        raise BadInput(
            f"vector has {len(raw)} bytes; expected {spec.size * _DTYPE.itemsize}, {spec.size} numbers of float32."
        )
    numbers = np.frombuffer(raw, _DTYPE).astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        position = int(finite.argmin())
        name = f", {spec.names[position]!r}," if spec.names else ""
        raise BadInput(f"vector is not finite: number {position}{name} is {numbers[position]}.")
    return numbers


def encode(numbers: np.ndarray) -> bytes:
    """The raw bytes of one vector of any numeric dtype."""
    return numbers.astype(_DTYPE).tobytes()

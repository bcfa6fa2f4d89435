"""What an earlier export computed of the same things: a second one with another budget takes seconds."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import numpy as np

from bundle.host import cpu_name, isa_class
from finetune.cache import array_bytes, bytes_array, kept

MAX_BYTES = 8 << 30
R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True)
class Memory:
    """Graphs, answers and timings, kept below `$XDG_CACHE_HOME/edgeward/export` as each is computed.

    An export that was interrupted goes on from there.

    Attributes:
        about: everything that all of them depend on, such as digests of checkpoint and data, and versions.
        enabled: without, everything is computed.
    """

    about: tuple[str, ...]
    enabled: bool = True

    def here(self) -> "Memory":
        """The memory of what this machine answers: kernels of another round, or saturate, otherwise."""
        return replace(self, about=(*self.about, isa_class(), cpu_name()))

    def blob(self, *what: object, compute: Callable[[], bytes]) -> bytes:
        """The bytes that `what` names, computed when they are not there."""
        if not self.enabled:
            return compute()
        key = hashlib.sha256(json.dumps([*self.about, *map(str, what)]).encode()).hexdigest()
        return kept("export", key, compute, max_bytes=MAX_BYTES)

    def array(self, *what: object, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The same of an array."""
        return bytes_array(self.blob(*what, compute=lambda: array_bytes(compute())))

    def record(self, kind: type[R], *what: object, compute: Callable[[], R]) -> R:
        """The same of a record."""
        return msgspec.json.decode(self.blob(*what, compute=lambda: msgspec.json.encode(compute())), type=kind)

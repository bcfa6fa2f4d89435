"""How long requests to a model take, from those before."""

import math
from collections import deque

SHORT_NS = 1_000_000  # less than that is mostly what a run costs besides, and joined requests pay it once

_KNOWN = 16  # requests that an estimate is made of
_EVERY = 4  # how many requests it is kept for
_LONG_NS = 30_000_000  # what holds up everybody else, if it was not expected
_WARY = 250  # requests after such a one of which nothing is expected


class Pace:
    """The lower quartile of the last durations: others may hold a request up, but nobody speeds it up.

    A request that took long is a warning: time may depend on what size does not tell, and for a while nobody knows.

    Made for one writer at a time, harmless with more.
    """

    def __init__(self) -> None:
        self._last_ns: deque[int] = deque(maxlen=_KNOWN)
        self._sizes: deque[int] = deque(maxlen=_KNOWN)
        self._seen = 0
        self._ns = math.inf
        self._size = 1.0

    def saw(self, size: int, ns: int) -> None:
        """Take a request into account.

        Args:
            size: of it, bytes.
            ns: how long it took.
        """
        self._last_ns.append(ns)
        self._sizes.append(size)
        self._seen += 1
        if ns > _LONG_NS:
            self._ns, self._seen = math.inf, -_WARY
        if self._seen > 0 and self._seen % _EVERY == 0:
            self._ns = sorted(self._last_ns)[len(self._last_ns) // 4]
            self._size = max(1.0, sum(self._sizes) / len(self._sizes))

    def expect_ns(self, size: int) -> float:
        """How long a request will take: as those before, and as much longer as it is larger; inf: nobody knows."""
        return self._ns * max(1.0, size / self._size)

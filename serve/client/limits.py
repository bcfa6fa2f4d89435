"""What the numbers of a client may be."""

from numbers import Real
from typing import Any

from bundle.errors import BadInput

LONGEST_S = 1e9  # 30 years; gRPC overflows where it is much more, and the deadline has passed at once


def seconds(timeout_s: Any) -> float:
    """A time that a call may take.

    Raises:
        BadInput: it is no number above 0.
    """
    if not (isinstance(timeout_s, Real) and float(timeout_s) > 0):
        raise BadInput(f"timeout_s is {timeout_s!r}; expected seconds, more than 0.")
    return min(float(timeout_s), LONGEST_S)

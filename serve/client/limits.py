"""What the numbers of a client may be."""

import operator
from numbers import Real
from typing import Any

from bundle.errors import BadInput

LONGEST_S = 1e9  # 30 years; gRPC overflows where it is much more, and the deadline has passed at once
LARGEST = 2**63 - 1  # an int64 of the protocol, and of the system


def whole(what: str, value: Any, least: int, most: int = LARGEST) -> int:
    """A count or a length.

    Raises:
        BadInput: it is no integer, or outside the limits.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise BadInput(f"{what} is {value!r}; expected an integer.") from error
    if not least <= number <= most:
        raise BadInput(f"{what} is {number}; expected {least} to {most}.")
    return number


def seconds(timeout_s: Any) -> float:
    """A time that a call may take.

    Raises:
        BadInput: it is no number above 0.
    """
    if not (isinstance(timeout_s, Real) and float(timeout_s) > 0):
        raise BadInput(f"timeout_s is {timeout_s!r}; expected seconds, more than 0.")
    return min(float(timeout_s), LONGEST_S)

"""Mixed precision: which groups of layers stay in fp32 so that the rest may be int8.

Ranked by how much harm int8 does in a group for every millisecond that it saves there; of that ranking the shortest
prefix is searched whose groups, kept in fp32, make the model accurate enough; what was then kept for nothing becomes
int8 again.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bundle.manifest import Record
from export.placement import Group

READMISSIONS = 8  # groups that are tried in int8 once more
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|_QuantizeLinear|_DequantizeLinear|_q|_output_\d+)+$")

Passes = Callable[[Sequence[Group]], bool]


class Kept(Record, frozen=True, kw_only=True):
    """A group of layers that stayed in fp32, and why."""

    group: str
    because: str
    harm: float | None = None  # by how much the KL divergence falls when it alone stays in fp32, nats
    gain_ms: float | None = None  # what int8 would have saved, of one run


@dataclass(frozen=True)
class Ranked:
    """A group and what int8 does there.

    Attributes:
        group: of layers.
        harm: by how much the KL divergence from the reference falls when this group alone is in fp32, nats.
        gain_ms: by how much a run is faster for it, conversions included; of most groups positive.
    """

    group: Group
    harm: float
    gain_ms: float

    @property
    def kept(self) -> Kept:
        """For the report."""
        because = "int8 was too harmful for what it saved" if self.gain_ms > 0 else "int8 was not faster here"
        return Kept(group=self.group.name, because=because, harm=self.harm, gain_ms=self.gain_ms)


def rank(groups: Sequence[Group], harms: Sequence[float], gains: Sequence[float]) -> list[Ranked]:
    """Those first that are best kept in fp32: where int8 saves nothing, then by harm for every millisecond saved."""
    ranked = [Ranked(*each) for each in zip(groups, harms, gains, strict=True)]
    return sorted(ranked, key=lambda one: -one.harm / one.gain_ms if one.gain_ms > 0 else -math.inf)


def affordable(ranked: Sequence[Ranked], room_ms: float) -> list[Ranked]:
    """The longest prefix that, kept in fp32, loses no more of a run's time than there is room for."""
    lost = np.cumsum([max(one.gain_ms, 0.0) for one in ranked])
    return list(ranked[: int(np.searchsorted(lost, room_ms, side="right"))])


def search(ranked: Sequence[Ranked], passes: Passes) -> list[Ranked] | None:
    """The groups to keep in fp32: few, and little time lost by them.

    A binary search of the prefix takes log₂ G trials. A longer prefix need not be better, so its neighbours are tried,
    too; then the kept groups are given back to int8 one by one, those first that save most.

    Args:
        ranked: the groups that may stay in fp32, those first that are best kept.
        passes: whether the model is accurate enough with these groups in fp32.

    Returns:
        Groups with which it passes, or None when no prefix that was tried does.
    """
    length = _shortest(ranked, passes)
    if length is None:
        return None
    kept = list(ranked[:length])
    for one in sorted(kept, key=lambda one: one.gain_ms, reverse=True)[:READMISSIONS]:
        without = [other for other in kept if other is not one]
        if one.gain_ms > 0 and without and passes([other.group for other in without]):
            kept = without
    return kept


def _shortest(ranked: Sequence[Ranked], passes: Passes) -> int | None:
    """The length of the shortest prefix that passes, as far as a binary search can tell; None: it found none."""
    known: dict[int, bool] = {}

    def passing(length: int) -> bool:
        if length not in known:
            known[length] = passes([one.group for one in ranked[:length]])
        return known[length]

    low, high = 0, len(ranked) + 1  # nothing kept fails, and all of these need not be enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passing(middle) else (middle, high)
    for length in (high - 2, high):
        if 0 < length <= len(ranked) and passing(length):
            return length
    return None


def times_of(groups: Sequence[Group], outputs: Mapping[str, str], times: Mapping[str, float]) -> list[float]:
    """How long each group takes in a run, in the unit of the times.

    ONNX Runtime names what it fused after a node or after the tensor that it gives, and adds an ending.

    Args:
        groups: of nodes.
        outputs: tensor -> the node that gives it, of the graph before it was optimised.
        times: of the nodes that were run, by name.
    """
    group_of = {node: i for i, group in enumerate(groups) for node in group.nodes}
    total = np.zeros(len(groups))
    for name, time in times.items():
        i = _first(group_of, outputs, (name, _SUFFIX.sub("", name)))
        if i is not None:
            total[i] += time
    return total.tolist()


def _first(group_of: Mapping[str, int], outputs: Mapping[str, str], names: Iterable[str]) -> int | None:
    for name in names:
        for node in (name, outputs.get(name, "")):
            if node in group_of:
                return group_of[node]
    return None

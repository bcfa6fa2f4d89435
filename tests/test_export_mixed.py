"""Mixed precision keeps few layers in fp32: those where int8 harms most for what it saves."""

import numpy as np
import pytest

from export.mixed import affordable, rank, search, times_of
from export.placement import Group


def groups(count):
    return [Group(name=f"g{i}", nodes=(f"conv{i}", f"relu{i}")) for i in range(count)]


def counted(needed):
    """A test that passes when these groups are in fp32, and how often it was asked."""
    asked = []

    def passes(kept):
        asked.append({group.name for group in kept})
        return needed <= asked[-1]

    return passes, asked


def test_ranks_by_harm_for_each_millisecond():
    """First where int8 saves nothing, then the most harm for a millisecond; last where fp32 would do harm."""
    ranked = rank(groups(5), harms=[0.1, 0.4, 0.3, -0.2, 0.0], gains=[1.0, 8.0, 2.0, 1.0, -0.5])
    assert [one.group.name for one in ranked] == ["g4", "g2", "g0", "g1", "g3"]


@pytest.mark.parametrize("needed", [{0}, {0, 1}, {2}, {5, 1}, {0, 1, 2, 3, 4, 5, 6}])
def test_keeps_what_it_takes_and_nothing_else(needed):
    """Of a prefix that passes, what was kept for nothing becomes int8 again, in a number of trials that stays small."""
    ranked = rank(groups(16), harms=np.arange(16, 0, -1).tolist(), gains=[1.0] * 16)
    passes, asked = counted({f"g{i}" for i in needed})
    kept = search(ranked, passes)

    assert {f"g{i}" for i in needed} <= {one.group.name for one in kept}
    assert len(kept) <= len(needed) + max(0, max(needed) + 1 - 8 - len(needed)) + 0
    assert len(asked) <= 4 + 2 + 8


def test_gives_up_when_all_that_may_stay_is_not_enough():
    """All of the groups are tried, and with none that passes there is no mixed precision."""
    ranked = rank(groups(6), harms=np.arange(6, 0, -1).tolist(), gains=[1.0] * 6)
    passes, asked = counted({"g6"})
    assert search(ranked, passes) is None
    assert {f"g{i}" for i in range(6)} in asked
    assert search(ranked[:0], passes) is None


def test_only_what_there_is_time_for_may_stay_in_fp32():
    """The prefix is as long as its losses fit the room; where int8 saves nothing, nothing is lost."""
    ranked = rank(groups(4), harms=[0.4, 0.3, 0.2, 0.1], gains=[2.0, 2.0, -1.0, 2.0])
    for room, names in ((-0.1, []), (1.9, ["g2"]), (4.0, ["g2", "g0", "g1"]), (9.0, ["g2", "g0", "g1", "g3"])):
        assert [one.group.name for one in affordable(ranked, room)] == names


def test_a_longer_prefix_that_fails_does_not_hide_a_shorter_one():
    """Accuracy is not monotone in what is kept: the prefix that was found must itself pass."""
    ranked = rank(groups(9), harms=np.arange(9, 0, -1).tolist(), gains=[1.0] * 9)
    kept = search(ranked, lambda some: len(some) in (3, 5, 6, 7, 8))
    assert kept is not None
    assert len(kept) in (3, 5, 6, 7, 8)


def test_times_belong_to_the_groups_of_fused_nodes():
    """What the runtime fused is named after a node, or after the tensor that a node gives."""
    times = {
        "conv0_token_12": 2.0,
        "out0_nchwc": 3.0,
        "relu1": 5.0,
        "out1_QuantizeLinear": 7.0,
        "elsewhere": 11.0,
        "ReorderOutput": 13.0,
    }
    assert times_of(groups(2), {"out0": "relu0", "out1": "conv1"}, times) == [5.0, 12.0]


def test_why_a_group_stayed_is_said():
    """The report gives each kept group its harm and what int8 would have saved."""
    harmful, useless = (one.kept for one in rank(groups(2), harms=[0.25, 0.1], gains=[0.5, 0.0])[::-1])
    assert (harmful.harm, harmful.gain_ms, harmful.because) == (0.25, 0.5, "int8 was too harmful for what it saved")
    assert useless.because == "int8 was not faster here"

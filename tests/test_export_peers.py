from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.peers.judge import Made, Row, best, front, plain, ranked, table
from export.gate import judge

TRUTH = np.arange(1000) % 2


def row(name, *, lost, ratio):
    """A file that answers `lost` of 1000 examples wrong, all of which PyTorch answers right, at a latency ratio."""
    record = judge(TRUTH, TRUTH, np.where(np.arange(1000) < lost, 1 - TRUTH, TRUTH), budget=0.01)
    timing = SimpleNamespace(ratio=ratio, ratio_upper=ratio, p50_ms=ratio, reference_p50_ms=1.0)
    return Row(Made(name, None, options="as made"), record, timing, threads=1, mb=1.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({"a": (0.0, 0.5), "b": (0.01, 0.4)}, {"a", "b"}),  # each better in one
        ({"a": (0.0, 0.5), "b": (0.01, 0.5)}, {"a"}),  # as fast, less accurate
        ({"a": (0.0, 0.5), "b": (0.0, 0.6)}, {"a"}),  # as accurate, slower
        ({"a": (0.0, 0.5), "b": (0.0, 0.5)}, {"a", "b"}),  # equal: neither beats the other
        ({"a": (-0.01, 0.4), "b": (0.0, 0.5), "c": (0.02, 0.3)}, {"a", "c"}),
        ({}, set()),
    ],
)
def test_front_is_what_nothing_beats(points, expected):
    """A point is off the front when another is no worse in both and better in one."""
    assert front(points) == expected


def test_ranked_by_verdict_and_then_by_speed():
    """The fastest that passes comes first, a faster one that fails later, and what could not be judged last."""
    broken = Row(Made("broken", None, error="no file"), error="no file")
    rows = [
        broken,
        row("fails", lost=60, ratio=0.1),
        row("undecided", lost=8, ratio=0.2),
        row("slow", lost=0, ratio=0.9),
        row("fast", lost=1, ratio=0.4),
    ]

    assert [one.made.name for one in ranked(rows)] == ["fast", "slow", "undecided", "fails", "broken"]


def test_table_keeps_what_lost_and_what_broke():
    """Every row is in the table and in the notes; bold is the front, and an error stands where its figures would."""
    rows = [
        row("beaten", lost=2, ratio=0.5),
        row("front", lost=1, ratio=0.4),
        Row(Made("broken", None, options="as made"), error="ModelError: no such operator"),
    ]

    shown = table(rows)

    assert best(rows) == {"front"}
    assert "| **front** | PASS |" in shown
    assert "| beaten | PASS |" in shown
    assert "| broken | error |" in shown
    assert "- broken: ModelError: no such operator" in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1
    assert plain(rows[2], on_front=False)["error"] == "ModelError: no such operator"

from types import SimpleNamespace

import numpy as np

from benchmarks.peers import judge as court
from benchmarks.peers.judge import Made, Row, best, plain, ranked, table
from export.gate import judge

TRUTH = np.arange(1000) % 2


def row(name, *, lost, ratio, width=0.0):
    """A file that answers `lost` of 1000 examples wrong, all of which PyTorch answers right, at a latency ratio."""
    answers = np.where(np.arange(1000) < lost, 1 - TRUTH, TRUTH)
    record = judge(TRUTH, TRUTH, answers, budget=0.01)
    timing = SimpleNamespace(
        ratio=ratio, ratio_lower=ratio - width, ratio_upper=ratio + width, p50_ms=ratio, reference_p50_ms=1.0
    )
    noise = width * np.random.default_rng(len(name)).permuted(np.linspace(-1, 1, court.ROUNDS))
    times = np.tile((ratio + noise)[:, None], 3)
    return Row(Made(name, None, options="as made"), record, timing, threads=1, right=answers == TRUTH, times=times)


def names(*rows):
    return best(rows)


def test_front_is_what_nothing_surely_beats():
    """A row is off the front when another is surely better in one, not surely worse in the other; or when it fails."""
    accurate = row("accurate", lost=0, ratio=0.5)
    assert names(accurate, row("faster", lost=4, ratio=0.4)) == {"accurate", "faster"}
    assert names(accurate, row("slower", lost=0, ratio=0.6)) == {"accurate"}
    assert names(row("alike", lost=0, ratio=0.5), accurate) == {"accurate", "alike"}
    assert names(row("failing", lost=60, ratio=0.1), accurate) == {"accurate"}
    assert names() == set()


def test_what_cannot_be_told_is_no_loss():
    """One answer fewer of 1000, or a median within the other's interval, does not beat; five answers fewer do."""
    good = row("good", lost=0, ratio=0.5)
    assert names(good, row("faster, one fewer", lost=1, ratio=0.4)) == {"faster, one fewer"}
    assert names(good, row("one fewer", lost=1, ratio=0.5)) == {"good", "one fewer"}
    assert names(good, row("five fewer", lost=5, ratio=0.5)) == {"good"}
    assert names(row("fast", lost=0, ratio=0.49, width=0.05), row("own", lost=0, ratio=0.5, width=0.05)) == {
        "fast",
        "own",
    }
    assert names(row("fast", lost=0, ratio=0.45, width=0.02), row("own", lost=0, ratio=0.5, width=0.02)) == {"fast"}


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
        row("beaten", lost=1, ratio=0.5),
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


def test_all_files_are_timed_against_the_faster_fp32(monkeypatch):
    """One figure for all: the same graph gets the same row, whichever number of threads is slow just now."""
    per_run = {("fp32", 1): 2.0, ("fp32", 2): 3.0, ("int8", 1): 1.5, ("int8", 2): 1.0}
    monkeypatch.setattr(court, "cpu_count", lambda: 2)
    monkeypatch.setattr(court, "Session", lambda graph, *, device, threads: (graph, threads))
    monkeypatch.setattr(court, "seconds", lambda session, feed: per_run[session] * feed)

    (fp32, one, _), (int8, two, times) = court.timed(["fp32", "int8"], "fp32", [1.0, 2.0, 3.0])

    assert (fp32.ratio, one) == (1.0, 1)
    assert (int8.ratio, int8.ratio_lower, int8.ratio_upper, two) == (0.5, 0.5, 0.5, 2)
    assert times.tolist() == [[1.0, 2.0, 3.0]] * court.ROUNDS
    assert (int8.p50_ms, int8.reference_p50_ms) == (2e3, 4e3)

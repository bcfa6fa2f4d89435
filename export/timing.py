"""Which of two graphs is faster here: runs in turns, so that a drifting machine drifts for both."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bundle.host import cpu_count
from bundle.session import Session

Feeds = Mapping[str, np.ndarray]
BLOCKS = 16  # of four turns
SESSIONS = 2  # with several threads, of which one can be slow by a third for as long as it lives
RUNS = 3  # of a turn that count; one before them brings the weights back into the caches, as under steady load
BUDGET_S = 8.0  # after which no further block is begun, once there are enough for an interval
FEWEST_BLOCKS = 12
WARMUPS = 3


@dataclass(frozen=True)
class Timing:
    """A candidate against a reference, on the same inputs."""

    p50_ms: float  # of a run
    reference_p50_ms: float
    ratio: float  # median over the blocks of candidate / reference
    ratio_lower: float  # ends of its 95% bootstrap interval
    ratio_upper: float


Timer = Callable[[Session, Session, Sequence[Feeds]], Timing]


def compared(candidate: Sequence[float], reference: Sequence[float]) -> Timing:
    """What two sessions took in the same blocks, seconds a run."""
    a, b = np.array(candidate), np.array(reference)
    ratios = a / b
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    lower, upper = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    return Timing(
        p50_ms=float(np.median(a)) * 1e3,
        reference_p50_ms=float(np.median(b)) * 1e3,
        ratio=float(np.median(ratios)),
        ratio_lower=float(lower),
        ratio_upper=float(upper),
    )


def interleaved(candidate: Session, reference: Session, feeds: Sequence[Feeds]) -> Timing:
    """Time both sessions on the same inputs, each block in the order A B B A.

    Args:
        candidate: A.
        reference: B.
        feeds: inputs of one run each; block i takes feeds[i % len(feeds)].
    """
    for session in (candidate, reference):
        for i in range(WARMUPS):
            session.run(feeds[i % len(feeds)])
    a, b = [], []
    end = time.perf_counter() + BUDGET_S
    for i in range(BLOCKS):
        if i >= FEWEST_BLOCKS and time.perf_counter() > end:
            break
        one = feeds[i % len(feeds)]
        first, second, third, fourth = (seconds(s, one) for s in (candidate, reference, reference, candidate))
        a.append((first + fourth) / 2)
        b.append((second + third) / 2)
    return compared(a, b)


def fastest(
    compiled: bytes,
    reference: Session,
    feeds: Sequence[Feeds],
    timer: Timer = interleaved,
    *,
    threads: int | None = None,
) -> tuple[Timing, Session]:
    """A graph with as many threads as suit it, one or all: a small model loses by sharing its work out.

    With all of them, the fastest of SESSIONS sessions counts. One it is only where it is surely faster than that, side
    by side: ratios to the reference are of different moments.

    Args:
        compiled: the graph.
        reference: what it is timed against.
        feeds: inputs of one example each.
        timer: compares the latency of two sessions.
        threads: all of them; None: all cores that this process may use.
    """

    def timed(count: int) -> tuple[Timing, Session]:
        session = Session(compiled, device=reference.device, threads=count)
        return timer(session, reference, feeds), session

    alone, everything = 1, threads or cpu_count()
    if everything == alone:
        return timed(alone)
    best = min((timed(everything) for _ in range(SESSIONS)), key=lambda each: each[0].ratio)
    one = timed(alone)
    if one[0].ratio < best[0].ratio and timer(one[1], best[1], feeds).ratio_upper < 1:
        return one
    return best


def seconds(session: Session, feeds: Feeds) -> float:
    """One turn: the mean time of a run, in seconds, after one that does not count."""
    session.run(feeds)
    start = time.perf_counter()
    for _ in range(RUNS):
        session.run(feeds)
    return (time.perf_counter() - start) / RUNS

"""Quantized files of any origin, judged in one run: on the same held-out examples, and in turns with the same fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.prepare import opened, rows_of
from bundle import preprocess
from bundle.errors import EdgewardError
from bundle.host import cpu_count
from bundle.manifest import GateRecord, Input, Task
from bundle.model import predict_logits
from bundle.session import Session
from export.gate import judge_tasks
from export.graph import joined
from export.proportions import drop_bounds
from export.timing import Feeds, Timing, compared, seconds
from finetune import evaluate
from finetune.target import Target

TIMED = 32  # examples that are timed in turns
ROUNDS = 7  # each with new sessions; an odd number
SURE = 1.943  # 0.95 quantile of Student's t with ROUNDS - 1 degrees of freedom
VERDICTS = ("PASS", "INCONCLUSIVE", "FAIL")


@dataclass(frozen=True)
class Made:
    """What a tool made of the fp32 graph, and how."""

    name: str
    model: Path | None  # none: it failed
    options: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    peak_mib: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """A made file, judged; without a record it could not be."""

    made: Made
    record: GateRecord | None = None
    timing: Timing | None = None
    threads: int = 0
    mb: float = 0.0
    error: str | None = None
    times: np.ndarray = field(default_factory=lambda: np.zeros((ROUNDS, 0)))  # seconds of a run, (ROUNDS, TIMED)
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # which examples it answers right, bool (N,)


class Judge:
    """The held-out examples of a checkpoint, what PyTorch says of them, and the fp32 graph."""

    def __init__(self, checkpoint: Path, fp32: bytes, budget: float) -> None:
        loaded, dataset = opened(checkpoint)
        rows, indices = rows_of(loaded, dataset, "gate")
        self.budget = budget
        self._spec: Input = loaded.spec.input
        self._tasks: tuple[Task, ...] = loaded.spec.tasks
        self._rows: Sequence[np.ndarray] = list(rows)
        self._targets: tuple[Target, ...] = tuple(target.take(indices) for target in dataset.targets)
        self._reference = evaluate.logits(loaded.network, self._rows, self._spec)
        self._reference_graph = fp32

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, made: Sequence[Made]) -> list[Row]:
        """Judge all files, one example a run, and time them in turns."""
        rows = [self._judged(one) for one in made]
        ran = [i for i, row in enumerate(rows) if row.record is not None]
        graphs = [path.read_bytes() for i in ran if (path := made[i].model) is not None]
        feeds = [preprocess.collate([row], self._spec) for row in self._rows[:TIMED]]
        for i, (timing, threads, times) in zip(ran, timed(graphs, self._reference_graph, feeds), strict=True):
            rows[i] = replace(rows[i], timing=timing, threads=threads, times=times)
        return rows

    def _judged(self, made: Made) -> Row:
        """What a file answers, its time not looked at."""
        if made.model is None:
            return Row(made, error=made.error)
        graph = made.model.read_bytes()
        try:
            session = Session(graph, device="cpu")
            outputs = predict_logits(session, self._spec, self._rows, batch_invariant=False)
            logits = joined(outputs, self._tasks)
        except (EdgewardError, KeyError) as error:  # KeyError: it lost the names of its outputs
            return Row(made, error=f"{type(error).__name__}: {error}")
        (record,) = judge_tasks(self._tasks, self._targets, self._reference, logits, budget=self.budget)
        right = logits.argmax(axis=1) == self._targets[0].values
        return Row(made, record, mb=len(graph) / 1e6, right=right)


def timed(graphs: Sequence[bytes], reference: bytes, feeds: Sequence[Feeds]) -> list[tuple[Timing, int, np.ndarray]]:
    """Each graph with one thread or with all, whichever is faster: against the faster of the two of the reference.

    All run in turns, forwards and backwards, so that what befalls the machine befalls them all. Two sessions of one
    file can differ by 6% for as long as they live, and with two threads by a third: hence the rounds.

    Returns:
        Of each graph the timing, the number of threads, and the seconds of a run, (ROUNDS, feeds).
    """
    counts = sorted({1, cpu_count()})
    rounds = [_turns([reference, *graphs], counts, feeds) for _ in range(ROUNDS)]
    times = np.array(rounds)  # (round, graph, number of threads, feed)
    fp32 = [min(each[0], key=np.median) for each in times]
    found = []
    for i in range(1, len(graphs) + 1):
        over = [_over([compared(*each) for each in zip(times[:, i, j], fp32, strict=True)]) for j in range(len(counts))]
        j = min(range(len(counts)), key=lambda j: over[j].ratio)
        found.append((over[j], counts[j], times[:, i, j]))
    return found


def _turns(graphs: Sequence[bytes], counts: Sequence[int], feeds: Sequence[Feeds]) -> list[list[list[float]]]:
    """Seconds of a run: by graph, number of threads and feed."""
    sessions = [Session(graph, device="cpu", threads=count) for graph, count in product(graphs, counts)]
    took: list[list[float]] = [[] for _ in sessions]
    for i, feed in enumerate(feeds):
        for j in range(len(sessions))[:: 1 if i % 2 == 0 else -1]:
            took[j].append(seconds(sessions[j], feed))
    return [took[i : i + len(counts)] for i in range(0, len(took), len(counts))]


def _over(rounds: Sequence[Timing]) -> Timing:
    """The middle one, with an interval that holds those of all."""
    middle = sorted(rounds, key=lambda one: one.ratio)[len(rounds) // 2]
    lower, upper = min(one.ratio_lower for one in rounds), max(one.ratio_upper for one in rounds)
    return replace(middle, ratio_lower=lower, ratio_upper=upper)


def beaten(own: Row, other: Row) -> bool:
    """Whether the other is surely better in accuracy or latency, and not surely worse in the one that is left.

    Surely, with 95% confidence each: by the ratio of their times, of which every round is one observation, or by the
    exact examples that only one of them answers right and Tango's bound. What neither the clock nor the examples can
    tell is no difference, for either of them.
    """
    faster, slower = _faster(other, own), _faster(own, other)
    better, worse = _more_accurate(other, own), _more_accurate(own, other)
    return (faster and not worse) or (better and not slower)


def _faster(one: Row, other: Row) -> bool:
    rounds = np.log(np.median(one.times / other.times, axis=1))
    return bool(rounds.mean() + SURE * rounds.std(ddof=1) / len(rounds) ** 0.5 < 0)


def _more_accurate(one: Row, other: Row) -> bool:
    lost, won = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    return drop_bounds(lost, won, len(one.right), 0.95)[0] > 0


def ranked(rows: Sequence[Row]) -> list[Row]:
    """By verdict, then the fastest first; what could not be judged comes last."""

    def key(row: Row) -> tuple[int, float]:
        if row.record is None or row.timing is None:
            return len(VERDICTS), 0.0
        return VERDICTS.index(row.record.verdict), row.timing.ratio

    return sorted(rows, key=key)


def best(rows: Sequence[Row]) -> set[str]:
    """The names of the rows on the Pareto front of those that passed: none of these surely beats them."""
    passed = [row for row in rows if row.record and row.record.verdict == "PASS"]
    return {row.made.name for row in passed if not any(beaten(row, other) for other in passed)}


def table(rows: Sequence[Row]) -> str:
    """Markdown, ranked; the names of those on the front are bold."""
    measures = ("drop, points (95% upper)", "× fp32 (range)", "p50 ms", "threads", "MB", "made in s", "peak MiB")
    lines = [f"| | verdict | {' | '.join(measures)} |", "|---" * (len(measures) + 2) + "|"]
    bold = best(rows)
    for row in ranked(rows):
        name = f"**{row.made.name}**" if row.made.name in bold else row.made.name
        cost = " | ".join("" if value is None else f"{value:.0f}" for value in (row.made.seconds, row.made.peak_mib))
        lines.append(f"| {name} | {_judged(row)} | {cost} |")
    notes = [f"- {row.made.name}: {_note(row)}" for row in ranked(rows)]
    return "\n".join([*lines, "", *notes])


def _judged(row: Row) -> str:
    if row.record is None or row.timing is None:
        return "error | | | | | "
    record, timing = row.record, row.timing
    return (
        f"{record.verdict} | {100 * record.drop:+.2f} ({100 * record.drop_upper:.2f}) | "
        f"{timing.ratio:.2f} ({timing.ratio_lower:.2f} to {timing.ratio_upper:.2f}) | "
        f"{timing.p50_ms:.2f} | {row.threads} | {row.mb:.1f}"
    )


def _note(row: Row) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in row.made.versions.items())
    what = row.error or row.made.options
    return f"{what} ({versions})" if versions else what


def plain(row: Row, on_front: bool) -> dict[str, Any]:
    """A row as JSON has it."""
    record, timing, made = row.record, row.timing, row.made
    judged: dict[str, Any] = {"error": row.error}
    if record and timing:
        judged = {
            "verdict": record.verdict,
            "examples": record.examples,
            "accuracy": record.served,
            "pytorch": record.reference,
            "drop": record.drop,
            "drop_upper": record.drop_upper,
            "disagreement": record.disagreement,
            "ratio": timing.ratio,
            "ratio_lower": timing.ratio_lower,
            "ratio_upper": timing.ratio_upper,
            "p50_ms": timing.p50_ms,
            "fp32_p50_ms": timing.reference_p50_ms,
            "threads": row.threads,
            "mb": row.mb,
            "front": on_front,
        }
    return {
        "name": made.name,
        "options": made.options,
        "versions": dict(made.versions),
        "seconds": made.seconds,
        "peak_mib": made.peak_mib,
        **judged,
    }

"""Quantized files of any origin, judged in one run: on the same held-out examples, and in turns with the same fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from export.timing import Timing, interleaved
from finetune import evaluate
from finetune.target import Target

TIMED = 32  # examples that are timed in turns
SESSIONS = 3  # an odd number
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
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # which examples it answers right, bool (N,)

    @property
    def point(self) -> tuple[float, float] | None:
        """Its drop of accuracy and its latency's ratio to fp32's; the smaller, the better."""
        return (self.record.drop, self.timing.ratio) if self.record and self.timing else None


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

    def row(self, made: Made) -> Row:
        """Judge one file, one example a run; with one thread and with all, of which the faster counts."""
        if made.model is None:
            return Row(made, error=made.error)
        try:
            graph = made.model.read_bytes()
            timing, session = self._fastest(graph)
            outputs = predict_logits(session, self._spec, self._rows, batch_invariant=False)
            logits = joined(outputs, self._tasks)
        except (EdgewardError, KeyError) as error:  # KeyError: it lost the names of its outputs
            return Row(made, error=f"{type(error).__name__}: {error}")
        (record,) = judge_tasks(self._tasks, self._targets, self._reference, logits, budget=self.budget)
        right = logits.argmax(axis=1) == self._targets[0].values
        return Row(made, record, timing, session.threads, len(graph) / 1e6, right=right)

    def _fastest(self, graph: bytes) -> tuple[Timing, Session]:
        """With one thread or all, whichever is faster; of SESSIONS pairs of new sessions each.

        Two sessions of one file can differ by 6% for as long as they live; the interval has to hold that as well.
        """
        feeds = [preprocess.collate([row], self._spec) for row in self._rows[:TIMED]]
        timed = []
        for threads in sorted({1, cpu_count()}):
            session = Session(graph, device="cpu", threads=threads)
            found = [interleaved(session, self._fp32(), feeds)]
            found += [
                interleaved(Session(graph, device="cpu", threads=threads), self._fp32(), feeds)
                for _ in range(SESSIONS - 1)
            ]
            middle = sorted(found, key=lambda one: one.ratio)[SESSIONS // 2]
            lower, upper = min(one.ratio_lower for one in found), max(one.ratio_upper for one in found)
            timed.append((replace(middle, ratio_lower=lower, ratio_upper=upper), session))
        return min(timed, key=lambda each: each[0].ratio)

    def _fp32(self) -> Session:
        return Session(self._reference_graph, device="cpu")


def beaten(own: Row, other: Row) -> bool:
    """Whether the other is no worse in accuracy and latency, and surely better in one of them.

    Surely: the intervals of the latency ratios do not meet, or the exact examples that only one of them answers right
    show it by Tango's bound. What neither the clock nor the examples can tell is no loss.
    """
    if own.point is None or other.point is None or own.timing is None or other.timing is None:
        return False
    if any(theirs > mine for theirs, mine in zip(other.point, own.point, strict=True)):
        return False
    lost, won = int((other.right & ~own.right).sum()), int((own.right & ~other.right).sum())
    more_accurate = drop_bounds(lost, won, len(own.right), 0.95)[0] > 0
    return more_accurate or other.timing.ratio_upper < own.timing.ratio_lower


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

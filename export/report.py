"""The accuracy report: report.json in the bundle, and what it says on the terminal."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle.manifest import GateRecord, Latency, Multiclass, Multilabel, Provenance, Record, Task
from export import gate
from export.bench import BatchLatency
from export.config import Objective
from export.fidelity import Fidelity
from export.graph import Parity
from export.mixed import Kept
from export.robustness import Robustness
from finetune import evaluate
from finetune.target import Target

FORMAT_VERSION = 3
MOST_FLIPS = 50  # that are listed
Outcome = Literal["shipped", "slower", "larger", "less accurate", "not passed", "failed", "not chosen"]
Scores = dict[str, float]
"""By metric; of several tasks with the prefix `TASK.`"""


class Candidate(Record, frozen=True, kw_only=True):
    """One compiled variant that was tried."""

    name: str
    recipe: str  # how it was made, a clause
    bytes: int
    batch_invariant: bool
    latency: Latency | None  # at batch 1; none when it was not worth timing
    rows_per_s: float | None = None  # at the served batch
    selection: Scores  # of the variant, on the selection split
    selection_drop: Scores  # PyTorch minus the variant, there, of each gated metric; of an error the relative increase
    selection_drop_interval: dict[str, tuple[float, float]]  # of each, both one-sided bounds
    fidelity: tuple[Fidelity, ...]  # on the selection split
    leftovers: int  # conversions between int8 and fp32 that the runtime left in the graph
    kept: tuple[Kept, ...] = ()
    outcome: Outcome
    because: str  # why this outcome, a clause


class Confusion(Record, frozen=True, kw_only=True):
    """Counts of a multiclass task on the gate split, rows the truth and columns the answer, in the labels' order."""

    task: str | None
    labels: tuple[str, ...]
    pytorch: tuple[tuple[int, ...], ...]
    served: tuple[tuple[int, ...], ...]


class Flip(Record, frozen=True, kw_only=True):
    """An example of the gate split whose answer the compiled variant changed."""

    task: str | None
    example: int  # its position in the data
    truth: str
    pytorch: str
    served: str


class Report(Record, frozen=True, kw_only=True):
    """Everything that was measured, and what followed from it."""

    format_version: int
    name: str
    version: int
    reference: str = "PyTorch"  # what everything is held to
    shipped: str
    budget: float  # largest drop that passes: of a fraction of right answers, or relative to an error
    confidence: float
    optimize: Objective
    certifiable: Scores  # the smallest drops that the gate split could have ruled out; of some metrics there is none
    examples: dict[str, int]
    parity: Parity
    fusions: dict[str, int]  # operators that the runtime, or export, fused, by kind
    candidates: tuple[Candidate, ...]
    gate: tuple[GateRecord, ...]  # for each task, of the one candidate that was gated; empty when none was worth it
    pytorch: Scores  # on the gate split
    served: Scores
    comparison: tuple[GateRecord, ...]  # for each task, of what ships; for fp32, which passes on parity, a description
    fidelity: tuple[Fidelity, ...]  # of what ships, on the gate split
    robustness: Robustness  # of what ships
    batches: tuple[BatchLatency, ...]
    confusion: tuple[Confusion, ...]
    flips: tuple[Flip, ...]  # the first MOST_FLIPS
    provenance: Provenance


def scores(tasks: Sequence[Task], logits: np.ndarray, targets: Sequence[Target]) -> Scores:
    """What finetune.evaluate.score says of logits float32 (N, columns of all tasks), the names being the gate's.

    Of a multilabel task the fraction of examples whose every label is right is called exact_match.
    """
    measured = evaluate.score(tasks, logits, targets)
    sets = [metric(tasks, task, "accuracy") for task in tasks if isinstance(task, Multilabel)]
    return {
        name.removesuffix("accuracy") + "exact_match" if name in sets else name: value
        for name, value in measured.items()
    }


def failed(name: str, recipe: str, because: str) -> Candidate:
    """A variant that could not be compiled."""
    return Candidate(
        name=name,
        recipe=recipe,
        bytes=0,
        batch_invariant=False,
        latency=None,
        selection={},
        selection_drop={},
        selection_drop_interval={},
        fidelity=(),
        leftovers=0,
        outcome="failed",
        because=because,
    )


def answer(task: Multiclass | Multilabel, predicted: np.ndarray) -> str:
    """A predicted or true label, or set of labels bool (C,), in words; a missing one is empty."""
    if isinstance(task, Multiclass):
        return task.labels[int(predicted)] if predicted >= 0 else ""
    return ", ".join(label for label, holds in zip(task.labels, predicted, strict=True) if holds == 1)


def metric(tasks: Sequence[Task], task: Task, name: str) -> str:
    """The key of a task's metric."""
    return f"{task.name}.{name}" if len(tasks) > 1 else name


def key(record: GateRecord) -> str:
    """The key of a gate record's metric."""
    return f"{record.task}.{record.metric}" if record.task else record.metric


def render(report: Report) -> Group:
    """The report as tables for a terminal."""
    verdict = f"Gate {gate.closest(report.gate).verdict}: " if report.gate else ""
    return Group(_candidates(report), _accuracy(report), Text(verdict + headline(report)))


def _candidates(report: Report) -> Table:
    table = Table(title=f"{report.name} version {report.version}: variants", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    gated = [key(record) for record in report.comparison]
    lost = [f"{words(name)} lost, {'%' if is_error(name) else 'points'}" for name in gated]
    for column in ("variant", "MB", "p50 ms", "× fp32", "rows/s", *lost, "batched", ""):
        table.add_column(column, justify="left" if column in ("variant", "") else "right", overflow="fold")
    for one in report.candidates:
        table.add_row(
            one.name,
            f"{one.bytes / 1e6:.1f}" if one.bytes else "–",
            *_time(one.latency),
            "–" if one.rows_per_s is None else f"{one.rows_per_s:.0f}",
            *(_lost(one, name) for name in gated),
            "yes" if one.batch_invariant else "no",
            one.outcome,
            style="bold" if one.outcome == "shipped" else "",
        )
    return table


def _time(latency: Latency | None) -> tuple[str, str]:
    """Of one run, and as a share of fp32's with the upper end of its interval."""
    return (f"{latency.p50_ms:.2f}", f"{latency.ratio:.2f} ≤ {latency.ratio_upper:.2f}") if latency else ("–", "–")


def _lost(one: Candidate, name: str) -> str:
    """Drop on the selection split, and its upper bound."""
    if name not in one.selection_drop:
        return "–"
    interval = one.selection_drop_interval.get(name)
    return f"{100 * one.selection_drop[name]:+.2f}" + (f" ≤ {100 * interval[1]:.2f}" if interval else "")


def _accuracy(report: Report) -> Table:
    table = Table(
        title=f"on {report.examples['gate']} held-out examples (gate split)", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("", report.reference, report.shipped, "lost", "at most"):
        table.add_column(column, justify="right" if column else "left")
    for row in accuracy(report):
        table.add_row(*row)
    return table


def accuracy(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Every metric on the gate split as words: its name, of PyTorch, of what ships, the loss, its upper bound."""
    compared = {key(record): record for record in report.comparison}
    rows = []
    for name, before in report.pytorch.items():
        if name.rpartition(".")[2] == "loss":
            continue
        after, record = report.served[name], compared.get(name)
        worse = before - after if evaluate.better(name, 1, 0) else after - before
        lost = ("" if np.isnan(worse) else f"{worse:+.4g}") if record is None else amount(name, record.drop, sign="+")
        upper = "" if record is None else amount(name, record.drop_upper)
        rows.append((words(name), _value(before), _value(after), lost, upper))
    return rows


def _value(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "not defined"


def words(name: str) -> str:
    """A metric as people write it."""
    task, _, bare = name.rpartition(".")
    bare = {"rmse": "RMSE", "mae": "MAE", "r2": "R²", "mcc": "MCC", "auroc": "AUROC"}.get(
        bare, bare.replace("_", " ").replace("f1", "F1")
    )
    return f"{task} {bare}".strip()


def is_error(name: str) -> bool:
    """Whether a metric is an error, whose drop is its relative increase."""
    return evaluate.better(name, 0, 1)


def amount(name: str, drop: float, sign: Literal["", "+"] = "") -> str:
    """A drop of a metric in its unit: points, or percent of an error."""
    return f"{100 * drop:{sign}.2f}{'%' if is_error(name) else ' points'}"


def headline(report: Report) -> str:
    """One sentence: what ships, what it saves, what it costs, how sure that is."""
    if not report.gate:
        equal = f"It equals {report.reference} within {report.parity.served:.1g}."
        return f"fp32 ships: no other variant was worth a gate. {equal}"
    worst, tried = gate.closest(report.gate), gated(report)
    several = f"of {len(report.gate)} tasks the closest to failing is " if len(report.gate) > 1 else ""
    if report.shipped != tried.name:
        undecided = f" ({needed(worst)})" if worst.verdict == "INCONCLUSIVE" else ""
        return f"{report.shipped} ships: {several}{describe(worst, tried.name)}{undecided}."
    saved = f"{tried.latency.ratio:.2f} of fp32's time; " if tried.latency else ""
    return f"{tried.name} ships: {saved}{several}{describe(worst, 'it')}."


def gated(report: Report) -> Candidate:
    """The one candidate that was gated; of a report with a gate."""
    tried = [one for one in report.candidates if one.name != "fp32" and one.outcome in ("shipped", "not passed")]
    return tried[0]


def describe(record: GateRecord, variant: str) -> str:
    """What a gate record says, as a clause."""
    task = f"{record.task}: " if record.task else ""
    lost = f"{'lost' if record.drop >= 0 else 'gained'} {amount(record.metric, abs(record.drop))}"
    sure, budget = f"{record.confidence:.0%} confidence", _bare(record, record.budget)
    return f"{task}{variant} {lost}{_of(record)}, {_bound(record)} with {sure}; the budget is {budget}"


def _of(record: GateRecord) -> str:
    return "" if record.metric == "accuracy" else f" of {words(record.metric)}"


def _bound(record: GateRecord) -> str:
    """The upper bound of the loss, as it goes on after what was lost or gained."""
    if record.drop >= 0:
        return f"at most {_bare(record, record.drop_upper)}"
    if record.drop_upper >= 0:
        return f"and loses at most {_bare(record, record.drop_upper)}"
    return f"at least {_bare(record, -record.drop_upper)}"


def _bare(record: GateRecord, drop: float) -> str:
    return amount(record.metric, drop).removesuffix(" points")


def needed(record: GateRecord) -> str:
    """How many examples would decide an inconclusive record, and how, as a clause."""
    if record.examples_needed is None:
        return "no number decides"
    decides = "for it" if record.drop < record.budget else "against it"
    return f"about {record.examples_needed} examples like these would decide {decides}"

"""The accuracy report: report.json in the bundle, and the table on the terminal."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
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
    return Group(_candidates(report), _accuracy(report), Text(_sentence(report)))


def _candidates(report: Report) -> Table:
    table = Table(title=f"{report.name} version {report.version}: variants, one example at a time")
    gated = [key(record) for record in report.comparison]
    measured = [f"{_words(name)} on selection" for name in gated]
    for column in ("variant", "MB", "p50 ms", "× fp32", "95% upper", *measured, "batch-invariant", ""):
        table.add_column(column, justify="left" if column in ("variant", "") else "right")
    for one in report.candidates:
        table.add_row(
            one.name,
            f"{one.bytes / 1e6:.1f}",
            *(f"{x:.2f}" for x in _times(one)),
            *(f"{one.selection[name]:.4g}" if name in one.selection else "" for name in gated),
            "yes" if one.batch_invariant else "no",
            one.outcome,
            style="bold" if one.outcome == "shipped" else "",
        )
    return table


def _times(one: Candidate) -> tuple[float, float, float]:
    latency = one.latency
    return (latency.p50_ms, latency.ratio, latency.ratio_upper) if latency else (np.nan, np.nan, np.nan)


def _accuracy(report: Report) -> Table:
    table = Table(title=f"on {report.examples['gate']} held-out examples (gate split)")
    for column in ("", "PyTorch", f"served ({report.shipped})", "drop", "95% upper bound"):
        table.add_column(column, justify="right" if column else "left")
    compared = {key(record): record for record in report.comparison}
    for name, before in report.pytorch.items():
        if name.rpartition(".")[2] == "loss":
            continue
        after, record = report.served[name], compared.get(name)
        worse = before - after if evaluate.better(name, 1, 0) else after - before
        change = f"{worse:+.4f}" if record is None else _amount(record, record.drop, sign="+")
        upper = "" if record is None else _amount(record, record.drop_upper)
        table.add_row(_words(name), f"{before:.4f}", f"{after:.4f}", change, upper)
    return table


def _words(name: str) -> str:
    """A metric as people write it."""
    task, _, bare = name.rpartition(".")
    bare = {"rmse": "RMSE", "mae": "MAE", "r2": "R²"}.get(bare, bare.replace("_", " ").replace("f1", "F1"))
    return f"{task} {bare}".strip()


def _amount(record: GateRecord, drop: float, sign: Literal["", "+"] = "") -> str:
    """A drop in the unit of its metric: a fraction, or percent of an RMSE."""
    return f"{100 * drop:{sign}.2f}%" if record.metric == "rmse" else f"{drop:{sign}.4f}"


def _sentence(report: Report) -> str:
    if not report.gate:
        return f"No int8 variant was worth a gate; fp32 ships, equal to PyTorch within {report.parity.served:.1g}."
    tried = next(
        one.name for one in report.candidates if one.outcome in ("shipped", "not passed") and one.name != "fp32"
    )
    worst = gate.closest(report.gate)
    several = f"{len(report.gate)} tasks, the closest to failing " if len(report.gate) > 1 else ""
    verdict = f"Gate {worst.verdict}: {several}{describe(worst, tried)}."
    if worst.verdict == "INCONCLUSIVE":
        verdict += f" With {worst.examples} examples that is undecided; {needed(worst)}."
    return verdict if worst.verdict == "PASS" else f"{verdict} fp32 ships."


def describe(record: GateRecord, variant: str) -> str:
    """What a gate record says, as a clause."""
    task = f"{record.task}: " if record.task else ""
    numbers = (100 * record.drop, 100 * record.drop_upper, 100 * record.budget)
    if record.metric == "rmse":
        change, most, budget = (f"{number:.2f}%" for number in numbers)
        changed = f"{variant} raised the RMSE by {change}"
    else:
        change, most, budget = (f"{number:.2f}" for number in numbers)
        of = "" if record.metric == "accuracy" else f" of {_words(record.metric)}"
        changed = f"{variant} lost {change} points{of}"
    return f"{task}{changed}, at most {most} with {record.confidence:.0%} confidence; the budget is {budget}"


def needed(record: GateRecord) -> str:
    """How many examples would decide an inconclusive record, as a clause."""
    return f"about {record.examples_needed} examples would decide" if record.examples_needed else "no number decides"

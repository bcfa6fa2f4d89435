"""The accuracy report: report.json in the bundle, and the table on the terminal."""

from typing import Literal

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle import metrics
from bundle.manifest import GateRecord, Latency, Provenance, Record
from export.graph import Parity

Outcome = Literal["shipped", "slower", "less accurate", "not passed", "not chosen"]


class Scores(Record, frozen=True, kw_only=True):
    """Of one model on the gate split; fractions."""

    accuracy: float
    macro_f1: float


class Candidate(Record, frozen=True, kw_only=True):
    """One compiled variant that was tried."""

    name: str
    bytes: int
    batch_invariant: bool
    latency: Latency
    selection_accuracy: float
    selection_drop: float  # of accuracy on the selection split, PyTorch minus the variant
    outcome: Outcome


class Report(Record, frozen=True, kw_only=True):
    """Everything that was measured, and what followed from it."""

    format_version: int
    name: str
    version: int
    shipped: str
    budget: float  # largest drop of accuracy that passes, a fraction
    confidence: float
    certifiable: float  # the smallest drop that the gate split could have ruled out
    examples: dict[str, int]
    parity: Parity
    candidates: tuple[Candidate, ...]
    gate: GateRecord | None  # of the one candidate that was gated; none when none was worth it
    pytorch: Scores
    served: Scores
    comparison: GateRecord  # of what ships; for fp32 a description, since fp32 passes on parity alone
    provenance: Provenance


def scores(truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """Scores of predicted labels int (N,) against true ones."""
    return Scores(accuracy=metrics.accuracy(truth, predicted), macro_f1=metrics.macro_f1(truth, predicted))


def render(report: Report) -> Group:
    """The report as tables for a terminal."""
    return Group(_candidates(report), _accuracy(report), Text(_sentence(report)))


def _candidates(report: Report) -> Table:
    table = Table(title=f"{report.name} version {report.version}: variants, one example at a time")
    for column in ("variant", "MB", "p50 ms", "× fp32", "95% upper", "accuracy on selection", "batch-invariant", ""):
        table.add_column(column, justify="left" if column in ("variant", "") else "right")
    for one in report.candidates:
        table.add_row(
            one.name,
            f"{one.bytes / 1e6:.1f}",
            f"{one.latency.p50_ms:.2f}",
            f"{one.latency.ratio:.2f}",
            f"{one.latency.ratio_upper:.2f}",
            f"{one.selection_accuracy:.4f}",
            "yes" if one.batch_invariant else "no",
            one.outcome,
            style="bold" if one.outcome == "shipped" else "",
        )
    return table


def _accuracy(report: Report) -> Table:
    table = Table(title=f"on {report.comparison.examples} held-out examples (gate split)")
    for column in ("", "PyTorch", f"served ({report.shipped})", "drop", "95% upper bound"):
        table.add_column(column, justify="right" if column else "left")
    compared = report.comparison
    table.add_row(
        "accuracy",
        f"{report.pytorch.accuracy:.4f}",
        f"{report.served.accuracy:.4f}",
        f"{compared.drop:+.4f}",
        f"{compared.drop_upper:.4f}",
    )
    change = report.pytorch.macro_f1 - report.served.macro_f1
    table.add_row("macro F1", f"{report.pytorch.macro_f1:.4f}", f"{report.served.macro_f1:.4f}", f"{change:+.4f}", "")
    return table


def _sentence(report: Report) -> str:
    gate = report.gate
    if gate is None:
        return f"No int8 variant was worth a gate; fp32 ships, equal to PyTorch within {report.parity.served:.1g}."
    tried = next(
        one.name for one in report.candidates if one.outcome in ("shipped", "not passed") and one.name != "fp32"
    )
    verdict = (
        f"Gate {gate.verdict}: {tried} lost {100 * gate.drop:.2f} points, at most {100 * gate.drop_upper:.2f} with "
        f"{gate.confidence:.0%} confidence; the budget is {100 * gate.budget:.2f}."
    )
    if gate.verdict == "INCONCLUSIVE":
        needed = f"about {gate.examples_needed} examples would decide" if gate.examples_needed else "no number decides"
        verdict += f" With {gate.examples} examples that is undecided; {needed}."
    return verdict if gate.verdict == "PASS" else f"{verdict} fp32 ships."

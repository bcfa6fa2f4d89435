"""`edgeward finetune` and `edgeward export`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle.errors import MissingExtra
from bundle.log import log
from bundle.signals import terminable
from edgeward.result import give

try:
    from export.build import ExportConfig, export_checkpoint
    from export.preflight import EXAMPLES
    from export.preflight import preflight as check
    from export.report import render
    from finetune.loader import EncodedRows
    from finetune.parallel import world
    from finetune.train import Job, TrainConfig, TrainResult, prepare, run
except ImportError as error:
    raise MissingExtra(
        f"{error.name} is not installed. To train and export, install edgeward with its extras 'export' and 'cpu'."
    ) from error

MOST_COLUMNS, MOST_ROWS = 9, 20  # of the table; --json gives all


def finetune(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    max_latency_ms: float | None = None,
    preflight: bool = True,
    json: bool = False,
) -> None:
    """Adapt a pretrained model to labelled data and write a checkpoint.

    Args:
        config: see TrainConfig.
        max_latency_ms: refuse, before the first epoch, a model that takes longer for one example on this machine.
        preflight: before training more than a head, export the model, try int8, and measure its latency.
        json: give the result as one JSON object.
    """
    with world() as ours, _told(), terminable() if ours.size == 1 else nullcontext():  # torchrun ends its own
        job = prepare(config, ours)
        wanted = max_latency_ms is not None or job.strategy != "probe"
        if preflight and wanted and ours.rank == 0:
            _check_job(job, max_latency_ms)
        result = run(job)
    if ours.rank == 0:
        give(result, _render(result), json=json)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SystemExit:  # of terminable
        log.warning("ended by SIGTERM; nothing half-written is left behind")
        raise


def _check_job(job: Job, max_latency_ms: float | None) -> None:
    """Hold a prepared job to export's pre-flight, on training examples.

    Raises:
        GateFailed: its network cannot be exported, or is too slow.
    """
    picked = np.random.default_rng(0).permutation(job.indices("train"))[:EXAMPLES]
    rows = EncodedRows(job.dataset, picked, job.encode)
    check(
        job.network,
        job.pretrained.input,
        job.tasks,
        rows,
        max_latency_ms=max_latency_ms,
        threads=job.config.threads,
    )


def export(config: Annotated[ExportConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Compile a checkpoint into a bundle, when its accuracy survived.

    Args:
        config: see ExportConfig.
        json: give the report as one JSON object.
    """
    with _told(), terminable():
        result = export_checkpoint(config)
    give(result.report, render(result.report), json=json)


def _render(result: TrainResult) -> Group:
    tables = [_history(result)]
    if result.rungs:
        tables.append(_table("rungs", result.rungs))
    metrics = ", ".join(f"{_words(name)} {_cell(value)}" for name, value in (result.metrics | result.facts).items())
    counts = ", ".join(f"{count} {split}" for split, count in result.examples.items())
    return Group(
        *tables,
        Text(
            f"{result.out}: by {result.strategy}, on validation {metrics}; {result.trainable_parameters:,} of "
            f"{result.total_parameters:,} parameters trained in {result.seconds:.0f} s; examples: {counts}."
        ),
    )


def _history(result: TrainResult) -> Table:
    """Epochs or penalties; the one whose weights were written is bold."""
    names = [name for name in ("epoch", "l2") if name in result.metrics]
    kept = [bool(names) and all(row.get(n) == result.metrics[n] for n in names) for row in result.history]
    every = -(-len(kept) // MOST_ROWS)
    shown = [i for i in range(len(kept)) if kept[i] or i % every == 0 or i == len(kept) - 1]
    return _table("on the validation split", [result.history[i] for i in shown], [kept[i] for i in shown])


def _table(title: str, rows: Sequence[Mapping[str, float | str]], bold: Sequence[bool] = ()) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if len(columns) > MOST_COLUMNS:  # of several tasks: of each its first metric
        first: dict[str, str] = {}
        for name in columns:
            first.setdefault(name.rpartition(".")[0] or f".{name}", name)
        columns = list(first.values())
    table = Table(title=title)
    for name in columns:
        table.add_column(_words(name), justify="right")
    for i, row in enumerate(rows):
        style = "bold" if i < len(bold) and bold[i] else ""
        table.add_row(*(_cell(row.get(name, "")) for name in columns), style=style)
    return table


def _words(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1")


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"

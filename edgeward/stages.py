"""`edgeward finetune` and `edgeward export`."""

from typing import Annotated

from cyclopts import Parameter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle.errors import MissingExtra
from edgeward.result import give

try:
    from export.build import ExportConfig, export_checkpoint
    from export.report import render
    from finetune.train import TrainConfig, TrainResult, train
except ImportError as error:
    raise MissingExtra(
        f"{error.name} is not installed. On the machine that trains and exports: pip install 'edgeward[export,cpu]'."
    ) from error


def finetune(config: Annotated[TrainConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Adapt a pretrained model to labelled data and write a checkpoint.

    Args:
        config: see TrainConfig.
        json: give the result as one JSON object.
    """
    result = train(config)
    give(result, _render(result), json=json)


def export(config: Annotated[ExportConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Compile a checkpoint into a bundle, when its accuracy survived.

    Args:
        config: see ExportConfig.
        json: give the report as one JSON object.
    """
    result = export_checkpoint(config)
    give(result.report, render(result.report), json=json)


def _render(result: TrainResult) -> Group:
    names = list(result.history[0])
    table = Table(title="on the validation split")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result.history:
        kept = all(result.metrics.get(name, row[name]) == row[name] for name in names)
        table.add_row(*(f"{row[name]:.4g}" for name in names), style="bold" if kept else "")
    counts = ", ".join(f"{count} {split}" for split, count in result.examples.items())
    return Group(
        table,
        Text(
            f"{result.out}: validation accuracy {result.metrics['accuracy']:.4f}, macro F1 "
            f"{result.metrics['macro_f1']:.4f}; {result.trainable_parameters:,} of {result.total_parameters:,} "
            f"parameters trained in {result.seconds:.0f} s; examples: {counts}."
        ),
    )

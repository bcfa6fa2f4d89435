"""`edgeward finetune` and `edgeward export`."""

from typing import Annotated

from cyclopts import Parameter

from bundle.errors import MissingExtra
from edgeward.result import give

try:
    from export.build import ExportConfig, export_checkpoint
    from export.report import render as render_export
    from finetune.train import TrainConfig, train
    from finetune.train import TrainConfig, train
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
    give(result, render_training(result), json=json)


def export(config: Annotated[ExportConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Compile a checkpoint into a bundle, when its accuracy survived.

    Args:
        config: see ExportConfig.
        json: give the report as one JSON object.
    """
    result = export_checkpoint(config)
    give(result.report, render_export(result.report), json=json)

"""What a training was and what came of it: run.json for programs, report.html for people, curves for TensorBoard.

report.html needs nothing but itself: no script, no file, no network.
"""

import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bundle import metrics, outputs
from bundle.errors import MissingExtra
from bundle.host import cpu_count, cpu_name, isa_class
from bundle.manifest import Multiclass, Record, Regression, Task, to_json
from finetune.cache import cache_folder
from finetune.checkpoint import Provenance
from finetune.config import TrainResult
from finetune.evaluate import predictions
from finetune.target import Target, columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT_VERSION = 1
MAX_MATRIX = 50  # labels; of more, there are the most frequent mistakes instead of a confusion matrix
MAX_MISTAKES = 30
MAX_POINTS = 2000  # of a plot
_TEMPLATE = "report.html.j2"


class LabelScores(Record, frozen=True, kw_only=True):
    """One label on the validation split."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # examples of which it is true


class Mistake(Record, frozen=True, kw_only=True):
    """One label that was taken for another."""

    label: str
    predicted: str
    examples: int


class TaskScores(Record, frozen=True, kw_only=True):
    """One task on those examples of the validation split whose label is known."""

    name: str
    kind: str
    examples: int
    metrics: dict[str, float | None]  # none where it is not defined
    labels: tuple[LabelScores, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()  # multiclass: [true label][predicted label]; none of many labels
    mistakes: tuple[Mistake, ...] = ()  # multiclass: the most frequent ones, the most frequent first


class Run(Record, frozen=True, kw_only=True):
    """The whole of run.json."""

    format_version: int
    strategy: str
    provenance: Provenance  # config, seed, versions, data and its sha256, examples per split, metrics, history
    host: dict[str, str | int]
    rungs: tuple[dict[str, str | float], ...]
    facts: dict[str, float]  # of the model and the data, such as the share of words without a vector
    trainable_parameters: int
    total_parameters: int
    seconds: float
    tasks: tuple[TaskScores, ...]


def check_extras(*, tensorboard: bool = False) -> None:
    """Refuse, before anything is trained, what could not be written afterwards.

    Raises:
        MissingExtra: Jinja2 or matplotlib is not installed, or TensorBoard where it is asked for.
    """
    wanted = {"jinja2": "finetune", "matplotlib": "finetune"} | ({"tensorboard": "tensorboard"} if tensorboard else {})
    for library, extra in wanted.items():
        if find_spec(library) is None:
            raise MissingExtra(f"{library} is not installed: pip install 'edgeward[{extra}]'.")


def write_report(
    tasks: Sequence[Task], result: TrainResult, provenance: Provenance, logits: np.ndarray, targets: Sequence[Target]
) -> dict[str, bytes]:
    """The files `run.json` and `report.html`.

    Args:
        tasks: in the order of their columns.
        result: of the training.
        provenance: of its checkpoint.
        logits: float32 (N, ΣC), of the validation split.
        targets: of the same examples.

    Raises:
        MissingExtra: see check_extras.
    """
    check_extras()
    run = Run(
        format_version=FORMAT_VERSION,
        strategy=result.strategy,
        provenance=provenance,
        host={"cpu": cpu_name(), "isa": isa_class(), "cores": cpu_count()},
        rungs=result.rungs,
        facts=result.facts,
        trainable_parameters=result.trainable_parameters,
        total_parameters=result.total_parameters,
        seconds=result.seconds,
        tasks=tuple(
            task_scores(task, logits[target.known, span], target.values[target.known])
            for task, target, span in zip(tasks, targets, columns(tasks), strict=True)
        ),
    )
    scatters = {
        task.name: _scatter(target.values[target.known], predictions(task, logits[target.known, span]))
        for task, target, span in zip(tasks, targets, columns(tasks), strict=True)
        if isinstance(task, Regression)
    }
    return {"run.json": to_json(run), "report.html": _page(run, scatters).encode()}


def task_scores(task: Task, logits: np.ndarray, truth: np.ndarray) -> TaskScores:
    """Everything that bundle.metrics measures of a task.

    Args:
        task: whose logits they are.
        logits: float32 (N, C).
        truth: as Target.values, of the same examples, all known.
    """
    predicted = predictions(task, logits)
    if isinstance(task, Regression):
        names = ("mae", "rmse", "r2")
        measured = {name: getattr(metrics, name)(truth, predicted) for name in names}
        return TaskScores(name=task.name, kind="regression", examples=len(truth), metrics=_defined(measured))
    measured = {"accuracy": metrics.accuracy(truth, predicted)}
    for average in ("macro", "micro"):
        for share in ("precision", "recall", "f1"):
            measured[f"{average}_{share}"] = getattr(metrics, share)(truth, predicted, average)
    counts = np.zeros((0, 0), np.int64)
    if isinstance(task, Multiclass):
        measured |= {
            "balanced_accuracy": metrics.balanced_accuracy(truth, predicted),
            "mcc": metrics.mcc(truth, predicted),
            "auroc": metrics.auroc(truth, outputs.softmax(logits)),
        }
        counts = metrics.confusion(truth, predicted, len(task.labels))
    else:
        measured["auroc"] = metrics.auroc(truth, logits)
    return TaskScores(
        name=task.name,
        kind="multiclass" if isinstance(task, Multiclass) else "multilabel",
        examples=len(truth),
        metrics=_defined(measured),
        labels=_label_scores(task.labels, metrics.label_counts(truth, predicted, len(task.labels))),
        confusion=tuple(map(tuple, counts.tolist())) if len(counts) <= MAX_MATRIX else (),
        mistakes=_mistakes(task.labels, counts),
    )


def _defined(measured: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in measured.items()}


def _label_scores(labels: Sequence[str], counts: metrics.LabelCounts) -> tuple[LabelScores, ...]:
    parts = (counts.precision, counts.recall, counts.f1, counts.support)
    return tuple(
        LabelScores(label=label, precision=precision, recall=recall, f1=f1, support=support)
        for label, precision, recall, f1, support in zip(labels, *(part.tolist() for part in parts), strict=True)
    )


def _mistakes(labels: Sequence[str], counts: np.ndarray) -> tuple[Mistake, ...]:
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_MISTAKES]
    pairs = [divmod(int(place), len(counts)) for place in order]
    return tuple(
        Mistake(label=labels[true], predicted=labels[predicted], examples=int(wrong[true, predicted]))
        for true, predicted in pairs
        if wrong[true, predicted]
    )


def _page(run: Run, scatters: dict[str, str]) -> str:
    import jinja2

    # Labels, paths and names of columns are the user's: whatever they hold is text.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(resources.files("finetune").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        run=run,
        curves=_curves(run.provenance.history),
        scatters=scatters,
        max_points=MAX_POINTS,
    )


def _number(value: object) -> str:
    if value is None:
        return "not defined"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """An SVG for each metric, over the epochs or over the L2 penalties that were tried."""
    across = "epoch" if history and "epoch" in history[0] else "l2"
    names = [name for name in (history[0] if history else ()) if name not in (across, "train_loss")]
    return {name: _curve(history, across, name) for name in names}


def _curve(history: Sequence[dict[str, float]], across: str, name: str) -> str:
    def draw(axes: "Axes") -> None:
        x = [row[across] for row in history]
        if name == "loss" and "train_loss" in history[0]:
            axes.plot(x, [row["train_loss"] for row in history], "o--", markersize=3, label="train")
        axes.plot(x, [row[name] for row in history], "o-", markersize=3, label="validation")
        axes.set_xlabel(across)
        if across == "l2":
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return _svg(draw)


def _scatter(truth: np.ndarray, predicted: np.ndarray) -> str:
    """Predicted over true numbers, of at most MAX_POINTS examples."""
    shown = np.unique(np.linspace(0, len(truth) - 1, min(len(truth), MAX_POINTS)).round().astype(int))

    def draw(axes: "Axes") -> None:
        axes.plot(truth[shown], predicted[shown], "o", markersize=3, alpha=0.5)
        axes.axline((float(truth.mean()),) * 2, slope=1, color="0.5", linewidth=1)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        axes.grid(alpha=0.3)

    return _svg(draw)


def _svg(draw: Callable[["Axes"], None]) -> str:
    """One plot as an SVG element for the inside of a page: the same bytes for the same numbers."""
    # Imported, matplotlib writes a list of the machine's fonts.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder("matplotlib")))
    import matplotlib
    from matplotlib.figure import Figure

    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "edgeward", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    return re.sub(r' id="[A-Za-z][\w.]*_\d{1,3}"', "", svg)  # nothing refers to these, and each plot has the same


def write_tensorboard(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Write every metric of every epoch, or of every L2 penalty, as a curve for TensorBoard.

    Raises:
        MissingExtra: see check_extras.
    """
    check_extras(tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for number, row in enumerate(history, start=1):
            for name, value in row.items():
                writer.add_scalar(name, value, int(row.get("epoch", number)))

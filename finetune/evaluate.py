"""What a network says about examples, and how good that is: one way for training, export and reports."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bundle import metrics, outputs
from bundle.errors import DataError
from bundle.manifest import Input, Multiclass, Multilabel, Regression, Task
from bundle.preprocess import is_sequence
from finetune.loader import batches
from finetune.model import Network
from finetune.progress import track
from finetune.target import Target, columns

_OF_KIND = {
    Multiclass: ("accuracy", "balanced_accuracy", "macro_f1", "loss"),
    Multilabel: ("accuracy", "macro_f1", "micro_f1", "loss"),
    Regression: ("rmse", "mae", "r2", "loss"),
}
_MAIN = {Multiclass: "accuracy", Multilabel: "macro_f1", Regression: "rmse"}
_ERRORS = ("loss", "rmse", "mae")  # the less, the better


def logits(
    network: Network, rows: Sequence[np.ndarray], spec: Input, batch_size: int = 32, device: str | torch.device = "cpu"
) -> np.ndarray:
    """Logits float32 (N, ΣC) of preprocessed examples, in their order, without dropout.

    Args:
        network: is moved to the device.
        rows: tensors without batch axis, as bundle.preprocess.encoder makes them; at least one.
        spec: how to collate them.
        batch_size: examples at a time; texts are batched with others of their length.
        device: to compute on.
    """
    return _run(network, network.forward, rows, spec, batch_size, torch.device(device))


def features(
    network: Network, rows: Sequence[np.ndarray], spec: Input, batch_size: int = 32, device: str | torch.device = "cpu"
) -> np.ndarray:
    """What the head sees, float32 (N, D); see logits for the arguments."""
    return _run(network, network.features, rows, spec, batch_size, torch.device(device))


def _run(
    network: Network,
    compute: Callable[..., Tensor],
    rows: Sequence[np.ndarray],
    spec: Input,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    training = network.training
    network.to(device).eval()
    order = np.arange(len(rows))
    if is_sequence(spec):
        rows = list(rows)
        order = np.argsort([row.shape[-1] for row in rows], kind="stable")
    plan = [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    parts = []
    with torch.inference_mode():
        for _, tensors in track(batches(rows, plan, spec, device), len(plan), "running the model"):
            parts.append(compute(*tensors.values()).float().cpu().numpy())
    network.train(training)
    result = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
    result[order] = np.concatenate(parts)
    return result


def score(
    tasks: Sequence[Task], logits: np.ndarray, targets: Sequence[Target], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """How good logits are, by metric: see metric_names for the names.

    The losses are those of training without weights of classes, smoothing and teacher: mean cross-entropy in nats, mean
    binary cross-entropy of the labels, mean squared error of the standardised value. rmse, mae and r2 are in the units
    of the data.

    Args:
        tasks: in the order of their columns.
        logits: float (N, ΣC).
        targets: of the same N examples, one per task; those without a label do not count.
        weights: of each task's loss in that of several; by default 1.

    Raises:
        DataError: too few of the examples have a label of some task.
    """
    several = len(tasks) > 1
    scores: dict[str, float] = {}
    total = 0.0
    for i, (task, span) in enumerate(zip(tasks, columns(tasks), strict=True)):
        known = targets[i].known
        _check_known(task, int(known.sum()), len(known))
        measured = _score(task, logits[known, span], targets[i].values[known])
        scores |= {f"{task.name}.{name}" if several else name: value for name, value in measured.items()}
        total += (1.0 if weights is None else weights[i]) * measured["loss"]
    return {**scores, "loss": total} if several else scores


def _check_known(task: Task, known: int, examples: int) -> None:
    needed = 2 if isinstance(task, Regression) else 1  # R² has no meaning for one
    if known < needed:
        raise DataError(
            f"{known} of {examples} examples have a value of {task.name!r}; measuring it takes {needed} or more. "
            "Label more examples, or give this split a larger fraction."
        )


def _score(task: Task, logits: np.ndarray, values: np.ndarray) -> dict[str, float]:
    match task:
        case Multiclass():
            return _score_multiclass(logits, values)
        case Multilabel():
            predicted = predictions(task, logits)
            exact = logits.astype(np.float64)
            losses = np.maximum(exact, 0) - exact * values + np.log1p(np.exp(-np.abs(exact)))
            return {
                "accuracy": metrics.accuracy(values, predicted),
                "macro_f1": metrics.macro_f1(values, predicted),
                "micro_f1": metrics.f1(values, predicted, "micro"),
                "loss": float(losses.mean()),
            }
        case Regression():
            predicted = predictions(task, logits)
            error = metrics.rmse(values, predicted)
            return {
                "rmse": error,
                "mae": metrics.mae(values, predicted),
                "r2": metrics.r2(values, predicted),
                "loss": (error / task.std) ** 2,
            }


def _score_multiclass(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predicted = logits.argmax(axis=1)
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return {
        "accuracy": metrics.accuracy(labels, predicted),
        "balanced_accuracy": metrics.balanced_accuracy(labels, predicted),
        "macro_f1": metrics.macro_f1(labels, predicted),
        "loss": float(loss.mean()),
    }


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """What a task's logits float (N, C) predict: labels int64 (N,), sets bool (N, C), or numbers float64 (N,)."""
    match task:
        case Multiclass():
            labels: np.ndarray = logits.argmax(axis=1)
            return labels
        case Multilabel():
            return outputs.sigmoid(logits) >= np.float32(task.threshold)
        case Regression():
            return logits[:, 0].astype(np.float64) * task.std + task.mean


def metric_names(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The names that score gives: of one task bare, of several with the prefix `TASK.`, and `loss` for all of them."""
    if len(tasks) == 1:
        return _OF_KIND[type(tasks[0])]
    return (*(f"{task.name}.{name}" for task in tasks for name in _OF_KIND[type(task)]), "loss")


def main_metric(tasks: Sequence[Task]) -> str:
    """The metric that chooses the epoch when none is named."""
    return _MAIN[type(tasks[0])] if len(tasks) == 1 else "loss"


def check_metric(metric: str, tasks: Sequence[Task]) -> None:
    """Refuse a metric that score does not give.

    Raises:
        DataError: naming those that it gives.
    """
    names = metric_names(tasks)
    if metric not in names:
        raise DataError(f"{metric!r} is no metric of this data; there are {', '.join(names)}.")


def better(metric: str, a: float, b: float) -> bool:
    """Whether the value `a` of a metric is better than `b`: less of rmse, mae and loss, more of all others."""
    return a < b if metric.rpartition(".")[2] in _ERRORS else a > b

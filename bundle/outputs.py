"""Logits -> the answers of the wire: labels, scores, values. docs/protocol.md has the table."""

from collections.abc import Mapping

import numpy as np

from bundle.manifest import Multiclass, Multilabel, Regression, Task
from bundle.tensor import TensorSpec


def width(task: Task) -> int:
    """Columns of the task's logits."""
    return 1 if isinstance(task, Regression) else len(task.labels)


def prefix(tasks: tuple[Task, ...], task: Task) -> str:
    """What stands before the output names of a task: nothing when it is the only one."""
    return "" if len(tasks) == 1 else f"{task.name}."


def logits_widths(tasks: tuple[Task, ...]) -> dict[str, int]:
    """Names of the graph's outputs, with the columns of each."""
    return {f"{prefix(tasks, task)}logits": width(task) for task in tasks}


def answer_specs(tasks: tuple[Task, ...]) -> tuple[TensorSpec, ...]:
    """Names, datatypes and shapes of the answers of all tasks, in their order."""
    specs = []
    for task in tasks:
        name = prefix(tasks, task)
        match task:
            case Multiclass():
                specs += [
                    TensorSpec(f"{name}label", "BYTES", (-1, 1)),
                    TensorSpec(f"{name}score", "FP32", (-1, width(task))),
                    TensorSpec(f"{name}logits", "FP32", (-1, width(task))),
                ]
            case Multilabel():
                specs += [
                    TensorSpec(f"{name}predicted", "BOOL", (-1, width(task))),
                    TensorSpec(f"{name}score", "FP32", (-1, width(task))),
                ]
            case Regression():
                specs += [TensorSpec(f"{name}value", "FP32", (-1, 1))]
    return tuple(specs)


def answers(tasks: tuple[Task, ...], logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What answer_specs names.

    Args:
        tasks: of the bundle.
        logits: the graph's outputs `logits` or `TASK.logits`, float32 (N, width(task)).
    """
    result: dict[str, np.ndarray] = {}
    for task in tasks:
        name = prefix(tasks, task)
        values = logits[f"{name}logits"]
        match task:
            case Multiclass():
                labels = np.array([label.encode() for label in task.labels], dtype=object)
                result[f"{name}label"] = labels[values.argmax(axis=1)][:, None]
                result[f"{name}score"] = softmax(values)
                result[f"{name}logits"] = values
            case Multilabel():
                score = sigmoid(values)
                result[f"{name}predicted"] = score >= np.float32(task.threshold)
                result[f"{name}score"] = score
            case Regression():
                result[f"{name}value"] = values * np.float32(task.std) + np.float32(task.mean)
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, C), rows summing to 1, from logits float32 (N, C)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, C) from logits float32 (N, C), without overflow."""
    probabilities: np.ndarray = (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
    return probabilities

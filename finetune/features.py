"""What a frozen network says of a dataset's examples, its features or its logits: computed once and kept."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bundle.errors import DataError
from bundle.manifest import ImageInput, Regression, Task, to_json
from bundle.preprocess import encoder
from finetune import evaluate
from finetune.cache import cached
from finetune.checkpoint import library_versions, load_checkpoint
from finetune.data import Dataset
from finetune.loader import EncodedRows
from finetune.model import Network
from finetune.pretrained import Pretrained
from finetune.target import columns


def encode_rows(pretrained: Pretrained, dataset: Dataset, indices: np.ndarray) -> Sequence[np.ndarray]:
    """Preprocessed examples: images encoded whenever they are asked for, everything else in memory."""
    rows = EncodedRows(dataset, indices, encoder(pretrained.input, pretrained.files.__getitem__))
    return rows if isinstance(pretrained.input, ImageInput) else list(rows)  # pixels are large, all else is small


def backbone_features(
    pretrained: Pretrained,
    network: Network,
    dataset: Dataset,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    cache: bool,
) -> np.ndarray:
    """What the head sees of some examples, float32 (N, D), without dropout and with the running means of training.

    Args:
        pretrained: says how to preprocess.
        network: of `pretrained`.
        dataset: has the examples.
        indices: int64 (N,), positions in the dataset.
        batch_size: examples at a time.
        device: to compute on.
        cache: take them from the cache, and keep them there.
    """

    def compute() -> np.ndarray:
        rows = encode_rows(pretrained, dataset, indices)
        return evaluate.features(network, rows, pretrained.input, batch_size, device)

    if not cache:
        return compute()
    return cached(_key(pretrained, network, [dataset.hashes[i] for i in indices], device), compute)


def teacher_logits(
    teacher: Path,
    dataset: Dataset,
    indices: np.ndarray,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    device: torch.device,
    cache: bool = True,
) -> np.ndarray:
    """What a checkpoint says of some examples, float32 (N, ΣC), as logits of the student's tasks, in their order.

    Args:
        teacher: the checkpoint; its preprocessing is its own.
        dataset: has the examples.
        indices: int64 (N,), positions in the dataset.
        tasks: the student's; a number is standardised as the student has it.
        batch_size: examples at a time.
        device: to compute on.
        cache: take them from the cache, and keep them there.

    Raises:
        CheckpointError: the teacher cannot be read.
        DataError: it lacks a task or its labels are others, or the examples are not what it takes.
    """
    checkpoint = load_checkpoint(teacher)
    _check_teacher(teacher, checkpoint.spec.tasks, tasks)

    def compute() -> np.ndarray:
        rows = EncodedRows(dataset, indices, checkpoint.encode)
        return evaluate.logits(checkpoint.network, rows, checkpoint.spec.input, batch_size, device)

    digest = hashlib.sha256(f"teacher {checkpoint.sha256} {library_versions()} {device.type}\n".encode())
    digest.update("\n".join(dataset.hashes[i] for i in indices).encode())
    logits = cached(digest.hexdigest(), compute) if cache else compute()
    return _as_student(logits, checkpoint.spec.tasks, tasks)


def _check_teacher(path: Path, teacher: Sequence[Task], student: Sequence[Task]) -> None:
    offered = {task.name: task for task in teacher}
    for task in student:
        other = offered.get(task.name)
        if type(other) is not type(task):
            said = ", ".join(f"{each.name!r} ({_kind(each)})" for each in teacher)
            raise DataError(f"the teacher {path} does not teach {task.name!r} ({_kind(task)}); it has {said}.")
        if getattr(other, "labels", ()) != getattr(task, "labels", ()):
            theirs, ours = set(getattr(other, "labels", ())), set(getattr(task, "labels", ()))
            raise DataError(
                f"the labels of {task.name!r} are not those of the teacher {path}, which lacks "
                f"{sorted(ours - theirs)[:5]} and has {sorted(theirs - ours)[:5]} besides."
            )


def _kind(task: Task) -> str:
    return type(task).__name__.lower()


def _as_student(logits: np.ndarray, teacher: Sequence[Task], student: Sequence[Task]) -> np.ndarray:
    spans = {task.name: (task, span) for task, span in zip(teacher, columns(teacher), strict=True)}
    parts = []
    for task in student:
        other, span = spans[task.name]
        part = logits[:, span]
        if isinstance(task, Regression) and isinstance(other, Regression):
            part = (part.astype(np.float64) * other.std + other.mean - task.mean) / task.std
        parts.append(part.astype(np.float32))
    return np.concatenate(parts, axis=1)


def weights_digest(module: nn.Module) -> str:
    """Hex digest of a module's tensors: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(pretrained: Pretrained, network: Network, hashes: list[str], device: torch.device) -> str:
    """Hex digest of the backbone, the preprocessing, the libraries and the examples in their order."""
    digest = hashlib.sha256()
    for part in (pretrained.spec, pretrained.input):
        digest.update(to_json(part))
    for name, data in sorted(pretrained.files.items()):
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    digest.update(f"{library_versions()} {device.type}\n{network.backbone}\n".encode())
    digest.update(weights_digest(network.backbone).encode())
    digest.update("\n".join(hashes).encode())
    return digest.hexdigest()

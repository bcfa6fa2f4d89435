"""What a network says about examples: the one way in which PyTorch logits and features are computed."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bundle import metrics
from bundle.manifest import Input, TextInput
from finetune.loader import batches
from finetune.model import Network
from finetune.progress import track


def logits(
    network: Network, rows: Sequence[np.ndarray], spec: Input, batch_size: int = 32, device: str | torch.device = "cpu"
) -> np.ndarray:
    """Logits float32 (N, C) of preprocessed examples, in their order, without dropout.

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
    if isinstance(spec, TextInput):
        rows = list(rows)
        order = np.argsort([len(row) for row in rows], kind="stable")
    plan = [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    parts = []
    with torch.inference_mode():
        for _, tensors in track(batches(rows, plan, spec, device), len(plan), "running the model"):
            parts.append(compute(**tensors).float().cpu().numpy())
    network.train(training)
    result = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
    result[order] = np.concatenate(parts)
    return result


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy`, `macro_f1` and `loss` (mean cross-entropy, nats) of logits float (N, C) for labels int64 (N,)."""
    predicted = logits.argmax(axis=1)
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return {
        "accuracy": metrics.accuracy(labels, predicted),
        "macro_f1": metrics.macro_f1(labels, predicted),
        "loss": float(loss.mean()),
    }

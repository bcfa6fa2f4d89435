"""Full fine-tuning: every weight trains, and the weights of the best epoch on the validation split are kept.

Nothing depends on what ran before: the order of the examples is a function of (seed, epoch), and what dropout drops is
a function of (seed, step). On the CPU two runs give the same weights, bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog
import torch
from torch.nn.functional import cross_entropy

from bundle.errors import TrainingDiverged
from bundle.manifest import Input
from finetune import evaluate
from finetune.loader import batches
from finetune.model import Network
from finetune.progress import track

log = structlog.get_logger()

Optimizer = Literal["adamw", "sgd"]
Rows = Sequence[np.ndarray]

MAX_GRADIENT_NORM = 1.0
_ORDER, _DROPOUT = 0, 1  # streams of random numbers under one seed


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    epochs: int
    batch_size: int
    optimizer: Optimizer
    learning_rate: float  # at its peak
    weight_decay: float  # of matrices and kernels; biases and norms have none
    momentum: float  # of SGD
    warmup: float  # fraction of all steps over which the learning rate rises
    seed: int


def data_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch: a permutation int64 (examples,) that is a function of seed and epoch alone."""
    permutation: np.ndarray = np.random.Generator(_stream(seed, _ORDER, epoch)).permutation(examples)
    return permutation


def _stream(seed: int, purpose: int, number: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([seed, purpose, number]))


def train_full(
    network: Network,
    rows: Rows,
    labels: np.ndarray,
    validation_rows: Rows,
    validation_labels: np.ndarray,
    spec: Input,
    recipe: Recipe,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train a network in place and leave it with the weights of its best epoch, in eval mode.

    The best epoch has the highest accuracy on validation; of equals, the least loss.

    Returns:
        Per epoch its number from 1, `train_loss`, and `accuracy`, `macro_f1` and `loss` on validation.

    Raises:
        TrainingDiverged: a loss became NaN or infinite.
    """
    network.requires_grad_(True).to(device)
    optimizer = _optimizer(network, recipe)
    steps_per_epoch = math.ceil(len(rows) / recipe.batch_size)
    history: list[dict[str, float]] = []
    best: tuple[float, float] | None = None
    weights = network.state_dict()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(recipe.epochs):
            train_loss = _train_epoch(network, optimizer, rows, labels, spec, recipe, device, epoch, steps_per_epoch)
            logits = evaluate.logits(network, validation_rows, spec, recipe.batch_size, device)
            measured = evaluate.score(logits, validation_labels)
            if not math.isfinite(measured["loss"]):
                raise _diverged(epoch, steps_per_epoch, recipe.learning_rate, "validation loss", measured["loss"])
            history.append({"epoch": epoch + 1, "train_loss": train_loss, **measured})
            log.info("epoch done", **history[-1])
            if best is None or (measured["accuracy"], -measured["loss"]) > best:
                best = (measured["accuracy"], -measured["loss"])
                weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)
    network.eval()
    return history


def _train_epoch(
    network: Network,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    labels: np.ndarray,
    spec: Input,
    recipe: Recipe,
    device: torch.device,
    epoch: int,
    steps: int,
) -> float:
    """One pass over the examples; its mean loss."""
    network.train()
    plan = np.array_split(data_order(recipe.seed, epoch, len(rows)), steps)  # nearly equal: no batch of one left over
    bar = f"epoch {epoch + 1}/{recipe.epochs}"
    total = 0.0
    for step, (positions, inputs) in enumerate(track(batches(rows, plan, spec, device), steps, bar)):
        overall = epoch * steps + step
        rate = recipe.learning_rate * rate_factor(overall, recipe.epochs * steps, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(int(_stream(recipe.seed, _DROPOUT, overall).random_raw()) >> 1)
        loss = cross_entropy(network(*inputs.values()), torch.from_numpy(labels[positions]).to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise _diverged(epoch, step, rate, "loss", value)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        total += value * len(positions)
    return total / len(rows)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step from 0 as a fraction of its peak: linear up over the warm-up, linear down to 0."""
    rising = round(warmup * steps)
    return (step + 1) / (rising + 1) if step < rising else (steps - step) / (steps - rising)


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [p for p in network.parameters() if p.ndim > 1]
    free = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


def _diverged(epoch: int, step: int, rate: float, what: str, value: float) -> TrainingDiverged:
    return TrainingDiverged(
        f"the {what} became {value} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.3g}; nothing was "
        f"written. Try a lower learning rate."
    )

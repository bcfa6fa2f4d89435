"""How to train: the loop's options, and what follows from them alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.blocks import layer_rates
from finetune.config import Optimizer, Precision, Schedule
from finetune.model import Network

Tensors = dict[str, Tensor]  # by the name of the parameter


@dataclass(frozen=True)
class Recipe:
    """The options of TrainConfig with their defaults filled in."""

    epochs: int
    batch_size: int  # over all processes
    accumulate: int
    optimizer: Optimizer
    learning_rate: float  # at its peak, of the head
    weight_decay: float  # of matrices and kernels; biases and norms have none
    momentum: float  # of sgd
    schedule: Schedule
    warmup: float  # fraction of all steps
    max_gradient_norm: float  # infinite: gradients are not cut
    layer_decay: float
    ema: float
    mixup: float
    patience: int | None
    metric: str | None  # of validation; None is the main one of the tasks
    precision: Precision
    save_steps: int | None
    seed: int

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step from 0, of so many."""
        return self.learning_rate * rate_factor(step, steps, self.warmup, self.schedule)


def rate_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """The learning rate as a fraction of its peak: linear up over the warm-up, then linear or along a cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = (steps - step) / (steps - rising)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]


def make_optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """An optimizer of the parameters that require gradients; each group's `factor` is that of its learning rate."""
    factors = layer_rates(network, recipe.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors[name], parameter.ndim > 1), []).append(parameter)
    options = [
        {"params": parameters, "factor": factor, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (factor, decays), parameters in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD(options, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, weights: Tensors) -> dict[str, Tensors]:
    """What an optimizer remembers of each weight, by the optimizer's name for it, such as optimizer.exp_avg."""
    found: dict[str, Tensors] = {}
    for name, weight in weights.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if value is not None:
                found.setdefault(f"optimizer.{key}", {})[name] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, weights: Tensors, tensors: dict[str, Tensors]) -> None:
    """Give a new optimizer the memory of another; other tensors than optimizer_tensors gives are passed over."""
    for kind, named in tensors.items():
        owner, _, key = kind.partition(".")
        for name, value in named.items() if owner == "optimizer" else ():
            here = value.to(weights[name].device)
            if here.shape == weights[name].shape:
                here = torch.empty_like(weights[name]).copy_(here)  # in the same memory format
            optimizer.state[weights[name]][key] = here

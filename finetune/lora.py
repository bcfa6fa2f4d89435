"""Low-rank changes of a backbone's layers, which are trained beside it and then added to its weights.

What is exported is the plain network again, with the very names of its parameters: nothing of peft is needed by whoever
loads the checkpoint.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from bundle.errors import MissingExtra, ModelError
from bundle.log import log
from bundle.manifest import Input
from finetune import evaluate
from finetune.model import Network

TOLERANCE = 1e-3  # of merging: largest difference of a logit, in standard deviations of the logits
_CHECKED = 64  # examples that merging is checked on


def with_lora(network: Network, rank: int, *, seed: int) -> list[str]:
    """Put low-rank changes beside every linear and convolutional layer of the backbone, in place.

    They start at nothing: the logits are as before. Grouped convolutions and the layers inside nn.MultiheadAttention,
    which does not call them, get none.

    Args:
        network: its backbone's layers are wrapped.
        rank: of each change; it is scaled by 2.
        seed: of the first weights.

    Returns:
        The names of the parameters to train: the changes' and the head's.

    Raises:
        ModelError: the backbone has no such layer.
        MissingExtra: peft is not installed.
    """
    targets = _targets(network.backbone)
    if not targets:
        raise ModelError("the backbone has no linear or convolutional layer that LoRA could change; choose full.")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("LoRA needs peft, which is not installed: pip install 'edgeward[lora]'.") from error
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, network.backbone)
    return [name for name, _ in network.named_parameters() if ".lora_" in name or name.startswith("head.")]


def merge_lora(network: Network, rows: Sequence[np.ndarray], spec: Input) -> None:
    """Add the changes to the weights and take the wrapping off, in place.

    Args:
        network: as with_lora left it, trained.
        rows: preprocessed examples on which the logits before and after are compared.
        spec: how to collate them.

    Raises:
        ModelError: the merged network gives other logits.
    """
    from peft.tuners.lora import LoraLayer

    rows = rows[:_CHECKED]
    before = evaluate.logits(network, rows, spec)
    for name, module in list(network.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            network.backbone.set_submodule(name, module.get_base_layer())
    vars(network.backbone).pop("peft_config", None)  # which peft leaves on what it changed
    network.requires_grad_(True)
    difference = float(np.abs(evaluate.logits(network, rows, spec) - before).max())
    log.info("low-rank changes merged", difference=difference)
    if not difference <= TOLERANCE * (float(before.std()) or 1.0):
        raise ModelError(
            f"merging the low-rank changes moved a logit by {difference:.3g}; the logits' standard deviation is "
            f"{before.std():.3g}. Nothing was written. Try a lower learning rate or full fine-tuning."
        )


def _targets(backbone: nn.Module) -> list[str]:
    attention = tuple(
        f"{name}." for name, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)
    )
    return [
        name
        for name, module in backbone.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and not name.startswith(attention)
    ]

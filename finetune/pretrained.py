"""MODEL, as it is named on the command line -> backbone, preprocessing and what must be kept to load it again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input
from finetune.model import ModelSpec, Network, Pooling, PythonModel, TorchvisionModel, TransformersModel, build_network


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model without its last layer."""

    spec: ModelSpec
    input: Input
    backbone: nn.Module
    width: int  # D, columns of its features
    files: dict[str, bytes]  # what lies beside the spec in a checkpoint

    def network(self, classes: int) -> Network:
        """The backbone with a fresh head of so many columns."""
        return build_network(self.spec, self.input, self.backbone, self.width, classes)


def open_model(
    model: str, *, column: str | None, max_length: int, image_size: int | None, pooling: Pooling, weights: str
) -> Pretrained:
    """Load the model that the user named.

    Args:
        model: transformers:ID_OR_DIR, torchvision:NAME, python:PATH.py:function or python:pkg.mod:function.
        column: what the examples are called; None is "text" or "image".
        max_length: tokens of a text; transformers only.
        image_size: pixels; torchvision only.
        pooling: transformers only.
        weights: "default", "none" or a file; torchvision only.

    Raises:
        ModelError: the name or the model cannot be used.
    """
    source, _, name = model.partition(":")
    if source != "torchvision" and (weights != "default" or image_size):
        raise ModelError(f"weights and image_size are for torchvision: models; {model} brings its own.")
    if source == "transformers" and name:
        from finetune import transformers_model

        return transformers_model.open_model(name, column=column or "text", max_length=max_length, pooling=pooling)
    if source == "torchvision" and name:
        from finetune import torchvision_model

        return torchvision_model.open_model(name, column=column or "image", image_size=image_size, weights=weights)
    if source == "python" and name:
        from finetune import python_model

        return python_model.open_model(name)
    raise ModelError(
        f"{model!r} is not a model: give transformers:ID_OR_DIR, torchvision:NAME, python:PATH.py:function "
        "or python:pkg.mod:function."
    )


def rebuild(spec: ModelSpec, input_spec: Input, read: Callable[[str], bytes], classes: int) -> Network:
    """The network of a checkpoint, before its weights are loaded. Needs no pretrained weights and no network.

    Args:
        spec: what the backbone is.
        input_spec: what it takes.
        read: gives the bytes of a file that lies beside the spec.
        classes: C, columns of the logits.

    Raises:
        ModelError: the libraries that are installed cannot make it.
    """
    with torch.random.fork_rng(devices=[]):  # the random weights that are about to be replaced
        match spec:
            case TransformersModel():
                from finetune import transformers_model

                backbone, width = transformers_model.rebuild(read)
            case TorchvisionModel():
                from finetune import torchvision_model

                assert isinstance(input_spec, ImageInput)
                backbone, width = torchvision_model.rebuild(spec, input_spec)
            case PythonModel():
                from finetune import python_model

                backbone, width = python_model.rebuild(spec, read)
        return build_network(spec, input_spec, backbone, width, classes)

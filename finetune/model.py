"""The network that is trained and exported: a pretrained backbone and one linear layer on its features.

A network takes exactly what the compiled graph takes, so that exporting it adds nothing and leaves nothing out.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bundle.manifest import ImageInput, Input, Record, TextInput

Pooling = Literal["mean", "cls"]


class TransformersModel(Record, frozen=True, kw_only=True, tag="transformers", tag_field="source"):
    """A text encoder of the transformers library; `config.json` lies beside the spec."""

    name: str  # hub id or folder, as it was given; never read again
    pooling: Pooling
    dropout: float  # before the head, in full training


class TorchvisionModel(Record, frozen=True, kw_only=True, tag="torchvision", tag_field="source"):
    """An image classifier of torchvision."""

    name: str


class PythonModel(Record, frozen=True, kw_only=True, tag="python", tag_field="source"):
    """An image classifier that a Python function makes; the function's source lies beside the spec as `factory.py`.

    A module that was named by its path is run from that copy; one that was named by its import name is imported
    again, and must then have the same source.
    """

    name: str  # pkg.mod:function or PATH.py:function, as it was given
    function: str
    module: str | None  # the import name; None for a path


ModelSpec = TransformersModel | TorchvisionModel | PythonModel


class Network(nn.Module):
    """Backbone, dropout and head. `forward` takes the graph's inputs by position, `features` also by name.

    Attributes:
        backbone: pretrained, without its own last layer.
        head: the new last layer, features (N, D) -> logits (N, C).
    """

    def __init__(self, backbone: nn.Module, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def features(self, *inputs: Any, **named: Any) -> Tensor:
        """What the head sees: float32 (N, D)."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Logits float32 (N, C)."""
        raise NotImplementedError


class TextNetwork(Network):
    """A transformers encoder whose token vectors are pooled to one vector per text."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, dropout: float, pooling: Pooling) -> None:
        super().__init__(backbone, width, classes, dropout)
        self.pooling = pooling

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled token vectors float32 (N, D).

        Args:
            input_ids: int64 (N, length).
            attention_mask: int64 (N, length), 1 for tokens and 0 for padding.
        """
        hidden: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits float32 (N, C); see features for the arguments."""
        logits: Tensor = self.head(self.dropout(self.features(input_ids, attention_mask)))
        return logits


class ImageNetwork(Network):
    """An image classifier without its last layer, behind the scaling of raw pixels."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, width: int, classes: int, spec: ImageInput) -> None:
        super().__init__(backbone, width, classes, dropout=0.0)  # the classifiers bring their own
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (spec.mean, spec.std))
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def features(self, image: Tensor) -> Tensor:
        """The input of the classifier's last layer, float32 (N, D).

        Args:
            image: uint8 (N, height, width, 3), RGB; becomes (x / 255 - mean) / std, channels first.
        """
        pixels = image.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift
        features: Tensor = self.backbone(pixels)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Logits float32 (N, C); see features for the argument."""
        logits: Tensor = self.head(self.dropout(self.features(image)))
        return logits


def build_network(spec: ModelSpec, input_spec: Input, backbone: nn.Module, width: int, classes: int) -> Network:
    """A network with a fresh head.

    Args:
        spec: what the backbone is.
        input_spec: what it takes.
        backbone: see Network.
        width: D, columns of the features.
        classes: C, columns of the logits.
    """
    match spec, input_spec:
        case TransformersModel(), TextInput():
            return TextNetwork(backbone, width, classes, spec.dropout, spec.pooling)
        case ((TorchvisionModel() | PythonModel()), ImageInput()):
            return ImageNetwork(backbone, width, classes, input_spec)
        case _:
            raise ValueError(f"{type(spec).__name__} does not take {type(input_spec).__name__}")

"""The network that is trained and exported: a backbone and one linear layer on its features, for all tasks.

A network takes exactly what the compiled graph takes, so that exporting it adds nothing and leaves nothing out.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input, Record, TextInput, VectorInput, WordsInput

Pooling = Literal["mean", "cls", "sum"]


class TransformersModel(Record, frozen=True, kw_only=True, tag="transformers", tag_field="source"):
    """A text encoder of the transformers library; `config.json` lies beside the spec."""

    name: str  # hub id or folder, as it was given; never read again
    pooling: Literal["mean", "cls"]
    dropout: float  # before the head, in training


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


class MlpModel(Record, frozen=True, kw_only=True, tag="mlp", tag_field="source"):
    """Standardised feature vectors and dense layers on them."""

    size: int  # of a vector
    widths: tuple[int, ...]  # of the hidden layers

    def __post_init__(self) -> None:
        """Refuse layers of no width."""
        if min((self.size, *self.widths)) < 1:
            raise ValueError(f"size {self.size} and widths {self.widths} must be positive")


class VectorsModel(Record, frozen=True, kw_only=True, tag="vectors", tag_field="source"):
    """Word vectors that stay as they are, pooled to one standardised vector, and dense layers on it."""

    name: str  # the file, as it was given; never read again
    words: int  # rows of the table, in the order of vocabulary.txt
    size: int  # of a word's vector
    pooling: Literal["mean", "sum"]
    widths: tuple[int, ...]  # of the hidden layers

    def __post_init__(self) -> None:
        """Refuse an empty table and layers of no width."""
        if min((self.words, self.size, *self.widths)) < 1:
            raise ValueError(f"words {self.words}, size {self.size} and widths {self.widths} must be positive")


ModelSpec = TransformersModel | TorchvisionModel | PythonModel | MlpModel | VectorsModel


class Network(nn.Module):
    """Backbone, dropout and head. `forward` takes the graph's inputs by position or by name.

    Attributes:
        backbone: whatever comes before the head; pretrained but for new hidden layers.
        head: the new last layer, features (N, D) -> logits (N, C), C being the columns of all tasks.
    """

    def __init__(self, backbone: nn.Module, width: int, columns: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, columns)

    def features(self, *inputs: Any, **named: Any) -> Tensor:
        """What the head sees: float32 (N, D)."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Logits float32 (N, C), the columns of the tasks one after the other."""
        raise NotImplementedError


class TextNetwork(Network):
    """A transformers encoder whose token vectors are pooled to one vector per text, or per pair of texts."""

    def __init__(
        self, backbone: nn.Module, width: int, columns: int, dropout: float, pooling: Literal["mean", "cls"]
    ) -> None:
        super().__init__(backbone, width, columns, dropout)
        self.pooling = pooling
        self.tells_apart = tells_apart(backbone)

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Pooled token vectors float32 (N, D).

        Args:
            input_ids: int64 (N, length).
            attention_mask: int64 (N, length), 1 for tokens and 0 for padding.
            token_type_ids: of pairs, int64 (N, length), 1 for tokens of the second text; not looked at by encoders
                that do not tell them apart.
        """
        types = {"token_type_ids": token_type_ids} if self.tells_apart and token_type_ids is not None else {}
        hidden: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits float32 (N, C); see features for the arguments."""
        logits: Tensor = self.head(self.dropout(self.features(input_ids, attention_mask, token_type_ids)))
        return logits


def tells_apart(backbone: nn.Module) -> bool:
    """Whether an encoder has an embedding for tokens of a second text: BERT has, RoBERTa and DistilBERT have not."""
    kinds = getattr(getattr(backbone, "config", None), "type_vocab_size", None) or 0
    return kinds > 1 and "token_type_ids" in inspect.signature(backbone.forward).parameters


class ImageNetwork(Network):
    """An image classifier without its last layer, behind the scaling of raw pixels."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, width: int, columns: int, spec: ImageInput) -> None:
        super().__init__(backbone, width, columns, dropout=0.0)  # the classifiers bring their own
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


class Standardize(nn.Module):
    """(x - mean) / std, number by number; buffers, so that nothing trains them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("std", torch.from_numpy(std.astype(np.float32)))

    def forward(self, features: Tensor) -> Tensor:
        """Float32 (N, D) -> float32 (N, D)."""
        return (features - self.mean) / self.std


def moments(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations float64 (size,).

    A number that is the same in every example, as far as float32 can tell, gets the standard deviation 1 and becomes 0.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    std = vectors.std(axis=0, dtype=np.float64)
    constant = std <= np.maximum(np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
    return mean, np.where(constant, 1.0, std)


class WordVectors(nn.Module):
    """A table of word vectors, the mean or sum of a text's, standardised, and dense layers on it.

    Attributes:
        table: float32 (words, size); a buffer, so that nothing trains it.
        standardize: of the pooled vector.
        layers: the hidden ones.
    """

    table: Tensor

    def __init__(
        self, table: Tensor, pooling: Literal["mean", "sum"], widths: Sequence[int], standardize: Standardize
    ) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.pooling = pooling
        self.standardize = standardize
        self.layers = nn.Sequential(*dense(table.shape[1], widths))

    def forward(self, word_ids: Tensor, word_mask: Tensor) -> Tensor:
        """Features float32 (N, D) of int64 (N, length); a text without a known word is pooled to the zero vector."""
        mask = word_mask.unsqueeze(-1).to(self.table.dtype)
        pooled = (nn.functional.embedding(word_ids, self.table) * mask).sum(dim=1)
        if self.pooling == "mean":
            pooled = pooled / mask.sum(dim=1).clamp(min=1.0)
        features: Tensor = self.layers(self.standardize(pooled))
        return features


class WordsNetwork(Network):
    """Word vectors and a head."""

    def features(self, word_ids: Tensor, word_mask: Tensor) -> Tensor:
        """Pooled word vectors behind the hidden layers, float32 (N, D).

        Args:
            word_ids: int64 (N, length), rows of the table.
            word_mask: int64 (N, length), 1 for words and 0 for padding.
        """
        features: Tensor = self.backbone(word_ids, word_mask)
        return features

    def forward(self, word_ids: Tensor, word_mask: Tensor) -> Tensor:
        """Logits float32 (N, C); see features for the arguments."""
        logits: Tensor = self.head(self.dropout(self.features(word_ids, word_mask)))
        return logits


class VectorNetwork(Network):
    """Dense layers on feature vectors and a head."""

    def features(self, features: Tensor) -> Tensor:
        """What comes out of the last hidden layer, float32 (N, D).

        Args:
            features: float32 (N, size), as they came.
        """
        hidden: Tensor = self.backbone(features)
        return hidden

    def forward(self, features: Tensor) -> Tensor:
        """Logits float32 (N, C); see features for the argument."""
        logits: Tensor = self.head(self.dropout(self.features(features)))
        return logits


def dense(size: int, widths: Sequence[int]) -> list[nn.Module]:
    """Hidden layers, each an nn.Linear and a ReLU, for vectors of `size`."""
    layers: list[nn.Module] = []
    for before, after in zip((size, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers


def build_network(spec: ModelSpec, input_spec: Input, backbone: nn.Module, width: int, columns: int) -> Network:
    """A network with a fresh head.

    Args:
        spec: what the backbone is.
        input_spec: what it takes.
        backbone: see Network.
        width: D, columns of the features.
        columns: C, columns of the logits of all tasks.

    Raises:
        ModelError: the model does not take such an input.
    """
    match spec, input_spec:
        case TransformersModel(), TextInput():
            return TextNetwork(backbone, width, columns, spec.dropout, spec.pooling)
        case ((TorchvisionModel() | PythonModel()), ImageInput()):
            return ImageNetwork(backbone, width, columns, input_spec)
        case VectorsModel(), WordsInput():
            return WordsNetwork(backbone, width, columns, dropout=0.0)
        case MlpModel(), VectorInput() if spec.size == input_spec.size:
            return VectorNetwork(backbone, width, columns, dropout=0.0)
        case _:
            raise ModelError(f"{spec} does not take {input_spec}.")

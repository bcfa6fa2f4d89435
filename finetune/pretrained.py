"""MODEL, as it is named on the command line -> backbone, preprocessing and what must be kept to load it again."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input
from finetune.config import TrainConfig
from finetune.data import Dataset, Modality
from finetune.model import (
    MlpModel,
    ModelSpec,
    Network,
    PythonModel,
    TorchvisionModel,
    TransformersModel,
    VectorsModel,
    build_network,
)

_MODALITIES: dict[str, Modality] = {
    "transformers": "text",
    "vectors": "text",
    "torchvision": "image",
    "python": "image",
    "mlp": "vector",
}
_OPTIONS = {  # what the source of the model decides, and for which sources
    "max_length": ("transformers", "vectors"),
    "pooling": ("transformers", "vectors"),
    "image_size": ("torchvision",),
    "weights": ("torchvision",),
    "widths": ("mlp", "vectors"),
    "vocab_size": ("vectors",),
    "segmenter": ("vectors",),
    "dictionary": ("vectors",),
    "lowercase": ("vectors",),
}
_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Pretrained:
    """A model without its last layer."""

    spec: ModelSpec
    input: Input
    backbone: nn.Module
    width: int  # D, columns of its features
    files: dict[str, bytes]  # what lies beside the spec in a checkpoint
    facts: dict[str, float] = field(default_factory=dict)  # for reports: of vectors, the out-of-vocabulary rates

    def network(self, columns: int) -> Network:
        """The backbone with a fresh head of so many columns, those of all tasks."""
        return build_network(self.spec, self.input, self.backbone, self.width, columns)


def modality(model: str) -> Modality:
    """What the examples of a model are, from its name alone; of a checkpoint, from its spec.

    Raises:
        ModelError: the name is not one of a model.
        CheckpointError: there is no such checkpoint.
    """
    source, name = _split(model)
    if source == "checkpoint":
        from finetune import checkpoint_model

        return checkpoint_model.modality(name)
    return _MODALITIES[source]


def open_model(config: TrainConfig, dataset: Dataset, train: np.ndarray) -> Pretrained:
    """Load the model that the user named.

    New layers take their first weights from torch's generator.

    Args:
        config: names the model, and has its options.
        dataset: what it is to be trained on: gives the names of the columns, the words, the size of the vectors.
        train: int64 positions of the train split, the only examples that are looked at.

    Raises:
        ModelError: the name or the model cannot be used, or an option has no effect on it.
        CheckpointError: the checkpoint cannot be read.
        MissingExtra: a library is not installed.
    """
    source, name = _split(config.model)
    _check_options(config, source)
    match source:
        case "transformers":
            from finetune import transformers_model

            return transformers_model.open_model(name, config, dataset)
        case "torchvision":
            from finetune import torchvision_model

            return torchvision_model.open_model(name, config, dataset)
        case "python":
            from finetune import python_model

            return python_model.open_model(name)
        case "mlp":
            from finetune import mlp

            return mlp.open_model(config, dataset, train)
        case "vectors":
            from finetune import vectors

            return vectors.open_model(name, config, dataset, train)
        case _:
            from finetune import checkpoint_model

            return checkpoint_model.open_model(name, dataset, train)


def _split(model: str) -> tuple[str, str]:
    """Source and name; mlp alone has no name."""
    source, _, name = model.partition(":")
    if source in (*_MODALITIES, "checkpoint") and bool(name) == (source != "mlp") and model != "mlp:":
        return source, name
    raise ModelError(
        f"{model!r} is not a model: give transformers:ID_OR_DIR, torchvision:NAME, python:PATH.py:function, "
        "python:pkg.mod:function, vectors:FILE, mlp, or checkpoint:DIR."
    )


def _check_options(config: TrainConfig, source: str) -> None:
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    for name, sources in _OPTIONS.items():
        if source not in sources and getattr(config, name) != defaults[name]:
            models = " and ".join(one if one == "mlp" else f"{one}:" for one in sources)
            raise ModelError(f"--{name.replace('_', '-')} is for {models} models; {config.model} brings its own.")
    wrong = {"transformers": "sum", "vectors": "cls"}.get(source)
    if config.pooling is not None and config.pooling == wrong:
        raise ModelError(f"--pooling {wrong} is not for {source}: models.")
    if config.widths and min(config.widths) < 1:
        raise ModelError(f"--widths {' '.join(map(str, config.widths))}: every hidden layer needs 1 number or more.")


def buckets(longest: int) -> tuple[int, ...]:
    """Padded lengths up to the longest, for the input specs of texts."""
    return (*(size for size in _BUCKETS if size < longest), longest)


def rebuild(spec: ModelSpec, input_spec: Input, read: Callable[[str], bytes], columns: int) -> Network:
    """The network of a checkpoint, before its weights are loaded. Needs no pretrained weights and no network.

    Args:
        spec: what the backbone is.
        input_spec: what it takes.
        read: gives the bytes of a file that lies beside the spec.
        columns: C, columns of the logits of all tasks.

    Raises:
        ModelError: the libraries that are installed cannot make it.
    """
    with torch.random.fork_rng(devices=[]):  # the random weights that are about to be replaced
        match spec:
            case TransformersModel():
                from finetune import transformers_model

                backbone, width = transformers_model.rebuild(read)
            case TorchvisionModel() if isinstance(input_spec, ImageInput):
                from finetune import torchvision_model

                backbone, width = torchvision_model.rebuild(spec, input_spec)
            case PythonModel():
                from finetune import python_model

                backbone, width = python_model.rebuild(spec, read)
            case MlpModel():
                from finetune import mlp

                backbone, width = mlp.rebuild(spec)
            case VectorsModel():
                from finetune import vectors

                backbone, width = vectors.rebuild(spec, read)
            case _:
                raise ModelError(f"{spec} does not take {input_spec}.")
        return build_network(spec, input_spec, backbone, width, columns)

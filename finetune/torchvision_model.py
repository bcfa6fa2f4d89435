"""`torchvision:NAME`: image classifiers of torchvision."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from bundle.errors import MissingExtra, ModelError
from bundle.manifest import ImageInput
from finetune.classifier import cut_head
from finetune.config import TrainConfig
from finetune.data import Dataset
from finetune.model import TorchvisionModel
from finetune.pretrained import Pretrained

_BACKBONE = "backbone."


def open_model(name: str, config: TrainConfig, dataset: Dataset) -> Pretrained:
    """A classifier with the preprocessing of its default weights.

    Args:
        name: as torchvision.models.get_model takes it.
        config: has the side of the images, along with which the resize before the crop scales; and where the weights
            come from: "default" downloads (or takes from torch's cache), "none" leaves them random, else a file, of a
            state_dict (.pth, .safetensors) or the weights of a checkpoint of this model.
        dataset: has the name of the images.

    Raises:
        ModelError: there is no such model or file, or it cannot be downloaded, or has other shapes.
    """
    models, weights = _import(), config.weights
    if name not in models.list_models(module=models):
        raise ModelError(f"torchvision has no image classifier {name!r}; it has resnet18, mobilenet_v3_small, …")
    default = models.get_model_weights(name).DEFAULT
    column = dataset.input_columns[0] if dataset.input_columns else "image"
    spec = _preprocessing(default.transforms(), column, config.image_size)
    try:
        model = models.get_model(name, weights=default if weights == "default" else None)
    except (URLError, OSError, RuntimeError) as error:
        raise ModelError(
            f"the weights of torchvision:{name} cannot be downloaded: {error}. "
            "Give --weights FILE, or --weights none for random ones."
        ) from error
    if getattr(model, "aux_logits", False):
        raise ModelError(f"torchvision:{name} has auxiliary heads, which are not trained here. Choose another model.")
    backbone, width, head = cut_head(model, spec.height, spec.width, f"torchvision:{name}")
    if weights not in ("default", "none"):
        _load_weights(backbone, Path(weights), head)
    return Pretrained(TorchvisionModel(name=name), spec, backbone, width, {})


def rebuild(spec: TorchvisionModel, image: ImageInput) -> tuple[nn.Module, int]:
    """The same architecture with fresh weights, and its number of features.

    Raises:
        ModelError: this torchvision does not have it.
    """
    models = _import()
    try:
        model = models.get_model(spec.name, weights=None)
    except (ValueError, KeyError) as error:
        raise ModelError(f"this torchvision has no {spec.name!r}: {error}.") from error
    backbone, width, _ = cut_head(model, image.height, image.width, f"torchvision:{spec.name}")
    return backbone, width


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise MissingExtra("torchvision is not installed: pip install 'edgeward[finetune]'.") from error


def _preprocessing(transforms: Any, column: str, image_size: int | None) -> ImageInput:
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    size = image_size or crop
    return ImageInput(
        column=column,
        height=size,
        width=size,
        resize=max(size, round(resize * size / crop)),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _load_weights(backbone: nn.Module, path: Path, head: str) -> None:
    state = _read_weights(path)
    if "head.weight" in state and any(name.startswith(_BACKBONE) for name in state):  # of a checkpoint of ours
        state = {name.removeprefix(_BACKBONE): t for name, t in state.items() if name.startswith(_BACKBONE)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{head}.")}
    ours = backbone.state_dict()
    lacking = sorted(name for name in ours.keys() - state.keys() if not name.endswith(".num_batches_tracked"))
    foreign = sorted(state.keys() - ours.keys())
    other = [name for name in ours if name in state and ours[name].shape != state[name].shape]
    if lacking or foreign or other:
        shapes = "".join(f" ({name} {tuple(state[name].shape)}, not {tuple(ours[name].shape)})" for name in other[:1])
        raise ModelError(
            f"{path} does not hold this model's weights: it lacks {_some(lacking)}, has {_some(foreign)} of another "
            f"model, and {len(other)} of another shape{shapes}."
        )
    backbone.load_state_dict(state, strict=False)  # old files do not count a BatchNorm's batches


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors" + (f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else "")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # OSError, pickle's, zipfile's, safetensors' own
        raise ModelError(f"the weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"the weights {path} are not a state_dict, which has a tensor for every name.")
    return state

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
from finetune.model import TorchvisionModel
from finetune.pretrained import Pretrained


def open_model(name: str, *, column: str, image_size: int | None, weights: str) -> Pretrained:
    """A classifier with the preprocessing of its default weights.

    Args:
        name: as torchvision.models.get_model takes it.
        column: what the images are called.
        image_size: side of the crop in pixels; the model's own if None. The resize before it scales along.
        weights: "default" downloads (or takes from torch's cache), "none" leaves them random, else a file of them.

    Raises:
        ModelError: there is no such model or file, or it cannot be downloaded.
    """
    models = _import()
    if name not in models.list_models(module=models):
        raise ModelError(f"torchvision has no image classifier {name!r}; it has resnet18, mobilenet_v3_small, …")
    default = models.get_model_weights(name).DEFAULT
    spec = _preprocessing(default.transforms(), column, image_size)
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
    state = {k: v for k, v in _read_weights(path).items() if not k.startswith(f"{head}.")}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold this model's weights: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # OSError, pickle's, zipfile's, safetensors' own
        raise ModelError(f"the weights {path} cannot be read: {error}") from error

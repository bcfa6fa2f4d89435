"""Random changes of images, for training only: of the decoded image, before the preprocessing that is served."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from bundle import image
from bundle.errors import BadInput, DataError
from bundle.manifest import ImageInput
from finetune.chance import AUGMENTATION, generator
from finetune.config import Augmentation
from finetune.data import Dataset

AREA = (0.5, 1.0)  # of a crop, as a share of the image
RATIO = (3 / 4, 4 / 3)  # of its width to its height
COLOR = (0.6, 1.4)  # factors of brightness, contrast and saturation
_ATTEMPTS = 10  # to find a crop that fits into the image


def augmented(
    dataset: Dataset, indices: np.ndarray, spec: ImageInput, kinds: Sequence[Augmentation], seed: int, epoch: int
) -> Sequence[np.ndarray]:
    """Some of a dataset's images as one epoch sees them, each made whenever it is asked for.

    What becomes of an image is a function of the seed, the epoch and its position in the dataset.

    Args:
        dataset: of images.
        indices: int64 (N,), positions in the dataset.
        spec: the preprocessing, which comes last.
        kinds: flip, left to right, of one in two; crop to a random part; color, brightness, contrast and saturation.
        seed: of the training.
        epoch: from 0.

    Returns:
        uint8 (height, width, 3) each. Asking for one raises DataError when it cannot be decoded any more.
    """
    return _Augmented(dataset, indices, spec, tuple(kinds), seed, epoch)


@dataclass(frozen=True)
class _Augmented(Sequence[np.ndarray]):
    dataset: Dataset
    indices: np.ndarray
    spec: ImageInput
    kinds: tuple[Augmentation, ...]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "_Augmented": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | _Augmented":
        if isinstance(index, slice):
            return _Augmented(self.dataset, self.indices[index], self.spec, self.kinds, self.seed, self.epoch)
        position = int(self.indices[index])
        try:
            decoded = image.decode(self.dataset.raw(position), self.spec)
            chance = generator(self.seed, AUGMENTATION, self.epoch, position)
            return image.fit(change(decoded, self.kinds, chance), self.spec)
        except (BadInput, OSError) as error:
            raise DataError(f"{self.dataset.names[position]} of {self.dataset.location}: {error}") from error


def change(picture: Image.Image, kinds: Sequence[Augmentation], chance: np.random.Generator) -> Image.Image:
    """The changes of these kinds, in a fixed order, whichever order they are named in."""
    if "crop" in kinds:
        picture = _crop(picture, chance)
    if "flip" in kinds and chance.random() < 0.5:
        picture = functional.horizontal_flip(picture)
    if "color" in kinds:
        adjustments: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
        )
        for adjust in adjustments:
            picture = adjust(picture, chance.uniform(*COLOR))
    return picture


def _crop(picture: Image.Image, chance: np.random.Generator) -> Image.Image:
    """A part of random area and ratio; the whole when no such part is found in a few attempts."""
    width, height = picture.size
    for _ in range(_ATTEMPTS):
        area = width * height * chance.uniform(*AREA)
        ratio = math.exp(chance.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = int(chance.integers(height - down + 1)), int(chance.integers(width - across + 1))
            return picture.crop((left, top, left + across, top + down))
    return picture


def mixed(images: Tensor, permutation: Tensor, share: float) -> Tensor:
    """Each image with another of its batch: share · x + (1 - share) · x[permutation], rounded.

    Args:
        images: uint8 (N, height, width, 3).
        permutation: int64 (N,).
        share: in [0, 1], of the image itself.

    Returns:
        uint8 (N, height, width, 3).
    """
    whole = images.to(torch.float32)
    return torch.lerp(whole[permutation], whole, share).round_().to(torch.uint8)

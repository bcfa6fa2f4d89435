"""Tiny networks, examples and recipes for the tests of the training loop, also for those in other processes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bundle.manifest import ImageInput, VectorInput
from finetune.augment import augmented
from finetune.data import load_dataset
from finetune.loader import EncodedRows
from finetune.loop import Examples, Recipe, fit
from finetune.model import ImageNetwork, VectorNetwork, dense
from finetune.objective import Objective
from finetune.resume import Progress
from finetune.target import Target

CPU = torch.device("cpu")
VECTOR = VectorInput(column="features", size=6)
IMAGE = ImageInput(
    column="image", height=8, width=8, resize=8, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3)
)
RECIPE = Recipe(
    epochs=3,
    batch_size=8,
    accumulate=1,
    optimizer="adamw",
    learning_rate=0.01,
    weight_decay=0.01,
    momentum=0.9,
    schedule="linear",
    warmup=0.1,
    max_gradient_norm=1.0,
    layer_decay=1.0,
    ema=0.0,
    mixup=0.0,
    patience=None,
    metric=None,
    precision="fp32",
    save_steps=None,
    seed=0,
)


def vector_network(columns=3, seed=0):
    """Dense layers without dropout or running means."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VectorNetwork(nn.Sequential(*dense(6, (16, 12))), 12, columns, 0.0)


def image_network(columns=2, seed=0):
    """Convolutions with running means and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, size, padding="same"), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, size in ((3, 4, 3), (4, 6, 1))
        ]
        backbone = nn.Sequential(*blocks, nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return ImageNetwork(backbone, 24, columns, IMAGE)


def multiclass(values, classes=3, name="label"):
    labels = tuple(str(i) for i in range(classes))
    return Target(name, "multiclass", labels, np.asarray(values, dtype=np.int64))


def objective(*targets, **options):
    tasks = tuple(target.task(np.arange(len(target))) for target in targets)
    return Objective(tasks, (1.0,) * len(tasks), (None,) * len(tasks), **options)


def vectors(count, seed=0, classes=3):
    """Vectors whose class is the largest of their first numbers."""
    rows = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return Examples(list(rows), (multiclass(rows[:, :classes].argmax(axis=1), classes),))


def write_pictures(folder, count=40):
    """Pictures of two classes, dark and bright, as PNG."""
    chance = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("bright" if i % 2 else "dark") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 160, (10, 12, 3)) + 90 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def train_pictures(data, out, progress=None, recipe=RECIPE, kinds=("flip", "crop", "color")):
    """Train on pictures with augmentation and write what came of it: out.safetensors and out.json."""
    from bundle import image

    torch.set_num_threads(1)
    dataset = load_dataset(data, "image")
    train, validation = np.arange(30), np.arange(30, 40)
    network = image_network()
    rows = {"train": EncodedRows(dataset, train, lambda raw: image.preprocess(raw, IMAGE)),
            "validation": EncodedRows(dataset, validation, lambda raw: image.preprocess(raw, IMAGE))}  # fmt: skip
    history = fit(
        network,
        Examples(rows["train"], (dataset.targets[0].take(train),)),
        Examples(rows["validation"], (dataset.targets[0].take(validation),)),
        IMAGE,
        objective(dataset.targets[0]),
        recipe,
        CPU,
        trainable=[name for name, _ in network.named_parameters()],
        progress=None if progress is None else Progress(progress, "tiny", recipe.save_steps),
        rows_of_epoch=partial(augmented, dataset, train, IMAGE, kinds, recipe.seed) if kinds else None,
    )
    write_result(out, network, history)


def write_result(out, network, history):
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, f"{out}.safetensors")
    Path(f"{out}.json").write_text(json.dumps(history))


def train_pictures_on_a_full_disk(data, out, progress, recipe):
    """The same where no file may have more than 2000 bytes; what it raised is in out.txt."""
    import resource

    from bundle.errors import EdgewardError

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        train_pictures(data, out, progress, recipe)
    except EdgewardError as error:
        Path(f"{out}.txt").write_text(str(error))

"""What the stage is asked for, and what it gives back."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from finetune.device import Device
from finetune.full import Optimizer
from finetune.model import Pooling
from finetune.splits import Fractions


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a checkpoint will be."""

    model: str
    """transformers:ID_OR_DIR, torchvision:NAME, python:PATH.py:function or python:pkg.mod:function."""
    data: str
    """A folder of class folders with PNG or JPEG files, or a .csv, .jsonl or .parquet file."""
    _: KW_ONLY
    out: Path
    """Directory of the checkpoint; must not exist yet."""
    strategy: Literal["probe", "full"] = "probe"
    """probe fits a linear head on the frozen model's features; full trains every weight."""
    input_column: str | None = None
    """Of a table: the texts, or the paths of the images; by default "text" or "image"."""
    label_column: str = "label"
    """Of a table: the labels."""
    max_bad: int = 0
    """Unreadable images, and rows without text or label, that are left out instead of being an error."""
    split: Fractions = (0.7, 0.1, 0.1, 0.1)
    """Fractions for train, validation, selection and gate."""
    seed: int = 0
    """Of the splits, the head's first weights, the order of the examples and dropout."""
    max_length: int = 128
    """Of a text, in tokens; longer ones are cut. transformers models only."""
    pooling: Pooling = "mean"
    """How token vectors become one vector. transformers models only."""
    image_size: int | None = None
    """Side of the images in pixels; by default the model's own. torchvision models only."""
    weights: str = "default"
    """default downloads, none is random, else a file. torchvision models only."""
    cache: bool = True
    """probe: keep the features, so that the next run on the same data is quick."""
    epochs: int = 5
    """full: passes over the train split."""
    batch_size: int = 32
    """Examples at a time."""
    optimizer: Optimizer | None = None
    """full: by default adamw for texts and sgd for images."""
    learning_rate: float | None = None
    """full: at its peak; by default 5e-5 for adamw and 0.01 for sgd."""
    weight_decay: float | None = None
    """full: by default 0.01 for adamw and 0.0001 for sgd."""
    momentum: float = 0.9
    """full: of sgd."""
    warmup: float = 0.1
    """full: fraction of the steps over which the learning rate rises."""
    device: Device = "auto"
    """auto takes CUDA where it works."""
    threads: int | None = None
    """On the CPU; by default all cores that this process may use."""


@dataclass(frozen=True)
class TrainResult:
    """What came of it; metrics are of the validation split."""

    out: Path
    metrics: dict[str, float]  # accuracy, macro_f1, loss of the weights that were written
    history: tuple[dict[str, float], ...]  # the same per epoch, or per L2 penalty that was tried
    trainable_parameters: int
    total_parameters: int
    examples: dict[str, int]  # per split; distinct ones in selection and gate
    seconds: float

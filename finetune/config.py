"""What the stage is asked for, and what it gives back."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from finetune.device import Device
from finetune.model import Pooling
from finetune.splits import Fractions

Strategy = Literal["auto", "probe", "last", "full", "lp-ft", "lora"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Augmentation = Literal["flip", "crop", "color"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a checkpoint will be."""

    model: str
    """transformers:ID_OR_DIR, torchvision:NAME, python:PATH.py:function, python:pkg.mod:function, vectors:FILE, mlp, or
    checkpoint:DIR to go on from a checkpoint with a new head."""
    data: str
    """A folder of class folders with PNG or JPEG files, a .csv, .jsonl, .parquet or .npz file, a folder of CIFAR-10's
    binary batches, or torchvision:CIFAR10."""
    _: KW_ONLY
    out: Path
    """Directory of the checkpoint; must not exist yet."""
    strategy: Strategy | None = None
    """probe fits a linear head on the frozen model's features; last trains the last blocks; full every weight; lp-ft
    probes and then trains every weight; lora trains low-rank changes and merges them; auto tries probe, last, full
    while there is something to gain and keeps the best. By default probe, or full where hidden layers are new."""
    input_column: tuple[str, ...] = ()
    """Of a table: the texts (two columns for pairs), the paths of the images, or the numbers of a vector; of an .npz:
    the array. By default "text", "image", every column of numbers that is no label, or "x"."""
    label_column: tuple[str, ...] = ("label",)
    """NAME[:KIND[:WEIGHT]], once for each task; the kinds are multiclass, multilabel and regression, the weight is that
    of the task's loss. In an .npz the default is "y"."""
    max_bad: int = 0
    """Images that are unreadable, too large or too narrow, and rows without input or labels, that are left out instead
    of being an error."""
    split: Fractions = (0.7, 0.1, 0.1, 0.1)
    """Fractions for train, validation, selection and gate."""
    seed: int = 0
    """Of the splits, the first weights, the order of the examples, dropout and augmentation."""
    max_length: int = 128
    """Of a text, in tokens or known words; longer ones are cut."""
    pooling: Pooling | None = None
    """How the vectors of tokens or words become one: mean, cls (transformers only) or sum (vectors only); by default
    mean."""
    image_size: int | None = None
    """Side of the images in pixels; by default the model's own. torchvision models only."""
    weights: str = "default"
    """default downloads, none is random, else a file. torchvision models only."""
    widths: tuple[int, ...] = ()
    """New hidden layers between the features and the head. mlp and vectors only."""
    vocab_size: int = 50_000
    """Words of a vectors file, the most frequent first, that are kept besides those of the train split."""
    segmenter: Literal["whitespace", "jieba"] = "whitespace"
    """How a text becomes words. vectors only."""
    dictionary: Path | None = None
    """jieba's; by default the one that comes with it."""
    lowercase: bool = True
    """Words are looked up in lower case. vectors only."""
    cache: bool = True
    """Keep a frozen model's features, so that the next run on the same data is quick."""
    train_last: int = 2
    """last: how many blocks train, counted from the end, the head being the first."""
    train_pattern: str | None = None
    """last: a regular expression; the parameters whose names it matches anywhere train, and the head."""
    lora_rank: int = 8
    """lora: rank of the changes."""
    epochs: int | None = None
    """Passes over the train split; by default as many as make 300 steps, between 3 and 10, and where nothing is
    pretrained as many as make 2,000, between 10 and 100; of more than 10 classes √(classes / 10) times as many."""
    batch_size: int = 32
    """Examples at a time, over all processes."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    optimizer: Optimizer | None = None
    """By default sgd for images, adamw for everything else."""
    learning_rate: float | None = None
    """At its peak; by default 0.01 for sgd, 5e-5 for adamw, 1e-3 for adamw without a pretrained network."""
    weight_decay: float | None = None
    """By default 0.0001 for sgd and 0.01 for adamw; biases and norms have none."""
    momentum: float = 0.9
    """Of sgd."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    max_gradient_norm: float = 1.0
    """Longer gradients are cut to it."""
    layer_decay: float = 1.0
    """The learning rate of each block is that of the next one times this."""
    ema: float = 0.0
    """Decay per step of a running average of the weights, which is then what is validated and kept; 0 is none."""
    label_smoothing: float = 0.0
    """multiclass: share of the truth that is spread over all labels."""
    mixup: float = 0.0
    """Images: parameter of the beta distribution by which pairs are mixed; 0 is none."""
    augment: tuple[Augmentation, ...] = ()
    """Images: random changes of the examples before preprocessing, new ones every epoch."""
    class_weights: Literal["none", "balanced", "auto"] = "auto"
    """multiclass: balanced weighs a label by the inverse of its frequency; auto does when one is 10 times another."""
    teacher: Path | None = None
    """A checkpoint of the same tasks whose logits are learned too (knowledge distillation)."""
    distill_weight: float = 0.5
    """Share of the teacher's loss."""
    temperature: float = 2.0
    """Of the teacher's and the student's softmax."""
    metric: str | None = None
    """Of the validation split, by which the epoch is chosen that is kept: accuracy, macro_f1, rmse, loss, …"""
    patience: int | None = None
    """Stop after so many epochs without a better one."""
    precision: Precision = "auto"
    """Of the training's arithmetic; auto is fp32 on a CPU, bf16 or fp16 on a GPU. Evaluation and weights are fp32."""
    save_steps: int | None = None
    """Save what resuming needs every so many steps; it is saved after an epoch anyway, every 10 seconds at most."""
    resume: bool = False
    """Go on where a training to the same --out was interrupted; the result is the same, bit for bit."""
    deterministic: bool = False
    """Refuse operations that are not deterministic, on a GPU; on a CPU all are."""
    tensorboard: Path | None = None
    """Write curves for TensorBoard into this folder too."""
    device: Device = "auto"
    """auto takes CUDA where it works."""
    threads: int | None = None
    """On the CPU; by default all cores that this process may use."""


@dataclass(frozen=True)
class TrainResult:
    """What came of it; metrics are of the validation split."""

    out: Path
    strategy: Strategy
    metrics: dict[str, float]  # of the weights that were written, and their epoch or l2; of several tasks as "TASK.…"
    history: tuple[dict[str, float], ...]  # the same per epoch, or per L2 penalty that was tried
    facts: dict[str, float]  # of the model and the data: the share of the train split's words that has no vector
    rungs: tuple[dict[str, str | float], ...]  # auto: each strategy, what it gained, and the seconds that it took
    trainable_parameters: int
    total_parameters: int
    examples: dict[str, int]  # per split; distinct ones in selection and gate
    seconds: float

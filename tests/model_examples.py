"""Small datasets and whole checkpoints for the tests of models, without a training."""

import hashlib
from pathlib import Path

import numpy as np

from bundle.manifest import Multiclass, Regression
from finetune.checkpoint import CheckpointSpec, Provenance, write_checkpoint
from finetune.config import TrainConfig
from finetune.data import Dataset
from finetune.pretrained import open_model
from finetune.splits import Splits
from finetune.target import Target

TASKS = (Multiclass(name="label", labels=("a", "b", "c")), Regression(name="stars", mean=2.0, std=0.5))


def dataset_of(raws, columns=("text",), names=()):
    """Examples with labels that alternate; `names` are those of the numbers of vectors."""
    target = Target("label", "multiclass", ("a", "b"), np.arange(len(raws)) % 2)
    return Dataset(
        location="/data",
        input_columns=tuple(columns),
        label_columns=("label",),
        names=[f"row {i}" for i in range(1, len(raws) + 1)],
        hashes=[hashlib.sha256(raw).hexdigest() for raw in raws],
        targets=(target,),
        weights=(1.0,),
        sha256="0" * 64,
        held_out=None,
        feature_names=tuple(names),
        _raw=raws.__getitem__,
    )


def load(model, dataset=None, train=None, **options):
    """The model, for a dataset whose examples are all of the train split unless `train` says otherwise."""
    dataset = dataset_of([], ()) if dataset is None else dataset
    train = np.arange(len(dataset)) if train is None else train
    return open_model(TrainConfig(str(model), "/data", out=Path("/none"), **options), dataset, train)


def write(pretrained, network, out, trained=()):
    """A checkpoint of the network, with two tasks, whose train split was the contents `trained`."""
    provenance = Provenance(
        created="", config={"model": "m", "widths": (3, 4), "augment": ("flip",), "seed": 0, "split": (0.5, 0.5)},
        seed=0, data="/data", data_sha256="0" * 64, device="cpu", versions={}, examples={}, metrics={}, history=(),
    )  # fmt: skip
    spec = CheckpointSpec(
        format="edgeward-checkpoint", format_version=1, model=pretrained.spec, input=pretrained.input, tasks=TASKS,
        provenance=provenance, files={},
    )  # fmt: skip
    splits = Splits(
        data="/data", data_sha256="0" * 64, input_columns=("text",), label_columns=("label",), seed=0,
        fractions=(0.7, 0.1, 0.1, 0.1), assignment=dict.fromkeys(trained, "train"),
    )  # fmt: skip
    write_checkpoint(out, spec, network, splits, {**pretrained.files, "run.json": b"{}", "report.html": b""})
    return out

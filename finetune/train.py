"""The stage: dataset -> checkpoint."""

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import structlog
import torch

from bundle.errors import OutputExists
from bundle.host import cpu_count
from bundle.manifest import Multiclass, TextInput
from finetune import evaluate
from finetune.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    CheckpointSpec,
    Provenance,
    library_versions,
    write_checkpoint,
)
from finetune.config import TrainConfig, TrainResult
from finetune.data import Dataset, load_dataset
from finetune.device import choose_device
from finetune.features import backbone_features, encode_rows
from finetune.full import Recipe, train_full
from finetune.model import Network
from finetune.pretrained import Pretrained, open_model
from finetune.probe import fit_head
from finetune.splits import SPLIT_NAMES, Splits, make_splits

__all__ = ["TrainConfig", "TrainResult", "train"]

log = structlog.get_logger()

TASK = "label"

Metrics = dict[str, float]
History = tuple[Metrics, ...]


@dataclass(frozen=True)
class _Job:
    """Everything that a strategy works on."""

    config: TrainConfig
    device: torch.device
    pretrained: Pretrained
    dataset: Dataset
    splits: Splits
    network: Network


def train(config: TrainConfig) -> TrainResult:
    """Adapt a pretrained model to a labelled dataset and write a checkpoint.

    Raises:
        OutputExists: there is something at config.out.
        ModelError: the model cannot be loaded.
        DataError: the data cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
        DeviceUnavailable: CUDA was asked for and cannot be used.
        MissingExtra: a library is not installed.
    """
    start = time.perf_counter()
    if config.out.exists():
        raise OutputExists(f"{config.out} exists already and was left as it is. Choose another --out.")
    job = _prepare(config)
    history, metrics = _probe(job) if config.strategy == "probe" else _full(job)
    spec = _spec(job, history, metrics)
    write_checkpoint(config.out, spec, job.network, job.splits, job.pretrained.files)
    log.info("checkpoint written", out=str(config.out), **metrics)
    trained = job.network.head if config.strategy == "probe" else job.network
    return TrainResult(
        out=config.out,
        metrics=metrics,
        history=history,
        trainable_parameters=sum(p.numel() for p in trained.parameters()),
        total_parameters=sum(p.numel() for p in job.network.parameters()),
        examples=spec.provenance.examples,
        seconds=time.perf_counter() - start,
    )


def _prepare(config: TrainConfig) -> _Job:
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or cpu_count())
    with _seeded(config.seed):
        pretrained = open_model(
            config.model,
            column=config.input_column,
            max_length=config.max_length,
            image_size=config.image_size,
            pooling=config.pooling,
            weights=config.weights,
        )
    dataset = load_dataset(
        config.data,
        "text" if isinstance(pretrained.input, TextInput) else "image",
        input_column=config.input_column,
        label_column=config.label_column,
        max_bad=config.max_bad,
    )
    splits = make_splits(dataset, config.split, seed=config.seed)
    with _seeded(config.seed):
        network = pretrained.network(len(dataset.label_names))
    return _Job(config, device, pretrained, dataset, splits, network)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers on the CPU are a function of the seed inside the block, and untouched after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _probe(job: _Job) -> tuple[History, Metrics]:
    train, validation = (job.splits.indices(job.dataset, split) for split in ("train", "validation"))
    features = backbone_features(
        job.pretrained,
        job.network,
        job.dataset,
        np.concatenate([train, validation]),
        batch_size=job.config.batch_size,
        device=job.device,
        cache=job.config.cache,
    )
    known, held_out = features[: len(train)], features[len(train) :]
    labels = job.dataset.labels[validation]
    head = fit_head(known, job.dataset.labels[train], held_out, labels, len(job.dataset.label_names))
    network = job.network.cpu().eval()
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(head.weight))
        network.head.bias.copy_(torch.from_numpy(head.bias))
        logits = network.head(torch.from_numpy(held_out)).numpy()
    history = tuple(dataclasses.asdict(trial) for trial in head.trials)
    return history, {**evaluate.score(logits, labels), "l2": head.l2}


def _full(job: _Job) -> tuple[History, Metrics]:
    train, validation = (job.splits.indices(job.dataset, split) for split in ("train", "validation"))
    history = train_full(
        job.network,
        encode_rows(job.pretrained, job.dataset, train),
        job.dataset.labels[train],
        encode_rows(job.pretrained, job.dataset, validation),
        job.dataset.labels[validation],
        job.pretrained.input,
        _recipe(job.config, job.pretrained),
        job.device,
    )
    job.network.cpu()
    best = max(history, key=lambda epoch: (epoch["accuracy"], -epoch["loss"]))
    return tuple(history), {name: best[name] for name in ("accuracy", "macro_f1", "loss", "epoch")}


def _recipe(config: TrainConfig, pretrained: Pretrained) -> Recipe:
    optimizer = config.optimizer or ("adamw" if isinstance(pretrained.input, TextInput) else "sgd")
    rate, decay = {"adamw": (5e-5, 0.01), "sgd": (0.01, 1e-4)}[optimizer]
    return Recipe(
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=optimizer,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        weight_decay=decay if config.weight_decay is None else config.weight_decay,
        momentum=config.momentum,
        warmup=config.warmup,
        seed=config.seed,
    )


def _spec(job: _Job, history: History, metrics: Metrics) -> CheckpointSpec:
    config, dataset = dataclasses.asdict(job.config), job.dataset
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config={name: os.fspath(value) if isinstance(value, Path) else value for name, value in config.items()},
        seed=job.config.seed,
        data=dataset.location,
        data_sha256=dataset.sha256,
        device=job.device.type,
        versions=library_versions(),
        examples={split: len(job.splits.indices(dataset, split)) for split in SPLIT_NAMES},
        metrics=metrics,
        history=history,
    )
    return CheckpointSpec(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        model=job.pretrained.spec,
        input=job.pretrained.input,
        tasks=(Multiclass(name=TASK, labels=dataset.label_names),),
        provenance=provenance,
        files={},
    )

"""The stage: dataset -> checkpoint."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bundle import store
from bundle.errors import OutputExists
from bundle.host import cpu_count
from bundle.log import log
from bundle.preprocess import encoder
from finetune import evaluate, report
from finetune.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    CheckpointSpec,
    Provenance,
    library_versions,
    read_spec,
    write_checkpoint,
)
from finetune.config import TrainConfig, TrainResult
from finetune.data import load_dataset
from finetune.device import choose_device
from finetune.features import weights_digest
from finetune.job import Job
from finetune.parallel import World, world
from finetune.pretrained import modality, open_model
from finetune.splits import SPLIT_NAMES, make_splits
from finetune.strategies import Outcome, adapt, check_options, progress_folder

__all__ = ["Job", "TrainConfig", "TrainResult", "prepare", "run", "train"]

_OF_NO_EFFECT = ("out", "resume", "save_steps", "cache", "tensorboard")  # on the weights


def train(config: TrainConfig) -> TrainResult:
    """Adapt a pretrained model to a labelled dataset and write a checkpoint.

    Under torchrun every process calls this, and the first one writes.

    Raises:
        OutputExists: there is something at config.out, or an unfinished training to it.
        EdgewardError: config.out cannot be written.
        ModelError: the model cannot be loaded.
        DataError: the data or an option cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
        DeviceUnavailable: CUDA was asked for and cannot be used.
        MissingExtra: a library is not installed.
    """
    with world() as ours:
        return run(prepare(config, ours))


def prepare(config: TrainConfig, ours: World | None = None) -> Job:
    """Load and check everything, and make the network, its head untrained. Raises as train does."""
    ours = ours or World()
    check_options(config)
    report.check_extras(tensorboard=config.tensorboard is not None)
    _check_output(config)
    device = choose_device(config.device)
    threads = config.threads or max(1, cpu_count() // ours.size)
    torch.set_num_threads(threads)
    dataset = load_dataset(
        config.data,
        modality(config.model),
        input_column=config.input_column,
        label_column=config.label_column,
        max_bad=config.max_bad,
    )
    splits = make_splits(dataset, config.split, seed=config.seed)
    train_indices = splits.indices(dataset, "train")
    tasks = tuple(target.task(train_indices) for target in dataset.targets)
    with _seeded(config.seed):
        pretrained = open_model(config, dataset, train_indices)
        network = pretrained.network(sum(target.width for target in dataset.targets))
    settings = {name: str(value) for name, value in asdict(config).items() if name not in _OF_NO_EFFECT}
    decisive = [settings, dataset.sha256, dataset.hashes, library_versions(), device.type, threads, ours.size]
    files = {name: hashlib.sha256(data).hexdigest() for name, data in pretrained.files.items()}
    decisive += [files, weights_digest(network), config.teacher and read_spec(config.teacher)[1]]
    return Job(
        config=config,
        strategy=config.strategy or ("full" if config.widths else "probe"),
        world=ours,
        device=device,
        pretrained=pretrained,
        dataset=dataset,
        splits=splits,
        tasks=tasks,
        network=network,
        encode=encoder(pretrained.input, pretrained.files.__getitem__),
        fingerprint=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest(),
    )


def _check_output(config: TrainConfig) -> None:
    store.check_new(config.out)
    if config.tensorboard is not None:
        store.check_writable(config.tensorboard / "events", "--tensorboard")
    unfinished = progress_folder(config.out)
    if unfinished.exists() and not config.resume:
        raise OutputExists(
            f"{unfinished} holds an unfinished training to {config.out}. Go on with --resume, or remove it."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers on the CPU are a function of the seed inside the block, and untouched after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no deterministic mode
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(job: Job) -> TrainResult:
    """Train a prepared job and write its checkpoint. Raises as train does."""
    start = time.perf_counter()
    unfinished = progress_folder(job.config.out)
    try:
        with _seeded(job.config.seed), _determinism(job.config.deterministic):
            outcome = adapt(job, job.strategy)
    except (KeyboardInterrupt, SystemExit):
        if unfinished.exists():
            log.info("go on with --resume", kept=str(unfinished))
        raise
    validation = job.targets(job.indices("validation"))
    metrics = evaluate.score(job.tasks, outcome.logits, validation, job.dataset.weights)
    result = TrainResult(
        out=job.config.out,
        strategy=job.strategy,
        metrics={**metrics, **outcome.kept},
        history=outcome.history,
        facts=job.pretrained.facts,
        rungs=outcome.rungs,
        trainable_parameters=outcome.trained,
        total_parameters=sum(p.numel() for p in job.network.parameters()),
        examples={split: len(job.indices(split)) for split in SPLIT_NAMES},
        seconds=time.perf_counter() - start,
    )
    if job.world.rank == 0:
        _write(job, outcome, result)
    return result


def _write(job: Job, outcome: Outcome, result: TrainResult) -> None:
    spec = _spec(job, result)
    validation = job.targets(job.indices("validation"))
    described = report.write_report(job.tasks, result, spec.provenance, outcome.logits, validation)
    write_checkpoint(job.config.out, spec, job.network, job.splits, {**job.pretrained.files, **described})
    shutil.rmtree(progress_folder(job.config.out), ignore_errors=True)
    if job.config.tensorboard is not None:
        report.write_tensorboard(job.config.tensorboard, result.history)
    log.info("checkpoint written", out=str(job.config.out), **result.metrics)


def _spec(job: Job, result: TrainResult) -> CheckpointSpec:
    return CheckpointSpec(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        model=job.pretrained.spec,
        input=job.pretrained.input,
        tasks=job.tasks,
        provenance=Provenance(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config={name: _plain(value) for name, value in asdict(job.config).items()},
            seed=job.config.seed,
            data=job.dataset.location,
            data_sha256=job.dataset.sha256,
            device=job.device.type,
            versions=library_versions(),
            examples=result.examples,
            metrics=result.metrics,
            history=result.history,
        ),
        files={},
    )


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, Path) else value

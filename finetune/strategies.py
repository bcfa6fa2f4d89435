"""How much of a network is trained: its head, its last blocks, all of it, low-rank changes, or what is best of some."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bundle.errors import DataError, ModelError
from bundle.log import log
from bundle.manifest import ImageInput, Multiclass, TextInput
from finetune import evaluate
from finetune.augment import augmented
from finetune.blocks import last_blocks, matching
from finetune.config import Strategy, TrainConfig
from finetune.features import backbone_features, encode_rows, teacher_logits
from finetune.job import Job
from finetune.loop import Examples, Recipe, fit
from finetune.model import Network
from finetune.objective import make_objective
from finetune.parallel import sharded_logits
from finetune.probe import fit_head
from finetune.resume import Progress

PROBED_RATE = 0.4  # lp-ft: of the learning rate, when the head already fits
WORTHWHILE = 0.005  # auto: with less than this left to gain it stops; a fraction, of rmse and loss relative
_RUNGS: tuple[Strategy, ...] = ("probe", "last", "full")  # of auto

Row = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What a strategy left the network as."""

    logits: np.ndarray  # float32 (N, C), of the validation split
    history: tuple[Row, ...]  # per epoch, or per L2 penalty
    kept: Row  # which of them: `epoch`, or `l2`, of several tasks one each
    trained: int  # parameters
    rungs: tuple[dict[str, str | float], ...] = ()


def adapt(job: Job, strategy: Strategy) -> Outcome:
    """Train the job's network in place by one strategy and leave it in eval mode, on the CPU.

    Raises:
        TrainingDiverged: a loss became NaN or infinite.
        ModelError: the strategy is not for this model.
    """
    match strategy:
        case "probe":
            return _probe(job)
        case "last":
            return _train(job, "last", _last(job))
        case "full":
            return _train(job, "full", _everything(job))
        case "lp-ft":
            _probe(job)
            return _train(job, "lp-ft", _everything(job), PROBED_RATE)
        case "lora":
            return _lora(job)
        case "auto":
            return _auto(job)


def _everything(job: Job) -> list[str]:
    return [name for name, _ in job.network.named_parameters()]


def _last(job: Job) -> list[str]:
    if job.config.train_pattern is not None:
        return matching(job.network, job.config.train_pattern)
    return last_blocks(job.network, job.config.train_last)


def _probe(job: Job) -> Outcome:
    train, validation = job.indices("train"), job.indices("validation")
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
    head = fit_head(known, job.targets(train), held_out, job.targets(validation), job.tasks)
    network = job.network.cpu().eval()
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(head.weight))
        network.head.bias.copy_(torch.from_numpy(head.bias))
        logits = network.head(torch.from_numpy(held_out)).numpy()
    names = ["l2"] if len(job.tasks) == 1 else [f"{task.name}.l2" for task in job.tasks]
    kept = dict(zip(names, head.l2, strict=True))
    return Outcome(logits, head.trials, kept, sum(p.numel() for p in network.head.parameters()))


def _train(job: Job, name: str, trainable: Sequence[str], rate: float = 1.0) -> Outcome:
    """The loop, over the parameters that are named."""
    config, spec = job.config, job.pretrained.input
    train, validation = job.indices("train"), job.indices("validation")
    teacher = None
    if config.teacher is not None:
        teacher = teacher_logits(
            config.teacher,
            job.dataset,
            train,
            job.tasks,
            batch_size=config.batch_size,
            device=job.device,
            cache=config.cache,
        )
    examples = Examples(encode_rows(job.pretrained, job.dataset, train), job.targets(train), teacher)
    held_out = Examples(encode_rows(job.pretrained, job.dataset, validation), job.targets(validation))
    recipe = make_recipe(job, name)
    history = fit(
        job.network,
        examples,
        held_out,
        spec,
        make_objective(config, job.tasks, job.dataset.weights, examples.targets),
        replace(recipe, learning_rate=recipe.learning_rate * rate),
        job.device,
        trainable=trainable,
        world=job.world,
        progress=Progress(progress_folder(config.out) / name, job.fingerprint, config.save_steps),
        rows_of_epoch=_augmentation(job, train),
    )
    logits = sharded_logits(job.world, job.network, held_out.rows, spec, config.batch_size, job.device)
    job.network.cpu()
    named = dict(job.network.named_parameters())
    kept = {"epoch": best_epoch(history, recipe.metric or evaluate.main_metric(job.tasks))["epoch"]}
    return Outcome(logits, tuple(history), kept, sum(named[one].numel() for one in trainable))


def best_epoch(history: Sequence[Row], metric: str) -> Row:
    """The epoch that the loop kept: the best by the metric, of equals that with the least loss, of equals the first."""
    sign = 1 if evaluate.better(metric, 1.0, 0.0) else -1
    return max(history, key=lambda epoch: (sign * epoch[metric], -epoch["loss"]))


def progress_folder(out: Path) -> Path:
    """Where an unfinished training keeps what resuming needs: beside its checkpoint."""
    return out.with_name(f"{out.name}.progress")


def _augmentation(job: Job, train: np.ndarray) -> Callable[[int], Sequence[np.ndarray]] | None:
    spec = job.pretrained.input
    if not job.config.augment:
        return None
    if not isinstance(spec, ImageInput):
        raise ModelError(f"augment {', '.join(job.config.augment)} is for images; {job.config.model} takes none.")
    return partial(augmented, job.dataset, train, spec, job.config.augment, job.config.seed)


def _lora(job: Job) -> Outcome:
    from finetune.lora import merge_lora, with_lora

    trainable = with_lora(job.network, job.config.lora_rank, seed=job.config.seed)
    trained = _train(job, "lora", trainable)
    merge_lora(job.network, encode_rows(job.pretrained, job.dataset, job.indices("validation")), job.pretrained.input)
    return trained


def _auto(job: Job) -> Outcome:
    """Climb probe, last, full, each from the first weights, while the best leaves something to gain; keep the best.

    A rung that gains nothing ends nothing: where the features do not fit the task, probe and last reach the same, and
    full what neither can. Of equals the cheaper is kept.
    """
    metric = job.config.metric or evaluate.main_metric(job.tasks)
    validation = job.targets(job.indices("validation"))
    first, kept = _weights(job.network), _weights(job.network)
    best, outcome = 0.0, None
    rungs: list[dict[str, str | float]] = []
    for strategy in _RUNGS:
        start = time.perf_counter()
        job.network.load_state_dict(first)
        reached = adapt(job, strategy)
        value = evaluate.score(job.tasks, reached.logits, validation)[metric]
        seconds = time.perf_counter() - start
        gain = math.inf if outcome is None else _gain(metric, best, value)
        rungs.append({"strategy": strategy, metric: value, "trained": reached.trained, "seconds": seconds})
        if outcome is not None:
            rungs[-1]["gain"] = gain
        log.info("rung", **rungs[-1])
        if gain > 0:
            best, outcome, kept = value, reached, _weights(job.network)
        if _gain(metric, best, _perfect(metric)) < WORTHWHILE:
            break
    assert outcome is not None
    job.network.load_state_dict(kept)
    return replace(outcome, rungs=tuple(rungs))


def _weights(network: Network) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def _perfect(metric: str) -> float:
    return 1.0 if evaluate.better(metric, 1.0, 0.0) else 0.0


def _gain(metric: str, before: float, after: float) -> float:
    """By how much a metric became better: of accuracies and F1 the difference, of errors and losses the fraction."""
    if evaluate.better(metric, 1.0, 0.0):
        return after - before
    return (before - after) / abs(before) if before else 0.0


def make_recipe(job: Job, strategy: str) -> Recipe:
    """The options of the loop, with the defaults that suit the model and the number of examples."""
    config: TrainConfig = job.config
    spec = job.pretrained.input
    optimizer = config.optimizer or ("sgd" if isinstance(spec, ImageInput) else "adamw")
    new = not isinstance(spec, (TextInput, ImageInput))  # mlp and vectors: no pretrained layers to spoil
    adamw = 1e-3 if new else 5e-4 if strategy == "lora" else 5e-5
    rate, decay = {"adamw": (adamw, 0.01), "sgd": (0.01, 1e-4)}[optimizer]
    metric = config.metric or evaluate.main_metric(job.tasks)
    classes = max((len(task.labels) for task in job.tasks if isinstance(task, Multiclass)), default=1)
    return Recipe(
        epochs=config.epochs or default_epochs(len(job.indices("train")), config.batch_size, classes, new=new),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        optimizer=optimizer,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        weight_decay=decay if config.weight_decay is None else config.weight_decay,
        momentum=config.momentum,
        schedule=config.schedule,
        warmup=config.warmup,
        max_gradient_norm=config.max_gradient_norm,
        layer_decay=config.layer_decay,
        ema=config.ema,
        mixup=config.mixup,
        patience=config.patience,
        metric=metric,
        precision=config.precision,
        save_steps=config.save_steps,
        seed=config.seed,
    )


def default_epochs(examples: int, batch_size: int, classes: int, *, new: bool) -> int:
    """Passes that make enough steps: 300 for a pretrained network, 2,000 for layers that start from nothing.

    Of more than ten classes each has fewer examples in a step: steps and the most passes grow with the square root of
    their number, which is measured for 100 (docs/fine-tuning.md).
    """
    steps, least, most = (2_000, 10, 100) if new else (300, 3, 10)
    more = math.sqrt(max(1.0, classes / 10))
    return min(round(most * more), max(least, math.ceil(steps * more * batch_size / examples)))


def check_options(config: TrainConfig) -> None:
    """Refuse numbers that no training can have.

    Raises:
        DataError: naming the option, its value and what it may be.
    """
    for name, low, high in (
        ("epochs", 1, math.inf),
        ("batch_size", 1, math.inf),
        ("accumulate", 1, math.inf),
        ("train_last", 1, math.inf),
        ("lora_rank", 1, math.inf),
        ("patience", 1, math.inf),
        ("save_steps", 1, math.inf),
        ("max_length", 1, math.inf),
        ("vocab_size", 0, math.inf),
        ("warmup", 0, 1),
        ("ema", 0, 1),
        ("label_smoothing", 0, 1),
        ("layer_decay", 0, 1),
        ("distill_weight", 0, 1),
        ("mixup", 0, math.inf),
        ("momentum", 0, 1),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            limits = f"between {low} and {high}" if high < math.inf else f"{low} or more"
            raise DataError(f"--{name.replace('_', '-')} is {value}; it must be {limits}.")
    for name in ("temperature", "max_gradient_norm", "learning_rate"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise DataError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0.")

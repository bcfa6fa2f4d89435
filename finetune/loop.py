"""The training loop. The weights of the best epoch on the validation split are kept.

Nothing depends on what ran before: the order of the examples is a function of (seed, epoch), what dropout drops of
(seed, step, process), how images are mixed of (seed, step, batch, process). So a training can stop after any step and
go on from there, and on a CPU the weights are the same, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from bundle.errors import CheckpointError, DataError, TrainingDiverged
from bundle.log import log
from bundle.manifest import ImageInput, Input
from bundle.preprocess import is_sequence, length
from finetune import evaluate
from finetune.augment import mixed
from finetune.chance import DROPOUT, MIXUP, generator, torch_seed
from finetune.device import choose_precision
from finetune.loader import batches
from finetune.model import Network
from finetune.objective import Mixed, Objective, target_tensors
from finetune.order import batches_of_epoch
from finetune.parallel import World, distribute, follow, gathered, sharded_logits
from finetune.progress import track
from finetune.recipe import Recipe, Tensors, make_optimizer, optimizer_tensors, restore_optimizer
from finetune.resume import Progress, State
from finetune.target import Target
from finetune.weights import Weights, freeze, set_modes

__all__ = ["Examples", "Recipe", "fit"]

Rows = Sequence[np.ndarray]
Ready = Iterator[tuple[np.ndarray, Tensors]]

_SAVE_SECONDS = 10  # epochs that are over sooner are not all saved
_CHECK_STEPS = 16  # on a GPU, where looking at a loss means waiting for it
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Examples:
    """What is learned from, or measured on.

    Attributes:
        rows: tensors without batch axis, as bundle.preprocess.encoder makes them.
        targets: one per task, of the same examples.
        teacher: float32 (N, ΣC), another network's logits of them.
    """

    rows: Rows
    targets: tuple[Target, ...]
    teacher: np.ndarray | None = None


def fit(
    network: Network,
    train: Examples,
    validation: Examples,
    spec: Input,
    objective: Objective,
    recipe: Recipe,
    device: torch.device,
    *,
    trainable: Sequence[str],
    world: World | None = None,
    progress: Progress | None = None,
    rows_of_epoch: Callable[[int], Rows] | None = None,
) -> list[dict[str, float]]:
    """Train a network in place and leave it on the device with the weights of its best epoch, in eval mode.

    The best epoch is that with the best recipe.metric on validation; of equals, that with the least loss. What is not
    trained stays as it is, bit for bit.

    Args:
        network: the same in every process.
        train: at least one example.
        validation: at least one example.
        spec: how rows are collated.
        objective: what is minimised.
        recipe: how.
        device: where.
        trainable: names of the parameters that are trained.
        world: the processes that take part; all of them call this with the same arguments.
        progress: where what resuming needs is kept. A training that is found there is resumed.
        rows_of_epoch: gives the rows of train as an epoch, from 0, is to see them.

    Returns:
        Per epoch its number from 1, `train_loss`, and the scores on validation.

    Raises:
        TrainingDiverged: a loss became NaN or infinite.
        DataError: there is no such metric, or mixup is asked for what is no image.
        CheckpointError: the state to resume from is damaged, or of another training.
        EdgewardError: what resuming needs cannot be written.
    """
    evaluate.check_metric(recipe.metric or evaluate.main_metric(objective.tasks), objective.tasks)
    if recipe.mixup and not isinstance(spec, ImageInput):
        raise DataError(f"mixup {recipe.mixup} is for images, and these examples are none.")
    network.to(device)
    if isinstance(spec, ImageInput):
        network.to(memory_format=torch.channels_last)  # as the pixels come
    freeze(network, trainable)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        training = _Training(
            network, train, validation, spec, objective, recipe, device, world or World(), progress, rows_of_epoch
        )
        training.run()
    network.to(memory_format=torch.contiguous_format)
    return training.history


class _Training:
    """A training under way."""

    def __init__(
        self,
        network: Network,
        train: Examples,
        validation: Examples,
        spec: Input,
        objective: Objective,
        recipe: Recipe,
        device: torch.device,
        world: World,
        progress: Progress | None,
        rows_of_epoch: Callable[[int], Rows] | None,
    ) -> None:
        self.network, self.train, self.validation, self.spec = network, train, validation, spec
        self.objective, self.recipe, self.device, self.world = objective, recipe, device, world
        self.progress = progress
        self.rows_of_epoch = rows_of_epoch or (lambda epoch: train.rows)
        self.targets = target_tensors(train.targets)
        self.teacher = None if train.teacher is None else torch.from_numpy(train.teacher)
        self.lengths = [length(row, spec) for row in train.rows] if is_sequence(spec) else None
        self.steps = -(-len(self._batches(0)) // recipe.accumulate)  # of an epoch
        self.model = distribute(world, network, next(batches(train.rows, [np.zeros(1, np.int64)], spec, device))[1])
        self.weights = Weights(network, averaged=recipe.ema > 0)
        self.optimizer = make_optimizer(network, recipe)
        self.dtype = _DTYPES[choose_precision(recipe.precision, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step = 0  # steps that are done
        self.losses = torch.zeros((), dtype=torch.float64, device=device)  # sum of the epoch so far, in this process
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best: Tensors = {}
        self.saved = -math.inf  # when, in seconds

    def run(self) -> None:
        """Train to the end, from the beginning or from where the last state was saved."""
        self._resume()
        for epoch in range(len(self.history), self.recipe.epochs):
            if self._is_stalled():
                break
            self._train_epoch(epoch)
            self._validate()
            self._save(sparing=epoch + 1 < self.recipe.epochs)
        self.weights.load(self.best)
        self.network.eval()

    def _is_stalled(self) -> bool:
        stalled = self.recipe.patience is not None and len(self.history) - self.best_epoch >= self.recipe.patience
        if stalled and self.world.rank == 0:
            log.info("stopped early", patience=self.recipe.patience, best_epoch=self.best_epoch)
        return stalled

    def _batches(self, epoch: int) -> list[np.ndarray]:
        recipe = self.recipe
        return batches_of_epoch(recipe.seed, epoch, len(self.train.rows), recipe.batch_size, self.lengths)

    def _train_epoch(self, epoch: int) -> None:
        """One pass over the examples, or what is left of it."""
        set_modes(self.network)
        planned = self._batches(epoch)
        starts = [int(batch[0]) for batch in np.array_split(np.arange(len(planned)), self.steps)]  # of the steps
        left = [*starts, len(planned)][self.step - epoch * self.steps :]
        own = [self._own(batch) for batch in planned[left[0] :]]
        ready = batches(self.rows_of_epoch(epoch), own, self.spec, self.device)
        shown = track(ready, len(planned), f"epoch {epoch + 1}/{self.recipe.epochs}", done=left[0])
        for start, end in pairwise(left):
            self._train_step(planned[start:end], shown)
            if self.recipe.save_steps and self.step % self.recipe.save_steps == 0 and end < len(planned):
                self._save()
        next(shown, None)  # the bar is full

    def _own(self, batch: np.ndarray) -> np.ndarray:
        """This process's examples of a batch; where there are too few for all, one that will not count."""
        own = batch[self.world.rank :: self.world.size]
        return own if len(own) else batch[:1]

    def _train_step(self, planned: list[np.ndarray], ready: Ready) -> None:
        """Move the weights once, along the gradient of some batches.

        Args:
            planned: of each batch the int64 positions of its examples, those of all processes.
            ready: gives the same batches, this process's positions and inputs.
        """
        self._set_rate()
        self._seed_dropout()
        everyone = np.concatenate(planned)
        counts = self.objective.counts([target[everyone] for target in self.targets])
        for number, batch in enumerate(planned):
            positions, inputs = next(ready)
            counted = self.world.rank < len(batch)
            with self._exchange(number + 1 == len(planned)):
                loss = self._loss(positions, inputs, counts, number)
                self.scaler.scale(loss * (counted * self.world.size)).backward()  # type: ignore[no-untyped-call]
            self.losses += loss.detach().double() * (counted * len(everyone))
        if self.device.type == "cpu" or self.step % _CHECK_STEPS == 0:
            self._check("loss", self.losses.item(), self.step + 1)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.weights.update_average(self.step, self.recipe.ema)

    def _seed_dropout(self) -> None:
        """Seed the one generator that dropout draws from: torch.manual_seed seeds those of all devices, and is slow."""
        seed = torch_seed(self.recipe.seed, DROPOUT, self.step, self.world.rank)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _set_rate(self) -> None:
        rate = self.recipe.rate(self.step, self.steps * self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def _exchange(self, now: bool) -> AbstractContextManager[None]:
        """Inside the block processes add up their gradients if it is time, else each keeps adding to its own."""
        alone = not isinstance(self.model, nn.parallel.DistributedDataParallel)
        return nullcontext() if now or alone else self.model.no_sync()  # type: ignore[operator]

    def _loss(self, positions: np.ndarray, inputs: Tensors, counts: list[float], number: int) -> Tensor:
        """What some examples add to the loss of the step in which they are in batch `number`."""
        index = torch.from_numpy(positions)
        targets = [target[index].to(self.device) for target in self.targets]
        teacher = None if self.teacher is None else self.teacher[index].to(self.device)
        mixing = self._mix(inputs, number) if self.recipe.mixup else None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(*inputs.values())
        return self.objective.loss(logits, targets, counts, teacher, mixing)

    def _mix(self, inputs: Tensors, number: int) -> Mixed:
        """Mix the images of a batch with each other, and say how."""
        chance = generator(self.recipe.seed, MIXUP, self.step, number, self.world.rank)
        share = float(chance.beta(self.recipe.mixup, self.recipe.mixup))
        permutation = torch.from_numpy(chance.permutation(len(inputs["image"]))).to(self.device)
        inputs["image"] = mixed(inputs["image"], permutation, share)
        return permutation, share

    def _clip(self) -> None:
        """Cut the gradient to the norm that it may have."""
        limit = self.recipe.max_gradient_norm
        if math.isinf(limit):
            return
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(
            [each.grad for each in self.weights.parameters.values() if each.grad is not None]
        )
        if self.device.type != "cpu" or norm > limit:  # a GPU is not waited for
            nn.utils.clip_grads_with_norm_(self.weights.parameters.values(), limit, norm)

    def _validate(self) -> None:
        """Measure the epoch that ended, and keep its weights when it is the best."""
        epoch = len(self.history) + 1
        train_loss = sum(gathered(self.world, self.losses.item())) / len(self.train.rows)
        self._check("loss", train_loss, self.step)
        self.losses.zero_()
        with self.weights.averaged():
            follow(self.world, self.weights.buffers().values())
            rows, batch_size = self.validation.rows, self.recipe.batch_size
            logits = sharded_logits(self.world, self.network, rows, self.spec, batch_size, self.device)
            self._check("largest logit of the validation split", float(np.abs(logits).max()), self.step)
            measured = evaluate.score(self.objective.tasks, logits, self.validation.targets, self.objective.weights)
            self.history.append({"epoch": epoch, "train_loss": train_loss, **measured})
            if self._is_best():
                self.best_epoch = epoch
                self.best = {name: each.detach().cpu().clone() for name, each in self.weights.changed().items()}
        if self.world.rank == 0:
            log.info("epoch done", **self.history[-1])

    def _is_best(self) -> bool:
        if not self.best_epoch:
            return True
        metric = self.recipe.metric or evaluate.main_metric(self.objective.tasks)
        now, before = self.history[-1], self.history[self.best_epoch - 1]
        if now[metric] == before[metric]:
            return now["loss"] < before["loss"]
        return evaluate.better(metric, now[metric], before[metric])

    def _check(self, what: str, value: float, step: int) -> None:
        """Stop at a number that is none; `step` is that of the whole training, from 1."""
        if not math.isfinite(value):
            rate = self.recipe.rate(step - 1, self.steps * self.recipe.epochs)
            epoch, of_epoch = divmod(step - 1, self.steps)
            raise TrainingDiverged(
                f"the {what} became {value} in epoch {epoch + 1}, step {of_epoch + 1}, at learning rate {rate:.3g}; "
                "no checkpoint was written. Try a lower learning rate."
            )

    def _save(self, *, sparing: bool = False) -> None:
        """Write what resuming needs; sparingly only when the last time is a while ago."""
        if self.progress is None:
            return
        losses = gathered(self.world, self.losses.item())
        self._check("loss", sum(losses), self.step)
        if self.world.rank or (sparing and time.monotonic() - self.saved < _SAVE_SECONDS):
            return
        self.saved = time.monotonic()
        tensors = {"model": self.weights.changed(), "average": self.weights.average, "best": self.best}
        tensors |= optimizer_tensors(self.optimizer, self.weights.parameters)
        scaler = self.scaler.state_dict()
        self.progress.save(State(self.step, losses, self.history, self.best_epoch, scaler, tensors))

    def _resume(self) -> None:
        """Take the last state that was saved, if there is one."""
        if self.progress is None:
            return
        state = self.progress.load()
        steps = gathered(self.world, 0 if state is None else state.step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"of the processes each finds another state in {self.progress.folder}: those of steps "
                f"{', '.join(f'{step:.0f}' for step in steps)}. It must be a folder that all of them share."
            )
        if state is None:
            return
        self.step, self.history, self.best_epoch = state.step, state.history, state.best_epoch
        self.losses.fill_(state.losses[self.world.rank])
        self.best = state.tensors.get("best", {})
        self.weights.load(state.tensors["model"])
        for name, tensor in state.tensors.get("average", {}).items():
            self.weights.average[name].copy_(tensor)
        restore_optimizer(self.optimizer, self.weights.parameters, state.tensors)
        self.scaler.load_state_dict(state.scaler)
        if self.world.rank == 0:
            log.info("resumed", step=self.step, of=self.steps * self.recipe.epochs)

"""What training minimises: the weighted sum of the losses, exact under micro-batches, ranks and missing labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bundle.log import log
from bundle.manifest import Multiclass, Multilabel, Regression, Task
from finetune.config import TrainConfig
from finetune.target import Target, columns

IMBALANCE = 10  # examples of the most frequent label for one of the rarest, from which "auto" balances
MISSING = -1  # index of a missing label

Mixed = tuple[Tensor, float]


@dataclass(frozen=True)
class Objective:
    """The loss of several tasks.

    A task's loss is the mean over the examples whose label is known: of cross-entropy weighted by class (multiclass),
    of the mean binary cross-entropy of the labels (multilabel), of the squared error of the standardised value
    (regression). With a teacher it is (1 - distill_weight) of that and distill_weight of the distance to the teacher's
    logits: the KL divergence of the softmaxes at the temperature T, times T² (multiclass), binary cross-entropy to the
    teacher's probabilities (multilabel), the squared difference (regression).

    Attributes:
        tasks: in the order of their columns in the logits.
        weights: of each task's loss.
        class_weights: of each task float32 (C,), or None.
        label_smoothing: share of the truth that is spread over all labels; multiclass only.
        distill_weight: share of the teacher; 0 when there is none.
        temperature: T.
    """

    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    class_weights: tuple[np.ndarray | None, ...]
    label_smoothing: float = 0.0
    distill_weight: float = 0.0
    temperature: float = 2.0

    def counts(self, targets: Sequence[Tensor]) -> list[float]:
        """What each task's summed loss is divided by: known examples, or the sum of their class weights.

        Args:
            targets: of all examples of a step, those of other micro-batches and ranks too; see target_tensors.
        """
        return [float(self._importance(i, target).sum()) for i, target in enumerate(targets)]

    def loss(
        self,
        logits: Tensor,
        targets: Sequence[Tensor],
        counts: Sequence[float],
        teacher: Tensor | None = None,
        mixed: Mixed | None = None,
    ) -> Tensor:
        """The share of a step's loss that is due to some of its examples; over all of them the shares add up to it.

        Args:
            logits: (n, ΣC), of any float type; the loss is computed in float32.
            targets: of the same n examples, one tensor per task; see target_tensors. On the device of the logits.
            counts: of the whole step; a task that nobody has a label of adds nothing.
            teacher: float32 (n, ΣC), the teacher's logits of the same examples before mixing.
            mixed: for inputs that are λ · x + (1 - λ) · x[permutation], int64 (n,) and λ: the loss is mixed likewise.
        """
        logits = logits.float()
        share = self._loss(logits, targets, counts, teacher)
        if mixed is None:
            return share
        permutation, kept = mixed
        others = [target[permutation] for target in targets]
        other = self._loss(logits, others, counts, None if teacher is None else teacher[permutation])
        return kept * share + (1 - kept) * other

    def _loss(
        self, logits: Tensor, targets: Sequence[Tensor], counts: Sequence[float], teacher: Tensor | None
    ) -> Tensor:
        total = logits.new_zeros(())
        for i, span in enumerate(columns(self.tasks)):
            part = self._hard(i, logits[:, span], targets[i])
            if teacher is not None and self.distill_weight > 0:
                soft = self._soft(self.tasks[i], logits[:, span], teacher[:, span])
                soft = (self._importance(i, targets[i]) * soft).sum()
                part = (1 - self.distill_weight) * part + self.distill_weight * soft
            total = total + self.weights[i] * part / (counts[i] or 1.0)
        return total

    def _importance(self, i: int, target: Tensor) -> Tensor:
        """How much each example counts for task i, float32 (n,): 0 without a label, else 1 or its class's weight."""
        match self.tasks[i]:
            case Multiclass():
                known = (target != MISSING).float()
                weight = self._class_weight(i, target.device)
                return known if weight is None else known * weight[target.clamp(min=0)]
            case Multilabel():
                return (~target.isnan().any(dim=1)).float()
            case Regression():
                return (~target.isnan()).float()

    def _class_weight(self, i: int, device: torch.device) -> Tensor | None:
        weight = self.class_weights[i]
        return None if weight is None else torch.from_numpy(weight).to(device)

    def _hard(self, i: int, logits: Tensor, target: Tensor) -> Tensor:
        """Sum of the losses to the labels, where they are known."""
        match self.tasks[i]:
            case Multiclass():
                return functional.cross_entropy(
                    logits,
                    target,
                    self._class_weight(i, logits.device),
                    ignore_index=MISSING,
                    reduction="sum",
                    label_smoothing=self.label_smoothing,
                )
            case Multilabel():  # a NaN would reach the gradient even where it is multiplied by 0
                each = functional.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none")
                return (self._importance(i, target) * each.mean(dim=1)).sum()
            case Regression(mean=mean, std=std):
                standardised = ((target.double() - mean) / std).nan_to_num().float()
                return (self._importance(i, target) * (logits[:, 0] - standardised).square()).sum()

    def _soft(self, task: Task, logits: Tensor, teacher: Tensor) -> Tensor:
        """Distance of each example's logits (n, C) to the teacher's, (n,)."""
        match task:
            case Multiclass():
                student, wanted = ((each / self.temperature).log_softmax(dim=1) for each in (logits, teacher))
                each = functional.kl_div(student, wanted, reduction="none", log_target=True)
                return each.sum(dim=1) * self.temperature**2
            case Multilabel():
                return functional.binary_cross_entropy_with_logits(logits, teacher.sigmoid(), reduction="none").mean(1)
            case Regression():
                return (logits - teacher).square().mean(dim=1)


def make_objective(
    config: TrainConfig, tasks: Sequence[Task], weights: Sequence[float], train: Sequence[Target]
) -> Objective:
    """The objective that a configuration asks for.

    Args:
        config: class_weights, label_smoothing, teacher, distill_weight and temperature are read.
        tasks: what is predicted.
        weights: of each task's loss, positive.
        train: the targets of the train split, by whose frequencies labels are weighed.
    """
    return Objective(
        tasks=tuple(tasks),
        weights=tuple(weights),
        class_weights=tuple(_class_weights(config.class_weights, target) for target in train),
        label_smoothing=config.label_smoothing,
        distill_weight=config.distill_weight if config.teacher else 0.0,
        temperature=config.temperature,
    )


def _class_weights(mode: str, target: Target) -> np.ndarray | None:
    """Weights float32 (C,) that make all labels count the same and the mean over the examples 1, or None."""
    if target.kind != "multiclass" or mode == "none":
        return None
    counts = np.bincount(target.values[target.known], minlength=target.width)
    seen = counts > 0
    if not seen.any() or (mode == "auto" and counts.max() < IMBALANCE * counts[seen].min()):
        return None
    log.info("labels are weighed by the inverse of their frequency", task=target.name, rarest=int(counts[seen].min()))
    weights = np.zeros(target.width, np.float32)
    weights[seen] = counts.sum() / (seen.sum() * counts[seen])
    return weights


def target_tensors(targets: Sequence[Target]) -> list[Tensor]:
    """The values as loss and counts take them, on the CPU.

    Multiclass int64 (N,), -1 where missing; multilabel float32 (N, C), NaN where missing; regression float64 (N,) in
    the units of the data, NaN where missing.
    """
    kinds = {"multiclass": torch.int64, "multilabel": torch.float32, "regression": torch.float64}
    return [torch.from_numpy(np.ascontiguousarray(target.values)).to(kinds[target.kind]) for target in targets]

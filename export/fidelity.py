"""How near a compiled model's answers are to PyTorch's, beyond the one metric that is gated."""

from collections.abc import Sequence
from fractions import Fraction
from math import comb, inf

import numpy as np

from bundle.manifest import Multiclass, Multilabel, Record, Regression, Task
from export.gate import label_rows
from finetune.evaluate import predictions
from finetune.target import Target, columns

BINS = 15  # of the calibration error
CHANCE = 0.05  # a corrected p-value above it is within chance


class ClassDrop(Record, frozen=True, kw_only=True):
    """The label whose recall fell most."""

    label: str
    examples: int  # that have it
    reference: float  # recall in PyTorch
    candidate: float
    p_value: float  # of as many lost answers by chance (exact, one-sided McNemar), corrected for all labels (Holm)
    within_chance: bool  # the p-value is above 0.05


class Fidelity(Record, frozen=True, kw_only=True):
    """How a candidate's answers to one task differ from the reference's."""

    task: str | None  # its name, when there are several
    broken: int  # examples with a logit of the candidate that is not finite; the means are of the others
    kl: float | None  # mean Kullback-Leibler divergence of the probabilities, nats; none for regression, or all broken
    cosine: float  # mean cosine of the logits less the reference's mean; of one column the correlation
    calibration_error: tuple[float, float] | None  # expected, of reference and candidate; none where kl is
    worst_class: ClassDrop | None  # none for regression, and when no recall fell


def compare(
    tasks: Sequence[Task], targets: Sequence[Target], reference: np.ndarray, candidate: np.ndarray
) -> tuple[Fidelity, ...]:
    """Describe how the logits of two models differ, task by task, on the examples whose truth is known.

    The calibration error is the mean distance of confidence and accuracy over 15 bins of equal width, weighted by their
    examples (C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017): of single labels the confidence is
    that of the predicted one, of sets each label's probability is held to how often the label is true.

    Args:
        tasks: whose logits they are.
        targets: the truth of N examples, one column for each task.
        reference: float32 (N, columns of all tasks), of PyTorch.
        candidate: the same, of the compiled model.
    """
    several = len(tasks) > 1
    return tuple(
        _describe(task, task.name if several else None, target, reference[:, part], candidate[:, part])
        for (task, part), target in zip(_parts(tasks), targets, strict=True)
    )


def _describe(task: Task, name: str | None, target: Target, reference: np.ndarray, candidate: np.ndarray) -> Fidelity:
    known = target.known
    truth, before, after = target.values[known], reference[known], candidate[known]
    whole = np.isfinite(after).all(axis=1)
    broken, cosine = int(np.sum(~whole)), _cosine(before[whole], after[whole])
    if isinstance(task, Regression):
        return Fidelity(task=name, broken=broken, kl=None, cosine=cosine, calibration_error=None, worst_class=None)
    kl, errors = None, None
    if whole.any():
        kl = _kl(task, before[whole], after[whole])
        errors = (
            calibration_error(task, truth[whole], before[whole]),
            calibration_error(task, truth[whole], after[whole]),
        )
    worst = _worst_class(task, truth, before, after, whole)
    return Fidelity(task=name, broken=broken, kl=kl, cosine=cosine, calibration_error=errors, worst_class=worst)


def screen_kl(tasks: Sequence[Task], reference: np.ndarray, candidate: np.ndarray) -> float:
    """One number to rank candidates by, which takes no labels: the mean over the tasks of the divergence, nats.

    Of a regression it is that of two normal distributions of the training data's deviation: half the mean squared
    difference of the standardised values. Infinite when a logit is not finite.

    Args:
        tasks: whose logits they are.
        reference: float32 (N, columns of all tasks), of PyTorch.
        candidate: the same, of the compiled model.
    """
    if not np.isfinite(candidate).all():
        return inf
    return float(np.mean([_kl(task, reference[:, part], candidate[:, part]) for task, part in _parts(tasks)]))


def _parts(tasks: Sequence[Task]) -> list[tuple[Task, slice]]:
    return list(zip(tasks, columns(tasks), strict=True))


def _kl(task: Task, reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean divergence of logits float (N, C), in float64: in float32 sure predictions would have probabilities of 0."""
    before, after = reference.astype(np.float64), candidate.astype(np.float64)
    match task:
        case Multiclass():
            logs, logs_now = _log_softmax(before), _log_softmax(after)
            divergence = (np.exp(logs) * (logs - logs_now)).sum(axis=1)
        case Multilabel():
            divergence = np.zeros_like(before)
            for sign in (1, -1):  # the label holds, or does not
                logs, logs_now = -np.logaddexp(0, -sign * before), -np.logaddexp(0, -sign * after)
                divergence += np.exp(logs) * (logs - logs_now)
        case Regression():
            divergence = np.square(before - after) / 2
    return max(0.0, float(divergence.mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def _cosine(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Of logits float (N, C); 1 of two directions that are nothing, 0 of one."""
    if len(reference) == 0:
        return 0.0
    before, after = reference.astype(np.float64), candidate.astype(np.float64)
    centre = before.mean(axis=0)
    before, after = before - centre, after - (after.mean(axis=0) if before.shape[1] == 1 else centre)
    if before.shape[1] == 1:
        before, after = before.T, after.T
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    same = (before == after).all(axis=1).astype(np.float64)
    return float(np.divide((before * after).sum(axis=1), lengths, out=same, where=lengths > 0).mean())


def calibration_error(task: Multiclass | Multilabel, truth: np.ndarray, logits: np.ndarray) -> float:
    """The expected calibration error, in [0, 1]; see compare.

    Args:
        task: whose logits they are.
        truth: labels int (N,), or 0 and 1 (N, C).
        logits: float (N, C), finite.
    """
    exact = logits.astype(np.float64)
    if isinstance(task, Multiclass):
        confidence, right = np.exp(_log_softmax(exact)).max(axis=1), exact.argmax(axis=1) == truth
    else:
        confidence, right = np.exp(-np.logaddexp(0, -exact)).ravel(), np.asarray(truth, bool).ravel()
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    distances = np.bincount(bins, confidence, BINS) - np.bincount(bins, right, BINS)
    return float(np.abs(distances).sum() / len(confidence))


def _worst_class(
    task: Multiclass | Multilabel, truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray, whole: np.ndarray
) -> ClassDrop | None:
    """The label whose recall fell most, if any did; logits that are not finite, where not `whole`, find nothing."""
    held = label_rows(task, truth)
    hits, hits_now = (held & label_rows(task, predictions(task, logits)) for logits in (reference, candidate))
    hits_now &= whole[:, None]
    lost, won = (hits & ~hits_now).sum(axis=0), (~hits & hits_now).sum(axis=0)
    examples = held.sum(axis=0)
    seen = np.flatnonzero(examples)
    if not (lost > won).any():
        return None
    corrected = _holm(np.array([_chance(int(lost[c]), int(won[c])) for c in seen]))
    worst = int(((lost - won)[seen] / examples[seen]).argmax())
    label = seen[worst]
    return ClassDrop(
        label=task.labels[label],
        examples=int(examples[label]),
        reference=float(hits.sum(axis=0)[label] / examples[label]),
        candidate=float(hits_now.sum(axis=0)[label] / examples[label]),
        p_value=float(corrected[worst]),
        within_chance=bool(corrected[worst] > CHANCE),
    )


def _chance(lost: int, won: int) -> float:
    """How often at least so many of the changed answers are lost ones, if each was as likely won (exact McNemar)."""
    ways: int = sum(comb(lost + won, k) for k in range(lost, lost + won + 1))
    return float(Fraction(ways, 2 ** (lost + won)))


def _holm(p_values: np.ndarray) -> np.ndarray:
    """P-values float64 (M,) corrected for being M (S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * (len(p_values) - np.arange(len(order)))))
    return corrected

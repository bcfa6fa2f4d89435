"""The accuracy gate: a paired non-inferiority test of a compiled model against PyTorch on the same examples.

The model passes when the upper confidence bound of its drop is within the budget, fails when the lower bound is beyond
it, and is inconclusive otherwise. "No significant difference" is never read as "equal". Of several tasks each is judged
by itself, and all must pass: a model that is beyond the budget in one task passes no more often than in that task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import msgspec
import numpy as np

from bundle import outputs
from bundle.errors import DataError
from bundle.manifest import GateRecord, Multiclass, Multilabel, Regression, Task, Verdict
from export.proportions import drop_bounds, examples_needed, fraction_upper
from export.resampling import Bounds, Comparison, bounds, compare_labels, compare_scores, compare_values
from finetune.evaluate import predictions
from finetune.target import Target, columns

FEWEST_RESAMPLED = 50  # numbers; with fewer the bootstrap of an error does not keep its level, and nothing passes
PRIOR = 25  # changed answers: of a variant's, the share lost less the share won is 0 ± 0.2 before any is seen
WORST = 1e100  # stands for a value that is no number, in standard deviations
METRICS = {
    Multiclass: ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc"),
    Multilabel: ("exact_match", "macro_f1", "micro_f1", "auroc"),
    Regression: ("rmse", "mae"),
}
"""What can be gated; by default the first."""


@dataclass(frozen=True)
class Terms:
    """What is judged, and how strictly."""

    metric: str
    budget: float  # largest drop that passes: of a metric, or of an error relative to the reference's
    confidence: float = 0.95  # of each one-sided bound
    task: str | None = None  # its name, when there are several


def judge_tasks(
    tasks: Sequence[Task],
    targets: Sequence[Target],
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    budget: float,
    confidence: float = 0.95,
    metric: str | None = None,
) -> tuple[GateRecord, ...]:
    """Compare the logits of two models, task by task, each on the examples whose truth is known.

    A row with a logit that is not finite counts as a wrong answer.

    Args:
        tasks: whose logits they are.
        targets: the truth of N examples, one column for each task, some of it known in each.
        reference: float32 (N, columns of all tasks), of PyTorch.
        candidate: the same, of the compiled model.
        budget: largest drop that passes: of a metric, or relative to the reference's error.
        confidence: of each one-sided bound.
        metric: of the tasks that it fits; see gated_metrics.

    Raises:
        DataError: the metric fits no task, or cannot be measured on these examples.
    """
    records = []
    names = gated_metrics(tasks, metric)
    for task, name, target, part in zip(tasks, names, targets, columns(tasks), strict=True):
        known = target.known
        truth = target.values[known]
        logits = [_wrong_where_broken(task, model[known, part], truth) for model in (reference, candidate)]
        terms = Terms(name, budget, confidence, task.name if len(tasks) > 1 else None)
        answers = [predictions(task, model) for model in logits]
        if name in ("accuracy", "exact_match"):
            records.append(judge(truth, *answers, budget=budget, confidence=confidence, task=terms.task))
        else:
            changed = ~_same(*answers)
            records.append(judge_resampled(terms, _comparison(name, task, truth, *logits), changed))
    return tuple(records)


def gated_metrics(tasks: Sequence[Task], metric: str | None = None) -> tuple[str, ...]:
    """The metric that each task is gated on: the given one where it fits, else the first of METRICS.

    Raises:
        DataError: it fits no task; naming those that fit.
    """
    fitting = [METRICS[type(task)] for task in tasks]
    if metric is not None and not any(metric in names for names in fitting):
        known = ", ".join(dict.fromkeys(name for names in fitting for name in names))
        raise DataError(f"{metric!r} is no metric that this data can be gated on; there are {known}.")
    return tuple(metric if metric in names else names[0] for names in fitting)


def certifiable(
    tasks: Sequence[Task],
    targets: Sequence[Target],
    reference: np.ndarray,
    *,
    confidence: float = 0.95,
    metric: str | None = None,
) -> tuple[float | None, ...]:
    """For each task the smallest drop that these examples can rule out, known before any candidate is.

    It is the upper bound of a candidate that answers all of them as PyTorch does. Within a budget below it none can be
    proved but one that is better than PyTorch.
    None for an error (rmse, mae): what one unseen example could add to it has no limit, so that there is no smallest.

    See judge_tasks for the arguments.

    Raises:
        DataError: the metric fits no task, or cannot be measured on these examples.
    """
    records = judge_tasks(tasks, targets, reference, reference, budget=0, confidence=confidence, metric=metric)
    errors = METRICS[Regression]
    return tuple(None if record.metric in errors else record.drop_upper for record in records)


def closest(records: Sequence[GateRecord]) -> GateRecord:
    """The record of the task that came closest to failing, or failed by most."""
    order: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "FAIL")
    return max(records, key=lambda record: (order.index(record.verdict), record.drop_upper - record.budget))


def chance_of_passing(records: Sequence[GateRecord], scale: float) -> float:
    """How likely the gate is to pass on so many times the examples, that of the task for which it is least likely.

    How many answers change is seen well on few examples, whether more are lost than won is not. So what is won and lost
    is taken together with PRIOR changes of which half are for the better, a Beta posterior. The gate's own bound is
    then normal about the one to be expected, with the spread of a Beta-binomial: 0.5 where that is the budget.

    Args:
        records: of each task, on some examples.
        scale: how many times as many others there are.
    """
    return min(_chance(record, scale) for record in records)


def _chance(record: GateRecord, scale: float) -> float:
    if record.lost is None or record.won is None:
        expected = record.drop + (record.drop_upper - record.drop) / sqrt(scale)
        spread = (record.drop_upper - record.drop) / NormalDist().inv_cdf(record.confidence) * sqrt(1 + 1 / scale)
    else:
        expected, spread = _counted(record.lost, record.won, scale * record.examples, scale, record.confidence)
    margin = record.budget - expected
    return NormalDist().cdf(margin / spread) if spread > 0 else float(margin >= 0)


def _counted(lost: int, won: int, n: float, scale: float, confidence: float) -> tuple[float, float]:
    """The upper bound to be expected on n examples, and by how much (one standard deviation) it may differ."""
    changed = lost + won
    net = changed * (lost - won) / (changed + PRIOR)
    expected = drop_bounds(scale * (changed + net) / 2, scale * (changed - net) / 2, n, confidence)[1]
    share, seen = (lost + PRIOR / 2) / (changed + PRIOR), changed + PRIOR
    to_come = scale * (changed + 0.5)  # that nothing changed is no proof that nothing will
    variance = to_come * share * (1 - share) * (1 + max(to_come - 1, 0) / (seen + 1))
    return expected, 2 * sqrt(variance) / n


def judge(
    truth: np.ndarray,
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    budget: float,
    confidence: float = 0.95,
    task: str | None = None,
) -> GateRecord:
    """Compare predicted labels example by example: the drop is that of the fraction of right answers.

    Args:
        truth: true labels, int (N,); of a multilabel task 0 or 1, (N, C), an answer being right when its row is.
        reference: labels predicted in PyTorch, of the same shape.
        candidate: labels predicted by the compiled model.
        budget: largest drop that passes, a fraction.
        confidence: of each one-sided bound.
        task: its name, when there are several.
    """
    n = len(truth)
    right, right_now = _same(reference, truth), _same(candidate, truth)
    lost, won = int(np.sum(right & ~right_now)), int(np.sum(~right & right_now))
    lower, upper = drop_bounds(lost, won, n, confidence)
    found = Bounds(float(np.mean(right)), float(np.mean(right_now)), (lost - won) / n, lower, upper, upper)
    terms = Terms("accuracy" if truth.ndim == 1 else "exact_match", budget, confidence, task)
    record = _record(
        terms, found, ~_same(reference, candidate), lambda: examples_needed(lost, won, n, budget, confidence)
    )
    return msgspec.structs.replace(record, lost=lost, won=won)


def judge_resampled(terms: Terms, comparison: Comparison, changed: np.ndarray) -> GateRecord:
    """Compare a metric of two models by the paired bootstrap.

    Args:
        terms: what is judged.
        comparison: of the two models' answers.
        changed: bool (N,), which predictions differ.

    Returns:
        Of an error (rmse, mae) `reference` and `served` are in the target's units, `drop` and `drop_upper` relative
        increases.
    """
    found, fewest = bounds(comparison, terms.confidence), FEWEST_RESAMPLED if comparison.relative else 0
    return _record(terms, found, changed, lambda: _needed(found, len(changed), terms.budget, fewest), fewest)


def _record(
    terms: Terms, found: Bounds, changed: np.ndarray, needed: Callable[[], int | None], fewest: int = 0
) -> GateRecord:
    n = len(changed)
    verdict: Verdict = (
        "PASS" if found.upper <= terms.budget else "FAIL" if found.lower > terms.budget else "INCONCLUSIVE"
    )
    if n < fewest:
        verdict = "INCONCLUSIVE"
    return GateRecord(
        verdict=verdict,
        task=terms.task,
        metric=terms.metric,
        examples=n,
        reference=found.reference,
        served=found.served,
        drop=found.drop,
        drop_lower=found.lower,
        drop_upper=found.upper,
        budget=terms.budget,
        confidence=terms.confidence,
        disagreement=float(np.mean(changed)),
        disagreement_upper=fraction_upper(int(changed.sum()), n, terms.confidence),
        examples_needed=needed() if verdict == "INCONCLUSIVE" else None,
    )


def _needed(found: Bounds, n: int, budget: float, fewest: int) -> int | None:
    """About how many examples would decide if all rates stay as seen; None at the budget, where none would.

    What was seen closes in as 1 / √n, and the one example more as 1 / n.
    """
    gap = budget - found.drop
    if gap == 0:
        return None
    seen, more = (
        (found.seen_upper - found.drop, found.upper - found.seen_upper) if gap > 0 else (found.drop - found.lower, 0.0)
    )
    width = seen + sqrt(
        seen**2 + 4 * more * abs(gap)
    )  # the root of more / k + seen / √k = |gap| is √k = width / 2|gap|
    return max(fewest, ceil(n * (width / (2 * abs(gap))) ** 2))


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which rows are equal: bool (N,)."""
    equal: np.ndarray = (one == other).reshape(len(one), -1).all(axis=1)
    return equal


def _wrong_where_broken(task: Task, logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The logits float (N, C), any row that is not finite replaced by one that is as wrong as can be."""
    broken = ~np.isfinite(logits).all(axis=1)
    if not broken.any():
        return logits
    wrong = np.full(logits.shape, WORST) if isinstance(task, Regression) else 50 - 100 * label_rows(task, truth)
    replaced: np.ndarray = np.where(broken[:, None], wrong, logits)
    return replaced


def label_rows(task: Task, labels: np.ndarray) -> np.ndarray:
    """Labels int (N,) or (N, C) as bool (N, C)."""
    if isinstance(task, Multiclass):
        rows: np.ndarray = np.eye(len(task.labels), dtype=bool)[labels]
        return rows
    return np.asarray(labels, dtype=bool)


def _comparison(metric: str, task: Task, truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Of logits float (N, C); areas under the ROC curve are of the scores that are served."""
    answers = [predictions(task, logits) for logits in (reference, candidate)]
    if isinstance(task, Regression):
        return compare_values(metric, truth, *answers)
    rows, exclusive = label_rows(task, truth), isinstance(task, Multiclass)
    if metric == "auroc":
        _check_ranked(task, rows)
        score = outputs.softmax if exclusive else outputs.sigmoid
        return compare_scores(rows, score(reference), score(candidate), exclusive=exclusive)
    return compare_labels(metric, rows, *(label_rows(task, labels) for labels in answers), exclusive=exclusive)


def _check_ranked(task: Multiclass | Multilabel, truth: np.ndarray) -> None:
    for label, held in zip(task.labels, truth.sum(axis=0), strict=True):
        if held in (0, len(truth)):
            raise DataError(
                f"auroc takes examples with and without each label; {held} of these {len(truth)} held-out examples of "
                f"{task.name!r} have {label!r}. Give the split a larger fraction (edgeward finetune --split), or gate "
                "another metric."
            )

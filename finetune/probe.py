"""Linear probe: the backbone stays as it is, its features are computed once, and only the head is fitted.

On standardised features the head is multinomial logistic regression, one logistic regression per label where any number
of them may hold, or ridge regression. Each has one best solution: no learning rate, no epochs, no luck. The strength of
its L2 penalty is chosen on the validation split.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bundle.errors import DataError, TrainingDiverged
from bundle.log import log
from bundle.manifest import Multiclass, Regression, Task
from finetune.evaluate import score
from finetune.target import Target

L2_GRID = tuple(10 ** (-exponent / 2) for exponent in range(10))  # 1 … 3e-5, decades and halves
SINGLE_THREADED = 4_000_000  # numbers; below that, threads that wait for each other cost more than they bring
STD_FLOOR = 0.1  # EfficientNet-Lite0 on digits: accuracy 0.928 -> 0.942, of an int8 head 0.25 -> 0.946


@dataclass(frozen=True)
class Head:
    """A fitted linear layer on raw features: logits = features @ weight.T + bias."""

    weight: np.ndarray  # float32 (ΣC, D)
    bias: np.ndarray  # float32 (ΣC,)
    l2: tuple[float, ...]  # the chosen one of each task
    trials: tuple[dict[str, float], ...]  # `l2`, strongest first, and what validation says to it as evaluate.score does


def fit_head(
    features: np.ndarray,
    targets: Sequence[Target],
    validation_features: np.ndarray,
    validation_targets: Sequence[Target],
    tasks: Sequence[Task],
    l2_grid: Sequence[float] = L2_GRID,
) -> Head:
    """Fit a head for every L2 penalty and take, for each task, the one with the least loss on validation.

    What is minimised is loss + l2 / 2 · |W|², with W on standardised features and the bias free. The loss is mean
    cross-entropy, the sum of the labels' mean binary cross-entropies, or half the mean squared error of the
    standardised value; the mean is over the examples with a label. In scikit-learn's terms C = 1 / (l2 · N) of
    LogisticRegression, alpha = l2 · N of Ridge. The standardisation is folded into the result.

    Args:
        features: float (N, D), of one scale, as those of a network's layer are.
        targets: of the N examples, one per task.
        validation_features: float (M, D).
        validation_targets: of the M examples, one per task.
        tasks: whose heads they are, in this order.
        l2_grid: positive penalties to try.

    Raises:
        TrainingDiverged: a feature is not finite.
        DataError: too few examples have a label of some task.
    """
    _check_finite(features, validation_features)
    trials: list[dict[str, float]] = []
    fits: list[list[tuple[np.ndarray, np.ndarray]]] = []  # per penalty, per task
    with _threads(1 if features.size < SINGLE_THREADED else torch.get_num_threads()):
        problems = _problems(features, targets, tasks)
        held_out = {problem.space: problem.space.standardised(validation_features) for problem in problems}
        solutions = [problem.start() for problem in problems]
        for l2 in sorted(l2_grid, reverse=True):  # each solution is the start of the next, weaker penalty
            solutions = [problem.minimise(l2, *start) for problem, start in zip(problems, solutions, strict=True)]
            fits.append([(weight.numpy(), bias.numpy()) for weight, bias in solutions])
            logits = [
                held_out[problem.space] @ weight.T + bias
                for problem, (weight, bias) in zip(problems, fits[-1], strict=True)
            ]
            measured = score(tasks, np.concatenate(logits, axis=1), validation_targets)
            trials.append({"l2": l2, **measured})
            log.info("head fitted", l2=l2, **measured)
    names = ["loss" if len(tasks) == 1 else f"{task.name}.loss" for task in tasks]
    best = [int(np.argmin([trial[name] for trial in trials])) for name in names]
    heads = [
        problem.space.folded(*fits[trial][i]) for i, (problem, trial) in enumerate(zip(problems, best, strict=True))
    ]
    weight, bias = (np.concatenate(parts).astype(np.float32) for parts in zip(*heads, strict=True))
    return Head(weight, bias, tuple(trials[trial]["l2"] for trial in best), tuple(trials))


def _spread(features: np.ndarray) -> np.ndarray:
    """Standard deviations float64 (D,), none below STD_FLOOR of their root mean square.

    A feature that hardly varies would be blown up to be as loud as any other, its noise with it, and its weight in the
    folded head would be so large that int8 has no bits left for the rest.
    """
    std = features.std(axis=0, dtype=np.float64)
    typical = float(np.sqrt(np.mean(np.square(std))))
    floored: np.ndarray = np.maximum(std, STD_FLOOR * typical if typical > 0 else 1.0)
    return floored


def _check_finite(*matrices: np.ndarray) -> None:
    bad = sum(int((~np.isfinite(matrix).all(axis=1)).sum()) for matrix in matrices)
    if bad:
        raise TrainingDiverged(
            f"the features of {bad} examples are not finite; nothing was written. Check the weights."
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Space:
    """Standardised features of some examples, in coordinates in which L-BFGS needs few steps.

    The Hessian of a task lies between l2 and l2 + curvature · λ, λ being the eigenvalues of the features' covariance.
    Rotating the features to its eigenvectors leaves the penalty as it is, and scaling each weight by the root of its
    bound evens the curvature out: some twenty evaluations instead of hundreds.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.mean = features.mean(axis=0, dtype=np.float64)
        self.std = _spread(features)
        x = torch.from_numpy(self.standardised(features))
        self.eigenvalues, self.basis = torch.linalg.eigh(x.T @ x / len(x))
        self.x = x @ self.basis  # float64 (N, D)

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Float64 (M, D), not rotated."""
        standardised: np.ndarray = (features - self.mean) / self.std
        return standardised

    def folded(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same linear layer on raw features."""
        weight = weight / self.std
        return weight, bias - weight @ self.mean


@dataclass(frozen=True)
class _Problem:
    """One task on the examples whose label is known."""

    task: Task
    space: _Space
    y: Tensor  # int64 (N,), float64 (N, C), or standardised float64 (N,)

    def start(self) -> tuple[Tensor, Tensor]:
        """Zeros for weight and bias, float64 (C, D) and (C,)."""
        width = len(getattr(self.task, "labels", ())) or 1
        return torch.zeros(width, self.space.x.shape[1], dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def minimise(self, l2: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The solution for one penalty, float64 (C, D) and (C,): in closed form, or by L-BFGS from a given start."""
        return self._ridge(l2) if isinstance(self.task, Regression) else self._logistic(l2, weight, bias)

    def _ridge(self, l2: float) -> tuple[Tensor, Tensor]:
        centre = self.y.mean()  # the features' is 0
        rotated = self.space.x.T @ (self.y - centre) / len(self.y) / (self.space.eigenvalues.clamp(min=0) + l2)
        return (self.space.basis @ rotated)[None], centre[None]

    def _logistic(self, l2: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        multiclass = isinstance(self.task, Multiclass)
        scale = (self.space.eigenvalues.clamp(min=0) / (2 if multiclass else 4) + l2).sqrt()
        scaled = (weight @ self.space.basis * scale).requires_grad_()
        bias = bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=1000,
            max_eval=2000,
            tolerance_grad=1e-7,
            tolerance_change=1e-8,  # nats; leaves the objective within about 1e-6 of its minimum
            history_size=30,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            optimizer.zero_grad()
            rotated = scaled / scale
            logits = self.space.x @ rotated.T + bias
            if multiclass:
                loss = cross_entropy(logits, self.y)
            else:
                loss = binary_cross_entropy_with_logits(logits, self.y, reduction="sum") / len(self.y)
            loss = loss + 0.5 * l2 * rotated.square().sum()
            loss.backward()
            return float(loss.item())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return (scaled / scale).detach() @ self.space.basis.T, bias.detach()


def _problems(features: np.ndarray, targets: Sequence[Target], tasks: Sequence[Task]) -> list[_Problem]:
    """One per task; tasks that are known for the same examples share their features."""
    spaces: dict[bytes, _Space] = {}
    problems = []
    for task, target in zip(tasks, targets, strict=True):
        known = target.known
        if not known.any():
            raise DataError(f"none of the {len(known)} examples to train on has a value of {task.name!r}.")
        if known.tobytes() not in spaces:
            spaces[known.tobytes()] = _Space(features[known])
        values = target.values[known]
        if isinstance(task, Regression):
            values = (values - task.mean) / task.std
        y = torch.from_numpy(np.asarray(values, np.int64 if isinstance(task, Multiclass) else np.float64))
        problems.append(_Problem(task, spaces[known.tobytes()], y))
    return problems

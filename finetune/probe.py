"""Linear probe: the backbone stays as it is, its features are computed once, and only the head is fitted.

The head is multinomial logistic regression on standardised features, which has one best solution: no learning rate, no
epochs, no luck. The strength of its L2 penalty is chosen on the validation split.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bundle.errors import TrainingDiverged
from finetune.evaluate import score

log = structlog.get_logger()

L2_GRID = tuple(10 ** (-exponent / 2) for exponent in range(10))  # 1 … 3e-5, decades and halves
SINGLE_THREADED = 4_000_000  # numbers; below that, threads that wait for each other cost more than they bring
STD_FLOOR = 0.1  # EfficientNet-Lite0 on digits: accuracy 0.928 -> 0.942, of an int8 head 0.25 -> 0.946


@dataclass(frozen=True)
class Trial:
    """One L2 penalty and what the validation split says to it."""

    l2: float
    accuracy: float
    macro_f1: float
    loss: float  # mean cross-entropy, nats


@dataclass(frozen=True)
class Head:
    """A fitted linear layer on raw features: logits = features @ weight.T + bias."""

    weight: np.ndarray  # float32 (C, D)
    bias: np.ndarray  # float32 (C,)
    l2: float  # the chosen one
    trials: tuple[Trial, ...]  # strongest penalty first


def fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
    classes: int,
    l2_grid: Sequence[float] = L2_GRID,
) -> Head:
    """Fit a head for every L2 penalty and take the one with the least loss on validation.

    What is minimised is mean cross-entropy + l2 / 2 · |W|², with W on standardised features and the bias free. In
    scikit-learn's terms C = 1 / (l2 · N). The standardisation is folded into the result.

    Args:
        features: float (N, D), of one scale, as those of a network's layer are.
        labels: int64 (N,), in [0, classes).
        validation_features: float (M, D).
        validation_labels: int64 (M,).
        classes: C.
        l2_grid: positive penalties to try.

    Raises:
        TrainingDiverged: a feature is not finite.
    """
    _check_finite(features, validation_features)
    mean = features.mean(axis=0, dtype=np.float64)
    std = _spread(features)
    x, y = torch.from_numpy((features - mean) / std), torch.from_numpy(np.asarray(labels, np.int64))
    held_out = (validation_features - mean) / std

    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    fits: list[tuple[Trial, np.ndarray, np.ndarray]] = []
    with _threads(1 if features.size < SINGLE_THREADED else torch.get_num_threads()):
        problem = _Problem(x, y)
        for l2 in sorted(l2_grid, reverse=True):  # each solution is the start of the next, weaker penalty
            weight, bias = problem.minimise(l2, weight, bias)
            measured = score(held_out @ weight.numpy().T + bias.numpy(), validation_labels)
            fits.append((Trial(l2, **measured), weight.numpy(), bias.numpy()))
            log.info("head fitted", l2=l2, **measured)
    best, w, b = min(fits, key=lambda fit: fit[0].loss)
    w = w / std
    return Head(w.astype(np.float32), (b - w @ mean).astype(np.float32), best.l2, tuple(trial for trial, _, _ in fits))


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


class _Problem:
    """Logistic regression on given standardised features, in coordinates in which L-BFGS needs few steps.

    The Hessian lies between l2 and l2 + λ / 2, λ being the eigenvalues of the features' covariance. Rotating the
    features to its eigenvectors leaves the penalty as it is, and scaling each weight by the root of its bound evens
    the curvature out: some twenty evaluations instead of hundreds.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._eigenvalues, self._basis = torch.linalg.eigh(x.T @ x / len(x))
        self._x = x @ self._basis  # float64 (N, D)
        self._y = y

    def minimise(self, l2: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The solution for one penalty, float64 (C, D) and (C,), by full-batch L-BFGS from a given start."""
        scale = (self._eigenvalues.clamp(min=0) / 2 + l2).sqrt()
        scaled = (weight @ self._basis * scale).requires_grad_()
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
            loss = cross_entropy(self._x @ rotated.T + bias, self._y) + 0.5 * l2 * rotated.square().sum()
            loss.backward()
            return float(loss.item())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return (scaled / scale).detach() @ self._basis.T, bias.detach()

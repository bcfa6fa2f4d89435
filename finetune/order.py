"""In which order examples are trained on: a function of the seed and the epoch, for any number of processes."""

from collections.abc import Sequence

import numpy as np

from finetune.chance import ORDER, generator

WINDOW = 50  # batches whose examples are sorted by length together; fewer where there are few batches


def data_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """A permutation int64 (examples,)."""
    permutation: np.ndarray = generator(seed, ORDER, epoch).permutation(examples)
    return permutation


def batches_of_epoch(
    seed: int, epoch: int, examples: int, batch_size: int, lengths: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Positions int64 of the examples of each batch; each is in one, and no batch is much smaller than another.

    Args:
        seed: of the training.
        epoch: from 0.
        examples: how many there are.
        batch_size: the most in a batch.
        lengths: of the examples, as tokens or words. Batches are then of similar length, longest first within a batch,
            and come in random order.
    """
    count = -(-examples // batch_size)
    batches = np.array_split(data_order(seed, epoch, examples), count)
    if lengths is None:
        return batches
    window = min(WINDOW, -(-count // 4))  # at least four windows, or each epoch would have the same batches
    sizes = np.asarray(lengths)
    alike = [batch for start in range(0, count, window) for batch in _by_length(batches[start : start + window], sizes)]
    return [alike[int(i)] for i in generator(seed, ORDER, epoch, 1).permutation(count)]


def _by_length(batches: Sequence[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    together = np.concatenate(batches)
    together = together[np.argsort(-lengths[together], kind="stable")]
    return np.array_split(together, len(batches))

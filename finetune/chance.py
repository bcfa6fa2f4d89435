"""Random numbers that depend on nothing that ran before: each use has a stream of its own under one seed."""

import numpy as np

ORDER, DROPOUT, MIXUP, AUGMENTATION = range(4)  # uses


def generator(seed: int, use: int, *numbers: int) -> np.random.Generator:
    """A generator that is a function of the seed, the use and the numbers, such as epoch and position."""
    return np.random.Generator(_bits(seed, use, *numbers))


def torch_seed(seed: int, use: int, *numbers: int) -> int:
    """A seed for torch's own generators, in [0, 2^63)."""
    return int(_bits(seed, use, *numbers).random_raw()) >> 1


def _bits(seed: int, use: int, *numbers: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([seed, use, *numbers]))

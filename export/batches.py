"""The batches on which the fp32 graph is held to its reference."""

from collections.abc import Iterator, Sequence

import numpy as np

from bundle import preprocess
from bundle.manifest import ImageInput, Input
from bundle.model import MAX_ROWS

SIZES = (1, 2, 3, 8)
MAX_PIXELS, MAX_TOKENS = 1 << 20, 1 << 11  # of the largest batch, which takes memory and time
LONG = 128  # tokens; of the buckets beyond it only the last is tried

Feeds = dict[str, np.ndarray]


def parity_sizes(spec: Input, rows: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Of the batches that are tried; the last is the largest that is served, or that has MAX_PIXELS or MAX_TOKENS."""
    if isinstance(spec, ImageInput):
        largest = MAX_PIXELS // (spec.height * spec.width)
    else:
        largest = MAX_TOKENS // max(1, *(preprocess.length(row, spec) for row in rows))
    return tuple(sorted({*SIZES, max(1, min(MAX_ROWS, largest))}))


def parity_batches(spec: Input, rows: Sequence[np.ndarray]) -> list[Feeds]:
    """Examples alone, in batches of every size, and of every length that matters.

    Args:
        spec: of the input.
        rows: preprocessed real examples; repeated where there are fewer than a batch has.
    """
    return [*_sizes(spec, rows), *_lengths(spec, rows)]


def _sizes(spec: Input, rows: Sequence[np.ndarray]) -> Iterator[Feeds]:
    for size in parity_sizes(spec, rows):
        for start in range(0, len(rows), max(size, len(rows) // 8)):
            yield preprocess.collate([rows[(start + i) % len(rows)] for i in range(size)], spec)


def _lengths(spec: Input, rows: Sequence[np.ndarray]) -> Iterator[Feeds]:
    """The shortest and the longest example alone; of each bucket one that fills it beside the shortest."""
    if not preprocess.is_sequence(spec):
        return
    ordered = sorted(rows, key=lambda row: preprocess.length(row, spec))
    yield preprocess.collate(ordered[:1], spec)
    yield preprocess.collate(ordered[-1:], spec)
    tokens = np.concatenate(ordered, axis=-1)
    shortest = preprocess.length(ordered[0], spec)
    for bucket in spec.buckets:
        if bucket >= shortest and (bucket <= LONG or bucket == spec.buckets[-1]):
            filling = np.take(tokens, np.arange(bucket), axis=-1, mode="wrap")
            yield preprocess.collate([filling, ordered[0]], spec, bucket)

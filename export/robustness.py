"""Whether a graph's answers depend on anything but the example, and whether it stands extreme ones."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bundle import preprocess
from bundle.errors import ModelError
from bundle.host import cpu_count
from bundle.manifest import ImageInput, Input, Record, TextInput, VectorInput, WordsInput
from bundle.session import Session

BATCHES = (2, 3, 8)
FAR = 1e4  # of a vector's numbers: far from what training saw, while fp16 could still hold it
NEXT = 2  # buckets that an example is padded to, beyond its own length

Outputs = Mapping[str, np.ndarray]


class Robustness(Record, frozen=True, kw_only=True):
    """What the answers of a compiled graph do not depend on, bit for bit, on real examples."""

    batch_invariant: bool  # the other examples of its batch, of equal length
    padding_invariant: bool  # how far it is padded; true of what has no length
    thread_invariant: bool  # one thread, or all cores; true on a GPU
    repeatable: bool  # which run of the same session it is
    extremes: str | None  # the extreme examples whose logits are not finite; none when all are


def check_robustness(
    graph: bytes, session: Session, spec: Input, rows: Sequence[np.ndarray], *, reference: Session | None = None
) -> Robustness:
    """Run a graph on real examples in many ways, and on extreme ones.

    Extreme are an image of nothing but 0, of nothing but 255, and a checkerboard of both; a text of one token, of as
    many as there may be of it, and of the highest token among the examples; no words at all; a vector of zeros, of 1e4
    and of -1e4. Tensors of any meaning have none.

    Args:
        graph: that the session runs.
        session: as it is served.
        spec: of its input.
        rows: preprocessed real examples.
        reference: of the fp32 graph; an extreme example whose logits are not finite there either is no fault.
    """
    alone = [session.run(preprocess.collate([row], spec)) for row in rows]
    return Robustness(
        batch_invariant=_batch_invariant(session, spec, rows),
        padding_invariant=is_padding_invariant(session, spec, rows),
        thread_invariant=session.device != "cpu" or _thread_invariant(graph, spec, rows),
        repeatable=all(
            _equal(session.run(preprocess.collate([row], spec)), answer)
            for row, answer in zip(rows, alone, strict=True)
        ),
        extremes=_broken_extremes(session, spec, rows, reference),
    )


def _equal(one: Outputs, other: Outputs) -> bool:
    return all(np.array_equal(values, other[name], equal_nan=True) for name, values in one.items())


def _batch_invariant(session: Session, spec: Input, rows: Sequence[np.ndarray]) -> bool:
    """Alone and in shuffled batches; examples of similar length are cut to that of the shortest among them."""
    order = np.random.default_rng(0).permutation(len(rows))
    order = order[np.argsort([preprocess.length(rows[i], spec) for i in order], kind="stable")]
    for size in BATCHES:
        for start in range(0, len(rows) - size + 1, size):
            batch = _cut([rows[i] for i in order[start : start + size]], spec)
            together = session.run(preprocess.collate(batch, spec))
            for i, row in enumerate(batch):
                own = {name: values[i : i + 1] for name, values in together.items()}
                if not _equal(session.run(preprocess.collate([row], spec)), own):
                    return False
    return True


def _cut(batch: list[np.ndarray], spec: Input) -> list[np.ndarray]:
    if not preprocess.is_sequence(spec):
        return batch
    shortest = min(preprocess.length(row, spec) for row in batch)
    return [row[..., :shortest] for row in batch]


def is_padding_invariant(session: Session, spec: Input, rows: Sequence[np.ndarray]) -> bool:
    """Whether every answer is bit-equal unpadded and padded to the next NEXT buckets; true of what has no length."""
    if not preprocess.is_sequence(spec):
        return True
    for row in rows:
        alone = session.run(preprocess.collate([row], spec))
        for length in [bucket for bucket in spec.buckets if bucket > preprocess.length(row, spec)][:NEXT]:
            if not _equal(session.run(preprocess.collate([row], spec, length)), alone):
                return False
    return True


def _thread_invariant(graph: bytes, spec: Input, rows: Sequence[np.ndarray]) -> bool:
    one, many = (Session(graph, device="cpu", threads=threads) for threads in (1, max(2, cpu_count())))
    feeds = [preprocess.collate([row], spec) for row in rows]
    return all(_equal(one.run(feed), many.run(feed)) for feed in feeds)


def _broken_extremes(
    session: Session, spec: Input, rows: Sequence[np.ndarray], reference: Session | None
) -> str | None:
    broken = [
        name
        for name, row in _extremes(spec, rows)
        if not _finite(session, spec, row) and (reference is None or _finite(reference, spec, row))
    ]
    return ", ".join(broken) or None


def _finite(session: Session, spec: Input, row: np.ndarray) -> bool:
    """Whether all outputs are; none is where the runtime fails."""
    try:
        outputs = session.run(preprocess.collate([row], spec))
    except ModelError:
        return False
    return all(bool(np.isfinite(values).all()) for values in outputs.values())


def _extremes(spec: Input, rows: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Extreme examples, preprocessed, and what they are called."""
    match spec:
        case ImageInput():
            board = np.indices((spec.height, spec.width)).sum(axis=0) % 2 * 255
            yield "all 0", np.zeros((spec.height, spec.width, 3), np.uint8)
            yield "all 255", np.full((spec.height, spec.width, 3), 255, np.uint8)
            yield "checkerboard", np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
        case VectorInput():
            for value in (0, FAR, -FAR):
                yield f"all {value:g}", np.full(spec.size, value, np.float32)
        case TextInput():
            yield from _texts(rows, spec.max_length)
        case WordsInput():
            yield "no words", rows[0][:0]
            yield from _texts(rows, spec.max_words)


def _texts(rows: Sequence[np.ndarray], longest: int) -> Iterator[tuple[str, np.ndarray]]:
    """Texts of one token or word, from those of the examples; of a pair all is the first text."""
    first = next((row[..., :1] for row in rows if row.shape[-1]), None)
    if first is None:
        return
    highest = first.copy()
    highest.flat[0] = max(int(np.atleast_2d(row)[0].max()) for row in rows if row.shape[-1])
    yield "one token", first
    yield f"{longest} times one token", np.repeat(first, longest, axis=-1)
    yield "the highest token", highest

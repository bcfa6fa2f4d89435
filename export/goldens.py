"""Golden examples: a few raw inputs that travel in the bundle with what must come of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bundle import preprocess, store
from bundle.manifest import Golden, ImageInput, Input
from bundle.session import Session
from export.source import Source, Split
from finetune.target import Target

COUNT = 8
FOLDER = "goldens"
JPEG = b"\xff\xd8\xff"
TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 0.02,
    "int8": 0.05,
}  # of a logit, in standard deviations: what one ISA class may differ by


def pick(split: Split) -> list[int]:
    """Positions in the split: each time the first example whose answers have been shown least, until there are COUNT.

    An answer is a label, a set of labels, or a range of numbers; those of several tasks are counted together.
    """
    answers = np.stack([_answers(target) for target in split.targets], axis=1)
    shown = np.zeros(len(split))  # how often an example's answers have been picked before
    picked: list[int] = []
    while len(picked) < min(COUNT, len(split)):
        picked.append(int(shown.argmin()))
        shown += (answers == answers[picked[-1]]).sum(axis=1)
        shown[picked[-1]] = np.inf
    return picked


def _answers(target: Target) -> np.ndarray:
    """A number for each different answer, int64 (N,): numbers in COUNT ranges of as many examples, -1 where missing."""
    codes = target.codes
    if target.kind != "regression":
        return codes
    edges = np.quantile(codes[target.known], np.arange(1, COUNT) / COUNT)
    return np.where(target.known, np.searchsorted(edges, codes, side="right"), -1)


def examples(source: Source) -> list[bytes]:
    """Raw examples of the selection split that show as many answers as possible."""
    split = source.selection
    return [source.raw(int(split.indices[position])) for position in pick(split)]


def write(
    folder: Path, spec: Input, files: Mapping[str, bytes], raws: Sequence[bytes], sessions: Mapping[str, Session]
) -> tuple[Golden, ...]:
    """Write raw examples and tensors below `folder`, run every variant, and return the manifest's entries."""
    (folder / FOLDER).mkdir()
    encode, goldens = preprocess.encoder(spec, files.__getitem__), []
    for number, raw in enumerate(raws):
        file = f"{FOLDER}/{number}.raw"
        (folder / file).write_bytes(raw)
        feeds = preprocess.collate([encode(raw)], spec)
        tensors = {}
        for place, (name, value) in enumerate(feeds.items()):
            plain = store.NAME_PATTERN.fullmatch(name)  # an ONNX model's inputs may be called anything
            tensors[name] = f"{FOLDER}/{number}.{name if plain else '_' + str(place)}.npy"
            np.save(folder / tensors[name], value[0], allow_pickle=False)
        logits = {
            variant: {name: tuple(map(float, rows[0])) for name, rows in session.run(feeds).items()}
            for variant, session in sessions.items()
        }
        exact = not (isinstance(spec, ImageInput) and raw.startswith(JPEG))
        goldens.append(Golden(file=file, tensors=tensors, exact=exact, logits=logits))
    return tuple(goldens)

"""Golden examples: a few raw inputs that travel in the bundle with what must come of them."""

from pathlib import Path

import numpy as np

from bundle import preprocess
from bundle.manifest import Golden, ImageInput
from bundle.session import Session
from export.search import Split
from finetune.checkpoint import Checkpoint
from finetune.data import Dataset
from finetune.target import Target

COUNT = 8
FOLDER = "goldens"
JPEG = b"\xff\xd8\xff"
TOLERANCE = {"fp32": 1e-3, "int8": 0.05}  # of a logit, in standard deviations: what one ISA class may differ by


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


def write(
    folder: Path, checkpoint: Checkpoint, dataset: Dataset, split: Split, sessions: dict[str, Session]
) -> tuple[Golden, ...]:
    """Write raw examples and tensors below `folder`, run every variant, and return the manifest's entries."""
    (folder / FOLDER).mkdir()
    spec, goldens = checkpoint.spec.input, []
    for number, position in enumerate(pick(split)):
        raw = dataset.raw(int(split.indices[position]))
        file = f"{FOLDER}/{number}.raw"
        (folder / file).write_bytes(raw)
        feeds = preprocess.collate([split.rows[position]], spec)
        tensors = {}
        for name, value in feeds.items():
            tensors[name] = f"{FOLDER}/{number}.{name}.npy"
            np.save(folder / tensors[name], value[0], allow_pickle=False)
        logits = {
            variant: {name: tuple(map(float, rows[0])) for name, rows in session.run(feeds).items()}
            for variant, session in sessions.items()
        }
        exact = not (isinstance(spec, ImageInput) and raw.startswith(JPEG))
        goldens.append(Golden(file=file, tensors=tensors, exact=exact, logits=logits))
    return tuple(goldens)

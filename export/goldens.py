"""Golden examples: a few raw inputs that travel in the bundle with what must come of them."""

from pathlib import Path

import numpy as np

from bundle import preprocess
from bundle.manifest import Golden
from bundle.session import Session
from export.search import Split
from finetune.checkpoint import Checkpoint
from finetune.data import Dataset

COUNT = 8
FOLDER = "goldens"
JPEG = b"\xff\xd8\xff"
TOLERANCE = {"fp32": 1e-3, "int8": 0.05}  # of a logit, in standard deviations: what one ISA class may differ by


def pick(split: Split) -> np.ndarray:
    """Positions in the split: the first example of each label in turn, until there are COUNT."""
    rank = np.zeros(len(split.truth), np.int64)  # how many of the same label come before
    for label in np.unique(split.truth):
        same = split.truth == label
        rank[same] = np.arange(same.sum())
    return np.argsort(rank, kind="stable")[:COUNT]


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
        goldens.append(Golden(file=file, tensors=tensors, exact=not raw.startswith(JPEG), logits=logits))
    return tuple(goldens)

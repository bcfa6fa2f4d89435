"""The examples of a benchmark, and the folder that peers read: python prepare.py data|work OUT TASK ROWS."""

import csv
import random
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers.work import Job, write_feeds, write_job
from bundle import preprocess
from bundle.host import cpu_count
from bundle.manifest import ImageInput
from export import graph
from finetune.checkpoint import Checkpoint, load_checkpoint
from finetune.data import Dataset, load_dataset
from finetune.loader import EncodedRows
from finetune.pretrained import modality
from finetune.splits import SplitName

CALIBRATION = 200  # training examples, as many as `edgeward export` takes
BUDGET = 0.01
SIDE = 32  # pixels of a written image; preprocessing makes of them what the network wants
MOST_DEGREES = 15.0


def write_data(path: Path, task: str, rows: int) -> None:
    """A table of tweets, or class folders of digits: each once as it is, then turned."""
    from examples.digits import digits, enlarged, turned
    from examples.tweets import tweets

    if task == "tweets":
        path.mkdir(parents=True)
        with (path / "tweets.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *random.Random(0).sample(tweets(), rows)])
        return
    images, labels = digits()
    pictures = enlarged(images, SIDE)
    generator = np.random.default_rng(0)
    for number in range(rows):
        which = number % len(images)
        picture, label = pictures[which], labels[which]
        if number >= len(images):
            (picture,) = turned([picture], generator.uniform(-MOST_DEGREES, MOST_DEGREES, 1))
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        picture.save(path / str(label) / f"{number:05}.png")


def opened(path: Path) -> tuple[Checkpoint, Dataset]:
    """A checkpoint and its data."""
    checkpoint = load_checkpoint(path)
    splits = checkpoint.splits
    dataset = load_dataset(
        splits.data,
        modality(f"checkpoint:{path}"),
        input_column=splits.input_columns,
        label_column=splits.label_columns or ("label",),
    )
    return checkpoint, dataset


def rows_of(checkpoint: Checkpoint, dataset: Dataset, split: SplitName) -> tuple[EncodedRows, np.ndarray]:
    """Preprocessed examples of a split, and their positions in the dataset, int64 (N,)."""
    indices = checkpoint.splits.indices(dataset, split)
    return EncodedRows(dataset, indices, checkpoint.encode), indices


def write_work(out: Path, checkpoint: Checkpoint, dataset: Dataset, task: str, rows: int) -> None:
    """What peers read; see work.py."""
    spec = checkpoint.spec.input
    selection, indices = rows_of(checkpoint, dataset, "selection")
    out.mkdir()
    sample = list(selection[:8])
    (out / "fp32.onnx").write_bytes(graph.to_onnx(checkpoint.network, spec, checkpoint.spec.tasks, sample))
    picked = np.random.default_rng(0).permutation(checkpoint.splits.indices(dataset, "train"))[:CALIBRATION]
    for name, examples in (
        ("calibration", EncodedRows(dataset, picked, checkpoint.encode)),
        ("selection", selection),
    ):
        for number in range(len(examples)):
            write_feeds(out / name, number, preprocess.collate([examples[number]], spec))
    labels = dataset.targets[0].take(indices)
    np.save(out / "labels.npy", labels.values)
    kind = "image" if isinstance(spec, ImageInput) else "text"
    write_job(out, Job(task, rows, kind, len(labels.labels), BUDGET, cpu_count()))


def main() -> None:
    what, out, task, rows = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    name = "data" if what == "data" else "work"
    unfinished = out / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if what == "data":
        write_data(unfinished, task, rows)
    else:
        write_work(unfinished, *opened(out / "checkpoint"), task, rows)
    unfinished.rename(out / name)


if __name__ == "__main__":
    main()

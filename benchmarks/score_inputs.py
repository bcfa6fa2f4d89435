"""What benchmarks/score_throughput.py scores: a bundle and rows of each kind, made once and kept.

text     MiniLM with three moods, tweets in Parquet.
images   A ResNet18 at 112 × 112 pixels, scikit-learn's digits as JPEG files of 320 × 240.
vectors  Three dense layers (100, 256, 10), in Parquet.
words    The mean of word vectors that were trained on tweets, scoring tweets in Parquet.
"""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import split

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

EDGEWARD = str(Path(sys.executable).with_name("edgeward"))
TRAINED = 2400  # examples that the checkpoint is made of
SIZE = (320, 240)  # of an image, about 10 kB
TURNED = 20.0  # degrees at most
GROUP = 10_000  # rows of a row group of Parquet


def bundle(task: str, out: Path) -> Path:
    """The bundle of a task, made below `out` unless it is there."""
    path = out / task / "bundle"
    if not path.exists():
        checkpoint = out / task / "checkpoint"
        if not checkpoint.exists():
            data = out / task / "train"
            _run("finetune", *TRAINING[task](data), "--no-preflight", "--out", checkpoint)
        _run("export", checkpoint, "--out", path, "--name", task)
    return path


def _run(*command: str | Path) -> None:
    words = [EDGEWARD, *map(str, command)]
    print("$", *words, file=sys.stderr, flush=True)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def _train_text(data: Path) -> list[str | Path]:
    from examples.steps import minilm

    _run_example("tweets.py", data.with_suffix(".csv"), "--rows", str(TRAINED))
    return [f"transformers:{minilm()}", data.with_suffix(".csv"), *split("--split 0.4 0.1 0.1 0.4")]


def _train_images(data: Path) -> list[str | Path]:
    for number, (picture, label) in enumerate(_pictures(TRAINED)):
        folder = data / label
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:05}.jpg", quality=90)
    network = "--weights none --image-size 112 --strategy full --optimizer sgd --learning-rate 0.02 --epochs 2"
    return ["torchvision:resnet18", data, *split(f"{network} --split 0.4 0.1 0.1 0.4")]


def _train_vectors(data: Path) -> list[str | Path]:
    from examples.dense import write_arrays

    data.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(data.with_suffix(".npz"), np.arange(1797))
    return ["mlp", data.with_suffix(".npz"), *split("--widths 256 --epochs 20 --split 0.4 0.1 0.1 0.4")]


def _train_words(data: Path) -> list[str | Path]:
    from examples.tweets import tweets
    from examples.word_vectors import train_vectors

    table, vectors = data.with_suffix(".csv"), data.with_suffix(".kv")
    _run_example("tweets.py", table, "--rows", str(5 * TRAINED))
    sentences = [text.lower().split() for text, _ in tweets()]
    train_vectors(sentences, epochs=3).wv.save(str(vectors))
    return [f"vectors:{vectors}", table, *split("--pooling mean --widths 64 --epochs 10 --split 0.4 0.1 0.1 0.4")]


TRAINING: dict[str, Callable[[Path], list[str | Path]]] = {
    "text": _train_text,
    "images": _train_images,
    "vectors": _train_vectors,
    "words": _train_words,
}


def _run_example(script: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, f"examples/{script}", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def rows(task: str, count: int, out: Path) -> Path:
    """A Parquet file or a folder of JPEG files with so many rows, made below `out` unless it is there."""
    path = out / task / (f"rows-{count}" if task == "images" else f"rows-{count}.parquet")
    if not path.exists():
        draft = path.with_name(f"{path.name}.draft")
        draft.parent.mkdir(parents=True, exist_ok=True)
        WRITING[task](draft, count)
        draft.rename(path)
    return path


def _write_text(path: Path, count: int) -> None:
    from examples.tweets import tweets

    texts = [text for text, _ in tweets()]
    random.Random(1).shuffle(texts)
    _write_table(path, count, lambda start, stop: {"text": [texts[row % len(texts)] for row in range(start, stop)]})


def _write_vectors(path: Path, count: int) -> None:
    from examples.dense import vectors
    from examples.digits import digits

    values = vectors(digits()[0])
    kind = pa.list_(pa.float32(), values.shape[1])

    def some(start: int, stop: int) -> dict[str, pa.Array]:
        block = values[np.arange(start, stop) % len(values)]
        return {"x": pa.FixedSizeListArray.from_arrays(block.ravel(), type=kind)}

    _write_table(path, count, some)


def _write_table(path: Path, count: int, some: Callable[[int, int], dict[str, object]]) -> None:
    """A row group at a time, as a hundred times the rows would not fit otherwise."""
    writer = None
    for start in range(0, count, GROUP):
        table = pa.table(some(start, min(start + GROUP, count)))
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _write_images(path: Path, count: int) -> None:
    path.mkdir()
    for number, (picture, _) in enumerate(_pictures(count)):
        picture.save(path / f"{number:07}.jpg", quality=90)


def _pictures(count: int) -> Iterator[tuple[Image.Image, str]]:
    """Digits, larger, on paper that is not quite white, each turned by another angle."""
    from examples.digits import digits

    images, labels = digits()
    chance = np.random.default_rng(1)

    for number in range(count):
        which = number % len(images)
        large = images[which].resize(SIZE, Image.Resampling.BICUBIC).rotate(chance.uniform(-TURNED, TURNED))
        noisy = np.asarray(large.convert("RGB"), np.int16) + chance.integers(-12, 13, (*SIZE[::-1], 3))
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), str(labels[which])


WRITING: dict[str, Callable[[Path, int], None]] = {
    "text": _write_text,
    "images": _write_images,
    "vectors": _write_vectors,
    "words": _write_text,
}

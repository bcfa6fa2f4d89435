"""How many steps many classes need: python benchmarks/classes.py vectors|images [--rows N] [--seeds N]

An example is two handwritten digits, one above the other; its label is the upper one (10 classes) or both (100
classes). Accuracy on the gate split, mean ± standard deviation over the seeds, for some numbers of passes. A seed
decides the splits, the first weights and the order.

vectors  128 numbers; a new hidden layer of 64, `mlp`.
images   16 × 16 pixels; a small convolutional network that was first trained on single digits.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from bundle.manifest import ImageInput


def small() -> tuple[nn.Module, ImageInput]:
    """Three convolutions; what `python:` models are made by."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    spec = ImageInput(
        column="image", height=16, width=16, resize=16, interpolation="bilinear", mean=(0.3,) * 3, std=(0.4,) * 3
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10)), spec


def pairs(rows: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pictures float32 (N, 16, 8), 0 to 1, and their digits int64 (N, 2); of the digits from `first` on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pool = np.arange(first, len(data.target))
    picked = np.random.default_rng(0).choice(len(pool) ** 2, rows, replace=False)
    drawn = pool[np.stack(np.divmod(picked, len(pool)), axis=1)]
    return (data.images[drawn] / 16).reshape(rows, 16, 8).astype(np.float32), data.target[drawn]


def write_images(folder: Path, pictures: np.ndarray, labels: list[str]) -> str:
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((picture * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)
        image.save(folder / label / f"{number:05}.png")
    return str(folder)


def start(folder: Path, threads: int) -> str:
    """A checkpoint of the small network that reads single digits."""
    from examples.digits import digits
    from finetune.train import TrainConfig, train

    images, labels = digits()
    pictures = np.stack([np.asarray(image.convert("L")) for image in images[:600]]) / 255
    data = write_images(folder / "source", pictures, [str(label) for label in labels[:600]])
    model = f"python:{Path(__file__).resolve()}:small"
    train(
        TrainConfig(model, data, out=folder / "start", strategy="full", epochs=20, learning_rate=0.05, threads=threads)
    )
    return str(folder / "start")


def job(kind: str, classes: int, rows: int, folder: Path) -> dict[str, Any]:
    """Write the data; the model and where the data is."""
    pictures, digits = pairs(rows, first=600)
    labels = [str(upper) if classes == 10 else f"{upper}{lower}" for upper, lower in digits]
    place = folder / f"{kind}-{classes}"
    if kind == "images":
        return {"data": write_images(place, pictures, labels)}
    np.savez(f"{place}.npz", x=pictures.reshape(rows, -1), y=np.array(labels))
    return {"model": "mlp", "widths": (64,), "data": f"{place}.npz"}


def accuracy(config: dict[str, Any], out: Path) -> float:
    """On the gate split."""
    from benchmarks.scored import gate_score
    from finetune.train import TrainConfig, train

    train(TrainConfig(**config, out=out))
    return gate_score(out)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vectors", "images"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5000, help="pairs, of which 40%% train (default 5000)")
    parser.add_argument("--passes", type=int, nargs="*", default=[10, 30])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    print(f"| {options.kind}, {options.rows} pairs | passes | accuracy |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        common = {"split": (0.4, 0.1, 0.1, 0.4), "threads": options.threads}
        if options.kind == "images":
            common |= {"model": f"checkpoint:{start(Path(place), options.threads)}", "strategy": "full"}
        for classes in (10, 100):
            data = job(options.kind, classes, options.rows, Path(place))
            for passes in options.passes:
                scores = [
                    accuracy(
                        common | data | {"seed": seed, "epochs": passes}, Path(place) / f"{classes}-{passes}-{seed}"
                    )
                    for seed in range(options.seeds)
                ]
                spread = stdev(scores) if len(scores) > 1 else float("nan")
                print(f"| {classes} classes | {passes} | {mean(scores):.4f} ± {spread:.4f} |", flush=True)


if __name__ == "__main__":
    main()

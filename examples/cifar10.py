"""ResNet18 on a folder in CIFAR-10's binary format: python examples/cifar10.py [--data FOLDER --weights FILE]

With --data, a folder of data_batch_1.bin ... test_batch.bin as on CIFAR-10's page, that is what is learned. Without,
the records are scikit-learn's digits 5 to 9, enlarged to 32 × 32 pixels in colour, and the weights are those of a
ResNet18 that this example first trains on the digits 0 to 4: they are NOT ImageNet's, which `--weights default` would
download. Stochastic gradient descent with momentum, cross-entropy, accuracy on the test batch, unseen in training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from shlex import split

import numpy as np
from PIL import Image

from examples import steps
from examples.digits import digits, enlarged

SGD = split("--strategy full --optimizer sgd --momentum 0.9 --learning-rate 0.05 --batch-size 32")
SPLIT = split("--split 0.6 0.1 0.1 0.2")  # a third of the test batch is for the selection, the rest for the gate


def write_batches(folder: Path, images: Sequence[Image.Image], labels: np.ndarray) -> None:
    """Write grey images of 32 × 32 as CIFAR-10's records: a byte for the label, 1024 each for red, green and blue.

    Three of ten are in test_batch.bin, the others in data_batch_1.bin to data_batch_5.bin.
    """
    folder.mkdir(parents=True)
    records = [bytes([label]) + image.tobytes() * 3 for image, label in zip(images, labels.tolist(), strict=True)]
    test = {place for place in range(len(records)) if place % 10 in (0, 3, 6)}
    train = [record for place, record in enumerate(records) if place not in test]
    for number in range(5):
        (folder / f"data_batch_{number + 1}.bin").write_bytes(b"".join(train[number::5]))
    (folder / "test_batch.bin").write_bytes(b"".join(records[place] for place in sorted(test)))
    (folder / "batches.meta.txt").write_text("".join(f"digit {digit}\n" for digit in range(10)))


def digits_0_to_4(out: Path, epochs: str) -> Path:
    """Train a ResNet18 from random weights on the digits 0 to 4; the file of its weights."""
    checkpoint = out / "source.checkpoint"
    model = ["torchvision:resnet18", out / "source", "--image-size", "32", "--weights", "none", "--no-preflight"]
    steps.run(steps.EDGEWARD, "finetune", *model, *SGD, *SPLIT, "--epochs", epochs, "--out", checkpoint)
    return checkpoint / "weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/cifar10"))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's binary batches")
    parser.add_argument("--weights", default="default", help="with --data: default (downloads), none or a file")
    parser.add_argument("--epochs", default="5")
    options = parser.parse_args()
    out = steps.begin(options.out)
    data, weights, size = options.data, options.weights, "224"
    if data is None:
        images, labels = digits()
        for name, chosen in (("source", labels < 5), ("target", labels >= 5)):
            places = np.flatnonzero(chosen)
            write_batches(out / name, enlarged([images[i] for i in places], 32), labels[places])
        print("the weights are those of a ResNet18 trained on the digits 0 to 4, not ImageNet's")
        data, weights, size = out / "target", digits_0_to_4(out, options.epochs), "32"
    picture = out / "one.png"
    _first(data).save(picture)
    model = ["torchvision:resnet18", data, "--image-size", size, "--weights", weights]
    passed = steps.pipeline(
        out,
        "cifar10",
        [*model, *SGD, *SPLIT, "--epochs", options.epochs],
        modality="image",
        features=steps.pixels,
        ask=[picture],
    )
    steps.finish(passed)


def _first(data: Path) -> Image.Image:
    record = np.frombuffer((data / "test_batch.bin").read_bytes()[1:3073], np.uint8)
    return Image.fromarray(np.ascontiguousarray(record.reshape(3, 32, 32).transpose(1, 2, 0)))


if __name__ == "__main__":
    main()

"""Only the last layers of a ResNet18: python examples/last_layers.py multiclass|multilabel|regression [--out DIR]

The ResNet18 is one that this example first trains on the digits 0 to 4: the weights are not ImageNet's. Of it the head
and the last two blocks are trained, the rest is frozen, its BatchNorm included. Three kinds of target, on other images:

multiclass   which of the digits 5 to 9 it is; cross-entropy
multilabel   whether the digit is even, prime, round (has a closed loop), any of them; binary cross-entropy
regression   by how many degrees the image was turned; squared error of the standardised angle
"""

import argparse
import csv
from pathlib import Path
from shlex import split

import numpy as np

from examples import steps
from examples.digits import digits, enlarged, traits, turned

SOURCE = 600  # images, of which the digits 0 to 4 are the source task
SIDE = 32  # pixels
MODEL = split(f"--image-size {SIDE} --optimizer sgd --learning-rate 0.05")


def write_table(path: Path, kind: str) -> None:
    """Write the images of one kind of target as PNG files, and their table with the columns image and target."""
    images, labels = digits()
    if kind == "source":
        places = np.flatnonzero(labels[:SOURCE] < 5)
    else:
        places = SOURCE + np.flatnonzero((labels[SOURCE:] >= 5) | (kind != "multiclass"))
    degrees = np.random.default_rng(0).uniform(-45, 45, len(labels)).round(1)
    pictures = enlarged([images[i] for i in places], SIDE)
    if kind == "regression":
        pictures = turned(pictures, degrees[places])
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "target"])
        for place, picture in zip(places.tolist(), pictures, strict=True):
            picture.save(folder / f"{place:04}.png")
            label = {
                "multilabel": "|".join(traits(labels[place])) or "|",  # which is how a table says: none of them
                "regression": degrees[place],
            }.get(kind, labels[place])
            writer.writerow([f"{folder.name}/{place:04}.png", label])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["multiclass", "multilabel", "regression"])
    parser.add_argument("--out", type=Path, default=Path("demo/last_layers"))
    parser.add_argument("--epochs", default="8")
    options = parser.parse_args()
    out = steps.begin(options.out / options.kind)
    write_table(out / "source.csv", "source")
    write_table(out / "images.csv", options.kind)
    source = out / "source.checkpoint"
    scratch = ["torchvision:resnet18", out / "source.csv", *MODEL, *split("--weights none --strategy full --epochs 5")]
    steps.run(steps.EDGEWARD, "finetune", *scratch, "--label-column", "target", "--no-preflight", "--out", source)
    model = ["torchvision:resnet18", out / "images.csv", *MODEL, "--weights", source / "weights.safetensors"]
    last = split(f"--no-preflight --strategy last --train-last 3 --epochs {options.epochs} --split 0.5 0.1 0.1 0.3")
    passed = steps.pipeline(
        out,
        options.kind,
        [*model, *last, "--label-column", f"target:{options.kind}"],
        modality="image",
        features=steps.pixels,
        ask=sorted((out / "images").iterdir())[:2],
    )
    steps.finish(passed)


if __name__ == "__main__":
    main()

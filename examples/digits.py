"""scikit-learn's handwritten digits, 1,797 grey images of 8 × 8 pixels: python examples/digits.py OUT

Written as PNG files in class folders, OUT/0/0000.png ... OUT/9/1796.png. The other examples take them from here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TRAITS = {"even": (0, 2, 4, 6, 8), "prime": (2, 3, 5, 7), "round": (0, 6, 8, 9)}  # round: with a closed loop


def digits() -> tuple[list[Image.Image], np.ndarray]:
    """The images, grey, 8 × 8, and the digits int64 (N,) that they show."""
    values, labels = load_digits(return_X_y=True)
    grey = np.round(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(pixels) for pixels in grey], labels


def enlarged(images: Sequence[Image.Image], side: int) -> list[Image.Image]:
    """The images with as many pixels on each side."""
    return [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]


def turned(images: Sequence[Image.Image], degrees: np.ndarray) -> list[Image.Image]:
    """Each image turned about its centre, counterclockwise."""
    return [image.rotate(float(angle), Image.Resampling.BICUBIC) for image, angle in zip(images, degrees, strict=True)]


def traits(digit: int) -> list[str]:
    """Which of TRAITS a digit has; 1 has none."""
    return [trait for trait, members in TRAITS.items() if digit in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    images, labels = digits()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = options.out / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:04}.png")
    print(f"{len(labels)} images in {options.out}")


if __name__ == "__main__":
    main()

"""Write scikit-learn's handwritten digits as PNG files in class folders: python examples/digits.py OUT

1,797 grey images of 8 × 8 pixels: OUT/0/0000.png ... OUT/9/1796.png.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = options.out / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.round(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:04}.png")
    print(f"{len(labels)} images in {options.out}")


if __name__ == "__main__":
    main()

"""CIFAR-10: its binary batches, read without torchvision, and `torchvision:CIFAR10`."""

import hashlib
import importlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bundle.errors import DataError, MissingExtra
from finetune.cache import cache_folder
from finetune.folder import TASK
from finetune.labels import read_target
from finetune.source import Source

LOCATION = "torchvision:CIFAR10"

SIDE = 32  # pixels
CLASSES = 10
TRAIN_FILES = "data_batch_*.bin"
TEST_FILE = "test_batch.bin"
NAMES_FILE = "batches.meta.txt"

_PIXELS = 3 * SIDE * SIDE
_RECORD = 1 + _PIXELS  # label, then the red, the green and the blue plane


def has_batches(folder: Path) -> bool:
    """Whether a folder is one of CIFAR-10's binary batches."""
    return (folder / TEST_FILE).is_file() or any(folder.glob(TRAIN_FILES))


def read_batches(folder: Path) -> Source:
    """The records of data_batch_*.bin and, held out, of test_batch.bin; they are mapped, not loaded.

    Raises:
        DataError: no data_batch, a file whose size is no whole number of records, or a label without a name.
    """
    files = sorted(folder.glob(TRAIN_FILES))
    if not files:
        raise DataError(f"{folder} has a {TEST_FILE} but no {TRAIN_FILES} to train on.")
    test = [folder / TEST_FILE] if (folder / TEST_FILE).is_file() else []
    label_names = _label_names(folder / NAMES_FILE)
    batches = [_map(file) for file in [*files, *test]]
    names = []
    for file, records in zip([*files, *test], batches, strict=True):
        wrong = np.flatnonzero(records[:, 0] >= len(label_names))
        if len(wrong):
            raise DataError(
                f"record {wrong[0]} of {file} has the label {records[wrong[0], 0]}; "
                f"there are {len(label_names)}, from 0. Is this CIFAR-10's binary version?"
            )
        names += [f"record {number} of {file.name}" for number in range(len(records))]
    held_out = np.arange(len(names)) >= len(names) - len(batches[-1]) if test else None
    labels = [label_names[label] for records in batches for label in records[:, 0]]
    return _source(str(folder), names, labels, [records[:, 1:] for records in batches], held_out)


def download() -> Source:
    """CIFAR-10 as torchvision has it, from `$XDG_CACHE_HOME/edgeward/cifar10` or from its home page.

    Raises:
        DataError: it is not there and cannot be downloaded.
        MissingExtra: torchvision is not installed.
    """
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise MissingExtra("torchvision is not installed: pip install 'edgeward[finetune]'.") from error
    folder = cache_folder("cifar10")
    try:
        parts = [datasets.CIFAR10(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a wrong checksum
        raise DataError(
            f"{LOCATION} is not in {folder} and cannot be downloaded: {error}. "
            f"Give a folder with CIFAR-10's binary version instead ({TRAIN_FILES}, {TEST_FILE})."
        ) from error
    kinds = ["train", "test"]
    return _source(
        LOCATION,
        [f"{kind}[{i}]" for kind, part in zip(kinds, parts, strict=True) for i in range(len(part))],
        [part.classes[label] for part in parts for label in part.targets],
        [part.data.transpose(0, 3, 1, 2).reshape(-1, _PIXELS) for part in parts],
        np.repeat([False, True], [len(part) for part in parts]),
    )


def _map(file: Path) -> np.ndarray:
    try:
        records = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.empty(0, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    size = len(records)
    if not size or size % _RECORD:
        raise DataError(
            f"{file} has {size} bytes, which is no whole number of CIFAR-10's records of {_RECORD} bytes "
            "(1 label, 3 × 32 × 32 pixels). Was it cut off?"
        )
    return records.reshape(-1, _RECORD)


def _label_names(path: Path) -> list[str]:
    """One a line; without the file, the numbers."""
    if not path.is_file():
        return [str(number) for number in range(CLASSES)]
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.") from error


def _source(
    location: str, names: Sequence[str], labels: Sequence[str], parts: Sequence[np.ndarray], held_out: np.ndarray | None
) -> Source:
    """Parts of uint8 (n, 3072), planes of red, green and blue; an example's content are these bytes."""
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def raw(index: int) -> bytes:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        planes = parts[part][index - starts[part]].reshape(3, SIDE, SIDE)
        png = BytesIO()
        Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(png, "PNG", compress_level=1)
        return png.getvalue()

    return Source(
        location=location,
        names=names,
        digests=[hashlib.sha256(record.tobytes()).hexdigest() for part in parts for record in part],
        raw=raw,
        targets=(read_target(TASK, "multiclass", labels)[0],),
        held_out=held_out,
    )

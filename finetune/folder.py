"""Image files: those of a folder of class folders, and the check that they can be used."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bundle import image
from bundle.errors import BadInput, DataError
from bundle.host import cpu_count
from bundle.log import log
from finetune.labels import read_target
from finetune.progress import track
from finetune.source import Source

SUFFIXES = (".png", ".jpg", ".jpeg")
TASK = "label"  # what is predicted of a folder, which has no column to be named after
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}  # no names of classes


def read_folder(path: Path) -> Source:
    """The images `CLASS/*.png`, `*.jpg` and `*.jpeg` below a folder, at any depth.

    Raises:
        DataError: no class folder, one without images, or folders that are splits instead of classes.
    """
    files: list[Path] = []
    labels: list[str] = []
    others: list[Path] = []
    for folder in _class_folders(path):
        present = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        images = [p for p in present if p.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(f"class folder {folder} holds no PNG or JPEG file. Fill it or remove it.")
        files += images
        labels += [folder.name] * len(images)
        others += [p for p in present if p.suffix.lower() not in SUFFIXES]
    if others:
        first = str(others[0].relative_to(path))
        log.warning("files that are no PNG or JPEG left out", data=str(path), count=len(others), first=first)
    digests, bad = check_images(files)
    return Source(
        location=str(path),
        names=[str(file.relative_to(path)) for file in files],
        digests=digests,
        raw=lambda index: files[index].read_bytes(),
        targets=(read_target(TASK, "multiclass", labels)[0],),
        bad=bad,
    )


def _class_folders(path: Path) -> list[Path]:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"{path} holds no folder. Put the images of each class into a folder of its name: CLASS/*.jpg.")
    names = [folder.name for folder in folders]
    if SPLITS.issuperset(name.lower() for name in names) and all(any(p.is_dir() for p in f.iterdir()) for f in folders):
        raise DataError(
            f"{path} holds {', '.join(names)}: splits, as it seems, with the classes below. Give one of them, such as "
            f"{folders[0]}, or put all images into {path}/CLASS; which are trained on is decided by --split."
        )
    return folders


def check_images(files: Sequence[Path]) -> tuple[list[str], dict[int, str]]:
    """Decode every image once.

    Returns:
        Hex sha256 of each file, "" where it cannot be used; and position -> why not.
    """
    digests, bad = [], {}
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(_check_image, files)
        for index, result in enumerate(track(results, len(files), "reading data")):
            digests.append(result if isinstance(result, str) else "")
            if isinstance(result, Exception):
                bad[index] = f"cannot be used: {result}"
    return digests, bad


def _check_image(path: Path) -> str | Exception:
    try:
        raw = path.read_bytes()
        image.check(raw)
    except (BadInput, OSError) as error:
        return error
    return hashlib.sha256(raw).hexdigest()

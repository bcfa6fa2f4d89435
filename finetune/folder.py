"""Image files: those of a folder of class folders, and the check that they can be used."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bundle import image
from bundle.errors import BadInput, DataError
from bundle.host import cpu_count
from finetune.labels import read_target
from finetune.progress import track
from finetune.source import Source

SUFFIXES = (".png", ".jpg", ".jpeg")
TASK = "label"  # what is predicted of a folder, which has no column to be named after


def read_folder(path: Path) -> Source:
    """The images `CLASS/*.png`, `*.jpg` and `*.jpeg` below a folder, at any depth.

    Raises:
        DataError: a class folder without images.
    """
    files: list[Path] = []
    labels: list[str] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        images = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        images = [p for p in images if not p.name.startswith(".")]
        if not images:
            raise DataError(f"class folder {folder} holds no PNG or JPEG file. Fill it or remove it.")
        files += images
        labels += [folder.name] * len(images)
    digests, bad = check_images(files)
    return Source(
        location=str(path),
        names=[str(file.relative_to(path)) for file in files],
        digests=digests,
        raw=lambda index: files[index].read_bytes(),
        targets=(read_target(TASK, "multiclass", labels)[0],),
        bad=bad,
    )


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

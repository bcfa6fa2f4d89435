"""What a peer's script reads and writes: python with_PEER.py WORK OUT NAME. It runs in the peer's environment.

WORK holds fp32.onnx, calibration/*.npz and selection/*.npz with the feeds of one example each, labels.npy, int64 (N,),
of the selection, and job.json. The script leaves OUT/NAME.onnx, and OUT/NAME.json with what it did.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """What is asked of a peer."""

    task: str
    rows: int
    kind: str  # "image" or "text"
    classes: int
    budget: float  # largest drop of accuracy, a fraction
    threads: int


class Work:
    """The folder of a benchmark, seen from a peer's script."""

    def __init__(self, folder: Path, out: Path, name: str) -> None:
        self.job = read_job(folder)
        self.graph = folder / "fp32.onnx"
        self.model = out / f"{name}.onnx"
        self.name = name
        self._folder = folder

    def calibration(self) -> Iterator[Feeds]:
        """Feeds of training examples, one each, with the batch axis."""
        return _feeds(self._folder / "calibration")

    def selection(self) -> Iterator[Feeds]:
        """Feeds of the examples that an accuracy function may use."""
        return _feeds(self._folder / "selection")

    def labels(self) -> np.ndarray:
        """Of the selection, int64 (N,)."""
        labels: np.ndarray = np.load(self._folder / "labels.npy")
        return labels

    def accuracy(self, model: str | bytes) -> float:
        """Of an ONNX file or its bytes, in ONNX Runtime on the selection, one example a run."""
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        answers = [int(np.argmax(session.run(None, feeds)[0])) for feeds in self.selection()]
        return float(np.mean(np.array(answers) == self.labels()))

    def finish(self, options: str, *packages: str) -> None:
        """Say what was done, in words, and with which packages."""
        told = {"options": options, "versions": {package: version(package) for package in packages}}
        self.model.with_suffix(".json").write_text(json.dumps(told))


class Calibration:
    """A CalibrationDataReader, as ONNX Runtime and Neural Compressor want one."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.rewind()

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)

    def rewind(self) -> None:
        self._feeds = self._work.calibration()

    def __iter__(self) -> Iterator[Feeds]:
        return self._work.calibration()


def opened() -> Work:
    """The folder of the command line."""
    folder, out, name = sys.argv[1:]
    return Work(Path(folder), Path(out), name)


def read_job(folder: Path) -> Job:
    return Job(**json.loads((folder / "job.json").read_bytes()))


def write_job(folder: Path, job: Job) -> None:
    (folder / "job.json").write_text(json.dumps(asdict(job)))


def write_feeds(folder: Path, number: int, feeds: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{number:05}.npz", **feeds)  # type: ignore[arg-type]  # allow_pickle is no tensor


def _feeds(folder: Path) -> Iterator[Feeds]:
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as arrays:
            yield dict(arrays)

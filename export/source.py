"""What is compiled, and the examples that it is held to."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import bundle
import export
import finetune
from bundle import preprocess
from bundle.errors import DataError
from bundle.host import installed_versions
from bundle.log import log
from bundle.manifest import Input, Task
from export import graph, refit
from export.config import ExportConfig
from export.graph import Parity
from export.memory import Memory
from finetune import evaluate
from finetune.checkpoint import Checkpoint, load_checkpoint
from finetune.data import Dataset, load_dataset
from finetune.loader import EncodedRows
from finetune.pretrained import modality
from finetune.splits import SplitName
from finetune.target import Target

SAMPLES = 32  # examples for tracing, parity, timing and invariance
PACKAGES = (
    *("edgeward", "jieba", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript", "pillow"),
    *("tokenizers", "torch", "torchvision", "transformers"),
)


@dataclass(frozen=True)
class Split:
    """Held-out examples as the graph takes them, and what the reference says of them."""

    rows: Sequence[np.ndarray]
    targets: tuple[Target, ...]  # of these N examples, one for each task
    logits: np.ndarray  # float32 (N, columns of all tasks), of the reference
    indices: np.ndarray  # int64 (N,), into the data

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Source:
    """A model in fp32, and what is known of it.

    Attributes:
        spec: what it takes.
        tasks: what it answers.
        graph: ONNX; takes bundle.preprocess.graph_inputs and gives bundle.outputs.logits_widths.
        parity: of the graph to the reference, which is PyTorch, or an ONNX model as it came.
        calibration: preprocessed training examples, drawn with a fixed seed.
        selection: the split that choices are made on.
        held_out: gives the gate split; asked for once, after the choice.
        gate_size: how many examples that has.
        raw: a raw example, by its index in the data.
        files: what preprocessing reads beside the manifest, by name.
        refit: makes the static int8 graph with a head fitted to it; None of what is not a checkpoint.
        reference: what the graph is held to, in a word or two.
        model: as it was named.
        data: where it is.
        data_sha256: its digest.
        sha256: of the checkpoint, or of the ONNX file.
        memory: of what was computed from the same things.
    """

    spec: Input
    tasks: tuple[Task, ...]
    graph: bytes
    parity: Parity
    calibration: Sequence[np.ndarray]
    selection: Split
    held_out: Callable[[], Split]
    gate_size: int
    raw: Callable[[int], bytes]
    files: dict[str, bytes]
    refit: Callable[[], bytes] | None
    reference: str
    model: str
    data: str
    data_sha256: str
    sha256: str
    memory: Memory

    @property
    def sample(self) -> list[np.ndarray]:
        """A few preprocessed examples of the selection split."""
        return list(self.selection.rows[:SAMPLES])


def open_source(config: ExportConfig) -> Source:
    """A checkpoint or an ONNX model, with its data.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        DataError: the data is not what it was split from, or too little to judge a task on.
        GateFailed: the fp32 graph is not the PyTorch model.
    """
    if config.checkpoint.suffix == ".onnx":
        from export.onnx_source import open_onnx

        return open_onnx(config)
    return open_checkpoint(config)


def open_checkpoint(config: ExportConfig) -> Source:
    """A checkpoint compiled to fp32, with the splits that it was trained with."""
    checkpoint = load_checkpoint(config.checkpoint)
    dataset = _dataset(checkpoint, config.data)
    _check_known(checkpoint, dataset)
    spec, tasks = checkpoint.spec.input, checkpoint.spec.tasks
    memory = recollection(config, dataset, checkpoint.sha256)
    here = memory.here()
    selection = reference_split(checkpoint, dataset, "selection", here)
    sample = list(selection.rows[:SAMPLES])
    fp32 = memory.blob("fp32", compute=lambda: graph.to_onnx(checkpoint.network, spec, tasks, sample))
    parity = here.record(
        Parity, "parity", compute=lambda: graph.check_parity(fp32, checkpoint.network, spec, tasks, sample)
    )
    log.info("parity", largest_difference=parity.served, tolerance=parity.tolerance)
    calibration = calibration_rows(checkpoint, dataset, config.calibration)
    return Source(
        spec=spec,
        tasks=tasks,
        graph=fp32,
        parity=parity,
        calibration=calibration,
        selection=selection,
        held_out=lambda: reference_split(checkpoint, dataset, "gate", here),
        gate_size=len(checkpoint.splits.indices(dataset, "gate")),
        raw=dataset.raw,
        files=_input_files(checkpoint),
        refit=lambda: refit.int8_static_refit(checkpoint, dataset, calibration),
        reference="PyTorch",
        model=getattr(checkpoint.spec.model, "name", "mlp"),
        data=dataset.location,
        data_sha256=dataset.sha256,
        sha256=checkpoint.sha256,
        memory=memory,
    )


def recollection(config: ExportConfig, dataset: Dataset, *digests: str) -> Memory:
    """The memory of what follows from the data in its order, these digests, the calibration, and what is installed."""
    order = hashlib.sha256("\n".join(dataset.hashes).encode()).hexdigest()  # that of the rows of what is remembered
    versions = (f"{name} {version}" for name, version in installed_versions(*PACKAGES).items())
    about = (dataset.sha256, order, *digests, str(config.calibration), *versions, _code())
    return Memory(about, config.cache)


@cache
def _code() -> str:
    """A digest of the code that compiles and runs the reference: another version of it remembers nothing."""
    digest = hashlib.sha256()
    for package in (export, bundle, finetune):
        for path in sorted(Path(next(iter(package.__path__))).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _dataset(checkpoint: Checkpoint, location: str | None) -> Dataset:
    splits = checkpoint.splits
    max_bad = checkpoint.spec.provenance.config.get("max_bad")  # what was left out then is left out now
    return load_dataset(
        location or splits.data,
        modality(f"checkpoint:{checkpoint.path}"),
        input_column=splits.input_columns,
        label_column=splits.label_columns or ("label",),
        max_bad=max_bad if isinstance(max_bad, int) else 0,
    )


def _check_known(checkpoint: Checkpoint, dataset: Dataset) -> None:
    names: tuple[SplitName, ...] = ("selection", "gate")
    for name in names:
        check_known(name, dataset.targets, checkpoint.splits.indices(dataset, name))


def check_known(split: str, targets: Sequence[Target], indices: np.ndarray) -> None:
    """Refuse a held-out split that is too small to compare two models on.

    Raises:
        DataError: fewer than two of its examples, int64 positions (N,), have a known value of some target.
    """
    for target in targets:
        known = int(target.take(indices).known.sum())
        if known < 2:
            raise DataError(
                f"the {split} split holds {known} examples with a known {target.name!r}; comparing models takes 2 or "
                "more. Give it a larger fraction (edgeward finetune --split)."
            )


def reference_split(checkpoint: Checkpoint, dataset: Dataset, name: SplitName, memory: Memory) -> Split:
    """Preprocess a held-out split and run it through PyTorch, unless that was done before."""
    indices = checkpoint.splits.indices(dataset, name)
    log.info("reference", split=name, examples=len(indices))
    rows = EncodedRows(dataset, indices, checkpoint.encode)
    logits = memory.array(
        "reference", name, compute=lambda: evaluate.logits(checkpoint.network, rows, checkpoint.spec.input)
    )
    return Split(rows, tuple(target.take(indices) for target in dataset.targets), logits, indices)


def calibration_rows(checkpoint: Checkpoint, dataset: Dataset, count: int) -> Sequence[np.ndarray]:
    """Preprocessed training examples, drawn at random with a fixed seed."""
    indices = checkpoint.splits.indices(dataset, "train")
    picked = np.random.default_rng(0).permutation(indices)[:count]
    return EncodedRows(dataset, picked, checkpoint.encode)


def _input_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What preprocessing reads beside the manifest, such as tokenizer.json: name -> bytes."""
    files = {}

    def read(name: str) -> bytes:
        files[name] = checkpoint.read(name)
        return files[name]

    preprocess.encoder(checkpoint.spec.input, read)
    return files

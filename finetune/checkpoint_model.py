"""`checkpoint:DIR`: the network of a checkpoint without its head, to go on from with other data or other tasks."""

from pathlib import Path

import msgspec
import numpy as np

from bundle.errors import ModelError
from bundle.log import log
from bundle.manifest import ImageInput, Input, TensorsInput, TextInput, VectorInput, WordsInput
from bundle.words import DICTIONARY, VOCABULARY, segmenter
from finetune.checkpoint import load_checkpoint, read_spec
from finetune.data import Dataset, Modality
from finetune.pretrained import Pretrained
from finetune.splits import Splits
from finetune.vectors import count_words, unknown_rates


def modality(path: str) -> Modality:
    """What the examples of a checkpoint are.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format version.
    """
    return modality_of(read_spec(Path(path).expanduser())[0].input)


def modality_of(spec: Input) -> Modality:
    """What examples become such an input.

    Raises:
        ModelError: they are tensors already.
    """
    match spec:
        case TextInput() | WordsInput():
            return "text"
        case ImageInput():
            return "image"
        case VectorInput():
            return "vector"
        case TensorsInput():
            raise ModelError("an input of tensors has no preprocessing: its examples are arrays, not texts or images.")


def open_model(path: str, dataset: Dataset, train: np.ndarray) -> Pretrained:
    """A checkpoint's backbone and preprocessing; the columns get the names of the new dataset.

    Args:
        path: directory of the checkpoint.
        dataset: what it is to be trained on.
        train: int64 positions of the train split.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ModelError: its network does not take what the dataset has.
    """
    checkpoint = load_checkpoint(Path(path).expanduser())
    spec = checkpoint.spec
    backbone, width, files = checkpoint.network.backbone, checkpoint.network.head.in_features, checkpoint.files
    _warn_of_leaks(path, checkpoint.splits, dataset, train)
    facts = _facts(spec.input, files, dataset, train)
    return Pretrained(spec.model, _input(path, spec.input, dataset), backbone, width, files, facts)


def _input(path: str, spec: Input, dataset: Dataset) -> Input:
    columns = dataset.input_columns
    match spec:
        case VectorInput():
            return _vector_input(path, spec, dataset)
        case TextInput() if len(columns) in (1, 2):
            return msgspec.structs.replace(spec, column=columns[0], pair=columns[1] if len(columns) == 2 else None)
        case _ if len(columns) == 1:
            return msgspec.structs.replace(spec, column=columns[0])
        case _ if not columns:  # a folder
            return spec
        case _:
            raise ModelError(f"checkpoint:{path} does not take {len(columns)} columns, {', '.join(columns)}.")


def _vector_input(path: str, spec: VectorInput, dataset: Dataset) -> VectorInput:
    size = len(dataset.raw(0)) // 4
    if size != spec.size:
        raise ModelError(f"checkpoint:{path} takes vectors of {spec.size} numbers; {dataset.location} has {size}.")
    names = tuple(dataset.feature_names)
    if names and spec.names and names != spec.names:
        place = next(i for i in range(size) if names[i] != spec.names[i])
        raise ModelError(
            f"checkpoint:{path} takes {spec.names[place]!r} as number {place}, where {dataset.location} has "
            f"{names[place]!r}. Name the columns with --input-column, in the checkpoint's order."
        )
    column = dataset.input_columns[0] if len(dataset.input_columns) == 1 else spec.column
    return msgspec.structs.replace(spec, column=column, names=names or spec.names)


def _facts(spec: Input, files: dict[str, bytes], dataset: Dataset, train: np.ndarray) -> dict[str, float]:
    if not isinstance(spec, WordsInput):
        return {}
    counts = count_words(dataset, train, segmenter(spec, files.get(DICTIONARY)))
    return unknown_rates(counts, files[VOCABULARY].decode().split("\n"))


def _warn_of_leaks(path: str, splits: Splits, dataset: Dataset, train: np.ndarray) -> None:
    """Say so when examples that are held out now were trained on then."""
    held_out = np.setdiff1d(np.arange(len(dataset)), train)
    leaks = sum(splits.assignment.get(dataset.hashes[i]) == "train" for i in held_out)
    if leaks:
        log.warning(
            "the checkpoint was trained on examples that are held out now; metrics will flatter it",
            checkpoint=path,
            examples=leaks,
        )

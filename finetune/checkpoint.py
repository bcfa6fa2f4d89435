"""The checkpoint on disk. docs/checkpoint-format.md is the normative page."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from bundle import preprocess, store
from bundle.errors import BundleDamaged, CheckpointError, ModelError
from bundle.host import installed_versions
from bundle.manifest import FileEntry, Input, Record, Task, to_json
from bundle.outputs import width
from bundle.preprocess import Encode
from bundle.store import FILE_PATTERN
from finetune.model import ModelSpec, Network
from finetune.pretrained import rebuild
from finetune.splits import Splits

FORMAT: Final = "edgeward-checkpoint"
FORMAT_VERSION = 1
SPEC = "checkpoint.json"
DIGEST = "checkpoint.sha256"
WEIGHTS = "weights.safetensors"
SPLITS = "splits.json"
MAX_SPEC_BYTES = 16 << 20

_PACKAGES = (
    "edgeward",
    "gensim",
    "jieba",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)

Scalar = str | int | float | bool | None


class Provenance(Record, frozen=True, kw_only=True):
    """How the checkpoint came to be. Nothing reads it but people and reports."""

    created: str  # ISO 8601, UTC
    config: dict[str, Scalar | tuple[Scalar, ...]]  # as given, field by field
    seed: int
    data: str
    data_sha256: str
    device: str
    versions: dict[str, str]
    examples: dict[str, int]  # per split
    metrics: dict[str, float]  # on the validation split, of the weights that were kept
    history: tuple[dict[str, float], ...]  # on the validation split, per epoch or per L2 that was tried


class CheckpointSpec(Record, frozen=True, kw_only=True):
    """The whole of checkpoint.json."""

    format: Literal["edgeward-checkpoint"]
    format_version: int
    model: ModelSpec
    input: Input
    tasks: tuple[Task, ...]
    provenance: Provenance
    files: dict[str, FileEntry]  # every other file but checkpoint.sha256


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: its directory.
        spec: checkpoint.json.
        sha256: hex digest of checkpoint.json, and through it of every file: the checkpoint's identity.
        splits: splits.json.
        network: float32, on the CPU, in eval mode, weights loaded.
        files: what the model and its preprocessing are made of, by name: tokenizer, vocabulary, factory, …
        encode: one raw example -> its tensor without batch axis; raises BadInput.
    """

    path: Path
    spec: CheckpointSpec
    sha256: str
    splits: Splits
    network: Network
    files: dict[str, bytes]
    encode: Encode

    def read(self, name: str) -> bytes:
        """The bytes of a file that the spec lists, verified.

        Raises:
            CheckpointError: it is not listed, missing, or another.
        """
        return _read(self.path, self.spec, name)


def write_checkpoint(
    out: Path, spec: CheckpointSpec, network: Network, splits: Splits, files: Mapping[str, bytes]
) -> None:
    """Write a whole checkpoint, or nothing.

    Args:
        out: must not exist.
        spec: its `files` are filled in here.
        network: whose weights are kept.
        splits: of the data.
        files: what else lies beside the spec, by name.

    Raises:
        OutputExists: there is something at `out`.
        EdgewardError: the disk is full, or cannot be written.
    """
    with store.new_directory(out) as directory:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
        try:
            save_file(tensors, directory / WEIGHTS)
        except SafetensorError as error:  # in which it tells of the disk
            raise OSError(error) from error
        (directory / SPLITS).write_bytes(to_json(splits))
        for name, data in files.items():
            (directory / name).write_bytes(data)
        data = to_json(msgspec.structs.replace(spec, files=store.list_files(directory)))
        (directory / SPEC).write_bytes(data)
        (directory / DIGEST).write_bytes(store.digest_line(SPEC, data))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read, verify and rebuild a checkpoint. Needs no network and no pretrained weights.

    Raises:
        CheckpointError: there is none, it is damaged, of another format version, or cannot be rebuilt here.
        MissingExtra: the library of its model is not installed.
    """
    spec, sha256 = read_spec(path)
    files: dict[str, bytes] = {}

    def read(name: str) -> bytes:
        files[name] = _read(path, spec, name)
        return files[name]

    try:
        splits = msgspec.json.decode(_read(path, spec, SPLITS), type=Splits)
        network = rebuild(spec.model, spec.input, read, sum(width(task) for task in spec.tasks))
        network.load_state_dict(load(_read(path, spec, WEIGHTS)))
        encode = preprocess.encoder(spec.input, read)
    except (msgspec.DecodeError, SafetensorError, RuntimeError, BundleDamaged, ModelError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    return Checkpoint(path, spec, sha256, splits, network.eval(), files, encode)


def read_spec(path: Path) -> tuple[CheckpointSpec, str]:
    """checkpoint.json, and its sha256 in hex; no other file is looked at.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format version.
    """
    if not (path / SPEC).is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {SPEC}.")
    if (path / SPEC).stat().st_size > MAX_SPEC_BYTES:
        raise CheckpointError(f"{path / SPEC} is larger than {MAX_SPEC_BYTES} bytes.")
    data = (path / SPEC).read_bytes()
    if not (path / DIGEST).is_file() or (path / DIGEST).read_bytes() != store.digest_line(SPEC, data):
        raise CheckpointError(f"{path / SPEC} does not have the sha256 that {DIGEST} gives.")
    try:
        header = msgspec.json.decode(data)
        if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(
                f"{path} has format {header.get('format')!r} version {header.get('format_version')!r}; this edgeward "
                f"reads {FORMAT!r} version {FORMAT_VERSION} (docs/checkpoint-format.md)."
            )
        spec = msgspec.json.decode(data, type=CheckpointSpec)
    except (msgspec.DecodeError, AttributeError) as error:
        raise CheckpointError(f"{path / SPEC} is not a checkpoint's: {error}.") from error
    if not spec.tasks:
        raise CheckpointError(f"{path / SPEC} has no task.")
    return spec, hashlib.sha256(data).hexdigest()


def _read(path: Path, spec: CheckpointSpec, name: str) -> bytes:
    if name not in spec.files or not FILE_PATTERN.fullmatch(name):
        raise CheckpointError(f"{path / SPEC} lists no file {name}.")
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / name} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != spec.files[name].sha256:
        raise CheckpointError(f"{path / name} is not the file that {SPEC} names: its sha256 differs.")
    return data


def library_versions() -> dict[str, str]:
    """Versions of what a checkpoint's numbers depend on, as far as it is installed."""
    return installed_versions(*_PACKAGES)

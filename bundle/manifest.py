"""The types of manifest.json. docs/bundle-format.md is the normative page.

Preprocessing and tasks are the same types in a checkpoint (docs/checkpoint-format.md), so that training, the
gate, the server and offline scoring cannot disagree about them.
"""

import math
from typing import Literal

import msgspec

from bundle.tensor import NUMPY_TYPES

FORMAT = "edgeward-bundle"
FORMAT_VERSION = 3  # as written
READ_VERSIONS = (1, 2, 3)
MAX_SIDE = 8192  # of a resized image's shorter side
MAX_NUMBERS = 1 << 20  # of a vector
MAX_AXES = 16  # of a tensor
MAX_TENSOR_BYTES = 64 << 20  # of all tensors of an example together

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of the formats: immutable, every key known."""


class TextInput(Record, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """One UTF-8 text per example, or two, tokenised by the `tokenizer.json` that lies beside the manifest."""

    column: str
    pair: str | None = None  # column of a second text, tokenised together with the first
    max_length: int  # tokens, special ones included; longer texts are cut at the end
    pad_id: int
    buckets: tuple[int, ...]  # padded lengths, ascending; the last is max_length
    max_bytes: int = 1 << 20  # of one text

    def __post_init__(self) -> None:
        """Refuse lengths that could not hold a text of max_length tokens."""
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.max_length:
            raise ValueError(f"buckets {self.buckets} must ascend to max_length {self.max_length}")
        if self.buckets[0] < 1 or not 0 <= self.pad_id < 2**31 or self.max_bytes < 1:
            raise ValueError("buckets and max_bytes must be positive, and pad_id a token")
        if self.pair in ("", self.column):
            raise ValueError(f"the columns of a pair must be two, not {self.column!r} and {self.pair!r}")


class ImageInput(Record, frozen=True, kw_only=True, tag="image", tag_field="type"):
    """One PNG or JPEG per example.

    Decoded, turned upright by its EXIF orientation, converted to RGB, its shorter side resized to `resize`, its
    centre cropped to height × width. The graph scales by mean and std.
    """

    column: str
    height: int
    width: int
    resize: int  # pixels of the shorter side before the crop
    interpolation: Literal["bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    max_bytes: int = 32 << 20  # of one encoded image
    max_pixels: int = 50_000_000  # of one decoded image

    def __post_init__(self) -> None:
        """Refuse a crop that is larger than what it is cut from, and limits that let nothing through."""
        if min(self.height, self.width) < 1 or max(self.height, self.width) > self.resize or self.resize > MAX_SIDE:
            raise ValueError(
                f"crop {self.height} × {self.width} must be positive and fit into resize {self.resize}, and that into "
                f"{MAX_SIDE}"
            )
        if min(self.std) <= 0 or self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError("std, max_bytes and max_pixels must be positive")


class WordsInput(Record, frozen=True, kw_only=True, tag="words", tag_field="type"):
    """One UTF-8 text per example, cut into words that the `vocabulary.txt` beside the manifest numbers.

    Words that it does not know are left out. With the segmenter jieba its dictionary lies beside, `jieba.txt`.
    """

    column: str
    segmenter: Literal["whitespace", "jieba"]
    lowercase: bool  # str.lower, before the text is cut
    hmm: bool = False  # jieba: guess words that the dictionary lacks, by the tables of the installed jieba
    max_words: int  # known ones; longer texts are cut at the end
    buckets: tuple[int, ...]  # padded lengths, ascending; the last is max_words
    max_bytes: int = 1 << 16  # of one text; jieba's time grows with the square of a long one's

    def __post_init__(self) -> None:
        """Refuse lengths that could not hold a text of max_words words."""
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.max_words:
            raise ValueError(f"buckets {self.buckets} must ascend to max_words {self.max_words}")
        if self.buckets[0] < 1 or self.max_bytes < 1:
            raise ValueError("buckets and max_bytes must be positive")


class VectorInput(Record, frozen=True, kw_only=True, tag="vector", tag_field="type"):
    """One vector of `size` finite float32 numbers per example; as raw bytes they are little-endian."""

    column: str
    size: int
    names: tuple[str, ...] = ()  # what each number is, when they were columns of a table

    def __post_init__(self) -> None:
        """Refuse an empty or endless vector, and names that are not one for each number."""
        if not 1 <= self.size <= MAX_NUMBERS or len(self.names) not in (0, self.size):
            raise ValueError(
                f"size {self.size} must be positive, at most {MAX_NUMBERS}, and names {len(self.names)} as many or none"
            )


class NamedTensor(Record, frozen=True, kw_only=True):
    """One of the tensors of an example; its numbers are finite."""

    name: str
    datatype: Literal[
        "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64"
    ]
    shape: tuple[int, ...]  # without the batch axis

    def __post_init__(self) -> None:
        """Refuse a tensor without a name or without elements."""
        if not self.name or len(self.shape) > MAX_AXES or min(self.shape, default=1) < 1:
            raise ValueError(
                f"tensor {self.name!r} must have a name and at most {MAX_AXES} axes, each of them of a positive "
                f"length, not {list(self.shape)}"
            )


class TensorsInput(Record, frozen=True, kw_only=True, tag="tensors", tag_field="type"):
    """Tensors as the graph takes them, one row of each per example.

    As raw bytes they stand one after the other, each little-endian and row-major.
    """

    tensors: tuple[NamedTensor, ...]

    def __post_init__(self) -> None:
        """Refuse no tensors, two of one name, and more than fits into a message."""
        if not self.tensors or len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("there must be a tensor, and each must have its own name")
        size = sum(math.prod(tensor.shape) * NUMPY_TYPES[tensor.datatype].itemsize for tensor in self.tensors)
        if size > MAX_TENSOR_BYTES:
            raise ValueError(f"the tensors of an example have {size} bytes; at most {MAX_TENSOR_BYTES} are allowed")


Input = TextInput | ImageInput | WordsInput | VectorInput | TensorsInput


class Multiclass(Record, frozen=True, kw_only=True, tag="multiclass", tag_field="kind"):
    """Exactly one of the labels holds."""

    name: str
    labels: tuple[str, ...]


class Multilabel(Record, frozen=True, kw_only=True, tag="multilabel", tag_field="kind"):
    """Any number of the labels holds; each is predicted when its score reaches the threshold."""

    name: str
    labels: tuple[str, ...]
    threshold: float = 0.5


class Regression(Record, frozen=True, kw_only=True, tag="regression", tag_field="kind"):
    """One number; the graph gives it standardised, `value = logit × std + mean`."""

    name: str
    mean: float
    std: float


Task = Multiclass | Multilabel | Regression


class GateRecord(Record, frozen=True, kw_only=True):
    """How a variant's accuracy on the gate split compares with PyTorch's, example by example."""

    verdict: Verdict
    task: str | None = None  # of several, the one that came closest to failing
    metric: str  # accuracy or exact_match, fractions; rmse, in the unit of the task
    examples: int
    reference: float  # the metric in PyTorch
    served: float  # the metric of the variant
    drop: float  # reference - served; of rmse (served - reference) / reference
    lost: int | None = None  # examples that only PyTorch got right; none of a metric that is no fraction of examples
    won: int | None = None  # examples that only the variant got right
    drop_lower: float | None = None  # one-sided confidence bounds of the drop
    drop_upper: float
    budget: float  # largest drop that passes
    confidence: float
    disagreement: float  # fraction of examples whose prediction differs
    disagreement_upper: float | None = None  # one-sided Clopper-Pearson bound of it, at the confidence
    examples_needed: int | None  # that would decide, if the rates stay as seen; none when decided, or at the budget


class Latency(Record, frozen=True, kw_only=True):
    """Time of one session run at batch 1, timed in turns with the fp32 variant."""

    p50_ms: float
    fp32_p50_ms: float
    ratio: float  # median of the block ratios variant / fp32
    ratio_lower: float | None = None  # ends of its 95% bootstrap interval
    ratio_upper: float
    threads: int


class Provenance(Record, frozen=True, kw_only=True):
    """Where the bundle, or a variant that was added to it, comes from."""

    created: str  # ISO 8601, UTC
    command: tuple[str, ...]
    model: str
    data: str
    data_sha256: str
    checkpoint_sha256: str
    cpu: str
    versions: dict[str, str]


class Variant(Record, frozen=True, kw_only=True):
    """One compiled graph, and what was measured of it on the machine that built it."""

    name: str
    file: str
    precision: Literal["fp32", "fp16", "int8"]
    device: Literal["cpu", "cuda", "tensorrt"]
    isa: str  # class of the machine that it was gated on, from bundle.host.machine_class
    batch_invariant: bool  # bit-equal whatever it is batched and padded with; if not, it runs at batch 1, unpadded
    tolerance: float  # largest difference of a golden logit that the self-test accepts
    parity: float  # largest difference of a logit from PyTorch's, over the parity examples
    gate: GateRecord | None  # none for fp32, which passes on parity alone
    latency: Latency
    rows_per_s: float | None = None  # examples a second, at the batch that a server would make
    built: Provenance | None = None  # of a variant that was added later; none is that of the bundle


class Golden(Record, frozen=True, kw_only=True):
    """One raw example and what must come of it."""

    file: str  # the raw bytes
    tensors: dict[str, str]  # graph input -> .npy file of the preprocessed example, without batch axis
    exact: bool  # tensors are equal bit for bit; otherwise (JPEG) within 32 of 255, on average 0.5
    logits: dict[str, dict[str, tuple[float, ...]]]  # variant -> graph output -> row


class FileEntry(Record, frozen=True, kw_only=True):
    """A file of the bundle."""

    sha256: str
    bytes: int


class Manifest(Record, frozen=True, kw_only=True):
    """The whole of manifest.json."""

    format: Literal["edgeward-bundle"]
    format_version: int
    name: str
    version: int
    input: Input
    tasks: tuple[Task, ...]
    variants: tuple[Variant, ...]  # preferred first; bundle.model chooses
    goldens: tuple[Golden, ...]
    provenance: Provenance
    files: dict[str, FileEntry]  # every other file but manifest.sha256


def to_json(record: msgspec.Struct) -> bytes:
    """The record as indented UTF-8 JSON; numbers round-trip exactly."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"

"""Raw example -> tensor -> batch, for every kind of input: one definition for training, gate, server and scoring."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from bundle import tensors, text, vector, words
from bundle.errors import BadInput
from bundle.manifest import ImageInput, Input, TensorsInput, TextInput, VectorInput, WordsInput
from bundle.tensor import TensorSpec

Encode = Callable[[bytes], np.ndarray]
Encoder = TypeVar("Encoder", text.TextEncoder, words.WordsEncoder)

_in_use: WeakValueDictionary[object, Any] = WeakValueDictionary()  # encoders that somebody holds


def encoder(spec: Input, read: Callable[[str], bytes]) -> Encode:
    """The function from one raw example to its tensor, without batch axis.

    Args:
        spec: how.
        read: gives the bytes of a file that lies beside the spec, such as tokenizer.json.
    """
    match spec:
        case TextInput():
            return _shared(text.TextEncoder, spec, read(text.TOKENIZER)).encode
        case ImageInput():
            from bundle import image  # Pillow takes memory that no other input needs

            return lambda raw: image.preprocess(raw, spec)
        case WordsInput():
            return words_encoder(spec, read).encode
        case VectorInput():
            return lambda raw: vector.decode(raw, spec)
        case TensorsInput():
            return lambda raw: tensors.decode(raw, spec)


def words_encoder(spec: WordsInput, read: Callable[[str], bytes]) -> words.WordsEncoder:
    """What encodes one text after the other; see encoder."""
    dictionary = read(words.DICTIONARY) if spec.segmenter == "jieba" else None
    return _shared(words.WordsEncoder, spec, read(words.VOCABULARY), dictionary)


def _shared(kind: Callable[..., Encoder], spec: TextInput | WordsInput, *files: bytes | None) -> Encoder:
    """One encoder for all who have the same files.

    The versions of a model mostly do. To read a tokenizer takes 15 ms, a dictionary of Chinese 0.5 s, in which the
    other threads of the process hardly run.
    """
    key = (kind, spec, *(file and hashlib.sha256(file).digest() for file in files))
    encoder: Encoder | None = _in_use.get(key)
    if encoder is None:
        encoder = _in_use[key] = kind(*files, spec)
    return encoder


def collate(rows: Sequence[np.ndarray] | np.ndarray, spec: Input, length: int | None = None) -> dict[str, np.ndarray]:
    """Tensors of several examples as the graph's inputs, with the batch axis first.

    Vectors and images may be one array already.

    Images: `image` uint8 (N, height, width, 3). Vectors: `features` float32 (N, size). Tensors: each by its own name.
    Text: see bundle.text.collate; words: see bundle.words.collate; `length` is the padded length of both.
    """
    match spec:
        case TextInput():
            return text.collate(rows, spec, length)
        case ImageInput():
            return {"image": _stacked(rows)}
        case WordsInput():
            return words.collate(rows, length)
        case VectorInput():
            return {"features": _stacked(rows)}
        case TensorsInput():
            return tensors.collate(rows, spec)


def _stacked(rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    return rows if isinstance(rows, np.ndarray) else np.stack(rows)


def graph_inputs(spec: Input) -> tuple[TensorSpec, ...]:
    """What the compiled graph takes."""
    match spec:
        case TextInput():
            names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (spec.pair is not None)
            return tuple(TensorSpec(name, "INT64", (-1, -1)) for name in names)
        case ImageInput():
            return (TensorSpec("image", "UINT8", (-1, spec.height, spec.width, 3)),)
        case WordsInput():
            return (TensorSpec("word_ids", "INT64", (-1, -1)), TensorSpec("word_mask", "INT64", (-1, -1)))
        case VectorInput():
            return (TensorSpec("features", "FP32", (-1, spec.size)),)
        case TensorsInput():
            return tuple(TensorSpec(one.name, one.datatype, (-1, *one.shape)) for one in spec.tensors)


def is_sequence(spec: Input) -> TypeGuard[TextInput | WordsInput]:
    """Whether examples differ in length, and are padded to be batched."""
    return isinstance(spec, TextInput | WordsInput)


def length(row: np.ndarray, spec: Input) -> int:
    """Tokens or words of an encoded example; 1 for what has no length."""
    return row.shape[-1] if is_sequence(spec) else 1


def bucket(length: int, spec: TextInput | WordsInput) -> int:
    """The smallest padded length that holds `length` tokens or words."""
    return next(size for size in spec.buckets if size >= length)


def wire_inputs(spec: Input) -> tuple[TensorSpec, ...]:
    """What a server takes: one tensor for each column of an example, named after it, or the tensors themselves."""
    match spec:
        case TensorsInput():
            return graph_inputs(spec)
        case VectorInput():
            return (TensorSpec(spec.column, "FP32", (-1, spec.size)),)
        case TextInput(pair=str(pair)):
            return (TensorSpec(spec.column, "BYTES", (-1, 1)), TensorSpec(pair, "BYTES", (-1, 1)))
        case _:
            return (TensorSpec(spec.column, "BYTES", (-1, 1)),)


def raw_examples(spec: Input, arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    """The raw examples that arrived as the tensors of wire_inputs, with as many rows each.

    Raises:
        BadInput: a text of a pair cannot be used; the message begins with its position.
    """
    match spec:
        case VectorInput():
            return [vector.encode(row) for row in arrays[spec.column]]
        case TensorsInput():
            return tensors.encode(arrays, spec)
        case TextInput(pair=str(pair)):
            rows = zip(arrays[spec.column][:, 0], arrays[pair][:, 0], strict=True)
            return [_pair(spec, i, *row) for i, row in enumerate(rows)]
        case _:
            found: list[bytes] = arrays[spec.column][:, 0].tolist()
            return found


def _pair(spec: TextInput, position: int, first: bytes, second: bytes) -> bytes:
    try:
        return text.join_raw_pair(first, second, spec)
    except BadInput as error:
        raise BadInput(f"example {position}: {error}") from error

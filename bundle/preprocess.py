"""Raw example -> tensor -> batch, for every kind of input: one definition for training, gate, server and scoring."""

from collections.abc import Callable, Sequence

import numpy as np

from bundle import image, text
from bundle.manifest import ImageInput, Input, TextInput
from bundle.tensor import TensorSpec

Encode = Callable[[bytes], np.ndarray]


def encoder(spec: Input, read: Callable[[str], bytes]) -> Encode:
    """The function from one raw example to its tensor, without batch axis.

    Args:
        spec: how.
        read: gives the bytes of a file that lies beside the spec, such as tokenizer.json.
    """
    match spec:
        case TextInput():
            return text.TextEncoder(read(text.TOKENIZER), spec).encode
        case ImageInput():
            return lambda raw: image.preprocess(raw, spec)


def collate(rows: Sequence[np.ndarray], spec: Input, length: int | None = None) -> dict[str, np.ndarray]:
    """Tensors of several examples as the graph's inputs, with the batch axis first.

    Images: `image` uint8 (N, height, width, 3). Text: see bundle.text.collate; `length` is the padded length.
    """
    match spec:
        case TextInput():
            return text.collate(rows, spec, length)
        case ImageInput():
            return {"image": np.stack(rows)}


def graph_inputs(spec: Input) -> tuple[TensorSpec, ...]:
    """What the compiled graph takes."""
    match spec:
        case TextInput():
            return (TensorSpec("input_ids", "INT64", (-1, -1)), TensorSpec("attention_mask", "INT64", (-1, -1)))
        case ImageInput():
            return (TensorSpec("image", "UINT8", (-1, spec.height, spec.width, 3)),)

"""Text -> token ids: the only tokenisation in the repository."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from bundle.errors import BadInput, BundleDamaged
from bundle.manifest import TextInput

TOKENIZER = "tokenizer.json"


class TextEncoder:
    """A tokenizer.json with the limits of its spec."""

    def __init__(self, tokenizer: bytes, spec: TextInput) -> None:
        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleDamaged(f"{TOKENIZER} is not a tokenizer: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_length)

    def encode(self, raw: bytes) -> np.ndarray:
        """One UTF-8 text as int64 ids (length,), special tokens included, at most spec.max_length of them.

        Raises:
            BadInput: the bytes are not UTF-8, more than spec.max_bytes, or hold nothing that the tokenizer knows of.
        """
        if len(raw) > self.spec.max_bytes:
            raise BadInput(f"text has {len(raw)} bytes; the limit is {self.spec.max_bytes}.")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"text is not UTF-8: {error.reason} at byte {error.start} of {len(raw)}.") from error
        ids = np.array(self._tokenizer.encode(text).ids, dtype=np.int64)
        if not len(ids):  # only a tokenizer that adds no special tokens comes here
            raise BadInput("text has no tokens.")
        return ids


def collate(rows: Sequence[np.ndarray], spec: TextInput, length: int | None = None) -> dict[str, np.ndarray]:
    """Ids of several texts as the tensors that the graph takes.

    Returns:
        `input_ids` and `attention_mask`, both int64 (N, length), padded at the end with spec.pad_id and 0; the length
        is that of the longest text unless given.
    """
    length = length or max(len(row) for row in rows)
    ids = np.full((len(rows), length), spec.pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def bucket(length: int, spec: TextInput) -> int:
    """The smallest padded length that holds `length` tokens."""
    return next(size for size in spec.buckets if size >= length)

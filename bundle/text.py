"""Text, or a pair of texts -> token ids: the only tokenisation in the repository."""

from collections.abc import Sequence

import msgspec
import numpy as np

from bundle.errors import BadInput, BundleDamaged
from bundle.manifest import TextInput

TOKENIZER = "tokenizer.json"


class TextEncoder:
    """A tokenizer.json with the limits of its spec."""

    def __init__(self, tokenizer: bytes, spec: TextInput) -> None:
        from tokenizers import Tokenizer  # takes memory that no other input needs

        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleDamaged(f"{TOKENIZER} is not a tokenizer: {error}.") from error
        special = self._tokenizer.num_special_tokens_to_add(spec.pair is not None)
        if special > spec.max_length:  # tokenizers would not cut at all
            raise BundleDamaged(f"{TOKENIZER} adds {special} special tokens; max_length {spec.max_length} is less.")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_length, strategy="longest_first")

    def encode(self, raw: bytes) -> np.ndarray:
        """One raw example as int64 ids (length,), special tokens included, at most spec.max_length of them.

        Of a pair, see join_pair, int64 (2, length): the ids, and which text each token is of. The longer text is cut.

        Raises:
            BadInput: a text is not UTF-8, more than spec.max_bytes, or holds nothing that the tokenizer knows of.
        """
        if self.spec.pair is None:
            encoding = self._tokenizer.encode(decode(raw, self.spec.max_bytes))
            row = np.array(encoding.ids, dtype=np.int64)
        else:
            encoding = self._tokenizer.encode(*_split_pair(raw, self.spec))
            row = np.array([encoding.ids, encoding.type_ids], dtype=np.int64)
        if not row.size:  # only a tokenizer that adds no special tokens comes here
            raise BadInput("text has no tokens.")
        return row


def decode(raw: bytes, max_bytes: int, name: str = "text") -> str:
    """The text that UTF-8 bytes are.

    Raises:
        BadInput: calling it `name`: the bytes are not UTF-8, or more than max_bytes.
    """
    if len(raw) > max_bytes:
        raise BadInput(f"{name} has {len(raw)} bytes; the limit is {max_bytes}.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8: {error.reason} at byte {error.start} of {len(raw)}.") from error


def join_pair(first: str, second: str) -> bytes:
    """Two texts as one raw example: a JSON list of both, in UTF-8."""
    return msgspec.json.encode((first, second))


def join_raw_pair(first: bytes, second: bytes, spec: TextInput) -> bytes:
    """The same of UTF-8 bytes.

    Raises:
        BadInput: one is not UTF-8, or more than spec.max_bytes; its column is named.
    """
    return join_pair(
        decode(first, spec.max_bytes, f"text {spec.column!r}"), decode(second, spec.max_bytes, f"text {spec.pair!r}")
    )


def _split_pair(raw: bytes, spec: TextInput) -> tuple[str, str]:
    try:
        pair = msgspec.json.decode(raw, type=tuple[str, str])
    except ValueError as error:  # of msgspec, and of what is not UTF-8
        raise BadInput(f"a pair of texts is not a JSON list of two strings in UTF-8: {error}.") from error
    for column, text in zip((spec.column, spec.pair), pair, strict=True):
        size = len(text.encode())
        if size > spec.max_bytes:
            raise BadInput(f"text {column!r} has {size} bytes; the limit is {spec.max_bytes}.")
    return pair


def collate(
    rows: Sequence[np.ndarray] | np.ndarray, spec: TextInput, length: int | None = None
) -> dict[str, np.ndarray]:
    """Ids of several texts, or pairs, as the tensors that the graph takes.

    Returns:
        `input_ids`, `attention_mask` and, of pairs, `token_type_ids`, all int64 (N, length), padded at the end with
        spec.pad_id, 0 and 0; the length is that of the longest example unless given.
    """
    length = length or max(row.shape[-1] for row in rows)
    shape = (len(rows), length)
    tensors = {"input_ids": np.full(shape, spec.pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    if spec.pair is not None:
        tensors["token_type_ids"] = np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        size = row.shape[-1]
        tensors["attention_mask"][i, :size] = 1
        for name, values in zip(("input_ids", "token_type_ids"), np.atleast_2d(row), strict=False):
            tensors[name][i, :size] = values
    return tensors

"""Text -> numbers of words: the only cutting into words in the repository."""

import math
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import islice

import numpy as np

from bundle.errors import BundleDamaged, MissingExtra
from bundle.manifest import WordsInput
from bundle.text import decode

VOCABULARY = "vocabulary.txt"
DICTIONARY = "jieba.txt"


class WordsEncoder:
    """A vocabulary and a segmenter with the limits of their spec."""

    def __init__(self, vocabulary: bytes, dictionary: bytes | None, spec: WordsInput) -> None:
        """Read both files.

        Args:
            vocabulary: vocabulary.txt, UTF-8, a word a line; the number of the line, from 0, is its id.
            dictionary: jieba.txt, see segmenter.
            spec: how texts are cut.

        Raises:
            BundleDamaged: a file is not what it should be.
            MissingExtra: the segmenter is jieba, and it is not installed.
        """
        self.spec = spec
        self._ids = _read_vocabulary(vocabulary)
        self.segment = segmenter(spec, dictionary)

    def encode(self, raw: bytes) -> np.ndarray:
        """The known words of one UTF-8 text as int64 ids (length,), at most spec.max_words, perhaps none.

        Raises:
            BadInput: the bytes are not UTF-8, or more than spec.max_bytes.
        """
        words = self.segment(decode(raw, self.spec.max_bytes))
        known = (self._ids[word] for word in words if word in self._ids)
        return np.fromiter(islice(known, self.spec.max_words), dtype=np.int64)


def segmenter(spec: WordsInput, dictionary: bytes | None) -> Callable[[str], list[str]]:
    """The function from a text to its words, known or not; it may be called from several threads at once.

    Whitespace: str.lower if spec.lowercase, then str.split. jieba: the same lower, then its accurate mode, with
    spec.hmm; words of nothing but white space are dropped. No file is read or written.

    Args:
        spec: how.
        dictionary: of jieba, in its own format, `WORD FREQUENCY [TAG]` a line, UTF-8; None for whitespace.

    Raises:
        BundleDamaged: the dictionary is not one.
        MissingExtra: jieba is not installed.
    """
    cut = str.split if spec.segmenter == "whitespace" else _jieba(dictionary or b"", spec.hmm)
    return (lambda text: cut(text.lower())) if spec.lowercase else cut


def _jieba(dictionary: bytes, hmm: bool) -> Callable[[str], list[str]]:
    try:
        with warnings.catch_warnings():  # escapes in its source that newer Pythons warn of
            warnings.simplefilter("ignore")
            import jieba
    except ImportError as error:
        raise MissingExtra(
            "jieba is not installed; it cuts the texts of this model into words. Install edgeward with its extra "
            "'chinese'."
        ) from error
    tokenizer = jieba.Tokenizer()
    file = BytesIO(dictionary)
    file.name = DICTIONARY
    try:
        tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(file)
        math.log(tokenizer.total)
        if min(tokenizer.FREQ.values()) < 0:
            raise ValueError("a frequency is negative")
    except ValueError as error:  # math's, when the frequencies sum to nothing, too
        raise BundleDamaged(f"{DICTIONARY} is not a dictionary of jieba: {error}.") from error
    tokenizer.initialized = True  # or it would look for a cache below the folder of temporary files, write and log
    return lambda text: [word for word in tokenizer.cut(text, HMM=hmm) if not word.isspace()]


def _read_vocabulary(data: bytes) -> dict[str, int]:
    try:
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise BundleDamaged(f"{VOCABULARY} is not UTF-8: {error.reason} at byte {error.start}.") from error
    ids: dict[str, int] = {}
    for number, word in enumerate(lines):
        if not word:
            raise BundleDamaged(f"{VOCABULARY} has nothing in line {number + 1}; each line is a word.")
        if word in ids:
            raise BundleDamaged(f"{VOCABULARY} has {word!r} in lines {ids[word] + 1} and {number + 1}.")
        ids[word] = number
    return ids


def collate(rows: Sequence[np.ndarray] | np.ndarray, length: int | None = None) -> dict[str, np.ndarray]:
    """Ids of several texts as the tensors that the graph takes.

    Returns:
        `word_ids` and `word_mask`, both int64 (N, length), padded at the end with 0 and 0; the length is that of the
        longest text, at least 1, unless given.
    """
    length = length or max(1, *(len(row) for row in rows))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"word_ids": ids, "word_mask": mask}

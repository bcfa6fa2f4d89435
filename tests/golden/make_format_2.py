"""How format-2-* were made, once: `python -m tests.golden.make_format_2 tests/golden`. They are kept as they are.

As in make_format_1.py, the answers are the same bits on every machine.
"""

import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from tokenizers import Tokenizer, processors

from bundle import manifest, text, vector
from tests.golden import make_format_1 as first

PAIR = manifest.TextInput(column="claim", pair="source", max_length=10, pad_id=0, buckets=(5, 10), max_bytes=1000)
REVIEW = manifest.WordsInput(
    column="review", segmenter="jieba", lowercase=True, hmm=True, max_words=6, buckets=(3, 6), max_bytes=1000
)
POINT = manifest.VectorInput(column="point", size=4, names=("x", "y", "z", "weight"))
VOCABULARY = "电影\n好\n难看\nfilm\n清华大学\n"
DICTIONARY = "电影 50 n\n好 9\n这部 20\n很 30\n难看 8 a\n看 7\n"
ENTAILS = manifest.Multiclass(name="entails", labels=("yes", "no"))
TASKS = (
    manifest.Multiclass(name="side", labels=("left", "right")),
    manifest.Multilabel(name="tags", labels=("near", "far", "high"), threshold=0.25),
    manifest.Regression(name="distance", mean=1.5, std=0.5),
)

node, tensor = helper.make_node, helper.make_tensor_value_info


def tokenizer() -> bytes:
    made = Tokenizer.from_buffer(first.tokenizer())
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made.to_str(pretty=True).encode()


def pair_graph() -> bytes:
    """logits (N, 2) = the sum of the tokens' rows, each the sum of a word's and a side's."""
    random = np.random.default_rng(0)
    nodes = [
        node("Gather", ["table", "input_ids"], ["words"]),
        node("Gather", ["sides", "token_type_ids"], ["side"]),
        node("Mul", ["words", "side"], ["rows"]),
        *_masked("attention_mask", "logits"),
    ]
    constants = {
        "table": random.integers(-8, 8, (len(first.WORDS), 2)).astype(np.float32),
        "sides": random.integers(-8, 8, (2, 2)).astype(np.float32),
        "last": np.array([2]),
        "tokens": np.array([1]),
    }
    inputs = [tensor(name, TensorProto.INT64, ["N", "L"]) for name in ("input_ids", "attention_mask", "token_type_ids")]
    return first.model(nodes, inputs, [tensor("logits", TensorProto.FLOAT, ["N", 2])], constants)


def words_graph() -> bytes:
    """logits (N, 2) = the sum of the words' rows."""
    table = np.random.default_rng(1).integers(-8, 8, (len(VOCABULARY.split()), 2)).astype(np.float32)
    nodes = [node("Gather", ["table", "word_ids"], ["rows"]), *_masked("word_mask", "logits")]
    inputs = [tensor(name, TensorProto.INT64, ["N", "L"]) for name in ("word_ids", "word_mask")]
    constants = {"table": table, "last": np.array([2]), "tokens": np.array([1])}
    return first.model(nodes, inputs, [tensor("logits", TensorProto.FLOAT, ["N", 2])], constants)


def _masked(mask: str, output: str) -> list:
    return [
        node("Cast", [mask], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["column"]),
        node("Mul", ["rows", "column"], ["kept"]),
        node("ReduceSum", ["kept", "tokens"], [output], keepdims=0),
    ]


def vector_graph() -> bytes:
    """Logits of each task: a matrix of small integers times the vector."""
    random = np.random.default_rng(2)
    widths = {"side.logits": 2, "tags.logits": 3, "distance.logits": 1}
    nodes = [node("MatMul", ["features", f"{name}.weight"], [name]) for name in widths]
    outputs = [tensor(name, TensorProto.FLOAT, ["N", width]) for name, width in widths.items()]
    constants = {
        f"{name}.weight": random.integers(-4, 4, (POINT.size, width)).astype(np.float32)
        for name, width in widths.items()
    }
    return first.model(nodes, [tensor("features", TensorProto.FLOAT, ["N", POINT.size])], outputs, constants)


def write(out: Path, spec: manifest.Input, tasks: tuple, graph: bytes, raws: list[bytes], files: dict) -> None:
    goldens = {f"goldens/{number}.raw": raw for number, raw in enumerate(raws)}
    name = out.name.removeprefix("format-2-")
    first.write(out, name, spec, tasks, graph, goldens, files, command="tests/golden/make_format_2.py")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pairs = [text.join_pair("Good films", 'not "bad"'), text.join_pair("", "gööd \U0001f600 film " * 9)]
    write(folder / "format-2-pair", PAIR, (ENTAILS,), pair_graph(), pairs, {"tokenizer.json": tokenizer()})
    reviews = ["这部Film很好，不难看", "我在清华大学", "谁知道?"]  # 清华大学 is a guess of the hidden Markov model
    files = {"vocabulary.txt": VOCABULARY.encode(), "jieba.txt": DICTIONARY.encode()}
    raws = [review.encode() for review in reviews]
    write(folder / "format-2-words", REVIEW, (ENTAILS,), words_graph(), raws, files)
    points = [vector.encode(np.array(row)) for row in ([0.5, -1, 2, 0], [-0.0, 3, 0.25, 8])]
    write(folder / "format-2-vector", POINT, TASKS, vector_graph(), points, {})

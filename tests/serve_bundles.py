"""Tiny models for the tests of serve: graphs made with onnx.helper, bundles sealed as export seals them."""

from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from bundle import outputs, preprocess, tensors, vector
from bundle.host import isa_class
from bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    GateRecord,
    Golden,
    ImageInput,
    Input,
    Latency,
    Manifest,
    Multiclass,
    Multilabel,
    NamedTensor,
    Provenance,
    Regression,
    Task,
    TensorsInput,
    TextInput,
    Variant,
    VectorInput,
    WordsInput,
)
from bundle.session import Session
from bundle.store import new_directory, seal
from bundle.text import join_pair
from serve.errors import ServerError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "good", "bad", "film", "the", "is", "a"]
TEXT = TextInput(column="text", max_length=8, pad_id=0, buckets=(4, 8), max_bytes=1000)
IMAGE = ImageInput(
    column="photo", height=8, width=8, resize=8, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
PAIR = TextInput(column="question", pair="answer", max_length=8, pad_id=0, buckets=(4, 8), max_bytes=1000)
REVIEW = WordsInput(
    column="review", segmenter="jieba", lowercase=True, hmm=True, max_words=4, buckets=(2, 4), max_bytes=1000
)
FLOWER = VectorInput(column="flower", size=3, names=("sepal", "petal", "stem"))
PLOT = TensorsInput(
    tensors=(
        NamedTensor(name="counts:0", datatype="INT32", shape=(2, 3)),
        NamedTensor(name="scale", datatype="FP32", shape=()),
        NamedTensor(name="known", datatype="BOOL", shape=(2,)),
    )
)
DICTIONARY = "好 9\n电影 50 n\n这部 20\n很 30\n难看 8\n看 7\n".encode()
VOCABULARY = "电影\n好\n难看\nfilm\n很\n".encode()
MOOD = Multiclass(name="mood", labels=("good", "bad", "neither — é"))
COLOUR = Multiclass(name="colour", labels=("red", "blue"))
TASKS = (MOOD, Multilabel(name="tags", labels=("x", "y")), Regression(name="length", mean=2.0, std=3.0))


def model_bytes(nodes, inputs, results, constants=()):
    """A serialised graph; inputs and results are (name, element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in results],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def identity(dtype, shape):
    """A graph that gives back its input `x` as `y`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model_bytes([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, shape)], [("y", kind, shape)])


def counter():
    """A graph that counts to its input `n` one by one, so that a call lasts as long as one likes."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "one"], ["more"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.INT64, []),
        ],
    )
    return model_bytes(
        [helper.make_node("Loop", ["n", "", "zero"], ["count"], body=body)],
        [("n", TensorProto.INT64, [])],
        [("count", TensorProto.INT64, [])],
        {"one": np.int64(1), "zero": np.int64(0)},
    )


def has_to_wait(client, model):
    """Whether a call of a counter has to wait, and is then given up: another one runs."""
    try:
        client.infer(model, {"n": np.array(0)}, timeout_s=0.2)
    except ServerError:
        return True
    return False


def _heads(tasks, features):
    names = list(outputs.logits_widths(tasks).items())
    nodes = [helper.make_node("MatMul", ["mean", f"{name}_w"], [name]) for name, _ in names]
    random = np.random.default_rng(5)
    weights = {f"{name}_w": random.integers(-8, 8, (features, width)).astype(np.float32) for name, width in names}
    return nodes, [(name, TensorProto.FLOAT, ["batch", width]) for name, width in names], weights


def text_graph(tasks, ids="input_ids", mask="attention_mask", types=None, rows=9):
    """The mean of the rows of a table, which no id at all makes zero, to the heads."""
    heads, results, weights = _heads(tasks, 4)
    random = np.random.default_rng(3)
    constants = {"embedding": random.integers(-4, 4, (rows, 4)).astype(np.float32)}  # exact in any order
    nodes = [helper.make_node("Gather", ["embedding", ids], ["vectors"])]
    if types:
        constants["types"] = random.integers(-4, 4, (2, 4)).astype(np.float32)
        nodes = [
            helper.make_node("Gather", ["embedding", ids], ["alone"]),
            helper.make_node("Gather", ["types", types], ["side"]),
            helper.make_node("Add", ["alone", "side"], ["vectors"]),
        ]
    nodes += [
        helper.make_node("Cast", [mask], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["vectors", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "length"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["wide", "length"], ["count"], keepdims=0),
        helper.make_node("Max", ["count", "one"], ["some"]),
        helper.make_node("Div", ["total", "some"], ["mean"]),
        *heads,
    ]
    inputs = [(name, TensorProto.INT64, ["batch", "length"]) for name in (ids, mask, types) if name]
    constants |= {"last": np.array([2]), "length": np.array([1]), "one": np.float32(1), **weights}
    return model_bytes(nodes, inputs, results, constants)


def vector_graph(tasks):
    heads, results, weights = _heads(tasks, FLOWER.size)
    nodes = [helper.make_node("Identity", ["features"], ["mean"]), *heads]
    return model_bytes(nodes, [("features", TensorProto.FLOAT, ["batch", FLOWER.size])], results, weights)


def tensors_graph(tasks):
    """The sums of the counts where they are known, and the scale, to the heads."""
    heads, results, weights = _heads(tasks, 3)
    nodes = [
        helper.make_node("Cast", ["counts:0"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers", "last"], ["sums"], keepdims=0),
        helper.make_node("Cast", ["known"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sums", "ones"], ["some"]),
        helper.make_node("Unsqueeze", ["scale", "first"], ["column"]),
        helper.make_node("Concat", ["some", "column"], ["mean"], axis=1),
        *heads,
    ]
    inputs = [
        ("counts:0", TensorProto.INT32, ["batch", 2, 3]),
        ("scale", TensorProto.FLOAT, ["batch"]),
        ("known", TensorProto.BOOL, ["batch", 2]),
    ]
    return model_bytes(nodes, inputs, results, {"last": np.array([2]), "first": np.array([1]), **weights})


def image_graph(tasks):
    heads, results, weights = _heads(tasks, 3)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "area"], ["mean"], keepdims=0),
        *heads,
    ]
    return model_bytes(
        nodes, [("image", TensorProto.UINT8, ["batch", 8, 8, 3])], results, {"area": np.array([1, 2]), **weights}
    )


def tokenizer_json():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS]:1 $B:1", special_tokens=[("[CLS]", 2)]
    )
    return tokenizer.to_str().encode()


def png(colour, size=(8, 8)):
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_text_bundle(out: Path, *, name="mood", tasks=(MOOD,), **changes):
    files = {"tokenizer.json": tokenizer_json()}
    return _write(out, name, TEXT, tasks, text_graph(tasks), [b"the film is good", b""], files, **changes)


def write_image_bundle(out: Path, *, name="colour", **changes):
    return _write(out, name, IMAGE, (COLOUR,), image_graph((COLOUR,)), [png("red"), png("blue")], {}, **changes)


def write_pair_bundle(out: Path, *, name="answers", tasks=(MOOD,), **changes):
    graph = text_graph(tasks, types="token_type_ids")
    raws = [join_pair("is the film good", "good"), join_pair("", "")]
    return _write(out, name, PAIR, tasks, graph, raws, {"tokenizer.json": tokenizer_json()}, **changes)


def write_words_bundle(out: Path, *, name="reviews", tasks=(MOOD,), **changes):
    graph = text_graph(tasks, "word_ids", "word_mask", rows=len(VOCABULARY.split()))
    files = {"vocabulary.txt": VOCABULARY, "jieba.txt": DICTIONARY}
    return _write(out, name, REVIEW, tasks, graph, ["这部电影很好".encode(), b""], files, **changes)


def write_vector_bundle(out: Path, *, name="flowers", tasks=TASKS, **changes):
    raws = [vector.encode(np.array(row)) for row in ([0.5, -1, 2], [0.0, 0, 0])]
    return _write(out, name, FLOWER, tasks, vector_graph(tasks), raws, {}, **changes)


def write_tensors_bundle(out: Path, *, name="plots", tasks=TASKS, **changes):
    arrays = {
        "counts:0": np.array([[[1, 2, 3], [4, 5, 6]], np.zeros((2, 3))], np.int32),
        "scale": np.array([0.5, 0], np.float32),
        "known": np.array([[True, True], [False, True]]),
    }
    return _write(out, name, PLOT, tasks, tensors_graph(tasks), tensors.encode(arrays, PLOT), {}, **changes)


def _write(
    out: Path,
    name: str,
    spec: Input,
    tasks: tuple[Task, ...],
    graph: bytes,
    examples: list[bytes],
    files: dict[str, bytes],
    version=1,
    precision="fp32",
    verdict=None,
) -> Path:
    files = {**files, "model.onnx": graph}
    session = Session(graph, device="cpu", threads=1)
    encode = preprocess.encoder(spec, files.__getitem__)
    with new_directory(out) as directory:
        for file, data in files.items():
            (directory / file).write_bytes(data)
        goldens = tuple(_golden(directory, i, raw, encode(raw), spec, session) for i, raw in enumerate(examples))
        seal(directory, _manifest(name, version, spec, tasks, goldens, precision, verdict))
    return out


def _golden(directory, i, raw, row, spec, session):
    feeds = preprocess.collate([row], spec)
    (directory / f"golden{i}").write_bytes(raw)
    files = {key: f"golden{i}.{key.replace(':', '_')}.npy" for key in feeds}
    for key, value in feeds.items():
        np.save(directory / files[key], value[0])
    logits = {key: tuple(map(float, value[0])) for key, value in session.run(feeds).items()}
    return Golden(
        file=f"golden{i}",
        tensors=files,
        exact=True,
        logits={"only": logits},
    )


def _manifest(name, version, spec, tasks, goldens, precision, verdict):
    gate = verdict and GateRecord(
        verdict=verdict, metric="accuracy", examples=100, reference=0.9, served=0.9, drop=0.0, drop_upper=0.01,
        budget=0.02, confidence=0.95, disagreement=0.0, examples_needed=None,
    )  # fmt: skip
    variant = Variant(
        name="only", file="model.onnx", precision=precision, device="cpu", isa=isa_class(), batch_invariant=True,
        tolerance=1e-5, parity=0.0, gate=gate,
        latency=Latency(p50_ms=1.0, fp32_p50_ms=1.0, ratio=1.0, ratio_upper=1.0, threads=1),
    )  # fmt: skip
    provenance = Provenance(
        created="2026-01-01T00:00:00Z", command=("test",), model="hand", data="hand", data_sha256="0" * 64,
        checkpoint_sha256="0" * 64, cpu="any", versions={},
    )  # fmt: skip
    return Manifest(
        format=FORMAT, format_version=FORMAT_VERSION, name=name, version=version, input=spec, tasks=tasks,
        variants=(variant,), goldens=goldens, provenance=provenance, files={},
    )  # fmt: skip

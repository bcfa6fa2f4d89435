"""How format-1-text and format-1-image were made, once. They are kept as they are: later versions must open them.

Run by a later version it writes that version's format; make_format_2.py builds on it.

Every number in the graphs is a small integer or a fraction of a power of two, so that the answers are the same bits
on every machine.
"""

import io
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bundle import manifest, preprocess, store
from bundle.session import Session

TEXT = manifest.TextInput(column="text", max_length=8, pad_id=0, buckets=(4, 8), max_bytes=1000)
IMAGE = manifest.ImageInput(
    column="image",
    height=32,
    width=32,
    resize=36,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    max_bytes=100_000,
    max_pixels=1_000_000,
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "not"]


def tokenizer() -> bytes:
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str(pretty=True).encode()


def text_graph() -> bytes:
    """logits (N, 3) = the sum of the tokens' rows: integers, so exact whatever the batch and the padding."""
    table = np.random.default_rng(0).integers(-8, 8, (len(WORDS), 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["logits"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["N", "L"]) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])]
    constants = {"table": table, "last": np.array([2]), "tokens": np.array([1])}
    return model(nodes, inputs, outputs, constants)


def image_graph() -> bytes:
    """tint.logits (N, 3) = the mean colour / 256; brightness.logits (N, 1) = its sum. All sums below 2**24: exact."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["pixels", "plane"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "scale"], ["tint.logits"]),
        helper.make_node("ReduceSum", ["tint.logits", "colours"], ["brightness.logits"], keepdims=1),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 32, 32, 3])]
    outputs = [
        helper.make_tensor_value_info("tint.logits", TensorProto.FLOAT, ["N", 3]),
        helper.make_tensor_value_info("brightness.logits", TensorProto.FLOAT, ["N", 1]),
    ]
    constants = {
        "plane": np.array([1, 2]),
        "colours": np.array([1]),
        "scale": np.array(2.0**-18, np.float32),
    }
    return model(nodes, inputs, outputs, constants)


def model(nodes: list, inputs: list, outputs: list, constants: dict) -> bytes:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "golden", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def encoded(kind: str) -> bytes:
    y, x = np.mgrid[0:48, 0:64]
    file = io.BytesIO()
    Image.fromarray(np.stack([4 * x, 5 * y, 2 * (x + y)], axis=2).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def write(
    out: Path,
    name: str,
    spec: manifest.Input,
    tasks: tuple,
    graph: bytes,
    raws: dict[str, bytes],
    files: dict[str, bytes],
    command: str = "tests/golden/make_format_1.py",
) -> None:
    with store.new_directory(out) as directory:
        (directory / "variants").mkdir()
        (directory / "goldens").mkdir()
        (directory / "variants/fp32.onnx").write_bytes(graph)
        for file, data in files.items():
            (directory / file).write_bytes(data)
        encode = preprocess.encoder(spec, lambda file: (directory / file).read_bytes())
        session = Session(graph, device="cpu", threads=1)
        goldens = []
        for file, raw in raws.items():
            (directory / file).write_bytes(raw)
            feeds = preprocess.collate([encode(raw)], spec)
            tensors = {key: f"{file}.{key}.npy" for key in feeds}
            for key, value in feeds.items():
                np.save(directory / tensors[key], value[0])
            logits = {key: tuple(map(float, value[0])) for key, value in session.run(feeds).items()}
            goldens.append(
                manifest.Golden(file=file, tensors=tensors, exact=not file.endswith(".jpg"), logits={"fp32": logits})
            )
        variant = manifest.Variant(
            name="fp32",
            file="variants/fp32.onnx",
            precision="fp32",
            device="cpu",
            isa="x86-64-avx2",
            batch_invariant=True,
            tolerance=0.01 if isinstance(spec, manifest.ImageInput) else 0.0,
            parity=0.0,
            gate=None,
            latency=manifest.Latency(p50_ms=0.1, fp32_p50_ms=0.1, ratio=1.0, ratio_upper=1.0, threads=1),
        )
        provenance = manifest.Provenance(
            created="2026-11-21T00:00:00Z",
            command=("python", command),
            model="hand-made",
            data="none",
            data_sha256="0" * 64,
            checkpoint_sha256="0" * 64,
            cpu="any",
            versions={"onnx": onnx.__version__},
        )
        sealed = manifest.Manifest(
            format="edgeward-bundle",
            format_version=manifest.FORMAT_VERSION,
            name=name,
            version=1,
            input=spec,
            tasks=tasks,
            variants=(variant,),
            goldens=tuple(goldens),
            provenance=provenance,
            files={},
        )
        store.seal(directory, sealed)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    mood = (manifest.Multiclass(name="mood", labels=("good", "bad", "neither")),)
    texts = {"goldens/0.txt": b"Good films, not bad!", "goldens/1.txt": "gööd \U0001f600 bad film".encode()}
    write(folder / "format-1-text", "mood", TEXT, mood, text_graph(), texts, {"tokenizer.json": tokenizer()})
    tint = manifest.Multilabel(name="tint", labels=("red", "green", "blue"), threshold=0.6)
    brightness = manifest.Regression(name="brightness", mean=1.0, std=2.0)
    pictures = {"goldens/0.png": encoded("PNG"), "goldens/1.jpg": encoded("JPEG")}
    write(folder / "format-1-image", "picture", IMAGE, (tint, brightness), image_graph(), pictures, {})

import dataclasses
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bundle import manifest, preprocess, store
from bundle.errors import BadInput, BundleDamaged, BundleUnsupported, DeviceUnavailable, ModelError, SelfTestFailed
from bundle.host import isa_class
from bundle.log import captured
from bundle.model import load_model, predict_logits
from bundle.outputs import answer_specs, answers, sigmoid, softmax
from bundle.session import Session
from bundle.store import open_bundle
from bundle.tensor import NUMPY_TYPES

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()
GOLDEN = Path(__file__).parent / "golden"
TEXT, IMAGE = GOLDEN / "format-1-text", GOLDEN / "format-1-image"
WORDS = ["good", "bad", "film", "films", "not", "other"]

node, tensor = helper.make_node, helper.make_tensor_value_info


def graph(nodes, inputs, outputs, **constants):
    initializers = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


IDS = [tensor(name, TensorProto.INT64, ["N", "L"]) for name in ("input_ids", "attention_mask")]
LOGITS = [tensor("logits", TensorProto.FLOAT, ["N", 3])]

# logits (N, 3) = the sum of the ids divided by the largest sum in the batch, plus the padded length: both of what an
# answer must not depend on.
NEIGHBOURLY = graph(
    [
        node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        node("Cast", ["kept"], ["numbers"], to=TensorProto.FLOAT),
        node("ReduceSum", ["numbers", "axis"], ["sums"], keepdims=1),
        node("ReduceMax", ["sums"], ["largest"], keepdims=0),
        node("Div", ["sums", "largest"], ["part"]),
        node("Shape", ["input_ids"], ["length"], start=1, end=2),
        node("Cast", ["length"], ["padded"], to=TensorProto.FLOAT),
        node("Add", ["part", "padded"], ["both"]),
        node("Mul", ["both", "ones"], ["logits"]),
    ],
    IDS,
    LOGITS,
    axis=[1],
    ones=np.ones((1, 3), np.float32),
)
# logits (N, 3) = 0 / 0
NAN = graph(
    [
        node("Sub", ["input_ids", "input_ids"], ["zeros"]),
        node("Cast", ["zeros"], ["numbers"], to=TensorProto.FLOAT),
        node("ReduceSum", ["numbers", "axis"], ["sums"], keepdims=1),
        node("Div", ["sums", "none"], ["logits"]),
    ],
    IDS,
    LOGITS,
    axis=[1],
    none=np.zeros((1, 3), np.float32),
)


@pytest.fixture
def text(tmp_path):
    return Path(shutil.copytree(TEXT, tmp_path / "text"))


@pytest.fixture
def image(tmp_path):
    return Path(shutil.copytree(IMAGE, tmp_path / "image"))


@pytest.fixture(scope="module")
def moods():
    return load_model(TEXT, device="cpu", threads=2)


@pytest.fixture(scope="module")
def pictures():
    return load_model(IMAGE, device="cpu", threads=2)


def reseal(path, **changes):
    """Seal a bundle anew after its files, or these keys of its manifest, were changed."""
    sealed = msgspec.json.decode((path / store.MANIFEST).read_bytes(), type=manifest.Manifest)
    store.seal(path, msgspec.structs.replace(sealed, **changes))


def variants(path, *changes):
    """The bundle's one variant, changed in each of these ways."""
    (variant,) = open_bundle(path).manifest.variants
    return tuple(msgspec.structs.replace(variant, **change) for change in changes)


def goldens(path, *names):
    """The bundle's golden examples, with the same logits for each of these variants."""
    found = open_bundle(path).manifest.goldens
    return tuple(msgspec.structs.replace(each, logits=dict.fromkeys(names, each.logits["fp32"])) for each in found)


def replace_graph(path, data, **variant):
    """Put another graph into a bundle, its golden logits measured anew."""
    (path / "variants/fp32.onnx").write_bytes(data)
    session, spec = Session(data, device="cpu", threads=1), open_manifest(path).input
    encode = preprocess.encoder(spec, lambda name: (path / name).read_bytes())
    measured = []
    for golden in open_manifest(path).goldens:
        got = session.run(preprocess.collate([encode((path / golden.file).read_bytes())], spec))
        rows = {name: tuple(np.nan_to_num(value[0]).tolist()) for name, value in got.items()}
        measured.append(msgspec.structs.replace(golden, logits={"fp32": rows}))
    changed = tuple(msgspec.structs.replace(each, **variant) for each in open_manifest(path).variants)
    reseal(path, goldens=tuple(measured), variants=changed)


def open_manifest(path):
    return msgspec.json.decode((path / store.MANIFEST).read_bytes(), type=manifest.Manifest)


def sentences(count):
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 12))).encode() for _ in range(count)]


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


# Predicting.


@pytest.mark.parametrize("count", [0, 1, 3, 64, 65, 100])
def test_any_number_of_texts_is_answered(moods, count):
    """No example, one, a few, and more than one run takes: each is answered as if it were alone."""
    raws = sentences(count)
    got = moods.predict(raws)

    alone = [moods.predict([raw]) for raw in raws]
    for spec in answer_specs(moods.manifest.tasks):
        assert got[spec.name].shape == (count, spec.shape[1])
        assert got[spec.name].dtype == NUMPY_TYPES[spec.datatype]
        for i, one in enumerate(alone):
            np.testing.assert_array_equal(got[spec.name][i], one[spec.name][0])


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_any_number_of_images_is_answered(pictures, count):
    """The same for images, with two tasks, whose answers carry their names."""
    raws = [png(seed) for seed in range(count)]
    got = pictures.predict(raws)

    assert set(got) == {"tint.predicted", "tint.score", "brightness.value"}
    alone = [pictures.predict([raw]) for raw in raws]
    for spec in answer_specs(pictures.manifest.tasks):
        assert got[spec.name].shape == (count, spec.shape[1])
        assert got[spec.name].dtype == NUMPY_TYPES[spec.datatype]
        for i, one in enumerate(alone):
            np.testing.assert_array_equal(got[spec.name][i], one[spec.name][0])


def test_image_answers_are_the_mean_colour(pictures):
    """The hand-made graph averages colours, so the whole path can be checked by hand."""
    raw = png(0)
    pixels = pictures.encode(raw)
    got = pictures.predict([raw])

    logits = pixels.mean(axis=(0, 1)) / 256
    np.testing.assert_allclose(got["tint.score"][0], 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_array_equal(got["tint.predicted"][0], got["tint.score"][0] >= np.float32(0.6))
    np.testing.assert_allclose(got["brightness.value"][0], [logits.sum() * 2 + 1], atol=1e-5)


def test_threads_agree(moods):
    """Concurrent calls give what calls in turn give."""
    batches = [sentences(count % 9) for count in range(100)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(moods.predict, batches))

    for batch, got in zip(batches, together, strict=True):
        for name, expected in moods.predict(batch).items():
            np.testing.assert_array_equal(got[name], expected)


@pytest.mark.parametrize("bad", [b"\xff", b"x" * 1001])
def test_bad_example_is_named_by_its_position(moods, bad):
    """Of many examples, the one that cannot be used is named."""
    with pytest.raises(BadInput, match=r"^example 2: text"):
        moods.predict([b"good", b"bad", bad, b"film"])


def test_threads_are_those_of_the_manifest_by_default():
    """A model runs on as many threads as were fastest when it was exported, unless told otherwise."""
    assert open_bundle(TEXT).manifest.variants[0].latency.threads == 1
    assert load_model(TEXT, device="cpu").session.threads == 1
    assert load_model(TEXT, device="cpu", threads=2).session.threads == 2


def test_graph_that_looks_at_its_neighbours_does():
    """The graph of the next test would give other answers in a batch and under padding: it is a real danger."""
    session = Session(NEIGHBOURLY, device="cpu", threads=1)
    spec = open_bundle(TEXT).manifest.input
    rows = [np.array([2, 4, 3]), np.array([2, 8, 7, 6, 3])]
    alone = predict_logits(session, spec, rows, batch_invariant=False)["logits"]
    together = predict_logits(session, spec, rows, batch_invariant=True)["logits"]

    assert not np.array_equal(alone[0], together[0])  # another neighbour
    assert not np.array_equal(alone[1], together[1])  # more padding


@pytest.mark.parametrize("count", [1, 3, 100])
def test_answer_does_not_depend_on_neighbours(text, count):
    """A variant that is not batch-invariant runs its examples one by one, unpadded."""
    replace_graph(text, NEIGHBOURLY, batch_invariant=False)
    model = load_model(text, device="cpu")
    raws = sentences(count)

    logits = model.predict(raws)["logits"]
    for raw, row in zip(raws, logits, strict=True):
        np.testing.assert_array_equal(row, np.full(3, 1 + len(model.encode(raw)), np.float32))
    shuffled = np.random.default_rng(0).permutation(count)
    np.testing.assert_array_equal(model.predict([raws[i] for i in shuffled])["logits"], logits[shuffled])


# Starting: a bundle is held to its golden examples.


@pytest.mark.parametrize("path", [TEXT, IMAGE], ids=["text", "image"])
def test_whole_bundle_starts(path):
    """What was sealed on this machine or another starts, its goldens reproduced."""
    assert load_model(path, device="cpu").manifest.format_version == 1


def test_tokenizer_that_splits_otherwise_fails_the_self_test(text):
    """The same hash-correct bundle with another tokenisation is not started."""
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (text / "tokenizer.json").write_text(json.dumps(tokenizer))
    reseal(text)

    with pytest.raises(SelfTestFailed, match=r"goldens/0\.txt is preprocessed to another input_ids"):
        load_model(text, device="cpu")


@pytest.mark.parametrize("kind", ["value", "shape", "type"])
def test_other_tensor_fails_the_self_test(text, kind):
    """A golden tensor is reproduced in value, shape and type, or the bundle is not started."""
    file = text / "goldens/1.txt.attention_mask.npy"
    values = np.load(file)
    np.save(file, {"value": 1 - values, "shape": values[None], "type": values.astype(np.int32)}[kind])
    reseal(text)

    with pytest.raises(SelfTestFailed, match=r"goldens/1\.txt is preprocessed to another attention_mask"):
        load_model(text, device="cpu")


@pytest.mark.parametrize(("file", "by", "starts"), [("0.png", 1, False), ("1.jpg", 1, True), ("1.jpg", 40, False)])
def test_png_is_exact_and_jpeg_has_a_tolerance(image, file, by, starts):
    """JPEG decoders may differ by a little and PNG decoders not at all."""
    tensor = image / f"goldens/{file}.image.npy"
    pixels = np.load(tensor).astype(np.int16)
    pixels[3, 5, 1] += by if pixels[3, 5, 1] + by < 256 else -by
    np.save(tensor, pixels.astype(np.uint8))
    reseal(image)

    if starts:
        assert load_model(image, device="cpu")
    else:
        with pytest.raises(SelfTestFailed, match=f"goldens/{file}"):
            load_model(image, device="cpu")


def test_jpeg_that_differs_everywhere_fails_the_self_test(image):
    """The tolerance is also one of the mean: a whole level of brightness is another preprocessing."""
    tensor = image / "goldens/1.jpg.image.npy"
    np.save(tensor, np.clip(np.load(tensor), 1, 255) - 1)
    reseal(image)

    with pytest.raises(SelfTestFailed, match=r"goldens/1\.jpg"):
        load_model(image, device="cpu")


@pytest.mark.parametrize(("off", "starts"), [(0.0, True), (0.25, True), (0.26, False), (-0.26, False), (1e30, False)])
def test_logit_may_differ_by_the_tolerance_and_no_more(text, off, starts):
    """The variant's tolerance is the largest difference that is accepted, itself included."""
    sealed = open_bundle(text).manifest
    golden = sealed.goldens[1]
    a, b, c = golden.logits["fp32"]["logits"]
    moved = msgspec.structs.replace(golden, logits={"fp32": {"logits": (a, b, c + off)}})
    reseal(text, goldens=(sealed.goldens[0], moved), variants=variants(text, {"tolerance": 0.25}))

    if starts:
        assert load_model(text, device="cpu")
    else:
        with pytest.raises(SelfTestFailed, match=r"logits of golden example goldens/1\.txt differs by .* 0\.25"):
            load_model(text, device="cpu")


def test_nan_fails_the_self_test(text):
    """A logit that is no number is within no tolerance."""
    replace_graph(text, NAN, tolerance=1e9)

    with pytest.raises(SelfTestFailed, match="differs by nan"):
        load_model(text, device="cpu")


def test_golden_example_that_cannot_be_read_fails_the_self_test(image):
    """A decoder that refuses a golden example is another decoder."""
    (image / "goldens/0.png").write_bytes(b"not an image")
    reseal(image)

    with pytest.raises(SelfTestFailed, match=r"goldens/0\.png cannot be read here: not a PNG or JPEG"):
        load_model(image, device="cpu")


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\x01\x00", "pickle", "archive"])
def test_golden_tensor_that_is_no_array_is_damage(text, data):
    """Only plain arrays are read; a pickle is never run."""
    if isinstance(data, str):
        file = io.BytesIO()
        if data == "pickle":
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        else:
            np.savez(file, np.ones(3))
        data = file.getvalue()
    (text / "goldens/0.txt.input_ids.npy").write_bytes(data)
    reseal(text)

    with pytest.raises(BundleDamaged, match=r"input_ids\.npy is not a \.npy file"):
        load_model(text, device="cpu")


def test_golden_example_without_its_tensors_is_damage(text):
    """Preprocessing is held to a tensor for every input of the graph."""
    golden = open_bundle(text).manifest.goldens[0]
    reseal(text, goldens=(msgspec.structs.replace(golden, tensors={}),))

    with pytest.raises(BundleDamaged, match=r"goldens/0\.txt has no tensor for graph input input_ids"):
        load_model(text, device="cpu")


def test_graph_that_cannot_be_loaded_is_a_model_error(text):
    """Whoever sealed nonsense learns it from the runtime's message."""
    (text / "variants/fp32.onnx").write_bytes(b"nonsense")
    reseal(text)

    with pytest.raises(ModelError, match="cannot load the graph"):
        load_model(text, device="cpu")


@pytest.mark.parametrize("other", ["input name", "input type", "output name", "output type"])
def test_graph_of_another_interface_is_damage(text, other):
    """A graph takes and gives what the manifest says, by name and type."""
    name, kind = ("tokens" if other == "input name" else "input_ids"), TensorProto.INT64
    kind = TensorProto.INT32 if other == "input type" else kind
    given = TensorProto.DOUBLE if other == "output type" else TensorProto.FLOAT
    output = "scores" if other == "output name" else "logits"
    data = graph(
        [
            node("Cast", [name], ["a"], to=given),
            node("Cast", ["attention_mask"], ["b"], to=given),
            node("Mul", ["a", "b"], ["c"]),
            node("ReduceSum", ["c", "axis"], ["d"], keepdims=1),
            node("Concat", ["d", "d", "d"], [output], axis=1),
        ],
        [tensor(name, kind, ["N", "L"]), tensor("attention_mask", TensorProto.INT64, ["N", "L"])],
        [tensor(output, given, ["N", 3])],
        axis=[1],
    )
    (text / "variants/fp32.onnx").write_bytes(data)
    reseal(text)

    with pytest.raises(BundleDamaged, match=r"fp32\.onnx takes .* by its manifest"):
        load_model(text, device="cpu")


def test_text_bundle_without_tokenizer_is_damage(text):
    """What the input needs must be listed."""
    (text / "tokenizer.json").unlink()
    reseal(text)

    with pytest.raises(BundleDamaged, match=r"does not list tokenizer\.json"):
        load_model(text, device="cpu")


# Choosing a variant.


@pytest.mark.parametrize(
    ("there", "served"),
    [
        (["int8 other-a", "int8 other-b"], 0),
        (["int8 other", "int8 here"], 1),
        (["int8 other", "fp32 other", "int8 here"], 2),
        (["int8 here", "fp32 here"], 0),
        (["fp32 here", "int8 here"], 0),
        (["int8 other-a", "fp32 other-b", "fp32 other-a"], 1),
        (["int8 other", "fp32 other"], 1),
    ],
)
def test_variant_proved_here_is_served_else_one_in_floating_point(text, there, served):
    """Gated on this class of machine comes first, then fp32 from anywhere, then int8 from elsewhere; each in order."""
    names = [str(number) for number in range(len(there))]
    changes = []
    for name, (precision, isa) in zip(names, map(str.split, there), strict=True):
        changes.append({"name": name, "precision": precision, "isa": isa_class() if isa == "here" else isa})
    reseal(text, variants=variants(text, *changes), goldens=goldens(text, *names))

    with captured() as logs:
        assert load_model(text, device="cpu").variant.name == names[served]
    gated = there[served].split()[1]
    said = [] if gated == "here" else [("warning", names[served], gated, isa_class())]
    assert [(each["level"], each["variant"], each["gated"], each["here"]) for each in logs] == said


def test_int8_from_elsewhere_is_held_to_its_golden_examples(text):
    """An int8 variant that gives other answers on this machine is not served, and the error names the remedy."""
    sealed = open_bundle(text).manifest
    golden = sealed.goldens[0]
    a, b, c = golden.logits["fp32"]["logits"]
    moved = msgspec.structs.replace(golden, logits={"fp32": {"logits": (a, b, c + 1)}})
    elsewhere = variants(text, {"precision": "int8", "isa": "other", "tolerance": 0.5})
    reseal(text, goldens=(moved, *sealed.goldens[1:]), variants=elsewhere)

    with (
        captured() as logs,
        pytest.raises(SelfTestFailed, match=r"gated on other, here .*Add a variant for this machine: .*--add-to"),
    ):
        load_model(text, device="cpu")
    assert logs == []


def test_failed_self_test_leads_to_no_other_variant(text):
    """What was to be served does not work here: that is an error, though another variant would have started."""
    sealed = open_bundle(text).manifest
    both = variants(text, {"name": "int8", "precision": "int8", "isa": isa_class()}, {})
    wrong = {"int8": {"logits": (9.0, 9.0, 9.0)}}
    moved = tuple(msgspec.structs.replace(each, logits=each.logits | wrong) for each in sealed.goldens)
    reseal(text, variants=both, goldens=moved)

    with pytest.raises(SelfTestFailed, match="variant int8"):
        load_model(text)


@pytest.mark.skipif(CUDA, reason="a GPU works here")
def test_devices_are_tried_in_turn():
    """Left to choose, the first of TensorRT, CUDA and the CPU that works is taken; the log says what was not."""
    with captured() as logs:
        model = load_model(GOLDEN / "format-3-variants")

    assert model.variant.device == model.session.device == "cpu"
    assert [each["device"] for each in logs if "because" in each] == ["tensorrt", "cuda"]


@pytest.mark.skipif(CUDA, reason="a GPU works here")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_gpu_that_is_asked_for_is_not_replaced(device):
    """Who asks for a GPU gets it or an error."""
    with pytest.raises(DeviceUnavailable, match=r"ExecutionProvider|cannot be used here"):
        load_model(GOLDEN / "format-3-variants", device=device)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="no GPU, or an onnxruntime without CUDA")
def test_fp16_variant_starts_on_a_gpu():
    """The graph in fp16 gives its golden logits on a GPU."""
    assert load_model(GOLDEN / "format-3-variants", device="cuda").variant.precision == "fp16"


def test_device_without_a_variant_is_unsupported(text):
    """The message says what there is."""
    with pytest.raises(BundleUnsupported, match="no variant for device cuda, only fp32 for cpu"):
        load_model(text, device="cuda")


@pytest.mark.skipif(CUDA, reason="CUDA works here")
def test_cuda_that_is_not_there_is_an_error_when_asked_for(text):
    """Who asks for CUDA gets it or an error."""
    both = variants(text, {"name": "gpu", "device": "cuda"}, {"name": "cpu", "isa": isa_class()})
    reseal(text, variants=both, goldens=goldens(text, "gpu", "cpu"))

    with pytest.raises(DeviceUnavailable, match="CUDA"):
        load_model(text, device="cuda")
    assert load_model(text, device="auto").variant.name == "cpu"
    assert load_model(text, device="cpu").variant.name == "cpu"


@pytest.mark.skipif(CUDA, reason="CUDA works here")
def test_bundle_for_cuda_only_does_not_start_without(text):
    """Left to choose, there is nothing to fall back to."""
    reseal(text, variants=variants(text, {"device": "cuda"}))

    with pytest.raises(DeviceUnavailable, match="CUDA"):
        load_model(text, device="auto")


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="no GPU, or an onnxruntime without CUDA")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_cuda_variant_starts_on_a_gpu(text, device):
    """With a GPU, the CUDA variant is served, its goldens reproduced there."""
    both = variants(text, {"name": "cpu"}, {"name": "gpu", "device": "cuda", "tolerance": 0.01})
    reseal(text, variants=both, goldens=goldens(text, "gpu", "cpu"))

    model = load_model(text, device=device)
    assert (model.variant.name, model.session.device) == ("gpu", "cuda")


# Answers.


def test_multiclass_answers():
    """The label is that of the largest logit, and the scores sum to one."""
    task = manifest.Multiclass(name="t", labels=("a", "ä", ""))
    logits = np.array([[1, 2, 0], [0, 0, 0], [-1e30, 0, 1e30]], np.float32)
    got = answers((task,), {"logits": logits})

    assert got["label"].tolist() == [["ä".encode()], [b"a"], [b""]]
    np.testing.assert_allclose(got["score"].sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(got["score"][1:], [[1 / 3] * 3, [0, 0, 1]], atol=1e-6)
    np.testing.assert_array_equal(got["logits"], logits)


def test_multilabel_answers():
    """A label is predicted from the threshold on, itself included, and extreme logits do not overflow."""
    task = manifest.Multilabel(name="t", labels=("a", "b", "c", "d"), threshold=0.5)
    got = answers((task,), {"logits": np.array([[0, -1, 1e30, -1e30]], np.float32)})

    assert got["predicted"].tolist() == [[True, False, True, False]]
    np.testing.assert_allclose(got["score"], [[0.5, 1 / (1 + np.e), 1, 0]], atol=1e-6)


def test_regression_answers():
    """A value has the units of the data again."""
    task = manifest.Regression(name="t", mean=10, std=2)
    got = answers((task,), {"logits": np.array([[0], [1.5]], np.float32)})

    assert got["value"].tolist() == [[10], [13]]
    assert got["value"].dtype == np.float32


def test_answers_of_several_tasks_carry_their_names():
    """One task has plain names, several are prefixed; specifications and answers have the same order."""
    tasks = (
        manifest.Multiclass(name="a", labels=("x", "y")),
        manifest.Multilabel(name="b", labels=("x", "y", "z")),
        manifest.Regression(name="c", mean=0, std=1),
    )
    logits = {"a.logits": np.zeros((2, 2), np.float32), "b.logits": np.zeros((2, 3), np.float32)}
    got = answers(tasks, {**logits, "c.logits": np.zeros((2, 1), np.float32)})

    names = ["a.label", "a.score", "a.logits", "b.predicted", "b.score", "c.value"]
    assert list(got) == [spec.name for spec in answer_specs(tasks)] == names
    for spec in answer_specs(tasks):
        assert got[spec.name].shape == (2, spec.shape[1])
        assert got[spec.name].dtype == NUMPY_TYPES[spec.datatype]


def test_scores_are_probabilities():
    """softmax and sigmoid are finite and float32 over the whole range of a float."""
    logits = np.array([[-1e38, 1e38, 0], [-100, 0, 100]], np.float32)

    for score in (softmax(logits), sigmoid(logits)):
        assert score.dtype == np.float32
        assert np.isfinite(score).all()
        assert ((score >= 0) & (score <= 1)).all()


def test_specification_reads_as_the_protocol_writes_it():
    """A tensor's specification is printed in error messages."""
    (spec, *_) = answer_specs((manifest.Multiclass(name="a", labels=("x", "y")),))

    assert str(spec) == "BYTES [-1, 1]"
    assert dataclasses.is_dataclass(spec)

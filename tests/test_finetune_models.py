"""Every source of models: what is loaded, what is refused, and that the network exports as it is."""

import json
import runpy
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from bundle.errors import CheckpointError, ModelError
from bundle.log import captured
from bundle.manifest import ImageInput, VectorInput
from bundle.preprocess import collate, encoder
from bundle.session import Session
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.model import ImageNetwork, MlpModel, TextNetwork, build_network
from finetune.pretrained import modality, rebuild
from tests.finetune_examples import tweets, write_bert, write_factory
from tests.model_examples import dataset_of, load, write


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slowed down many times by threads that wait for a shared core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_rows(pretrained, count):
    encode = encoder(pretrained.input, pretrained.files.__getitem__)
    return [encode(text.encode()) for text, _ in tweets(count)]


def pixels(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def export(network, inputs):
    """The network as ONNX with every batch and length, loaded by the one session class."""
    dynamic = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if len(inputs) > 1 else {})
    program = torch.onnx.export(
        network,
        tuple(torch.from_numpy(value) for value in inputs.values()),
        dynamo=True,
        verbose=False,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=tuple(dict(dynamic) for _ in inputs),
    )
    return Session(program.model_proto.SerializeToString(), device="cpu")


def test_text_network_exports_as_it_is(bert):
    """The ONNX graph gives PyTorch's logits for any number of texts of any length, whatever they are padded to."""
    pretrained = load(f"transformers:{bert}", pooling="cls")
    network = pretrained.network(3).eval()
    rows = text_rows(pretrained, 8)
    session = export(network, collate(rows[:2], pretrained.input))

    assert [(spec.name, spec.datatype, spec.shape) for spec in session.inputs] == [
        ("input_ids", "INT64", (-1, -1)),
        ("attention_mask", "INT64", (-1, -1)),
    ]
    for some, length in [(rows[:1], None), (rows[:1], 64), ([rows[0][:2]], None), (rows[:3], None), (rows, 64)]:
        got = session.run(collate(some, pretrained.input, length))["logits"]
        expected = evaluate.logits(network, some, pretrained.input, batch_size=1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_image_network_exports_as_it_is():
    """The graph takes raw pixels and gives PyTorch's logits for any number of images."""
    pretrained = load("torchvision:shufflenet_v2_x0_5", weights="none", image_size=64)
    network = pretrained.network(5).eval()
    session = export(network, {"image": pixels(2, 64)})

    assert [(spec.name, spec.datatype, spec.shape) for spec in session.inputs] == [("image", "UINT8", (-1, 64, 64, 3))]
    for count in (1, 3, 7):
        images = pixels(count, 64, seed=count)
        got = session.run({"image": images})["logits"]
        np.testing.assert_allclose(got, evaluate.logits(network, list(images), pretrained.input), atol=1e-5)


def test_scaling_is_the_first_layer():
    """Raw pixels become (x / 255 - mean) / std, channels first."""
    spec = ImageInput(column="image", height=8, width=8, resize=8, interpolation="bilinear", mean=(0.1, 0.2, 0.3),
                      std=(0.5, 0.6, 0.7))  # fmt: skip
    network = ImageNetwork(torch.nn.Identity(), 1, 1, spec)
    image = pixels(2, 8)

    expected = (image / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(network.features(torch.from_numpy(image)), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_padding_does_not_reach_the_features(bert):
    """A text's features are the same alone and beside a longer one, for both poolings."""
    for pooling in ("mean", "cls"):
        pretrained = load(f"transformers:{bert}", pooling=pooling)
        network = pretrained.network(2)
        rows = sorted(text_rows(pretrained, 5), key=len)
        together = evaluate.features(network, rows, pretrained.input)
        alone = evaluate.features(network, rows[:1], pretrained.input)
        np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_evaluation_keeps_the_order_and_the_mode(bert):
    """Texts are batched by length and answered in the order in which they came; dropout is off, then as it was."""
    pretrained = load(f"transformers:{bert}")
    network = pretrained.network(2).train()
    rows = text_rows(pretrained, 40)
    batched = evaluate.logits(network, rows, pretrained.input, batch_size=7)

    assert network.training
    assert batched.dtype == np.float32
    one_by_one = np.concatenate([evaluate.logits(network, [row], pretrained.input) for row in rows])
    np.testing.assert_allclose(batched, one_by_one, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_float32_whatever_the_folder_says(tmp_path, dtype):
    """A folder saved in half precision is loaded, and trained, in float32."""
    pretrained = load(f"transformers:{write_bert(tmp_path / 'half', dtype)}")

    assert {p.dtype for p in pretrained.network(2).parameters()} == {torch.float32}
    assert json.loads(pretrained.files["config.json"])["dtype"] == "float32"


def test_tokenizer_is_the_folders_own(bert):
    """The stored tokenizer gives the ids of transformers' tokenizer, cut to max_length."""
    from transformers import AutoTokenizer

    pretrained = load(f"transformers:{bert}", max_length=16)
    reference = AutoTokenizer.from_pretrained(bert)

    assert pretrained.input.buckets == (8, 16)
    for (text, _), row in zip(tweets(50), text_rows(pretrained, 50), strict=True):
        assert row.tolist() == reference(text, truncation=True, max_length=16)["input_ids"]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["model.safetensors"], "the weights of .* cannot be loaded"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["config.json"], "cannot be loaded"),
    ],
)
def test_incomplete_folder_is_refused(tmp_path, lost, message):
    """A folder without weights, tokenizer or config is an error; nothing is made up in their place."""
    folder = write_bert(tmp_path / "bert")
    for name in lost:
        (folder / name).unlink()

    with pytest.raises(ModelError, match=message):
        load(f"transformers:{folder}")


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    """Weights of a shallower model are an error, not a layer of random numbers."""
    folder = write_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))

    with pytest.raises(ModelError, match="lack 16 of the model's tensors"):
        load(f"transformers:{folder}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "is not a model: give"),
        ("mlp:3", "is not a model: give"),
        ("mlp:", "is not a model: give"),
        ("vectors", "is not a model: give"),
        ("keras:resnet", "is not a model: give"),
        ("torchvision:", "is not a model: give"),
        ("torchvision:resnet19", "no image classifier 'resnet19'"),
        ("transformers:./nowhere", "no folder ./nowhere"),
        ("transformers:edgeward/does-not-exist", "tokenizer of edgeward/does-not-exist cannot be loaded"),
        ("python:nowhere.py:f", "nowhere.py cannot be read: No such file"),
        ("python:no_such_module:f", "module no_such_module cannot be imported"),
        ("python:f", "is neither python:PATH"),
    ],
)
def test_wrong_model_is_refused_by_name(model, message):
    """Each way to name a model that is not there is one clear error."""
    with pytest.raises(ModelError, match=message):
        load(model)


def test_too_long_texts_are_refused(bert):
    """More tokens than the model has positions are refused before anything is trained, or cut if nobody asked."""
    with pytest.raises(ModelError, match="cannot encode 65 tokens"):
        load(f"transformers:{bert}", max_length=65)
    assert load(f"transformers:{bert}").input.max_length == 64
    assert load(f"transformers:{bert}").input.buckets == (8, 16, 24, 32, 48, 64)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("transformers:x", {"weights": "none"}, "--weights is for torchvision: models"),
        ("torchvision:resnet18", {"max_length": 9}, "--max-length is for transformers: and vectors: models"),
        ("python:x.py:f", {"widths": (8,)}, "--widths is for mlp and vectors: models"),
        ("mlp", {"lowercase": False}, "--lowercase is for vectors: models; mlp brings its own"),
        ("checkpoint:x", {"image_size": 9}, "--image-size is for torchvision: models"),
        ("transformers:x", {"pooling": "sum"}, "--pooling sum is not for transformers: models"),
        ("vectors:x", {"pooling": "cls"}, "--pooling cls is not for vectors: models"),
        ("mlp", {"widths": (8, 0)}, "--widths 8 0: every hidden layer needs 1 number or more"),
    ],
)
def test_options_without_effect_are_refused(model, options, message):
    """An option of another source of models is an error, and so is one that no network could have."""
    with pytest.raises(ModelError, match=message):
        load(model, **options)


def test_missing_download_says_what_to_do(tmp_path, monkeypatch):
    """Without a network the error names --weights FILE and --weights none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ModelError, match=r"no network.*--weights FILE, or --weights none"):
        load("torchvision:shufflenet_v2_x0_5")


def test_weights_may_come_from_a_file(tmp_path):
    """A file of the whole classifier's weights, of any number of classes, is loaded; another model's is refused."""
    from torchvision.models import get_model

    model = get_model("shufflenet_v2_x0_5", weights=None, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    pretrained = load("torchvision:shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"), image_size=64)
    write(pretrained, pretrained.network(4), tmp_path / "checkpoint")
    ours = str(tmp_path / "checkpoint" / "weights.safetensors")
    again = load("torchvision:shufflenet_v2_x0_5", weights=ours, image_size=64)

    for one in (pretrained, again):
        for name, tensor in one.backbone.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"lacks \d+ tensors \(.*, has \d+ tensors .* of another model"):
        load("torchvision:mobilenet_v3_small", weights=str(tmp_path / "w.pth"), image_size=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: state | {"conv1.0.weight": torch.zeros(24, 1, 3, 3)},
         r"1 of another shape \(conv1.0.weight \(24, 1, 3, 3\), not \(24, 3, 3, 3\)\)"),
        (lambda state: {"epoch": 3, "model": state}, "are not a state_dict"),
        (lambda state: [1, 2], "are not a state_dict"),
    ],
)  # fmt: skip
def test_weights_of_other_shapes_are_refused(tmp_path, content, message):
    """One tensor of another shape, or something else than tensors by name, is one clear error."""
    from torchvision.models import get_model

    path = tmp_path / "w.pth"
    torch.save(content(dict(get_model("shufflenet_v2_x0_5", weights=None).state_dict())), path)
    with pytest.raises(ModelError, match=message):
        load("torchvision:shufflenet_v2_x0_5", weights=str(path), image_size=64)
    path.write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        load("torchvision:shufflenet_v2_x0_5", weights=str(path), image_size=64)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "no function missing"),
        ("wrong", r"must return \(torch.nn.Module, ImageInput\), not Linear"),
        ("raising", "fails: KeyError: 'weights'"),
        ("not_a_classifier", "has no nn.Linear"),
    ],
)
def test_wrong_factory_is_refused(tmp_path, function, message):
    """A function that is missing, fails, or makes something else is one clear error."""
    with pytest.raises(ModelError, match=message):
        load(f"python:{write_factory(tmp_path)}:{function}")


def test_factory_is_kept_and_held_to_its_source(tmp_path, monkeypatch):
    """A path's function is run again from its copy; a module must still have the source it was recorded with."""
    path = write_factory(tmp_path)
    by_path = load(f"python:{path}:tiny")
    monkeypatch.syspath_prepend(str(tmp_path))
    by_name = load("python:tiny_models:tiny")
    source = path.read_bytes()
    assert by_path.files == by_name.files == {"factory.py": source}

    path.write_bytes(source + b"\n# changed\n")
    assert isinstance(rebuild(by_path.spec, by_path.input, by_path.files.__getitem__, 3), ImageNetwork)
    with pytest.raises(ModelError, match="tiny_models is not the one this checkpoint was trained with"):
        rebuild(by_name.spec, by_name.input, by_name.files.__getitem__, 3)
    sys.modules.pop("tiny_models")


def test_rebuilding_leaves_the_random_numbers_alone(bert):
    """Loading a network does not change what a program draws next."""
    pretrained = load(f"transformers:{bert}")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    network = rebuild(pretrained.spec, pretrained.input, pretrained.files.__getitem__, 2)

    assert isinstance(network, TextNetwork)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_example_model_sees_a_flower():
    """EfficientNet-Lite0 with the example's preprocessing sees class 985 of ImageNet, daisy, in a flower."""
    import sklearn.datasets

    example = Path(__file__).parents[1] / "examples" / "efficientnet_lite0.py"
    namespace = runpy.run_path(str(example))
    model, spec = namespace["efficientnet_lite0"]()
    photo = Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
    network = ImageNetwork(model.eval(), 1, 1, spec)

    with torch.inference_mode():
        scores = network.features(torch.from_numpy(encoder(spec, Path.read_bytes)(photo.read_bytes())[None]))
    assert scores.argmax().item() == 985
    assert load(f"python:{example}:efficientnet_lite0").width == 1280


def pairs(count):
    texts = [text for text, _ in tweets(2 * count)]
    return [json.dumps(pair, ensure_ascii=False).encode() for pair in zip(texts[::2], texts[1::2], strict=True)]


def write_encoder(folder, kind, bert):
    """A random encoder of another kind with the tokenizer of the BERT."""
    import shutil

    from transformers import AutoConfig, AutoModel

    vocabulary = json.loads((bert / "config.json").read_text())["vocab_size"]
    shutil.copytree(bert, folder)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 66, "vocab_size": vocabulary}
    if kind == "roberta":
        config = AutoConfig.for_model(kind, hidden_size=32, intermediate_size=32, type_vocab_size=1, **sizes)
    else:
        config = AutoConfig.for_model(kind, dim=32, hidden_dim=32, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "matter"), [("bert", True), ("distilbert", False)])
def test_pairs_of_texts_export_as_they_are(bert, tmp_path, kind, matter):
    """The graph takes token types, whether the encoder tells the texts apart or not, and gives PyTorch's logits."""
    folder = bert if kind == "bert" else write_encoder(tmp_path / kind, kind, bert)
    pretrained = load(f"transformers:{folder}", dataset_of([], ("first", "second")), max_length=48)
    network = pretrained.network(3).eval()
    encode = encoder(pretrained.input, pretrained.files.__getitem__)
    rows = [encode(raw) for raw in pairs(6)]
    inputs = collate(rows, pretrained.input)
    session = export(network, collate(rows[:2], pretrained.input))

    assert (pretrained.input.column, pretrained.input.pair) == ("first", "second")
    assert [spec.name for spec in session.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    expected = evaluate.logits(network, rows, pretrained.input, batch_size=1)
    np.testing.assert_allclose(session.run(inputs)["logits"], expected, atol=1e-5)
    flat = session.run(inputs | {"token_type_ids": np.zeros_like(inputs["input_ids"])})["logits"]
    assert (np.abs(flat - expected).max() > 1e-4) == matter


def test_the_length_is_measured_with_tokens(bert, tmp_path):
    """RoBERTa gives padding no position of its own, and has two positions fewer than its config says."""
    folder = write_encoder(tmp_path / "roberta", "roberta", bert)

    pretrained = load(f"transformers:{folder}")
    assert pretrained.input.max_length == 64
    assert not pretrained.network(2).tells_apart
    with pytest.raises(ModelError, match="cannot encode 65 tokens"):
        load(f"transformers:{folder}", max_length=65)
    with pytest.raises(ModelError, match="one or two columns of texts, not a, b, c"):
        load(f"transformers:{folder}", dataset_of([], ("a", "b", "c")))


def numbers(count, size, seed=0):
    """Vectors whose numbers have very different scales; the last but one is always 5."""
    values = np.random.default_rng(seed).normal(size=(count, size)) * np.logspace(-4, 6, size) + np.logspace(0, 7, size)
    values[:, -2] = 5
    return values.astype("<f4")


def vectors_dataset(values, columns=("x",), names=()):
    return dataset_of([row.tobytes() for row in values], columns, names)


def test_dense_network_exports_as_it_is():
    """Vectors are standardised by the train split inside the graph, whatever their scales; constants become zero."""
    values = numbers(200, 5)
    train = np.arange(150)
    pretrained = load("mlp", vectors_dataset(values), train, widths=(16, 8))
    network = pretrained.network(2).eval()
    rows = list(values)
    session = export(network, {"features": values[:2]})

    standardised = pretrained.backbone[0](torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(standardised[train].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(standardised[train].std(axis=0), [1, 1, 1, 0, 1], atol=1e-3)
    assert [(spec.name, spec.datatype, spec.shape) for spec in session.inputs] == [("features", "FP32", (-1, 5))]
    expected = evaluate.logits(network, rows, pretrained.input)
    np.testing.assert_allclose(session.run({"features": values})["logits"], expected, atol=1e-5)
    assert {name for name, _ in network.named_parameters()} == {
        "backbone.1.weight", "backbone.1.bias", "backbone.3.weight", "backbone.3.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_columns_of_vectors_keep_their_names():
    """A table's columns become one input with their names; an array keeps its own; no layers leave the vector."""
    table = load("mlp", vectors_dataset(numbers(9, 3), ("u", "v", "w"), ("u", "v", "w")))
    array = load("mlp", vectors_dataset(numbers(9, 3)))

    assert table.input == VectorInput(column="features", size=3, names=("u", "v", "w"))
    assert array.input == VectorInput(column="x", size=3)
    assert (table.width, table.spec) == (3, MlpModel(size=3, widths=()))


def models(folder, bert):
    """Every source but vectors, with the rows that it takes."""
    values = numbers(20, 4)
    return {
        "text": (load(f"transformers:{bert}", dataset_of([]), pooling="cls"), [text.encode() for text, _ in tweets(3)]),
        "pair": (load(f"transformers:{bert}", dataset_of([], ("a", "b"))), pairs(3)),
        "torchvision": (load("torchvision:shufflenet_v2_x0_5", weights="none", image_size=64), None),
        "python": (load(f"python:{write_factory(folder)}:tiny"), None),
        "mlp": (load("mlp", vectors_dataset(values), widths=(6,)), [row.tobytes() for row in values]),
    }


@pytest.mark.parametrize("source", ["text", "pair", "torchvision", "python", "mlp"])
def test_a_checkpoint_is_the_network_again(bert, tmp_path, source):
    """What was written is rebuilt from its files alone, with the same logits; and is a model to go on from."""
    pretrained, raws = models(tmp_path, bert)[source]
    network = pretrained.network(4).eval()
    checkpoint = load_checkpoint(write(pretrained, network, tmp_path / "checkpoint"))
    rows = list(pixels(3, pretrained.input.height)) if raws is None else [checkpoint.encode(raw) for raw in raws]

    np.testing.assert_array_equal(
        evaluate.logits(checkpoint.network, rows, checkpoint.spec.input),
        evaluate.logits(network, rows, pretrained.input),
    )
    assert checkpoint.files == pretrained.files
    assert checkpoint.spec.provenance.config["augment"] == ("flip",)
    columns = ("a", "b") if source == "pair" else () if raws is None else ("tweet",)
    following = load(f"checkpoint:{tmp_path / 'checkpoint'}", dataset_of(raws or [], columns))
    assert modality(f"checkpoint:{tmp_path / 'checkpoint'}") == {"mlp": "vector", "text": "text", "pair": "text"}.get(
        source, "image"
    )
    assert (following.spec, following.width, following.files) == (
        pretrained.spec,
        pretrained.width,
        pretrained.files,
    )
    assert following.input.column == (columns[0] if columns else "image")
    np.testing.assert_array_equal(
        evaluate.features(following.network(9), rows, following.input),
        evaluate.features(network, rows, pretrained.input),
    )


def test_a_checkpoint_refuses_what_it_does_not_take(tmp_path):
    """Vectors of another size, or with other columns, are named; what it was trained on and is held out now, too."""
    values = numbers(10, 3)
    table = vectors_dataset(values, "uvw", "uvw")
    trained = [table.hashes[0], table.hashes[8], table.hashes[9]]
    pretrained = load("mlp", table)
    path = write(pretrained, pretrained.network(4), tmp_path / "checkpoint", trained)
    model = f"checkpoint:{path}"

    with pytest.raises(ModelError, match="takes vectors of 3 numbers; /data has 4"):
        load(model, vectors_dataset(numbers(10, 4)))
    with pytest.raises(ModelError, match="takes 'v' as number 1, where /data has 'w'"):
        load(model, vectors_dataset(values, "uwv", "uwv"))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        modality("checkpoint:/nowhere")
    assert load(model, vectors_dataset(values)).input == VectorInput(column="x", size=3, names=("u", "v", "w"))
    with captured() as logs:
        load(model, table, np.arange(8))
    assert [(entry["level"], entry["examples"]) for entry in logs] == [("warning", 2)]
    model = load(f"python:{write_factory(tmp_path)}:tiny")
    path = write(model, model.network(4), tmp_path / "images")
    with pytest.raises(ModelError, match="does not take 2 columns, a, b"):
        load(f"checkpoint:{path}", dataset_of([], ("a", "b")))


def test_specs_that_do_not_fit_are_refused(bert, tmp_path):
    """A model and an input of another kind, as only a forged checkpoint has them, are an error."""
    pretrained = load(f"transformers:{bert}")
    with pytest.raises(ModelError, match="does not take"):
        build_network(MlpModel(size=3, widths=()), VectorInput(column="x", size=4), torch.nn.Identity(), 3, 2)
    with pytest.raises(ModelError, match="does not take"):
        rebuild(MlpModel(size=3, widths=()), pretrained.input, pretrained.files.__getitem__, 2)

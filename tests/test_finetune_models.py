"""Every source of models: what is loaded, what is refused, and that the network exports as it is."""

import json
import runpy
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from bundle.errors import ModelError
from bundle.manifest import ImageInput
from bundle.preprocess import collate, encoder
from bundle.session import Session
from finetune import evaluate
from finetune.model import ImageNetwork, TextNetwork
from finetune.pretrained import open_model, rebuild
from tests.finetune_examples import tweets, write_bert, write_factory


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


def load(model, **options):
    defaults = {"column": None, "max_length": 64, "image_size": None, "pooling": "mean", "weights": "default"}
    return open_model(str(model), **{**defaults, **options})


def text_rows(pretrained, count):
    encode = encoder(pretrained.input, pretrained.files.__getitem__)
    return [encode(text.encode()) for text, _ in tweets(count)]


def pixels(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def export(network, inputs):
    """The network as ONNX with every batch and length, loaded by the one session class."""
    dynamic = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if len(inputs) == 2 else {})
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


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_network_exports_as_it_is(bert, pooling):
    """The ONNX graph gives PyTorch's logits for any number of texts of any length, whatever they are padded to."""
    pretrained = load(f"transformers:{bert}", pooling=pooling)
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
    """More tokens than the model has positions are refused before anything is trained."""
    with pytest.raises(ModelError, match="cannot encode 128 tokens"):
        load(f"transformers:{bert}", max_length=128)


def test_options_of_other_sources_are_refused(bert):
    """An option that would have no effect is an error."""
    with pytest.raises(ModelError, match="are for torchvision: models"):
        load(f"transformers:{bert}", weights="none")


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

    torch.testing.assert_close(pretrained.backbone.conv1[0].weight, model.conv1[0].weight)
    with pytest.raises(ModelError, match="does not hold this model's weights"):
        load("torchvision:mobilenet_v3_small", weights=str(tmp_path / "w.pth"), image_size=64)
    (tmp_path / "w.pth").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        load("torchvision:shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"), image_size=64)


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

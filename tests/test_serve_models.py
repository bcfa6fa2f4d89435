"""What serve finds below a path, under which names, and what it refuses to start with."""

import numpy as np
import pytest

from bundle.errors import BadInput, BundleDamaged, ModelError
from serve.errors import StartError, UnknownModel
from serve.repository import load_repository
from tests.serve_bundles import identity, write_image_bundle, write_text_bundle


def served(*paths, **options):
    repository = load_repository(paths, device="cpu", threads=1, **options)
    return [(model.name, model.version, model.platform) for model in repository]


def test_a_bundle_is_served_with_and_without_its_preprocessing(tmp_path):
    """A bundle gives two models of its version: raw examples in, and the bare graph."""
    bundle = write_text_bundle(tmp_path / "anything", version=3)

    assert served(bundle) == [("mood", 3, "edgeward_bundle"), ("mood.onnx", 3, "onnxruntime_onnx")]


def test_a_folder_of_bundles_is_served_whole(tmp_path):
    """Every bundle of a folder is served under its own name; hidden entries, half-written ones, are skipped."""
    write_text_bundle(tmp_path / "a")
    write_image_bundle(tmp_path / "b")
    (tmp_path / ".c.half").mkdir()

    assert [name for name, *_ in served(tmp_path)] == ["mood", "mood.onnx", "colour", "colour.onnx"]


def test_a_repository_is_served_with_every_version(tmp_path):
    """NAME/VERSION/ may hold bundles or model.onnx files, side by side."""
    write_text_bundle(tmp_path / "mood" / "1")
    write_text_bundle(tmp_path / "mood" / "12", version=12)
    (tmp_path / "plain" / "7").mkdir(parents=True)
    (tmp_path / "plain" / "7" / "model.onnx").write_bytes(identity(np.float32, [None, 2]))

    assert {(name, version) for name, version, _ in served(tmp_path)} == {
        ("mood", 1),
        ("mood.onnx", 1),
        ("mood", 12),
        ("mood.onnx", 12),
        ("plain", 7),
    }


def test_a_plain_graph_is_served_under_its_file_name(tmp_path):
    """A plain .onnx file is version 1 of its stem and says that no gate has seen it."""
    path = tmp_path / "echo.v2.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))

    [model] = load_repository([path], device="cpu", threads=1)

    assert (model.name, model.version, model.max_batch, model.facts) == ("echo.v2", 1, 0, {"gate": "ungated"})


def test_the_highest_version_answers_unless_one_is_named(tmp_path):
    """An empty version is the highest as a number, not as text."""
    write_text_bundle(tmp_path / "mood" / "9", version=9)
    write_text_bundle(tmp_path / "mood" / "10", version=10)
    repository = load_repository([tmp_path], device="cpu", threads=1)

    assert repository.find("mood", "").version == 10
    assert repository.find("mood", "9").version == 9
    assert repository.versions("mood") == [9, 10]


@pytest.mark.parametrize(
    ("name", "version", "error", "words"),
    [
        ("other", "", UnknownModel, "Request for unknown model: 'other' is not found"),
        ("", "", UnknownModel, "unknown model: ''"),
        ("../mood", "", UnknownModel, "unknown model: '../mood'"),
        ("mood", "2", UnknownModel, "version 2 is not found; it has versions 1"),
        ("mood", "one", BadInput, "'one'"),
        ("mood", "-1", BadInput, "'-1'"),
        ("mood", "01", BadInput, "'01'"),
        ("mood", "1.0", BadInput, "'1.0'"),
        ("mood", "١", BadInput, "positive integer"),
        ("mood", "9" * 5000, BadInput, "positive integer"),
        ("mood\0", "", BadInput, "NUL"),
    ],
)
def test_a_name_or_version_that_is_not_served_is_said_so(tmp_path, name, version, error, words):
    """Unknown is told apart from impossible."""
    repository = load_repository([write_text_bundle(tmp_path / "b")], device="cpu", threads=1)

    with pytest.raises(error, match=words.replace(".", r"\.")):
        repository.find(name, version)


def test_two_models_of_one_name_and_version_are_a_start_up_error(tmp_path):
    """Both places are named."""
    write_text_bundle(tmp_path / "a")
    write_text_bundle(tmp_path / "b")

    with pytest.raises(StartError, match=r"/a and .*/b are both model 'mood' version 1"):
        served(tmp_path)


def test_a_bundle_in_another_version_s_folder_is_a_start_up_error(tmp_path):
    """In a repository the folders and the manifest must agree."""
    write_text_bundle(tmp_path / "mood" / "2", version=1)

    with pytest.raises(StartError, match=r"belongs in mood/1"):
        served(tmp_path)


def test_a_config_pbtxt_is_not_silently_ignored(tmp_path):
    """A Triton model whose configuration would say more than its graph is refused."""
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(identity(np.float32, [None, 2]))
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 8")

    with pytest.raises(StartError, match=r"config\.pbtxt is not read yet"):
        served(tmp_path)


@pytest.mark.parametrize("version", ["0", "01", "-1", "v1", "1.5"])
def test_a_version_folder_is_a_positive_integer(tmp_path, version):
    """Other folders are an error, not another version by accident."""
    (tmp_path / "m" / version).mkdir(parents=True)
    (tmp_path / "m" / version / "model.onnx").write_bytes(identity(np.float32, [None, 2]))

    with pytest.raises(StartError, match="is not a version"):
        served(tmp_path)


@pytest.mark.parametrize("place", ["missing", "missing.onnx", "text.txt", "empty", "nameless", "hollow"])
def test_a_path_without_a_model_is_a_start_up_error(tmp_path, place):
    """What is not there, or holds nothing, is named."""
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nameless" / "m").mkdir(parents=True)
    (tmp_path / "hollow" / "m" / "1").mkdir(parents=True)

    with pytest.raises(StartError, match=place):
        served(tmp_path / place)


def test_nothing_at_all_is_a_start_up_error():
    """A server without a model is a mistake."""
    with pytest.raises(StartError, match="nothing to serve"):
        served()


def test_a_broken_graph_is_an_error_that_names_the_file(tmp_path):
    """The runtime's own words come after the path."""
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")

    with pytest.raises(ModelError, match=r"broken\.onnx cannot be served"):
        served(path)


def test_a_damaged_bundle_is_not_served(tmp_path):
    """A changed byte anywhere keeps the server from starting."""
    bundle = write_text_bundle(tmp_path / "b")
    (bundle / "golden0").write_bytes(b"the film is evil")

    with pytest.raises(BundleDamaged, match="golden0"):
        served(bundle)


@pytest.mark.parametrize(
    ("precision", "verdict", "gate"),
    [("fp32", None, "parity"), ("int8", "PASS", "PASS"), ("fp32", "PASS", "PASS")],
)
def test_require_gate_serves_what_passed(tmp_path, precision, verdict, gate):
    """An fp32 variant passes on parity; any other needs a gate that says PASS."""
    bundle = write_text_bundle(tmp_path / "b", precision=precision, verdict=verdict)

    models = list(load_repository([bundle], device="cpu", threads=1, require_gate=True))

    assert [model.facts["gate"] for model in models] == [gate, gate]


@pytest.mark.parametrize(
    ("precision", "verdict"), [("int8", "FAIL"), ("int8", "INCONCLUSIVE"), ("fp32", "FAIL"), ("int8", None)]
)
def test_require_gate_refuses_what_did_not_pass(tmp_path, precision, verdict):
    """INCONCLUSIVE is not passed, and neither is int8 that no gate has seen."""
    bundle = write_text_bundle(tmp_path / "b", precision=precision, verdict=verdict)

    assert served(bundle)
    with pytest.raises(StartError, match=f"its gate is {verdict or 'ungated'}"):
        served(bundle, require_gate=True)


def test_require_gate_refuses_a_plain_graph(tmp_path):
    """No gate has seen it."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))

    with pytest.raises(StartError, match="its gate is ungated"):
        served(path, require_gate=True)

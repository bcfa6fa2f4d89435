"""What a server serves of the paths that it is given, under which names, and what it refuses to start with."""

import functools
import queue
import resource
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper
from onnxruntime import get_available_providers

from bundle.errors import BadInput, BundleDamaged, ModelError
from bundle.log import captured
from bundle.session import Session
from bundle.store import read_manifest, seal
from serve.config import ServeConfig
from serve.configuration import model_config
from serve.errors import ConfigRefused, GateNotPassed, StartError, UnknownModel
from serve.queue import Job
from serve.repository import Repository
from tests.serve_bundles import (
    MOOD,
    identity,
    model_bytes,
    write_image_bundle,
    write_text_bundle,
    write_vector_bundle,
)


def start(*paths, **options):
    return Repository(ServeConfig(paths, device="cpu", threads=1, **options))


def served(*paths, **options):
    models = [each.model for each in start(*paths, **options)]
    return [(model.name, model.version, model.platform) for model in models]


def write_graph(folder, config=None, graph=None):
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(graph or identity(np.float32, [None, 2]))
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    return folder.parent


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


def test_a_plain_graph_is_served_under_its_file_name(tmp_path):
    """A plain .onnx file is version 1 of its stem, says that no gate has seen it, and joins no requests."""
    path = tmp_path / "echo.v2.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))

    [one] = start(path, max_batch=8)

    model = one.model
    assert (model.name, model.version, model.max_batch, model.facts) == ("echo.v2", 1, 0, {"gate": "ungated"})
    assert model.key({"x": np.zeros((1, 2), np.float32)}) is None


def test_texts_are_joined_with_those_of_like_length(tmp_path):
    """On the CPU a long text does not make short ones be padded to its length; images are joined of whatever size."""
    write_text_bundle(tmp_path / "texts")
    write_image_bundle(tmp_path / "images")
    images, _, texts, _ = (each.model for each in start(tmp_path))

    def key(model, *raws):
        return model.key({"x": np.array([[raw] for raw in raws], object)})

    assert key(texts, b"good") == key(texts, b"bad, and that twice")
    assert key(texts, b"x" * 200) == key(texts, b"x" * 205) == key(texts, b"short", b"x" * 200)
    assert len({key(texts, b"x" * size) for size in (30, 60, 120, 240)}) == 4
    assert key(images, b"x") == key(images, b"x" * 100_000)


def test_the_highest_version_answers_unless_one_is_named(tmp_path):
    """An empty version is the highest as a number, not as text; what else is served is the policy's choice."""
    write_text_bundle(tmp_path / "mood" / "9", version=9)
    write_text_bundle(tmp_path / "mood" / "10", version=10)
    repository = start(tmp_path, versions="all")

    assert repository.find("mood", "").model.version == 10
    assert repository.find("mood", "9").model.version == 9
    assert repository.versions("mood") == [9, 10]
    assert start(tmp_path).versions("mood") == [10]


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
    repository = start(write_text_bundle(tmp_path / "b"))

    with pytest.raises(error, match=words.replace(".", r"\.")):
        repository.find(name, version)


def test_two_models_of_one_name_and_version_are_a_start_up_error(tmp_path):
    """Both places are named."""
    write_text_bundle(tmp_path / "a")
    write_text_bundle(tmp_path / "b")

    with pytest.raises(StartError, match=r"/a and .*/b are both model 'mood' version 1"):
        start(tmp_path, versions="all")


def test_a_bundle_in_another_version_s_folder_is_a_start_up_error(tmp_path):
    """In a repository the folders and the manifest must agree."""
    write_text_bundle(tmp_path / "mood" / "2", version=1)

    with pytest.raises(StartError, match=r"belongs in mood/1. Move it, or export it with --name \w+ --version \d"):
        served(tmp_path)


LABELLED = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 2 format: FORMAT_NONE }
output { name: "y" label_filename: "labels.txt" }
dynamic_batching { max_queue_delay_microseconds: 500 priority_levels: 2 default_priority_level: 1 }
instance_group { count: 3 kind: KIND_CPU }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
parameters { key: "owner" value: { string_value: "us" } }
"""


def test_a_config_pbtxt_is_done_as_it_says(tmp_path):
    """Rows, joining, instances, threads and labels are the configuration's, and ModelConfig tells them."""
    write_graph(tmp_path / "m", LABELLED)
    (tmp_path / "m" / "labels.txt").write_text("no\nyes\n")

    [one] = start(tmp_path, max_queue=9)

    model, policy = one.model, one.model.policy
    assert (model.max_batch, model.joins, model.threads, model.labels) == (8, True, 2, {"y": ("no", "yes")})
    assert (policy.max_batch, policy.max_delay_s, policy.instances, policy.levels) == (8, 0.0005, 3, 2)
    assert policy.max_queue == 9
    config = model_config(model)
    assert (config.name, config.max_batch_size, config.instance_group[0].count) == ("m", 8, 3)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert (list(config.input[0].dims), config.output[0].label_filename) == ([2], "labels.txt")
    assert config.parameters["owner"].string_value == "us"
    assert config.parameters["gate"].string_value == "ungated"


JOINED = """
name: "m", platform: "onnxruntime_onnx", max_batch_size: 4,
input: [ { name: "x", data_type: TYPE_FP32, dims: [ 2 ] } ],
dynamic_batching: { preferred_batch_size: [ 4 ], max_queue_delay_microseconds: 60000000 }
instance_group [ { count: 1 } ]
"""


def test_requests_are_joined_as_a_config_pbtxt_asks(tmp_path):
    """Four rows make the preferred batch, which runs at once, as one, however long it could have waited."""
    repository = start(write_graph(tmp_path / "m", JOINED))
    served, outcomes = repository.find("m", ""), queue.Queue()

    for row in range(4):
        arrays = {"x": np.full((1, 2), row, np.float32)}
        done = functools.partial(lambda row, outcome: outcomes.put((row, outcome["y"].tolist())), row)
        served.scheduler.submit(Job(arrays=arrays, rows=1, key=served.model.key(arrays), done=done))

    got = sorted(outcomes.get(timeout=30) for _ in range(4))
    assert got == [(row, [[row, row]]) for row in range(4)]
    counts = served.statistics.snapshot()
    assert (counts.runs, counts.rows) == (1, 4)


def positive():
    """A graph that gives those rows of its input whose first number is positive: not one for each."""
    return model_bytes(
        [
            helper.make_node("Gather", ["x", "column"], ["first"], axis=1),
            helper.make_node("Greater", ["first", "zero"], ["wanted"]),
            helper.make_node("Compress", ["x", "wanted"], ["y"], axis=0),
        ],
        [("x", TensorProto.FLOAT, ["rows", 2])],
        [("y", TensorProto.FLOAT, ["found", 2])],
        {"column": np.int64(0), "zero": np.float32(0)},
    )


def test_rows_that_cannot_be_told_apart_are_given_to_nobody(tmp_path):
    """Requests that were joined are run one by one, where an answer has not as many rows as they have together."""
    repository = start(write_graph(tmp_path / "m", JOINED, positive()))
    served, outcomes = repository.find("m", ""), queue.Queue()

    with captured() as logs:
        for value in (-1, 1, 2, 3):
            arrays = {"x": np.full((1, 2), value, np.float32)}
            done = functools.partial(lambda value, outcome: outcomes.put((value, outcome["y"].tolist())), value)
            served.scheduler.submit(Job(arrays=arrays, rows=1, key=served.model.key(arrays), done=done))
        got = sorted(outcomes.get(timeout=30) for _ in range(4))

    assert got == [(-1, []), (1, [[1, 1]]), (2, [[2, 2]]), (3, [[3, 3]])]
    assert "has shape [3, 2] after a run of 4 rows" in str(logs)
    with pytest.raises(ModelError, match=r"shape \[1, 2\] after a run of 8 rows"):
        served.model.run([{"x": np.float32([[1, 1], [-1, -1]])}], 8)


PADDED = "max_batch_size: 8 dynamic_batching {}"


@pytest.mark.parametrize("rows", [[0], [0, 0], [2, 0], [0, 3, 0]])
def test_requests_without_rows_are_padded_by_what_their_neighbours_have(tmp_path, rows):
    """The last row there is makes the size up, of whichever request; where there is none, the run has none."""
    [one] = start(write_graph(tmp_path / "m", PADDED), batch_sizes=(4, 8))
    requests = [{"x": np.full((count, 2), count, np.float32)} for count in rows]

    answers = one.model.run(requests, 4)

    assert [answer["y"].tolist() for answer in answers] == [request["x"].tolist() for request in requests]


@pytest.mark.parametrize(("invariant", "rows"), [(True, [8]), (False, [1])])
def test_rows_that_run_alone_are_not_padded(tmp_path, monkeypatch, invariant, rows):
    """Where a variant's answers depend on their neighbours, each row is a run; so would each row of padding be."""
    bundle = write_text_bundle(tmp_path / "b")
    manifest = read_manifest(bundle)
    variants = tuple(replace(variant, batch_invariant=invariant) for variant in manifest.variants)
    seal(bundle, replace(manifest, variants=variants))
    mood, _ = (each.model for each in start(bundle, batch_sizes=(8,)))
    ran, run = [], Session.run

    def spy(session, feeds):
        ran.append(len(feeds["input_ids"]))
        return run(session, feeds)

    monkeypatch.setattr(Session, "run", spy)
    [answer] = mood.run([mood.decode({"text": np.array([[b"good film"]], object)})], 8)

    assert ran == rows
    assert answer["logits"].shape == (1, 3)


def test_a_request_without_rows_is_answered_where_runs_are_padded(tmp_path):
    """By a graph with a config.pbtxt, and by a bundle with and without its preprocessing."""
    write_graph(tmp_path / "r" / "m", PADDED)
    bundle = write_vector_bundle(tmp_path / "b", tasks=(MOOD,))
    repository = start(tmp_path / "r", bundle, batch_sizes=(4, 8))

    for name, given, asked, shape in [
        ("m", "x", "y", (0, 2)),
        ("flowers", "flower", "logits", (0, 3)),
        ("flowers.onnx", "features", "logits", (0, 3)),
    ]:
        served, outcome = repository.find(name, ""), Future()
        arrays = {given: np.zeros((0, 2 if name == "m" else 3), np.float32)}
        served.scheduler.submit(Job(arrays, rows=0, key=served.model.key(arrays), done=outcome.set_result))
        assert outcome.result(30)[asked].shape == shape


def test_a_graph_that_needs_no_input_is_served_where_runs_are_padded(tmp_path):
    """A request that leaves out every input runs as it is; one that brings one is padded."""
    node, number = helper.make_node("Identity", ["x"], ["y"]), TensorProto.FLOAT
    tensors = [("x", number, ["rows", 2])], [("y", number, ["rows", 2])]
    graph = model_bytes([node], *tensors, {"x": np.float32([[10, 20]])})
    repository = start(write_graph(tmp_path / "m", f'{PADDED} input {{ name: "x" }}', graph), batch_sizes=(4, 8))
    served = repository.find("m", "")

    for arrays in ({}, {"x": np.float32([[1, 2]])}):
        outcome = Future()
        served.scheduler.submit(Job(arrays, rows=1, key=served.model.key(arrays), done=outcome.set_result))
        assert outcome.result(30)["y"].tolist() == arrays.get("x", np.float32([[10, 20]])).tolist()


def test_a_graph_with_labels_from_config_but_no_file_does_not_start(tmp_path):
    """A file of labels that is not there is named."""
    write_graph(tmp_path / "m", LABELLED)

    with pytest.raises(ConfigRefused, match=r"/m/1/model\.onnx: labels\.txt cannot be read"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("sequence_batching {}", r"/m: config\.pbtxt .*sequence_batching is not supported"),
        ('input { name: "z" }', r"/m/1/model\.onnx: config\.pbtxt has input 'z'; the graph has 'x'"),
        ("instance_group { kind: KIND_GPU }", r"/m/1/model\.onnx: config\.pbtxt has an instance_group of KIND_GPU"),
    ],
)
def test_a_config_pbtxt_that_cannot_be_done_keeps_the_server_from_starting(tmp_path, config, words):
    """The line names the place and the field."""
    with pytest.raises(ConfigRefused, match=words):
        start(write_graph(tmp_path / "m", config))


@pytest.mark.skipif("CUDAExecutionProvider" in get_available_providers(), reason="there may be a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_the_field_that_asks_for_it(tmp_path):
    """KIND_GPU on a server that may use one, where there is none, is not served from the CPU."""
    write_graph(tmp_path / "m", "instance_group { kind: KIND_GPU }")

    with pytest.raises(ConfigRefused, match="instance_group of KIND_GPU; no GPU can be used here"):
        Repository(ServeConfig((tmp_path,), device="auto"))


@pytest.mark.parametrize("version", ["0", "01", "-1", "v1", "1.5"])
def test_a_version_folder_is_a_positive_integer(tmp_path, version):
    """Of no other folder a server starts, and no other version is served by accident."""
    (tmp_path / "m" / version).mkdir(parents=True)
    (tmp_path / "m" / version / "model.onnx").write_bytes(identity(np.float32, [None, 2]))

    with pytest.raises(StartError, match="called by a positive integer"):
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


@pytest.mark.parametrize("length", [1 << 29, 1 << 40, 1 << 62])
@pytest.mark.parametrize("config", [None, 'input {{ name: "x" dims: {} }}'])
def test_an_input_that_no_request_may_claim_is_refused(tmp_path, config, length):
    """Whether the graph fixes the length, or its config.pbtxt: zeros of it would not fit into memory either."""
    graph = identity(np.float32, [length if config is None else None])
    write_graph(tmp_path / "m", config and config.format(length), graph)

    with pytest.raises(ModelError, match=rf"input 'x' has shape \[{length}\], which is at least {4 * length} bytes"):
        served(tmp_path)


@pytest.mark.parametrize("count", [4095, 4096])
def test_more_inputs_than_a_request_has_are_refused(tmp_path, count):
    """Nobody could call it."""
    names = [f"x{i}" for i in range(count)]
    inputs = [(name, TensorProto.FLOAT, [1]) for name in names]
    nodes = [helper.make_node("Sum", names, ["y"])]
    write_graph(tmp_path / "m", graph=model_bytes(nodes, inputs, [("y", TensorProto.FLOAT, [1])]))

    if count == 4095:
        assert served(tmp_path)
    else:
        with pytest.raises(ModelError, match="takes 4096 inputs; a request has at most 4095"):
            served(tmp_path)


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

    models = list(start(bundle, require_gate=True))

    assert [each.model.facts["gate"] for each in models] == [gate, gate]


@pytest.mark.parametrize(
    ("precision", "verdict"), [("int8", "FAIL"), ("int8", "INCONCLUSIVE"), ("fp32", "FAIL"), ("int8", None)]
)
def test_require_gate_refuses_what_did_not_pass(tmp_path, precision, verdict):
    """INCONCLUSIVE is not passed, and neither is int8 that no gate has seen."""
    bundle = write_text_bundle(tmp_path / "b", precision=precision, verdict=verdict)

    assert served(bundle)
    with pytest.raises(GateNotPassed, match=f"its gate is {verdict or 'ungated'}"):
        served(bundle, require_gate=True)


def test_require_gate_refuses_a_plain_graph(tmp_path):
    """No gate has seen it."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))

    with pytest.raises(GateNotPassed, match="its gate is ungated"):
        served(path, require_gate=True)


def test_a_graph_that_zeros_do_not_fit_is_served(tmp_path):
    """Warming up is no test: what it cannot run the first request runs."""
    config = 'input { name: "x" }'
    nodes = [helper.make_node("Reshape", ["x", "square"], ["y"])]
    inputs, outputs = [("x", TensorProto.FLOAT, [None])], [("y", TensorProto.FLOAT, [2, 2])]
    write_graph(tmp_path / "m", config, model_bytes(nodes, inputs, outputs, {"square": np.array([2, 2])}))

    with captured() as logs:
        [one] = start(tmp_path)

    assert [entry["event"] for entry in logs] == ["ungated model", "not warmed up", "loaded"]
    (result,) = one.model.run([one.model.decode({"x": np.arange(4, dtype=np.float32)})], None)
    assert one.model.encode(result)["y"].tolist() == [[0, 1], [2, 3]]


def test_a_graph_whose_zeros_are_larger_than_memory_is_served(tmp_path):
    """Those who share the memory of their tensors may yet call it."""
    path = tmp_path / "large.onnx"
    path.write_bytes(identity(np.uint8, [2**31 - 1]))
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])

    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    try:
        with captured() as logs:
            [one] = start(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

    assert one.model.inputs[0].shape == (2**31 - 1,)
    assert [entry["event"] for entry in logs] == ["ungated model", "not warmed up", "loaded"]

"""Every call of the protocol over a real socket, and what it must answer."""

import json
import queue
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from onnx import TensorProto, helper

from bundle.model import load_model
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.client import Client
from serve.config import ServeConfig
from serve.errors import ServerError
from serve.queue import Job
from serve.server import start
from tests.scheduling import PATIENCE_S
from tests.serve_bundles import TASKS, identity, model_bytes, png, write_image_bundle, write_text_bundle

TEXTS = [b"the film is good", b"", b"bad bad film", "né".encode()]
RANKED = "instance_group { count: 1 } dynamic_batching { priority_levels: 2 default_priority_level: 2 }"
OFFSET = 'max_batch_size: 4 input { name: "x" } input { name: "by" optional: true }'


def offset():
    """A graph that adds to its rows a number that may be left out, and one that its configuration does not name."""
    number = TensorProto.FLOAT
    nodes = [helper.make_node("Add", ["x", "by"], ["sum"]), helper.make_node("Add", ["sum", "more"], ["y"])]
    inputs = [("x", number, ["rows", 1]), ("by", number, ["any", 1]), ("more", number, ["some", 1])]
    constants = {"by": np.float32([[10]]), "more": np.float32([[100]])}
    return model_bytes(nodes, inputs, [("y", number, ["rows", 1])], constants)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "mood" / "1")
    write_text_bundle(root / "mood" / "2", version=2)
    write_text_bundle(root / "many" / "1", name="many", tasks=TASKS)
    write_image_bundle(root / "colour" / "1")
    for name, dtype in [("echo", np.float32), ("half", np.float16), ("words", object), ("flags", np.bool_)]:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.onnx").write_bytes(identity(dtype, [None, 2]))
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float64):
        (root / np.dtype(dtype).name / "1").mkdir(parents=True)
        (root / np.dtype(dtype).name / "1" / "model.onnx").write_bytes(identity(dtype, [None, 2]))
    (root / "scalar" / "1").mkdir(parents=True)
    (root / "scalar" / "1" / "model.onnx").write_bytes(identity(np.float32, []))
    for name, graph, said in [("ranked", identity(np.float32, []), RANKED), ("offset", offset(), OFFSET)]:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.onnx").write_bytes(graph)
        (root / name / "config.pbtxt").write_text(said)
    return root


@pytest.fixture(scope="module")
def server(models):
    server = start(ServeConfig(paths=(models,), port=0, device="cpu", threads=1, instances=2, versions="all"))
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        yield client


def triton(server, command):
    program = [sys.executable, str(Path(__file__).parent / "triton_client.py"), str(server.port), command]
    return json.loads(subprocess.run(program, check=True, capture_output=True).stdout)


def test_the_server_is_live_and_ready(stub):
    """Both are true as soon as the socket answers, for every model has been loaded before."""
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready


@pytest.mark.parametrize(
    ("name", "number", "ready"),
    [("mood", "", True), ("mood", "2", True), ("mood.onnx", "1", True), ("mood", "3", False), ("other", "", False)],
)
def test_a_model_is_ready_when_it_is_served(stub, name, number, ready):
    """One that is not served is not ready, which is no error."""
    assert stub.ModelReady(pb.ModelReadyRequest(name=name, version=number)).ready is ready


def test_the_server_names_itself_and_only_what_it_has(stub):
    """Clients switch on the extensions."""
    answer = stub.ServerMetadata(pb.ServerMetadataRequest())

    assert (answer.name, answer.version) == ("edgeward", version("edgeward"))
    assert list(answer.extensions) == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "parameters",
        "schedule_policy",
        "statistics",
    ]


def test_metadata_of_a_bundle_is_the_table_of_the_protocol(stub):
    """One BYTES input of the manifest's column name; answers as docs/protocol.md lists them."""
    answer = MessageToDict(stub.ModelMetadata(pb.ModelMetadataRequest(name="mood")))

    assert answer == {
        "name": "mood",
        "versions": ["1", "2"],
        "platform": "edgeward_bundle",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": ["-1", "1"]},
            {"name": "score", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]},
        ],
    }


def test_metadata_of_several_tasks_has_their_names_before_the_outputs(stub):
    """TASK.output, in the order of the manifest's tasks."""
    answer = stub.ModelMetadata(pb.ModelMetadataRequest(name="many", version="1"))

    assert [f"{output.name} {output.datatype} {list(output.shape)}" for output in answer.outputs] == [
        "mood.label BYTES [-1, 1]",
        "mood.score FP32 [-1, 3]",
        "mood.logits FP32 [-1, 3]",
        "tags.predicted BOOL [-1, 2]",
        "tags.score FP32 [-1, 2]",
        "length.value FP32 [-1, 1]",
    ]


def test_metadata_of_the_bare_graph_is_the_graph_s(stub):
    """Tensors in, logits out; a named version lists only itself."""
    answer = MessageToDict(stub.ModelMetadata(pb.ModelMetadataRequest(name="mood.onnx", version="2")))

    assert answer["versions"] == ["2"]
    assert answer["platform"] == "onnxruntime_onnx"
    assert [(spec["name"], spec["datatype"], spec["shape"]) for spec in answer["inputs"]] == [
        ("input_ids", "INT64", ["-1", "-1"]),
        ("attention_mask", "INT64", ["-1", "-1"]),
    ]
    assert [spec["name"] for spec in answer["outputs"]] == ["logits"]


def test_config_of_a_bundle_leaves_the_batch_axis_out(stub):
    """With max_batch_size, clients put the batch before the dims."""
    config = stub.ModelConfig(pb.ModelConfigRequest(name="mood", version="1")).config

    assert MessageToDict(config, preserving_proto_field_name=True) == {
        "name": "mood",
        "platform": "edgeward_bundle",
        "backend": "edgeward",
        "max_batch_size": 1024,
        "input": [{"name": "text", "data_type": "TYPE_STRING", "dims": ["1"]}],
        "output": [
            {"name": "label", "data_type": "TYPE_STRING", "dims": ["1"]},
            {"name": "score", "data_type": "TYPE_FP32", "dims": ["3"]},
            {"name": "logits", "data_type": "TYPE_FP32", "dims": ["3"]},
        ],
        "dynamic_batching": {},
        "instance_group": [{"name": "mood_0", "count": 2, "kind": "KIND_CPU"}],
        "parameters": {
            "gate": {"string_value": "parity"},
            "variant": {"string_value": "only"},
            "precision": {"string_value": "fp32"},
        },
    }


def test_config_of_a_plain_graph_says_that_it_is_ungated(stub):
    """Nothing is known of its first axis, so the dims are the whole shape."""
    config = stub.ModelConfig(pb.ModelConfigRequest(name="echo")).config

    assert config.max_batch_size == 0
    assert config.backend == "onnxruntime"
    assert list(config.input[0].dims) == list(config.output[0].dims) == [-1, 2]
    assert config.parameters["gate"].string_value == "ungated"


def test_answers_of_a_bundle_are_those_of_the_predict_path(client, models):
    """Bit for bit what bundle.model gives, for texts and for images."""
    photos = [png("red"), png((3, 200, 9), size=(20, 11))]
    for name, raws in [("mood", TEXTS), ("many", TEXTS), ("colour", photos)]:
        expected = load_model(models / name / "1", device="cpu", threads=1).predict(raws)

        answer = client.predict(name, raws, version="1")

        assert list(answer) == list(expected)
        for output, array in expected.items():
            assert answer[output].dtype == array.dtype
            np.testing.assert_array_equal(answer[output], array)


def test_a_batch_without_examples_is_answered(client):
    """-1 is any length, 0 too."""
    answer = client.predict("many", [])

    assert {name: array.shape for name, array in answer.items()} == {
        "mood.label": (0, 1),
        "mood.score": (0, 3),
        "mood.logits": (0, 3),
        "tags.predicted": (0, 2),
        "tags.score": (0, 2),
        "length.value": (0, 1),
    }


def test_the_largest_batch_is_answered(client):
    """As many rows as ModelConfig says."""
    assert client.predict("mood", ["good"] * 1024)["score"].shape == (1024, 3)


def test_answers_of_the_bare_graph_are_those_of_its_session(client, models):
    """Bit for bit."""
    ids = np.array([[2, 3, 4], [2, 5, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    expected = load_model(models / "mood" / "2", device="cpu", threads=1).session.run(feeds)

    np.testing.assert_array_equal(client.infer("mood.onnx", feeds)["logits"], expected["logits"])


def test_the_answer_says_who_answered(stub):
    """Name and version of the model, and the id of the request."""
    request = pb.ModelInferRequest(model_name="mood", id="a \u00e9 1")
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"good")

    answer = stub.ModelInfer(request)

    assert (answer.model_name, answer.model_version, answer.id) == ("mood", "2", "a é 1")


def test_answers_are_raw_even_to_typed_contents(stub):
    """Clients read raw_output_contents by the output's position."""
    request = pb.ModelInferRequest(model_name="mood")
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"good")

    answer = stub.ModelInfer(request)

    assert [output.name for output in answer.outputs] == ["label", "score", "logits"]
    assert [len(raw) for raw in answer.raw_output_contents][1:] == [12, 12]
    assert not any(output.HasField("contents") for output in answer.outputs)
    length = int.from_bytes(answer.raw_output_contents[0][:4], "little")
    assert answer.raw_output_contents[0][4:].decode() in ("good", "bad", "neither — é")
    assert length == len(answer.raw_output_contents[0]) - 4


def test_outputs_come_as_requested(client):
    """Those that were asked for, in that order."""
    rows = np.array([[b"good"]], object)
    whole = client.infer("mood", {"text": rows})

    answer = client.infer("mood", {"text": rows}, outputs=["logits", "label"])

    assert list(answer) == ["logits", "label"]
    np.testing.assert_array_equal(answer["logits"], whole["logits"])


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("echo", np.array([[0.1, -0.0], [np.nan, np.inf]], np.float32)),
        ("half", np.array([[0.1, -65504.0]], np.float16)),
        ("words", np.array([["a\0b", "é—"], ["", "x" * 100_000]], object)),
        ("flags", np.array([[True, False]])),
        ("echo", np.zeros((0, 2), np.float32)),
        ("words", np.zeros((0, 2), object)),
        ("scalar", np.array(1.5, np.float32)),
        *[
            (dtype, np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max]], dtype))
            for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
        ],
        ("float64", np.array([[1e300, -1e-300]])),
    ],
)
def test_every_datatype_goes_there_and_back(client, model, values):
    """NaN, signed zero, extreme integers, NUL in texts, no elements and no axes included."""
    answer = client.infer(model, {"x": values})["y"]

    assert answer.shape == values.shape
    if values.dtype == object:
        assert answer.ravel().tolist() == [text.encode() for text in values.ravel()]
    else:
        assert answer.dtype == values.dtype
        assert answer.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("model", "datatype", "field", "values"),
    [
        ("int8", "INT8", "int_contents", [-128, 127]),
        ("int16", "INT16", "int_contents", [-32768, 32767]),
        ("int32", "INT32", "int_contents", [-(2**31), 2**31 - 1]),
        ("int64", "INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("uint8", "UINT8", "uint_contents", [0, 255]),
        ("uint16", "UINT16", "uint_contents", [0, 65535]),
        ("uint32", "UINT32", "uint_contents", [0, 2**32 - 1]),
        ("uint64", "UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("echo", "FP32", "fp32_contents", [0.5, float("inf")]),
        ("float64", "FP64", "fp64_contents", [1e300, -0.1]),
        ("flags", "BOOL", "bool_contents", [True, False]),
        ("words", "BYTES", "bytes_contents", [b"", b"a\0b"]),
    ],
)
def test_typed_contents_say_the_same_as_raw(stub, client, model, datatype, field, values):
    """Every datatype but FP16 can be sent in its own field."""
    request = pb.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(tensor.contents, field).extend(values)

    [raw] = stub.ModelInfer(request).raw_output_contents

    dtype = object if datatype == "BYTES" else np.dtype(model if model[-1].isdigit() else type(values[0]))
    if model == "echo":
        dtype = np.float32
    again = pb.ModelInferRequest(model_name=model, raw_input_contents=[raw])
    again.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    assert list(stub.ModelInfer(again).raw_output_contents) == [raw]
    assert client.infer(model, {"x": np.array([values], dtype)})["y"].ravel().tolist() == values


def test_harmless_parameters_are_accepted(stub):
    """What clients put into every request, and keys of their own, change nothing."""
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(8)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).parameters["mine"].string_param = "x"
    request.outputs.add(name="y").parameters["binary_data"].bool_param = True
    request.parameters["triton_enable_empty_final_response"].bool_param = False
    request.parameters["priority"].uint64_param = 1
    request.parameters["timeout"].int64_param = 60_000_000
    request.parameters["sequence_id"].int64_param = 0
    request.parameters["sequence_start"].bool_param = False
    request.parameters["mine"].double_param = 0.5

    assert list(stub.ModelInfer(request).raw_output_contents) == [bytes(8)]


def test_inputs_that_a_configuration_calls_optional_may_be_left_out(stub, client):
    """The graph has a value for them; one that the configuration does not name is not taken."""
    x, by = np.float32([[1], [2]]), np.float32([[0], [5]])

    assert client.infer("offset", {"x": x})["y"].tolist() == [[111], [112]]
    assert client.infer("offset", {"x": x, "by": by})["y"].tolist() == [[101], [107]]
    with pytest.raises(ServerError, match="input 'x' is missing"):
        client.infer("offset", {"by": by})
    with pytest.raises(ServerError, match="unexpected input 'more'; the model takes 'x', 'by'"):
        client.infer("offset", {"x": x, "more": by})
    config = stub.ModelConfig(pb.ModelConfigRequest(name="offset")).config
    assert [(spec.name, spec.optional) for spec in config.input] == [("x", False), ("by", True)]


def asked(value, **parameters):
    """A request to the model that is held."""
    request = pb.ModelInferRequest(model_name="ranked", raw_input_contents=[np.float32(value).tobytes()])
    request.inputs.add(name="x", datatype="FP32")
    for key, number in parameters.items():
        request.parameters[key].int64_param = number
    return request


@pytest.fixture
def held(server):
    """The queue of a model whose one instance runs a 0 until it is let go, and all that it runs after that."""
    served, values, go = server._repository.find("ranked", ""), queue.Queue(), threading.Event()
    run = served.model.run

    def wait(decoded, size):
        values.put(float(decoded[0]["x"]))
        assert go.wait(PATIENCE_S)
        return run(decoded, size)

    object.__setattr__(served.model, "run", wait)
    served.scheduler.submit(Job({"x": np.float32(0)}, rows=1, key=None, done=lambda outcome: None))
    assert values.get(timeout=PATIENCE_S) == 0
    yield SimpleNamespace(queue=served.scheduler, values=values, go=go)
    go.set()
    object.__setattr__(served.model, "run", run)


def until_wait(requests, held):
    """Return when so many requests wait, which no event tells."""
    end = time.monotonic() + PATIENCE_S
    while held.queue.pending < requests:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_request_of_a_higher_priority_is_run_first(stub, held):
    """Though it came last; who asks for none has the model's default, and a level that is not there is refused."""
    calls = []
    for value, priority in [(1, 2), (2, 0), (3, 1)]:
        calls.append(stub.ModelInfer.future(asked(value, priority=priority)))
        until_wait(len(calls), held)
    with pytest.raises(grpc.RpcError, match="priority is 3; expected 1") as refused:
        stub.ModelInfer(asked(4, priority=3))

    held.go.set()

    for call in calls:
        call.result(PATIENCE_S)
    assert [held.values.get_nowait() for _ in calls] == [3, 1, 2]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_waits_no_longer_than_its_timeout(stub, held):
    """It is refused while the model still runs another, and is never run."""
    with pytest.raises(grpc.RpcError, match="Request timeout expired") as refused:
        stub.ModelInfer(asked(1, timeout=1000), timeout=PATIENCE_S)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert held.values.empty()


def test_a_request_that_does_not_fit_its_model_is_counted(stub):
    """Among the failures of the model that it was for."""

    def failures():
        (statistics,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="echo")).model_stats
        return statistics.inference_stats.fail.count

    before = failures()
    with pytest.raises(grpc.RpcError, match="unexpected input 'z'"):
        stub.ModelInfer(pb.ModelInferRequest(model_name="echo", inputs=[{"name": "z"}]))

    assert failures() == before + 1


@pytest.mark.parametrize("service", ["", "mood", "mood.onnx", "echo"])
def test_health_is_told_of_the_server_and_of_each_model(channel, service):
    """grpc.health.v1, as orchestrators ask it."""
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(channel):
    """As the health protocol asks."""
    with pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other"))

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_shows_the_services(channel):
    """So that grpcurl works without the proto."""
    database = ProtoReflectionDescriptorDatabase(channel)

    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(database.get_services())
    assert database.FindFileContainingSymbol("inference.GRPCInferenceService").package == "inference"


@pytest.mark.parametrize("name", ["TraceSetting", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "Nothing"])
def test_calls_that_do_not_exist_are_unimplemented(channel, name):
    """Methods of the protocol that this server does not have are not advertised, and answered so."""
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")

    with pytest.raises(grpc.RpcError) as refused:
        call(b"")

    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_triton_s_client_gets_the_answers_of_a_bundle(server, client):
    """as_numpy gives what our own client gives."""
    answer = triton(server, "bundle")

    expected = client.predict("mood", ["the film is good", "", "né"])
    assert answer["label"] == [label.decode() for label in expected["label"].ravel()]
    assert np.array_equal(np.array(answer["score"], np.float32), expected["score"].ravel())
    assert (answer["id"], answer["shape"]) == ("7", [3, 3])


def test_triton_s_client_gets_the_logits_of_the_bare_graph(server, client):
    """The same graph, tensors in and out, with priority and timeout as it sends them."""
    ids = np.array([[2, 3, 4]])
    expected = client.infer("mood.onnx", {"input_ids": ids, "attention_mask": np.ones_like(ids)})

    assert triton(server, "graph") == {"logits": expected["logits"].ravel().tolist()}


def test_triton_s_client_reads_what_the_server_says_of_itself(server):
    """Metadata and configuration arrive under Triton's own names."""
    answer = triton(server, "about")

    assert (answer["live"], answer["ready"], answer["model"], answer["other"]) == (True, True, True, False)
    assert answer["server"]["name"] == "edgeward"
    assert answer["metadata"]["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}]
    assert answer["config"]["max_batch_size"] == 1024
    assert answer["config"]["input"][0] == {"name": "text", "data_type": "TYPE_STRING", "dims": ["1"]}
    assert answer["config"]["instance_group"][0]["kind"] == "KIND_CPU"
    assert answer["config"]["parameters"]["gate"] == {"string_value": "parity"}


def test_triton_s_client_gets_the_status_and_the_message(server):
    """As its own exception shows them."""
    assert triton(server, "error") == {
        "status": "StatusCode.INVALID_ARGUMENT",
        "message": "input 'text' has shape [1]; expected [-1, 1], where -1 is any length.",
    }

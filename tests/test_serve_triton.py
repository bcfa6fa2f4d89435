"""Triton's own Python client against a server: all that its example programs call, on models like theirs."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import counter, model_bytes

SUM_AND_DIFFERENCE = [list(range(1, 17)), list(range(-1, 15))]
CLASSIFIER = """
max_batch_size: 8
input { name: "INPUT" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 2, 2 ] }
output { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" }
"""


def add_sub(kind):
    """INPUT0 + INPUT1 and INPUT0 - INPUT1, of 16 elements each; strings are numbers in decimals."""
    nodes, names = [], ["INPUT0", "INPUT1"]
    if kind == TensorProto.STRING:
        nodes = [helper.make_node("Cast", [each], [f"{each}_n"], to=TensorProto.INT32) for each in names]
        names = [f"{each}_n" for each in names]
    for output, operator in (("OUTPUT0", "Add"), ("OUTPUT1", "Sub")):
        result = f"{output}_n" if kind == TensorProto.STRING else output
        nodes.append(helper.make_node(operator, names, [result]))
        if kind == TensorProto.STRING:
            nodes.append(helper.make_node("Cast", [result], [output], to=kind))
    tensors = [(name, kind, ["batch", 16]) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]
    return model_bytes(nodes, tensors[:2], tensors[2:])


def identity():
    tensors = [(name, TensorProto.STRING, ["batch", "length"]) for name in ("INPUT0", "OUTPUT0")]
    return model_bytes([helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])], tensors[:1], tensors[1:])


def classifier():
    """The mean of each colour of an image, as scores of three labels."""
    node = helper.make_node("ReduceMean", ["INPUT", "area"], ["OUTPUT"], keepdims=0)
    taken = ("INPUT", TensorProto.FLOAT, ["batch", 3, 2, 2])
    return model_bytes([node], [taken], [("OUTPUT", TensorProto.FLOAT, ["batch", 3])], {"area": [2, 3]})


def write_models(root):
    batched = "max_batch_size: 8\n"
    models = {
        "simple": (add_sub(TensorProto.INT32), batched),
        "simple_int8": (add_sub(TensorProto.INT8), batched),
        "simple_string": (add_sub(TensorProto.STRING), batched),
        "simple_identity": (identity(), batched),
        "classifier": (classifier(), CLASSIFIER),
        "slow": (counter(), ""),
    }
    for name, (graph, config) in models.items():
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(graph)
        (root / name / "config.pbtxt").write_text(config)
    (root / "classifier" / "labels.txt").write_text("red\ngreen\nblue\n")


class Examples:
    """The process in which the examples run: a name in, an answer out."""

    def __init__(self, address):
        program = [sys.executable, str(Path(__file__).parent / "triton_examples.py"), address]
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put({"failed": "the process ended"})

    def run(self, name):
        print(name, file=self.process.stdin, flush=True)
        answer = self.answers.get(timeout=120)
        assert "failed" not in answer, answer["failed"]
        return answer

    def close(self):
        self.process.kill()
        self.reader.join(60)
        with self.process:  # closes its pipes
            pass


@pytest.fixture(scope="module", params=["completion-queue", "asyncio"])
def address(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_models(root)
    config = ServeConfig(
        paths=(root,), port=0, transport=request.param, device="cpu", threads=1, admin=True, shared_memory=True
    )
    server = start(config)
    yield server.address
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def examples(address):
    process = Examples(address)
    yield process
    process.close()


def test_infer(examples):
    """With and without outputs, compressed, by version, with an id, a priority, a timeout and custom parameters."""
    answer = examples.run("infer")

    assert answer["arrays"] == [SUM_AND_DIFFERENCE] * 4
    assert (answer["id"], answer["version"]) == ("7", "1")
    assert answer["statistics"][:3] == [1, 1, 1]
    assert answer["statistics"][3] >= 4


def test_one_output(examples):
    """What was not asked for is not sent."""
    assert examples.run("one_output") == {"names": ["OUTPUT1"], "minus": [SUM_AND_DIFFERENCE[1]]}


def test_async_infer(examples):
    """Callbacks get the results, or the error."""
    answer = examples.run("async_infer")

    assert answer["arrays"] == [SUM_AND_DIFFERENCE] * 10
    assert (answer["error"], answer["result"]) == ("StatusCode.NOT_FOUND", None)


def test_cancel(examples):
    """A call that its client cancels is over for the client at once."""
    assert examples.run("cancel") == {"status": "StatusCode.CANCELLED"}


def test_client_timeout(examples):
    """The client's timeout is the deadline of the call."""
    assert examples.run("client_timeout")["status"] == "StatusCode.DEADLINE_EXCEEDED"


def test_string(examples):
    """Numbers in decimals, NUL within a string, and four bytes that are no text."""
    assert examples.run("string") == {"arrays": SUM_AND_DIFFERENCE, "nul": True, "blobs": True}


def test_shared_memory(examples):
    """Inputs are read from a region, outputs written to one, and none of their bytes are in the messages."""
    answer = examples.run("shared_memory")

    assert answer["arrays"] == SUM_AND_DIFFERENCE
    assert answer["raw"] == [0, 0]
    assert answer["status"] == {"input_data": [0, 128], "output_data": [0, 128]}
    assert answer["again"] == "StatusCode.ALREADY_EXISTS"
    assert answer["unknown"]["status"] == "StatusCode.NOT_FOUND"
    assert answer["cuda"] == {}


def test_shared_memory_string(examples):
    """Strings need as many bytes as they have; the answer says how many."""
    answer = examples.run("shared_memory_string")

    assert answer["arrays"] == SUM_AND_DIFFERENCE
    assert answer["sizes"] == [sum(4 + len(str(x)) for x in each) for each in SUM_AND_DIFFERENCE]


def test_reuse_infer_objects(examples):
    """One input object may be in shared memory, then in the message, then in shared memory again."""
    doubled = [list(range(2, 18)), list(range(-2, 14))]
    assert examples.run("reuse_infer_objects") == {"arrays": [SUM_AND_DIFFERENCE, doubled, SUM_AND_DIFFERENCE]}


def test_cuda_shared_memory(examples):
    """It is refused and not advertised; what examples call first, to forget all regions, is no error."""
    answer = examples.run("cuda_shared_memory")

    assert answer["register"]["status"] == "StatusCode.UNIMPLEMENTED"
    assert answer["status"] == {}
    assert "cuda_shared_memory" not in answer["extensions"]
    assert {"system_shared_memory", "statistics", "model_repository", "classification"} <= set(answer["extensions"])


def test_switched_off(tmp_path):
    """Without its options a server refuses shared memory and control, does not advertise them, and goes on."""
    folder = tmp_path / "simple" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(add_sub(TensorProto.INT32))
    server = start(ServeConfig(paths=(tmp_path,), port=0, device="cpu", threads=1))
    process = Examples(server.address)
    try:
        answer = process.run("switched_off")
    finally:
        process.close()
        server.stop(drain_s=0)

    for key in ("register", "unregister", "cuda", "infer", "load", "unload", "log", "trace"):
        assert answer[key]["status"] == "StatusCode.UNIMPLEMENTED", key
    assert "Client shared memory is disabled" in answer["register"]["message"]
    assert answer["status"] == {}
    assert not {"system_shared_memory", "model_repository", "logging", "trace"} & set(answer["extensions"])
    assert answer["arrays"] == SUM_AND_DIFFERENCE


def test_health_metadata(examples):
    """Liveness, readiness, metadata, configuration, statistics, settings."""
    answer = examples.run("health_metadata")

    assert [answer[key] for key in ("live", "ready", "model", "version")] == [True] * 4
    assert answer["server"]["name"] == "edgeward"
    assert answer["metadata"]["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": ["-1", "16"]}
    assert answer["wrong"]["status"] == "StatusCode.NOT_FOUND"
    assert "Request for unknown model" in answer["wrong"]["message"]
    assert (answer["config"]["name"], answer["config"]["max_batch_size"]) == ("simple", 8)
    assert {"simple", "simple_string", "slow"} <= set(answer["statistics"])
    assert answer["log"]["settings"]


def test_model_control(examples):
    """A model is unloaded and loaded; contents from clients, unknown names and paths are refused, and all goes on."""
    answer = examples.run("model_control")

    assert answer["before"]["simple"] == ["1", "READY", ""]
    assert set(answer["before"]) == {
        "simple", "simple_int8", "simple_string", "simple_identity", "classifier", "slow",
    }  # fmt: skip
    assert answer["unloaded"][0] is False
    assert answer["unloaded"][1][1] == "UNAVAILABLE"
    assert answer["inference"]["status"] == "StatusCode.UNAVAILABLE"
    assert answer["loaded"] == [True, True]
    assert answer["arrays"] == SUM_AND_DIFFERENCE
    assert [answer[key]["status"] for key in ("broken", "config", "files")] == ["StatusCode.UNIMPLEMENTED"] * 3
    for key in ("wrong", "outside"):
        assert answer[key]["status"] == "StatusCode.NOT_FOUND"
        assert "failed to load" in answer[key]["message"]
    assert answer["after"] == [True, True, True]


def test_sequence(examples):
    """Requests of a sequence are refused rather than answered one by one."""
    assert examples.run("sequence")["status"] == "StatusCode.UNIMPLEMENTED"


def test_sequence_stream(examples):
    """On a stream, too, and the stream stays open."""
    answer = examples.run("sequence_stream")

    assert answer["ids"] == ["0", "1", None, "3", "4", None]
    assert len(answer["errors"]) == 2
    assert all("sequence" in each for each in answer["errors"])


def test_stream(examples):
    """Answers come in the order of the requests, an error in its place, and the last with its mark."""
    answer = examples.run("stream")
    good = [number for number in range(50) if number != 20]

    assert answer["ids"] == good
    assert answer["sums"] == [number + 1 for number in good]
    assert answer["at"] == [20]
    assert "Request for unknown model" in answer["errors"][0]
    assert answer["final"] is True
    assert answer["outputs"] == 2


@pytest.mark.parametrize("name", ["custom_args", "keepalive"])
def test_options_of_the_channel(examples, name):
    """Limits and keepalive options that clients set are put up with."""
    assert examples.run(name) == {"arrays": SUM_AND_DIFFERENCE}


def test_explicit_byte_content(examples):
    """Typed strings are answered raw."""
    assert examples.run("explicit_byte_content") == {"arrays": SUM_AND_DIFFERENCE}


@pytest.mark.parametrize("name", ["explicit_int_content", "explicit_int8_content"])
def test_explicit_content(examples, name):
    """Typed integers are answered raw, and a version that is no number is refused in Triton's words."""
    answer = examples.run(name)

    assert answer["arrays"] == SUM_AND_DIFFERENCE
    assert answer["wrong"][0] == "INVALID_ARGUMENT"
    assert "failed to get model version from specified version string 'wrong_specification'" in answer["wrong"][1]


def test_generated_stubs(examples):
    """The calls of the core protocol without the client library."""
    answer = examples.run("generated_stubs")

    assert [answer[key] for key in ("live", "ready", "model")] == [True] * 3
    assert answer["metadata"] == [-1, 3, 2, 2]
    assert (answer["id"], answer["shape"], answer["bytes"]) == ("my request id", [1, 3], 12)


def test_image(examples):
    """The highest scores with their labels, in the form value:index:label, for each row."""
    answer = examples.run("image")
    first, second = ["2.000000:1:green", "1.000000:2:blue"], ["5.000000:0:red", "0.000000:1:green"]

    assert (answer["format"], answer["dims"], answer["most"]) == (2, [3, 2, 2], 8)
    assert answer["batch 1"] == ["BYTES", [1, 2], first]
    assert answer["batch 2"] == ["BYTES", [2, 2], [*first, *second]]
    assert answer["stream"] == [["", answer["batch 2"]]] * 2
    assert answer["client"] == [first[0], second[0]]


def test_aio_infer(examples):
    """The asyncio client, ten calls at once, with its options of the channel."""
    answer = examples.run("aio_infer")

    assert answer == {"arrays": [SUM_AND_DIFFERENCE] * 13, "statistics": 1}


def test_aio_health_metadata(examples):
    """As with the client that waits."""
    answer = examples.run("aio_health_metadata")

    assert "Request for unknown model" in answer.pop("wrong")
    assert answer == {
        "live": True, "ready": True, "model": True, "server": "edgeward", "metadata": "simple", "config": "simple",
    }  # fmt: skip


def test_aio_model_control(examples):
    """As with the client that waits."""
    answer = examples.run("aio_model_control")

    assert "failed to load" in answer.pop("wrong")
    assert answer == {"unloaded": False, "loaded": True, "models": 6}


def test_aio_stream(examples):
    """In order; the sequence at its end is refused."""
    answer = examples.run("aio_stream")

    assert answer["ids"] == list(range(20))
    assert answer["sums"] == list(range(1, 21))
    assert len(answer["errors"]) == 1
    assert "sequence" in answer["errors"][0]


def test_aio_shared_memory(examples):
    """As with the client that waits."""
    assert examples.run("aio_shared_memory") == {"arrays": SUM_AND_DIFFERENCE, "status": ["in", "out"]}

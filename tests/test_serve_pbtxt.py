"""config.pbtxt: what it says is done, what is not done here is refused by name, what it contradicts is found."""

from pathlib import Path

import pytest

from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve.errors import ConfigRefused
from serve.pbtxt import choose_device, choose_threads, complete, parse_config, queue_policy, read_labels
from serve.queue import Policy

IMAGE = TensorSpec("image", "FP32", (-1, 3, -1, -1))
TEXT = TensorSpec("text", "BYTES", (-1,))
SCORE = TensorSpec("score", "FP32", (-1, 10))
LOSS = TensorSpec("loss", "FP64", ())

WHOLE = """
name: "m"  # as its folder
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "image" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, -1 ] } ]
output [ { name: "score" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
default_model_filename: "net.onnx"
version_policy: { specific: { versions: [ 1, 3 ] } }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
"""
BATCHING = """
max_batch_size: 16
dynamic_batching {
  preferred_batch_size: [ 8, 4 ]
  max_queue_delay_microseconds: 2500
  preserve_ordering: true
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 50000 max_queue_size: 7 }
  priority_queue_policy { key: 1 value: { timeout_action: DELAY allow_timeout_override: true } }
}
"""


def test_a_whole_configuration_is_read():
    """What a usual config.pbtxt says arrives, comments and lists included."""
    config = parse_config(WHOLE, "m")

    assert (config.max_batch_size, config.default_model_filename) == (8, "net.onnx")
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert config.input[0].format == pb.ModelInput.FORMAT_NCHW
    assert choose_threads(config, None) == 2
    assert complete(config, [IMAGE], [SCORE]) == ((TensorSpec("image", "FP32", (-1, 3, 224, -1)),), (SCORE,))


def test_what_a_configuration_leaves_out_is_the_graph_s():
    """An empty file describes the whole graph, and a name alone one tensor of it."""
    assert complete(parse_config("", "m"), [IMAGE, TEXT], [LOSS]) == ((IMAGE, TEXT), (LOSS,))
    assert complete(parse_config('input { name: "text" }', "m"), [IMAGE, TEXT], [LOSS])[0] == (IMAGE, TEXT)


def test_an_optional_input_is_served_where_the_configuration_names_it():
    """An old graph lists every weight as an input that may be left out; none of them is a client's by default."""
    weight = TensorSpec("weight", "FP32", (3,))

    assert complete(parse_config("max_batch_size: 4", "m"), [IMAGE], [SCORE], [weight]) == ((IMAGE,), (SCORE,))
    assert complete(parse_config('input { name: "weight" }', "m"), [IMAGE], [SCORE], [weight])[0] == (IMAGE, weight)


def test_outputs_that_a_configuration_does_not_name_are_not_served():
    """Naming some of the outputs chooses them, and their order."""
    config = parse_config('output { name: "b" } output { name: "a" }', "m")
    a, b, c = (TensorSpec(name, "FP32", (-1,)) for name in "abc")

    assert complete(config, [], [a, b, c])[1] == (b, a)


def test_dynamic_batching_becomes_a_policy():
    """Every field of dynamic_batching and of its queue policies holds for the queue."""
    policy = queue_policy(parse_config(BATCHING, "m"), Policy(max_queue=99, sizes=(4, 16, 32), instances=5))

    assert (policy.max_batch, policy.max_delay_s, policy.preferred, policy.sizes) == (16, 0.0025, (4, 8), (4, 16))
    assert (policy.instances, policy.levels, policy.default_level, policy.preserve_order) == (5, 3, 2, True)
    assert (policy.max_queue, policy.timeout_s, policy.timeout_override, policy.delays_timed_out) == (
        7,
        0.05,
        False,
        False,
    )
    first = policy.of(1)
    assert (first.max_queue, first.timeout_s, first.timeout_override, first.delays_timed_out) == (99, None, True, True)
    assert policy.of(3) == policy


@pytest.mark.parametrize("text", ["", "max_batch_size: 8", "dynamic_batching {}"])
def test_requests_are_joined_only_where_the_configuration_says_both(text):
    """Rows alone, or batching alone, join nothing, whatever the server's own policy is."""
    policy = queue_policy(parse_config(text, "m"), Policy(max_batch=64, max_queue=3))

    assert (policy.max_batch, policy.max_queue) == (1, 3)


def test_a_request_s_own_timeout_counts_unless_a_queue_policy_says_otherwise():
    """Without a queue policy the server's own rule holds."""
    batching = "max_batch_size: 4 dynamic_batching { %s }"

    assert queue_policy(parse_config(batching % "", "m"), Policy()).timeout_override
    assert not queue_policy(parse_config(batching % "default_queue_policy {}", "m"), Policy()).timeout_override


def test_instances_are_counted_over_all_groups():
    """A group without a count is one instance."""
    config = parse_config("instance_group { count: 3 } instance_group { kind: KIND_AUTO }", "m")

    assert queue_policy(config, Policy()).instances == 4


@pytest.mark.parametrize(
    ("kind", "asked", "device"),
    [
        ("KIND_CPU", "cuda", "cpu"),
        ("KIND_GPU", "auto", "cuda"),
        ("KIND_GPU", "tensorrt", "tensorrt"),
        ("KIND_AUTO", "auto", "auto"),
        ("KIND_MODEL", "cpu", "cpu"),
    ],
)
def test_an_instance_group_chooses_the_device(kind, asked, device):
    """CPU is the CPU, GPU is never the CPU, and all else is what the server was asked for."""
    assert choose_device(parse_config(f"instance_group {{ kind: {kind} }}", "m"), asked) == device


def test_a_gpu_that_the_server_is_not_to_use_is_refused():
    """KIND_GPU is not served from the CPU."""
    with pytest.raises(ConfigRefused, match=r"instance_group of KIND_GPU.*--device cpu"):
        choose_device(parse_config("instance_group { kind: KIND_GPU }", "m"), "cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequence_batching { direct {} }", "sequence_batching is not supported: requests of a sequence"),
        ('ensemble_scheduling { step { model_name: "x" } }', "ensemble_scheduling is not supported"),
        ('platform: "ensemble"', "platform 'ensemble'; expected 'onnxruntime_onnx'"),
        ('platform: "tensorrt_plan"', "platform 'tensorrt_plan'"),
        ('backend: "python"', "backend 'python'; expected 'onnxruntime'"),
        ('input { name: "x" dims: 1 reshape { shape: [] } }', "reshape is not supported"),
        ('input { name: "x" allow_ragged_batch: true }', "allow_ragged_batch is not supported"),
        ('model_warmup { name: "zero" }', "model_warmup is not supported"),
        ("optimization { graph { level: 1 } }", "optimization is not supported"),
        ("response_cache { enable: true }", "response_cache is not supported"),
        ("instance_group { rate_limiter { priority: 2 } }", "rate_limiter is not supported"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ("instance_group { gpus: 1 }", "gpus 1; expected none, or GPU 0 alone"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "gpus 0"),
        ("instance_group { count: -1 }", "count -1"),
        ("instance_group { kind: 9 }", "kind 9; expected KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL"),
        ('input { name: "x" data_type: 99 }', "data_type 99; expected TYPE_INVALID, TYPE_BOOL, .*TYPE_BF16"),
        ('output { name: "y" data_type: -1 }', "data_type -1"),
        ('input { name: "x" format: 9 }', "format 9; expected FORMAT_NONE"),
        ("dynamic_batching { default_queue_policy { timeout_action: 5 } }", "timeout_action 5; expected REJECT, DELAY"),
        (
            "dynamic_batching { priority_levels: 1 default_priority_level: 1 "
            "priority_queue_policy { key: 1 value { timeout_action: 2 } } }",
            "timeout_action 2",
        ),
        (
            f"dynamic_batching {{ max_queue_delay_microseconds: {2**64 - 1} }}",
            "max_queue_delay_microseconds 18446744073709551615; expected at most 60000000",
        ),
        ("instance_group { count: 200 } instance_group { count: 57 }", "257 instances; expected 256 at most"),
        ("instance_group { kind: KIND_CPU } instance_group { kind: KIND_GPU }", "on CPU and GPU"),
        ("max_batch_sizes: 8", 'no field named "max_batch_sizes"'),
        ("max_batch_size: eight", "integer"),
        ("max_batch_size: 8 max_batch_size: 9", "multiple"),
        ("max_batch_size {", "cannot be served"),
        ("max_batch_size: -1", "max_batch_size -1; expected 0 or more"),
        ('name: "other"', "names model 'other'; expected 'm'"),
        ("version_policy { specific { versions: 0 } }", "version below 1"),
        (
            "max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }",
            "preferred_batch_size 8; expected 1 to .* 4",
        ),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level 0; expected 1 to 2"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "default_priority_level 3"),
        ("dynamic_batching { priority_levels: 99999 default_priority_level: 1 }", "priority_levels 99999"),
        ("dynamic_batching { priority_queue_policy { key: 1 value {} } }", "priority_queue_policy for a level"),
        ('default_model_filename: "../secret.onnx"', "file '../secret.onnx'; expected a name"),
        ('default_model_filename: ".hidden"', "file '.hidden'"),
        ('output { name: "y" label_filename: "/etc/passwd" }', "file '/etc/passwd'"),
        ('input { name: "x" } input { name: "x" }', "input 'x' 2 times"),
        ("output { dims: 1 }", "output '' 1 times"),
        ('input { name: "x" dims: [ -2 ] }', "input 'x' with dims \\[-2\\]"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(text, words):
    """One line names the field, and nothing is passed over."""
    with pytest.raises(ConfigRefused, match=words) as error:
        parse_config(text, "m")

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('input { name: "photo" }', "input 'photo'; the graph has 'image', 'text'"),
        ('output { name: "image" }', "output 'image'; the graph has 'score', 'loss'"),
        ('input { name: "image" data_type: TYPE_UINT8 }', "input 'image' as TYPE_UINT8; the graph has it as TYPE_FP32"),
        ('input { name: "text" data_type: TYPE_UINT8 }', "the graph has it as TYPE_STRING"),
        ('input { name: "image" dims: [ 1, 4, 8, 8 ] }', r"dims \[1, 4, 8, 8\]; the graph has \[-1, 3, -1, -1\]"),
        ('output { name: "score" dims: [ -1, -1 ] }', r"dims \[-1, -1\]; the graph has \[-1, 10\]"),
        ('output { name: "score" dims: [ 10 ] }', r"dims \[10\]; the graph has \[-1, 10\]"),
        ('max_batch_size: 2 output { name: "score" dims: [ -1, 10 ] }', r"the graph has \[10\] without the batch axis"),
        ('input { name: "text" optional: true }', "input 'text' as optional; the graph needs it"),
        ("max_batch_size: 2", r"max_batch_size 2, but 'loss' of the graph is FP64 \[\]"),
    ],
)
def test_a_configuration_that_contradicts_the_graph_is_refused(text, words):
    """The line says what each of the two has."""
    with pytest.raises(ConfigRefused, match=words):
        complete(parse_config(text, "m"), [IMAGE, TEXT], [SCORE, LOSS])


def test_a_batch_axis_is_not_asked_of_outputs_that_are_not_served():
    """Leaving out the output without rows makes the rest a batch."""
    config = parse_config('max_batch_size: 2 output { name: "score" }', "m")

    assert complete(config, [IMAGE], [SCORE, LOSS])[1] == (SCORE,)


@pytest.mark.parametrize("value", ["", "two", "-1", "2.5", "1025"])
def test_a_thread_count_is_a_number(value):
    """A parameter that means something is not guessed."""
    text = f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{value}" }} }}'

    with pytest.raises(ConfigRefused, match="expected 1 to 1024 threads"):
        choose_threads(parse_config(text, "m"), None)


def test_labels_are_the_lines_of_their_file(tmp_path: Path):
    """A file of labels lies beside config.pbtxt; one that is not there is named without its folder."""
    (tmp_path / "labels.txt").write_text("red\ngrün\n\nblue\n")
    config = parse_config(WHOLE, "m")

    assert read_labels(config, tmp_path) == {"score": ("red", "grün", "", "blue")}
    with pytest.raises(ConfigRefused, match=r"^labels\.txt cannot be read: No such file or directory\.$"):
        read_labels(config, tmp_path / "elsewhere")


def test_only_a_newline_ends_a_label(tmp_path):
    """Of a line of Windows its carriage return is no part; what else separates lines for some stays in the label."""
    (tmp_path / "labels.txt").write_text("a\u2028b\r\nc\x0b\x85\n\nd:e", newline="")

    assert read_labels(parse_config(WHOLE, "m"), tmp_path) == {"score": ("a\u2028b", "c\x0b\x85", "", "d:e")}


@pytest.mark.parametrize(("data", "words"), [(b"\xff", "not UTF-8"), (b"x" * (1 << 20) + b"x", "larger than")])
def test_labels_that_are_no_text_are_refused(tmp_path, data, words):
    """Other bytes, and too many of them, are no labels."""
    (tmp_path / "labels.txt").write_bytes(data)

    with pytest.raises(ConfigRefused, match=words):
        read_labels(parse_config(WHOLE, "m"), tmp_path)

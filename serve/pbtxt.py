"""config.pbtxt, Triton's description of a model: read, completed from the graph, refused where it asks for more."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from google.protobuf import text_format

from bundle.session import Device
from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve.config import MOST_DELAY_MS, MOST_INSTANCES, MOST_THREADS
from serve.errors import ConfigRefused
from serve.queue import Policy

MAX_BYTES = 1 << 20  # of config.pbtxt, and of a file of labels
MAX_LEVELS = 1000  # of priority
THREADS = "intra_op_thread_count"  # the parameter of Triton's ONNX Runtime backend

_NOT_HERE = {
    "allow_ragged_batch": "requests are joined where their shapes agree",
    "batch_input": "the graph gets what the request holds",
    "batch_output": "the graph's outputs are split by rows",
    "cc_model_filenames": "give a default_model_filename",
    "ensemble_scheduling": "models are not chained",
    "host_policy": "instances are not bound to cores or memory",
    "is_shape_tensor": "there is no TensorRT backend",
    "metric_tags": "metrics carry the model's name and version only",
    "model_metrics": "the histograms' bounds are fixed",
    "model_operations": "libraries with operators of their own are not loaded",
    "model_repository_agents": "there are no agents",
    "model_warmup": "every model is run once before it is served",
    "optimization": "graphs are optimised as far as the runtime can, and --device chooses the accelerator",
    "passive": "every instance takes requests",
    "profile": "there is no TensorRT backend",
    "rate_limiter": "only --instances limits what runs at the same time",
    "reshape": "dims are those of the graph; leave them out, and they are completed",
    "response_cache": "answers are not cached",
    "runtime": "there is one backend",
    "secondary_devices": "there is no TensorRT backend",
    "sequence_batching": "requests of a sequence are not kept together",
}
"""Field of Triton's configuration that this server does not have -> why."""


def parse_config(text: str, name: str) -> pb.ModelConfig:
    """What a config.pbtxt says of model `name`, as it stands there.

    Raises:
        ConfigRefused: it cannot be read, contradicts itself, or asks for what this server does not do.
    """
    config = pb.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ConfigRefused(f"config.pbtxt cannot be served: {_explain(str(error))}.") from error
    _check_enums(config)
    _check_identity(config, name)
    _check_batching(config)
    _check_instances(config)
    _check_files([config.default_model_filename, *(output.label_filename for output in config.output)])
    for kind, tensors in (("input", config.input), ("output", config.output)):
        _check_tensors(kind, tensors)
    return config


def _explain(error: str) -> str:
    unknown = re.search(r'no field named "(\w+)"', error)
    if unknown and unknown[1] in _NOT_HERE:
        return f"{unknown[1]} is not supported: {_NOT_HERE[unknown[1]]}. Remove it"
    return error.removesuffix(".")


def _check_enums(config: pb.ModelConfig) -> None:
    """Protobuf takes any number for a name of an enum."""
    batching = config.dynamic_batching
    policies = (batching.default_queue_policy, *batching.priority_queue_policy.values())
    numbers = [
        *(("data_type", tensor.data_type, pb.DataType) for tensor in config.input),
        *(("data_type", tensor.data_type, pb.DataType) for tensor in config.output),
        *(("format", tensor.format, pb.ModelInput.Format) for tensor in config.input),
        *(("kind", group.kind, pb.ModelInstanceGroup.Kind) for group in config.instance_group),
        *(("timeout_action", policy.timeout_action, pb.ModelQueuePolicy.TimeoutAction) for policy in policies),
    ]
    for field, number, kind in numbers:
        if number not in kind.values():
            raise ConfigRefused(f"config.pbtxt has {field} {number}; expected {', '.join(kind.keys())}.")


def _check_identity(config: pb.ModelConfig, name: str) -> None:
    if config.name not in ("", name):
        raise ConfigRefused(f"config.pbtxt names model {config.name!r}; expected {name!r}, as its folder is called.")
    if config.platform not in ("", "onnxruntime_onnx"):
        raise ConfigRefused(f"config.pbtxt has platform {config.platform!r}; expected 'onnxruntime_onnx'.")
    if config.backend not in ("", "onnxruntime"):
        raise ConfigRefused(f"config.pbtxt has backend {config.backend!r}; expected 'onnxruntime'.")
    if config.model_transaction_policy.decoupled:
        raise ConfigRefused("config.pbtxt has model_transaction_policy.decoupled; every request has one answer here.")
    if any(version < 1 for version in config.version_policy.specific.versions):
        raise ConfigRefused("config.pbtxt has a version_policy with a version below 1; expected positive integers.")


def _check_batching(config: pb.ModelConfig) -> None:
    if config.max_batch_size < 0:
        raise ConfigRefused(f"config.pbtxt has max_batch_size {config.max_batch_size}; expected 0 or more.")
    batching = config.dynamic_batching
    limit, levels = config.max_batch_size, batching.priority_levels
    if any(not 1 <= size <= limit for size in batching.preferred_batch_size):
        sizes = ", ".join(map(str, batching.preferred_batch_size))
        raise ConfigRefused(f"config.pbtxt has preferred_batch_size {sizes}; expected 1 to max_batch_size, {limit}.")
    if batching.max_queue_delay_microseconds > MOST_DELAY_MS * 1000:
        raise ConfigRefused(
            f"config.pbtxt has max_queue_delay_microseconds {batching.max_queue_delay_microseconds}; expected at most "
            f"{MOST_DELAY_MS * 1000}."
        )
    if levels > MAX_LEVELS:
        raise ConfigRefused(f"config.pbtxt has priority_levels {levels}; expected at most {MAX_LEVELS}.")
    if levels and not 1 <= batching.default_priority_level <= levels:
        raise ConfigRefused(
            f"config.pbtxt has default_priority_level {batching.default_priority_level}; expected 1 to {levels}, its "
            "priority_levels."
        )
    if any(not 1 <= level <= levels for level in batching.priority_queue_policy):
        raise ConfigRefused(f"config.pbtxt has a priority_queue_policy for a level that is not in 1 to {levels}.")


def _check_instances(config: pb.ModelConfig) -> None:
    kinds = {group.kind for group in config.instance_group}
    if {pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_GPU} <= kinds:
        raise ConfigRefused("config.pbtxt has instance_group on CPU and GPU; expected one of them.")
    for group in config.instance_group:
        if group.count < 0:
            raise ConfigRefused(f"config.pbtxt has an instance_group with count {group.count}; expected 1 or more.")
        if set(group.gpus) - {0} or (group.gpus and group.kind == pb.ModelInstanceGroup.KIND_CPU):
            gpus = ", ".join(map(str, group.gpus))
            raise ConfigRefused(f"config.pbtxt has an instance_group with gpus {gpus}; expected none, or GPU 0 alone.")
    total = sum(group.count or 1 for group in config.instance_group)
    if total > MOST_INSTANCES:
        raise ConfigRefused(f"config.pbtxt has {total} instances; expected {MOST_INSTANCES} at most.")


def _check_files(names: Iterable[str]) -> None:
    for name in names:
        if name and (name.startswith(".") or set(name) & set("/\\\0")):
            raise ConfigRefused(f"config.pbtxt names the file {name!r}; expected a name without a folder.")


def _check_tensors(kind: str, tensors: Sequence[pb.ModelInput] | Sequence[pb.ModelOutput]) -> None:
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if not name or count > 1:
            raise ConfigRefused(f"config.pbtxt has {kind} {name!r} {count} times; expected a name, once.")
    for tensor in tensors:
        if any(size < -1 for size in tensor.dims):
            raise ConfigRefused(f"config.pbtxt has {kind} {tensor.name!r} with dims {list(tensor.dims)}.")


def complete(
    config: pb.ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    optional: Sequence[TensorSpec] = (),
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What is served of a graph under a configuration: inputs and outputs, with the batch axis.

    Datatypes and dims that the configuration leaves out are the graph's, and so are inputs that it does not name. Where
    the graph allows any length, the configuration may allow one. Outputs that it does not name are not served, unless
    it names none; optional inputs that it does not name are not served either.

    Args:
        config: from `parse_config`.
        inputs: of the graph.
        outputs: of the graph.
        optional: inputs that the graph has a value for.

    Raises:
        ConfigRefused: it contradicts the graph.
    """
    batched = config.max_batch_size > 0
    said = _fit("input", config.input, [*inputs, *optional], batched)
    needed = {spec.name for spec in inputs} & {tensor.name for tensor in config.input if tensor.optional}
    if needed:
        raise ConfigRefused(f"config.pbtxt has input {min(needed)!r} as optional; the graph needs it.")
    takes = tuple({spec.name: spec for spec in (*inputs, *said)}.values())
    gives = tuple(_fit("output", config.output, outputs, batched) or outputs)
    unbatched = next((spec for spec in (*takes, *gives) if batched and spec.shape[:1] != (-1,)), None)
    if unbatched:
        raise ConfigRefused(
            f"config.pbtxt has max_batch_size {config.max_batch_size}, but {unbatched.name!r} of the graph is "
            f"{unbatched}, and its first axis is not of any length. Expected 0, or a graph with a batch axis."
        )
    return takes, gives


def _fit(
    kind: str, tensors: Sequence[pb.ModelInput] | Sequence[pb.ModelOutput], specs: Sequence[TensorSpec], batched: bool
) -> list[TensorSpec]:
    known = {spec.name: spec for spec in specs}
    for tensor in tensors:
        if tensor.name not in known:
            names = ", ".join(map(repr, known)) or "none"
            raise ConfigRefused(f"config.pbtxt has {kind} {tensor.name!r}; the graph has {names}.")
    return [_fit_tensor(kind, tensor, known[tensor.name], batched) for tensor in tensors]


def _fit_tensor(kind: str, tensor: pb.ModelInput | pb.ModelOutput, spec: TensorSpec, batched: bool) -> TensorSpec:
    said, real = pb.DataType.Name(tensor.data_type), data_type(spec)
    if said not in ("TYPE_INVALID", real):
        raise ConfigRefused(f"config.pbtxt has {kind} {spec.name!r} as {said}; the graph has it as {real}.")
    axes = spec.shape[batched:]
    dims = tuple(tensor.dims) or axes
    if len(dims) != len(axes) or any(have not in (-1, want) for want, have in zip(dims, axes, strict=True)):
        without = " without the batch axis" if batched else ""
        raise ConfigRefused(
            f"config.pbtxt has {kind} {spec.name!r} with dims {list(dims)}; the graph has {list(axes)}{without}."
        )
    return replace(spec, shape=spec.shape[:batched] + dims)


def data_type(spec: TensorSpec) -> str:
    """The name in DataType of a tensor's datatype."""
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def queue_policy(config: pb.ModelConfig, default: Policy) -> Policy:
    """How requests to the model wait and are joined.

    Args:
        config: from `parse_config`.
        default: the server's own, for what the configuration leaves open.
    """
    batching = config.dynamic_batching
    rows = config.max_batch_size if config.HasField("dynamic_batching") else 0
    limits = batching.default_queue_policy if batching.HasField("default_queue_policy") else None
    return replace(
        _limited(default, limits),
        max_batch=max(rows, 1),
        joins_short=False,
        max_delay_s=batching.max_queue_delay_microseconds / 1e6,
        preferred=tuple(sorted(batching.preferred_batch_size)),
        sizes=tuple(size for size in default.sizes if size <= rows),
        instances=sum(group.count or 1 for group in config.instance_group) or default.instances,
        levels=batching.priority_levels,
        default_level=batching.default_priority_level,
        by_level={level: _limited(default, each) for level, each in batching.priority_queue_policy.items()},
        preserve_order=batching.preserve_ordering,
    )


def _limited(default: Policy, limits: pb.ModelQueuePolicy | None) -> Policy:
    if limits is None:
        return default
    return replace(
        default,
        max_queue=limits.max_queue_size or default.max_queue,
        timeout_s=limits.default_timeout_microseconds / 1e6 or None,
        timeout_override=limits.allow_timeout_override,
        delays_timed_out=limits.timeout_action == pb.ModelQueuePolicy.DELAY,
    )


def choose_device(config: pb.ModelConfig, asked: Device) -> Device:
    """The device that the model's instance groups mean on a server that was asked for one.

    Raises:
        ConfigRefused: they are on a GPU, and the server is to use none.
    """
    kinds = {group.kind for group in config.instance_group}
    if pb.ModelInstanceGroup.KIND_CPU in kinds:
        return "cpu"
    if pb.ModelInstanceGroup.KIND_GPU in kinds and asked == "cpu":
        raise ConfigRefused("config.pbtxt has an instance_group of KIND_GPU; the server was started with --device cpu.")
    return "cuda" if pb.ModelInstanceGroup.KIND_GPU in kinds and asked == "auto" else asked


def choose_threads(config: pb.ModelConfig, default: int | None) -> int | None:
    """Threads of one run, by the parameter `intra_op_thread_count`; 0 and no such parameter are the default.

    Raises:
        ConfigRefused: it is not a number, or too large.
    """
    if THREADS not in config.parameters:
        return default
    value = config.parameters[THREADS].string_value
    if not re.fullmatch(r"[0-9]{1,4}", value) or int(value) > MOST_THREADS:
        raise ConfigRefused(f"config.pbtxt has parameter {THREADS} {value!r}; expected 1 to {MOST_THREADS} threads.")
    return int(value) or default


def read_labels(config: pb.ModelConfig, folder: Path) -> dict[str, tuple[str, ...]]:
    """The labels of each output that names a file of them, one a line; only a newline ends one.

    Raises:
        ConfigRefused: a file cannot be read.
    """
    named = {output.name: output.label_filename for output in config.output if output.label_filename}
    return {name: _lines(read_text(folder / file)) for name, file in named.items()}


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))


def read_text(path: Path) -> str:
    """A small UTF-8 file.

    Raises:
        ConfigRefused: it is not there, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigRefused(f"{path.name} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigRefused(f"{path.name} is larger than {MAX_BYTES} bytes.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigRefused(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}.") from error

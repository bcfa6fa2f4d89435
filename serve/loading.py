"""A place on the disk -> models that can be called: verified, held to their gate and their config.pbtxt, warm."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bundle.errors import (
    BundleDamaged,
    BundleError,
    BundleUnsupported,
    DeviceUnavailable,
    EdgewardError,
    MissingExtra,
    ModelError,
    SelfTestFailed,
)
from bundle.log import log
from bundle.manifest import Variant
from bundle.model import load_model, start_variant
from bundle.session import Session
from bundle.store import Bundle
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from serve.config import ServeConfig
from serve.envelope import MAX_FIELDS, Envelope
from serve.errors import ConfigRefused, GateNotPassed, StartError, forget_frames
from serve.inputs import MAX_BYTES
from serve.layout import Place
from serve.models import ServedModel, bare_graph, check_gate, default_policy, plain_graph, served_bundle
from serve.pbtxt import THREADS, choose_device, choose_threads, complete, queue_policy, read_labels
from serve.plan import Plan, planner
from serve.scheduler import Scheduler
from serve.spare import Spare
from serve.statistics import Statistics

_REASONS: dict[type[EdgewardError], str] = {
    SelfTestFailed: "this device does not reproduce the golden examples",
    BundleUnsupported: "the bundle has another format version, or no variant for this device",
    BundleDamaged: "a file of the bundle is missing, unlisted or changed",
    BundleError: "it is no bundle",
    DeviceUnavailable: "the device that it needs cannot be used",
    MissingExtra: "a package that it needs is not installed",
    ModelError: "the graph cannot be loaded",
    GateNotPassed: "no accuracy gate has passed it, and this server asks for one",
}


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model that can be called, its queue and its counts."""

    model: ServedModel
    scheduler: Scheduler
    statistics: Statistics
    loaded_s: float  # how long loading took
    plan: Callable[[Envelope], Plan]  # of a request to it


@dataclass(frozen=True, eq=False)
class Loaded:
    """What is served from one place: a bundle and its bare graph, or one graph."""

    place: Place
    served: tuple[Served, ...]


@dataclass(frozen=True)
class Refused:
    """A place that is not served, and why."""

    place: Place
    error: Exception


def reason(error: Exception) -> str:
    """Why a model was not loaded, in words that a client may read: no paths, nothing of the runtime's own."""
    if isinstance(error, ConfigRefused):
        return str(error).removesuffix(".")
    known = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), None)
    return known or "the server's log says why"


def load_place(place: Place, config: ServeConfig) -> Loaded | Refused:
    """Verify and start everything that is served from one place, and say in the log how that went.

    Args:
        place: from serve.layout.
        config: of the server.
    """
    start = time.perf_counter()
    told = log.bind(model=place.name, version=place.version, path=str(place.path))
    try:
        models = _load(place, config)
    except EdgewardError as error:
        told.error("not loaded", because=str(error))
        refused = Refused(place, error)
    except Exception as error:  # of a library that a bundle's files are given to; the other models need not know
        told.exception("not loaded")
        refused = Refused(place, error)
    else:
        loaded_s = time.perf_counter() - start
        told.info("loaded", device=models[0].device, gate=models[0].facts["gate"], seconds=round(loaded_s, 3))
        return Loaded(place, tuple(_served(model, loaded_s) for model in models))
    forget_frames(refused.error)  # which hold the session
    return refused


def _served(model: ServedModel, loaded_s: float) -> Served:
    statistics = Statistics()
    return Served(model, Scheduler(model, model.policy, statistics), statistics, loaded_s, planner(model))


def _load(place: Place, config: ServeConfig) -> tuple[ServedModel, ...]:
    models = _load_bundle(place, config) if place.is_bundle else (_load_graph(place, config),)
    if config.require_gate:
        check_gate(models[0])
    if models[0].facts["gate"] == "ungated":
        log.warning("ungated model", model=place.name, version=place.version, path=str(place.path))
    if config.gpu_memory_bytes is not None and models[0].device == "cpu":
        log.warning("no GPU memory to limit", model=place.name, version=place.version, device="cpu")
    check_callable(models[-1])
    warm_up(models[-1])
    return models


def _load_bundle(place: Place, config: ServeConfig) -> tuple[ServedModel, ...]:
    model = load_model(
        place.path,
        device=config.device,
        threads=config.threads,
        gpu_memory_bytes=config.gpu_memory_bytes,
        batch_sizes=config.batch_sizes,
    )
    manifest = model.manifest
    if (place.name, place.version) != (manifest.name, manifest.version):
        raise StartError(
            f"{place.path} holds bundle {manifest.name!r} version {manifest.version}; in a repository it belongs in "
            f"{manifest.name}/{manifest.version}. Move it, or export it with --name {place.name} --version "
            f"{place.version}."
        )
    session = model.session
    policy = default_policy(config, joins=model.variant.batch_invariant, device=session.device, threads=session.threads)
    spare = Spare(place.name, partial(_second, Bundle(place.path, manifest), model.variant)) if policy.splits else None
    return served_bundle(model, place.path, policy, spare), bare_graph(model, place.path, policy, spare)


def _second(bundle: Bundle, variant: Variant) -> Session:
    """The graph that is served once more, by the hashes of the manifest that it had, and with one thread."""
    return start_variant(bundle, variant, threads=1).session


def _load_graph(place: Place, config: ServeConfig) -> ServedModel:
    said = place.config or pb.ModelConfig()
    try:
        graph = place.path.read_bytes()
        device, threads = choose_device(said, config.device), choose_threads(said, config.threads)
        session = Session(
            graph,
            device=device,
            threads=threads,
            gpu_memory_bytes=config.gpu_memory_bytes,
            batch_sizes=config.batch_sizes,
        )
    except DeviceUnavailable as error:
        if not said.instance_group:
            raise
        raise ConfigRefused("config.pbtxt has an instance_group of KIND_GPU; no GPU can be used here.") from error
    except (OSError, ModelError) as error:
        raise ModelError(f"{place.path} cannot be served: {error}") from error
    fixed = bool(said.instance_group) or THREADS in said.parameters
    policy = default_policy(config, joins=False, device=session.device, threads=session.threads, fixed=fixed)
    spare = Spare(place.name, partial(_again, place, hashlib.sha256(graph).digest())) if policy.splits else None
    model = plain_graph(session, place.name, place.version, place.path, policy, spare)
    if place.config is None:
        return model
    inputs, outputs = complete(said, session.inputs, session.outputs, session.optional)
    return replace(
        model,
        inputs=inputs,
        outputs=outputs,
        optional=model.optional & {spec.name for spec in inputs},
        labels=read_labels(said, place.path.parent.parent),
        max_batch=said.max_batch_size,
        joins=said.max_batch_size > 0,
        policy=queue_policy(said, policy),
        config=said,
    )


def _again(place: Place, digest: bytes) -> Session:
    """A plain graph once more, with one thread."""
    graph = place.path.read_bytes()
    if hashlib.sha256(graph).digest() != digest:
        raise ModelError(f"{place.path} is not the file any more that is served.")
    return Session(graph, device="cpu", threads=1)


def check_callable(model: ServedModel) -> None:
    """Refuse a model that no request fits.

    Raises:
        ModelError: it takes more inputs than a request may have, or one that is larger than a request may claim.
    """
    needed = [spec for spec in model.inputs if spec.name not in model.optional]
    if len(needed) >= MAX_FIELDS:  # of which the model's name is one
        raise ModelError(
            f"{model.source} cannot be served: it takes {len(needed)} inputs; a request has at most {MAX_FIELDS - 1}."
        )
    for spec in needed:
        size = math.prod(max(length, 1) for length in spec.shape) * NUMPY_TYPES[spec.datatype].itemsize
        if size > MAX_BYTES:
            raise ModelError(
                f"{model.source} cannot be served: input {spec.name!r} has shape {list(spec.shape)}, which is at least "
                f"{size} bytes; a request may claim {MAX_BYTES} for a tensor."
            )


def warm_up(model: ServedModel) -> None:
    """Run a model that takes tensors with zeros, once for each number of rows that runs are padded to.

    The first run of a session takes its memory and sets up its kernels. Zeros can be no input of this very graph; then
    the first request is the first run. A bundle's golden examples have been through its session before.
    """
    try:
        arrays = {spec.name: _zeros(spec) for spec in model.inputs if spec.name not in model.optional}
        sizes: tuple[int | None, ...] = (() if model.key(arrays) is None else model.policy.sizes) or (None,)
        for size in sizes:
            model.run([model.decode(arrays)], size)
    except (EdgewardError, MemoryError) as error:
        log.info("not warmed up", model=model.name, version=model.version, because=str(error))


def _zeros(spec: TensorSpec) -> np.ndarray:
    shape = [1 if size == -1 else size for size in spec.shape]
    return np.full(shape, b"", object) if spec.datatype == "BYTES" else np.zeros(shape, NUMPY_TYPES[spec.datatype])

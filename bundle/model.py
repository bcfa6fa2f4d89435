"""A bundle on a device: raw examples in, answers out. The one predict path of gate, server and scorer."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from bundle import outputs, preprocess
from bundle.errors import BadInput, BundleDamaged, BundleUnsupported, DeviceUnavailable, SelfTestFailed
from bundle.host import cpu_count, machine_class
from bundle.log import log
from bundle.manifest import Golden, ImageInput, Input, Manifest, Variant
from bundle.session import Device, Session
from bundle.store import Bundle, open_bundle

MAX_ROWS = 64  # of one session run; more examples are run in turns
DEVICES = ("tensorrt", "cuda", "cpu")  # in the order in which they are tried
ADD = "edgeward export CHECKPOINT --add-to BUNDLE --out NEW"
JPEG_MEAN, JPEG_MAX = 0.5, 32  # of 255: what two decoders may differ by, on average and at most


def predict_logits(
    session: Session,
    spec: Input,
    rows: Sequence[np.ndarray] | np.ndarray,
    *,
    batch_invariant: bool,
    most: int = MAX_ROWS,
) -> dict[str, np.ndarray]:
    """Graph outputs for any number of preprocessed examples.

    A graph that is not bit-equal over batch and padding runs one example at a time, unpadded, so that an answer
    never depends on its neighbours.

    Args:
        session: of the graph.
        spec: how the examples were preprocessed.
        rows: tensors without batch axis, from bundle.preprocess.encoder, or one array of them; at least one.
        batch_invariant: see Variant.
        most: rows of one run, where answers do not depend on it.
    """
    size = most if batch_invariant else 1
    parts = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if not isinstance(batch, np.ndarray):
            batch = list(batch)  # rows may be preprocessed as they are asked for
        length = None
        if batch_invariant and preprocess.is_sequence(spec):
            length = preprocess.bucket(max(preprocess.length(row, spec) for row in batch), spec)
        parts.append(session.run(preprocess.collate(batch, spec, length)))
    return parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


class Model:
    """One variant of a bundle, loaded, and self-tested by `load_model`. Its methods may be called from several threads.

    Attributes:
        manifest: of the bundle.
        variant: the one that is served.
        session: the bare graph.
    """

    def __init__(self, bundle: Bundle, variant: Variant, session: Session) -> None:
        self.manifest: Manifest = bundle.manifest
        self.variant = variant
        self.session = session
        self.encode = preprocess.encoder(bundle.manifest.input, bundle.read)
        """One raw example -> its tensor without batch axis; raises BadInput."""

    def logits(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Graph outputs for preprocessed examples: `logits` or `TASK.logits`, float32 (N, columns of the task)."""
        if not rows:
            widths = outputs.logits_widths(self.manifest.tasks)
            return {name: np.zeros((0, width), np.float32) for name, width in widths.items()}
        return predict_logits(self.session, self.manifest.input, rows, batch_invariant=self.variant.batch_invariant)

    def rows(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        """Raw examples, preprocessed.

        Raises:
            BadInput: an example cannot be used; the message begins with its position.
        """
        rows = []
        for i, raw in enumerate(raws):
            try:
                rows.append(self.encode(raw))
            except BadInput as error:
                raise BadInput(f"example {i}: {error}") from error
        return rows

    def predict(self, raws: Sequence[bytes]) -> dict[str, np.ndarray]:
        """The answers for raw examples, as bundle.outputs.answer_specs names them.

        Raises:
            BadInput: an example cannot be used; the message begins with its position.
        """
        return outputs.answers(self.manifest.tasks, self.logits(self.rows(raws)))


def load_model(
    path: Path,
    *,
    device: Device = "auto",
    threads: int | None = None,
    gpu_memory_bytes: int | None = None,
    batch_sizes: Sequence[int] = (),
) -> Model:
    """Open, verify and start a bundle, and hold it to its golden examples on this device.

    Args:
        path: of the bundle.
        device: "auto" takes the first that works here of those that the bundle has a variant for.
        threads: see `start_variant`, as the next two.
        gpu_memory_bytes: most that it may take on a GPU.
        batch_sizes: numbers of rows that most runs have.

    Raises:
        BundleError: it is damaged, unsupported, has no variant for the device, or fails its self-test.
        DeviceUnavailable: a GPU was asked for, or is all that there are variants for, and cannot be used.
        MissingExtra: the bundle's preprocessing needs a package that is not installed.
        ModelError: the runtime cannot load or run the graph.
    """
    bundle = open_bundle(path)
    devices = DEVICES if device == "auto" else (device,)
    *first, last = _choices(bundle, devices)
    start = partial(start_variant, bundle, threads=threads, gpu_memory_bytes=gpu_memory_bytes, batch_sizes=batch_sizes)
    for variant in first:
        try:
            return _started(start(variant), path)
        except DeviceUnavailable as error:
            log.info("device passed over", device=variant.device, because=str(error))
    return _started(start(last), path)


def _choices(bundle: Bundle, devices: Sequence[str]) -> list[Variant]:
    """At least one."""
    found = [choose_variant(bundle.manifest.variants, device) for device in devices]
    choices = [variant for variant in found if variant]
    if not choices:
        built = ", ".join(f"{variant.name} for {variant.device}" for variant in bundle.manifest.variants)
        raise BundleUnsupported(f"{bundle.path} has no variant for device {devices[0]}, only {built}.")
    return choices


def choose_variant(variants: Sequence[Variant], device: str) -> Variant | None:
    """What is served on this machine's CPU or GPU, or None when there is nothing for it.

    The first that was gated on this class of machine. Else the first that computes in floating point: its accuracy does
    not hang on the instruction set. Else, int8 alone being there, the first: its self-test decides.
    """
    fitting = [variant for variant in variants if variant.device == device]
    gated_here = [variant for variant in fitting if variant.isa == machine_class(device)]
    floating = [variant for variant in fitting if variant.precision != "int8"]
    return next(iter(gated_here or floating or fitting), None)


def _started(model: Model, path: Path) -> Model:
    """The same, with a word in the log where it was gated on another class of machine."""
    variant = model.variant
    here = machine_class(variant.device)
    if variant.isa != here:
        log.warning(
            "gated on another class of machine; the self-test passed on this one",
            bundle=str(path),
            variant=variant.name,
            gated=variant.isa,
            here=here,
            remedy=ADD,
        )
    return model


def start_variant(
    bundle: Bundle,
    variant: Variant,
    *,
    threads: int | None = None,
    gpu_memory_bytes: int | None = None,
    batch_sizes: Sequence[int] = (),
) -> Model:
    """Load one variant and hold it to its golden examples on its device.

    Args:
        bundle: that it is in.
        variant: one of the bundle's.
        threads: of one run on the CPU; by default as export measured it.
        gpu_memory_bytes: most that it may take on a GPU.
        batch_sizes: numbers of rows that most runs have, for CUDA graphs.

    Raises:
        BundleError, DeviceUnavailable, MissingExtra, ModelError: see `load_model`.
    """
    if variant.device == "cpu" and threads is None:
        threads = min(variant.latency.threads, cpu_count())  # as export measured it
    session = Session(
        bundle.read(variant.file),
        device=variant.device,
        threads=threads,
        gpu_memory_bytes=gpu_memory_bytes,
        batch_sizes=batch_sizes,
    )
    _check_graph(bundle, variant, session)
    model = Model(bundle, variant, session)
    self_test(bundle, model)
    return model


def _check_graph(bundle: Bundle, variant: Variant, session: Session) -> None:
    takes = {spec.name: spec.datatype for spec in preprocess.graph_inputs(bundle.manifest.input)}
    gives = dict.fromkeys(outputs.logits_widths(bundle.manifest.tasks), "FP32")
    taken = {spec.name: spec.datatype for spec in session.inputs}
    given = {spec.name: spec.datatype for spec in session.outputs}
    if taken != takes or given != gives:
        raise BundleDamaged(
            f"{bundle.path / variant.file} takes {taken} and gives {given}; by its manifest it takes {takes} and "
            f"gives {gives}."
        )


def self_test(bundle: Bundle, model: Model) -> None:
    """Preprocess and run every golden example and compare.

    Raises:
        SelfTestFailed: a tensor or a logit differs by more than the manifest allows.
    """
    for golden in bundle.manifest.goldens:
        got = model.session.run(golden_tensors(bundle, golden, model.encode))
        for name, row in golden.logits[model.variant.name].items():
            expected = np.array([row], np.float32)
            same_shape = got[name].shape == expected.shape
            difference = float(np.abs(got[name] - expected).max()) if same_shape else float("inf")
            if not difference <= model.variant.tolerance:  # a NaN fails too
                raise SelfTestFailed(
                    f"{bundle.path}: {name} of golden example {golden.file} differs by {difference:.3g} from what was "
                    f"gated; the tolerance of variant {model.variant.name} is {model.variant.tolerance:.3g} (gated on "
                    f"{model.variant.isa}, here {machine_class(model.variant.device)}). It was not started. Add a "
                    f"variant for this machine: {ADD}."
                )


def golden_tensors(bundle: Bundle, golden: Golden, encode: preprocess.Encode) -> dict[str, np.ndarray]:
    """The graph's inputs for one golden example, preprocessed here and found to be those of the bundle.

    Raises:
        SelfTestFailed: the example cannot be read here, or a tensor differs by more than the manifest allows.
    """
    try:
        tensors = preprocess.collate([encode(bundle.read(golden.file))], bundle.manifest.input)
    except BadInput as error:
        raise SelfTestFailed(f"{bundle.path}: golden example {golden.file} cannot be read here: {error}") from error
    for name, tensor in tensors.items():
        _check_tensor(bundle, golden, name, tensor[0], _load_tensor(bundle, golden, name))
    return tensors


def _load_tensor(bundle: Bundle, golden: Golden, name: str) -> np.ndarray:
    if name not in golden.tensors:
        raise BundleDamaged(f"{bundle.path}: golden example {golden.file} has no tensor for graph input {name}.")
    file = golden.tensors[name]
    try:
        tensor: np.ndarray = np.lib.format.read_array(BytesIO(bundle.read(file)), allow_pickle=False)
    except (ValueError, MemoryError) as error:
        raise BundleDamaged(f"{bundle.path / file} is not a .npy file: {error}.") from error
    return tensor


def _check_tensor(bundle: Bundle, golden: Golden, name: str, got: np.ndarray, expected: np.ndarray) -> None:
    same = got.shape == expected.shape and got.dtype == expected.dtype
    if same and (golden.exact or not isinstance(bundle.manifest.input, ImageInput)):
        same = np.array_equal(got, expected)
    elif same:
        difference = np.abs(got.astype(np.int16) - expected.astype(np.int16))
        same = difference.mean() <= JPEG_MEAN and difference.max() <= JPEG_MAX
    if not same:
        raise SelfTestFailed(
            f"{bundle.path}: golden example {golden.file} is preprocessed to another {name} than the model was gated "
            "on. A decoder, resizer, tokenizer or segmenter of another version is installed here. The bundle was not "
            "started."
        )

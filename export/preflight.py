"""Before the first epoch: will this model, once it is trained, be exported, survive int8, and be fast enough?"""

import time
from collections.abc import Sequence

import numpy as np

from bundle import preprocess
from bundle.errors import GateFailed, ModelError
from bundle.log import log
from bundle.manifest import ImageInput, Input, Record, Task, VectorInput
from bundle.model import predict_logits
from bundle.session import Session
from export import graph, quantize, timing
from finetune.model import Network

EXAMPLES = 200  # that int8 is tried on
SAMPLES = 32  # for parity and timing
DRIFT = 0.3
"""Relative error of the features in int8 from which on accuracy is in doubt. MiniLM and ResNet18 have 0.14,
EfficientNet-Lite0, whose head can fall from 0.94 to 0.25 in int8, has 0.43 (benchmarks/drift.py)."""


class Drift(Record, frozen=True, kw_only=True):
    """How far int8 moves what the head will see, over the examples."""

    variant: str
    cosine: float  # mean over the examples, of the features less their mean
    relative_error: float  # root mean square of the change / standard deviation of the features


class Preflight(Record, frozen=True, kw_only=True):
    """What was measured of a network whose head is untrained."""

    parity: graph.Parity
    drift: Drift | None  # none when the graph cannot be quantized
    fp32_ms: float  # p50 of one example
    int8_ms: float | None
    threads: int  # of the faster one
    max_latency_ms: float | None
    seconds: float


def preflight(
    network: Network,
    spec: Input,
    tasks: Sequence[Task],
    rows: Sequence[np.ndarray],
    *,
    max_latency_ms: float | None = None,
    threads: int | None = None,
    timer: timing.Timer = timing.interleaved,
) -> Preflight:
    """Export, quantize and time a network before it is trained.

    int8 is dynamic for texts and words, static for images and vectors. It is only a warning when it moves the features
    far: the trained ones may behave, a refitted head may follow them, and fp32 can ship.

    Args:
        network: float32, on the CPU; its mode is as before afterwards.
        spec: of its input.
        tasks: of its head.
        rows: two or more preprocessed training examples, of which EXAMPLES are used.
        max_latency_ms: the most that one example may take at the median, by the faster of fp32 and int8.
        threads: the most that one run may have; by default all the cores that this process may use.
        timer: compares the latency of two sessions.

    Raises:
        GateFailed: it cannot be exported, its graph is not the network, or neither variant is fast enough.
    """
    start = time.perf_counter()
    rows = list(rows[:EXAMPLES])
    fp32, parity = _compile(network, spec, tasks, rows)
    int8 = _quantize(fp32, spec, rows)
    reference = Session(fp32, device="cpu", threads=threads)
    feeds = [preprocess.collate([row], spec) for row in rows[:SAMPLES]]
    times, session = timing.fastest(fp32, reference, feeds, timer, threads=threads)
    fp32_ms, int8_ms, drift = times.p50_ms, None, None
    if int8 is not None:
        times, compiled = timing.fastest(int8, reference, feeds, timer, threads=threads)
        int8_ms = times.p50_ms
        drift = _drift(_variant(spec), reference, compiled, spec, rows)
        session = compiled if int8_ms < fp32_ms else session
    found = Preflight(
        parity=parity,
        drift=drift,
        fp32_ms=fp32_ms,
        int8_ms=int8_ms,
        threads=session.threads,
        max_latency_ms=max_latency_ms,
        seconds=time.perf_counter() - start,
    )
    _report(found)
    return found


def _compile(
    network: Network, spec: Input, tasks: Sequence[Task], rows: Sequence[np.ndarray]
) -> tuple[bytes, graph.Parity]:
    training = network.training
    network.eval()
    try:
        fp32 = graph.to_onnx(network, spec, tasks, rows, features=True)
        return fp32, graph.check_parity(fp32, network, spec, tasks, rows[:SAMPLES])
    except (ModelError, GateFailed) as error:
        raise GateFailed(
            f"pre-flight: {error} Nothing was trained. Choose another model, or train it anyway with --no-preflight."
        ) from error
    finally:
        network.train(training)


def _variant(spec: Input) -> str:
    return "int8-static" if isinstance(spec, ImageInput | VectorInput) else "int8-dynamic"


def _quantize(fp32: bytes, spec: Input, rows: Sequence[np.ndarray]) -> bytes | None:
    try:
        return (
            quantize.int8_minmax(fp32, spec, rows) if _variant(spec) == "int8-static" else quantize.int8_dynamic(fp32)
        )
    except ModelError as error:
        log.warning("pre-flight: no int8", because=str(error))
        return None


def _drift(variant: str, fp32: Session, int8: Session, spec: Input, rows: Sequence[np.ndarray]) -> Drift:
    expected, got = (
        predict_logits(session, spec, rows, batch_invariant=False)[graph.FEATURES].astype(np.float64)
        for session in (fp32, int8)
    )
    mean = expected.mean(axis=0)
    change, expected, got = got - expected, expected - mean, got - mean
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(got, axis=1)
    least = np.finfo(np.float64).tiny
    return Drift(
        variant=variant,
        cosine=float(np.mean(np.sum(expected * got, axis=1) / np.maximum(lengths, least))),
        relative_error=float(np.linalg.norm(change) / max(float(np.linalg.norm(expected)), least)),
    )


def _report(found: Preflight) -> None:
    """Log what was found, and refuse what is too slow."""
    int8 = {} if found.drift is None else {"int8_ms": round(found.int8_ms or 0, 3), **_figures(found.drift)}
    log.info("pre-flight", fp32_ms=round(found.fp32_ms, 3), **int8, threads=found.threads)
    if found.drift is not None and not found.drift.relative_error <= DRIFT:  # NaN warns too
        log.warning(
            "pre-flight: int8 changes the features much; fp32 may have to ship, or try export --refit-head",
            **_figures(found.drift),
        )
    fastest = min(ms for ms in (found.fp32_ms, found.int8_ms) if ms is not None)
    if found.max_latency_ms is not None and not fastest <= found.max_latency_ms:
        int8_ms = "not to be had" if found.int8_ms is None else f"{found.int8_ms:.2f} ms"
        raise GateFailed(
            f"pre-flight: one example takes {found.fp32_ms:.2f} ms in fp32, int8 is {int8_ms} (median on this machine, "
            f"{found.threads} threads for the faster); --max-latency-ms is {found.max_latency_ms:g}. Nothing was "
            "trained. Choose a smaller model, a smaller --image-size or --max-length, or allow more."
        )


def _figures(drift: Drift) -> dict[str, float]:
    return {"cosine": round(drift.cosine, 4), "relative_error": round(drift.relative_error, 4)}

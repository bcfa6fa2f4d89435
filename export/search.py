"""Which compiled variant ships: built, timed, chosen on the selection split, gated once on the gate split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog

from bundle import preprocess
from bundle.errors import DataError
from bundle.manifest import GateRecord, Input, Latency
from bundle.model import predict_logits
from bundle.session import Session
from export import gate, graph, quantize, timing
from finetune import evaluate
from finetune.checkpoint import Checkpoint
from finetune.data import Dataset
from finetune.loader import EncodedRows

log = structlog.get_logger()

WORTHWHILE = 0.97  # an int8 variant whose latency ratio may be above this is not worth its rounding
SAMPLES = 32  # examples for timing, parity and invariance
VariantName = Literal["fp32", "int8-dynamic", "int8-static"]


@dataclass(frozen=True)
class Split:
    """Held-out examples as the graph takes them, and what PyTorch says of them."""

    rows: Sequence[np.ndarray]
    truth: np.ndarray  # int64 (N,)
    logits: np.ndarray  # float32 (N, C), of PyTorch
    indices: np.ndarray  # int64 (N,), into the dataset

    @property
    def reference(self) -> np.ndarray:
        """Labels int64 (N,) that PyTorch predicts."""
        labels: np.ndarray = self.logits.argmax(axis=1)
        return labels


@dataclass(frozen=True)
class Candidate:
    """A compiled variant and what was measured of it on the selection split."""

    name: VariantName
    graph: bytes
    session: Session
    batch_invariant: bool
    latency: Latency
    selection: GateRecord

    def predict(self, rows: Sequence[np.ndarray], spec: Input) -> np.ndarray:
        """Labels int64 (N,), by the path that serves."""
        logits = predict_logits(self.session, spec, rows, batch_invariant=self.batch_invariant)["logits"]
        labels: np.ndarray = logits.argmax(axis=1)
        return labels


@dataclass(frozen=True)
class Findings:
    """What the search found out."""

    parity: graph.Parity
    candidates: tuple[Candidate, ...]  # fp32 first
    chosen: Candidate  # on the selection split
    gated: GateRecord | None  # of `chosen`; none when that is fp32, which passes on parity alone
    shipped: Candidate
    selection: Split
    held_out: Split  # the gate split
    predicted: np.ndarray  # labels int64 (N,) of `shipped` on the gate split


def search(
    checkpoint: Checkpoint,
    dataset: Dataset,
    *,
    variant: Literal["auto"] | VariantName,
    budget: float,
    calibration: int,
    threads: int | None,
    timer: timing.Timer,
) -> Findings:
    """Compile and measure every variant, choose one, and gate it.

    Args:
        checkpoint: what to compile.
        dataset: that it was split from.
        variant: the one to gate, or "auto" for the fastest that the selection split lets through.
        budget: largest drop in accuracy that passes, a fraction.
        calibration: how many training examples set the ranges of static int8.
        threads: the most that one run may have; by default all the cores that this process may use.
        timer: compares the latency of two sessions.

    Raises:
        GateFailed: the fp32 graph is not the PyTorch model.
    """
    spec = checkpoint.spec.input
    selection = reference_split(checkpoint, dataset, "selection")
    fp32 = graph.to_onnx(checkpoint.network, spec, list(selection.rows[:2]))
    parity = graph.check_parity(fp32, checkpoint.network, spec, list(selection.rows[:SAMPLES]))
    log.info("parity", largest_difference=parity.served, tolerance=parity.tolerance)

    graphs: dict[VariantName, bytes] = {"fp32": fp32}
    if variant in ("auto", "int8-dynamic"):
        graphs["int8-dynamic"] = quantize.int8_dynamic(fp32)
    if variant in ("auto", "int8-static"):
        graphs["int8-static"] = quantize.int8_static(fp32, spec, calibration_rows(checkpoint, dataset, calibration))
    reference = Session(fp32, device="cpu", threads=threads)
    candidates = tuple(
        measure(name, compiled, reference, spec, selection, budget, timer) for name, compiled in graphs.items()
    )
    chosen = choose(candidates) if variant == "auto" else next(one for one in candidates if one.name == variant)

    held_out = reference_split(checkpoint, dataset, "gate")
    log.info("gate", variant=chosen.name, examples=len(held_out.truth), budget=budget)
    predicted, shipped, gated = chosen.predict(held_out.rows, spec), chosen, None
    if chosen.name != "fp32":
        gated = gate.judge(held_out.truth, held_out.reference, predicted, budget=budget)
        log.info("verdict", variant=chosen.name, verdict=gated.verdict, drop=gated.drop, drop_upper=gated.drop_upper)
        if gated.verdict != "PASS":
            shipped = candidates[0]
            predicted = shipped.predict(held_out.rows, spec)
    return Findings(parity, candidates, chosen, gated, shipped, selection, held_out, predicted)


def reference_split(checkpoint: Checkpoint, dataset: Dataset, name: Literal["selection", "gate"]) -> Split:
    """Preprocess a held-out split and run it through PyTorch."""
    indices = checkpoint.splits.indices(dataset, name)
    if len(indices) < 2:
        raise DataError(f"the {name} split holds {len(indices)} examples; give it more (edgeward finetune --split).")
    log.info("reference", split=name, examples=len(indices))
    rows = EncodedRows(dataset, indices, checkpoint.encode)
    logits = evaluate.logits(checkpoint.network, rows, checkpoint.spec.input)
    return Split(rows, dataset.labels[indices], logits, indices)


def calibration_rows(checkpoint: Checkpoint, dataset: Dataset, count: int) -> Sequence[np.ndarray]:
    """Preprocessed training examples, drawn at random with a fixed seed."""
    indices = checkpoint.splits.indices(dataset, "train")
    picked = np.random.default_rng(0).permutation(indices)[:count]
    return EncodedRows(dataset, picked, checkpoint.encode)


def measure(
    name: VariantName,
    compiled: bytes,
    reference: Session,
    spec: Input,
    selection: Split,
    budget: float,
    timer: timing.Timer,
) -> Candidate:
    """Time a variant against fp32, with as many threads as suit it, and run it over the selection split."""
    sample = list(selection.rows[:SAMPLES])
    feeds = [preprocess.collate([row], spec) for row in sample]
    timed = []
    for threads in sorted({1, reference.threads}, reverse=True):  # a small model loses by sharing its work out
        session = Session(compiled, device="cpu", threads=threads)
        timed.append((timer(session, reference, feeds), session))
    times, session = min(timed, key=lambda each: each[0].ratio)
    invariant = graph.is_batch_invariant(session, spec, sample)
    logits = predict_logits(session, spec, selection.rows, batch_invariant=invariant)["logits"]
    candidate = Candidate(
        name,
        compiled,
        session,
        invariant,
        Latency(
            p50_ms=times.p50_ms,
            fp32_p50_ms=times.reference_p50_ms,
            ratio=times.ratio,
            ratio_upper=times.ratio_upper,
            threads=session.threads,
        ),
        gate.judge(selection.truth, selection.reference, logits.argmax(axis=1), budget=budget),
    )
    log.info(
        "candidate",
        variant=name,
        threads=session.threads,
        ratio=round(times.ratio, 3),
        ratio_upper=round(times.ratio_upper, 3),
        drop=candidate.selection.drop,
        batch_invariant=invariant,
    )
    return candidate


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest that is surely faster than fp32 and within the budget on the selection split; else fp32."""
    worthy = [
        one
        for one in candidates[1:]
        if one.latency.ratio_upper <= WORTHWHILE and one.selection.drop <= one.selection.budget
    ]
    return min(worthy, key=lambda one: one.latency.ratio, default=candidates[0])

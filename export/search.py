"""Which compiled variant ships: built, timed, chosen on the selection split, gated once on the gate split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog

from bundle import preprocess
from bundle.errors import DataError
from bundle.manifest import GateRecord, Input, Latency, Task
from bundle.model import predict_logits
from bundle.session import Session
from export import gate, graph, quantize, refit, timing
from finetune import evaluate
from finetune.checkpoint import Checkpoint
from finetune.data import Dataset
from finetune.loader import EncodedRows
from finetune.splits import SplitName
from finetune.target import Target

log = structlog.get_logger()

WORTHWHILE = 0.97  # an int8 variant whose latency ratio may be above this is not worth its rounding
SAMPLES = 32  # examples for timing, parity and invariance
VariantName = Literal["fp32", "int8-dynamic", "int8-static", "int8-static-refit"]


@dataclass(frozen=True)
class Split:
    """Held-out examples as the graph takes them, and what PyTorch says of them."""

    rows: Sequence[np.ndarray]
    targets: tuple[Target, ...]  # of these N examples, one for each task
    logits: np.ndarray  # float32 (N, columns of all tasks), of PyTorch
    indices: np.ndarray  # int64 (N,), into the dataset

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A compiled variant and what was measured of it on the selection split."""

    name: VariantName
    graph: bytes
    session: Session
    batch_invariant: bool
    latency: Latency
    logits: np.ndarray  # float32 (N, columns of all tasks), of the selection split
    selection: tuple[GateRecord, ...]  # for each task

    @property
    def within_budget(self) -> bool:
        """Whether no task lost more than the budget on the selection split."""
        return all(record.drop <= record.budget for record in self.selection)

    @property
    def drop(self) -> float:
        """That of the task that lost most on the selection split."""
        return max(record.drop for record in self.selection)

    def predict(self, rows: Sequence[np.ndarray], spec: Input, tasks: Sequence[Task]) -> np.ndarray:
        """Logits float32 (N, columns of all tasks), by the path that serves."""
        return graph.joined(predict_logits(self.session, spec, rows, batch_invariant=self.batch_invariant), tasks)


@dataclass(frozen=True)
class Findings:
    """What the search found out."""

    parity: graph.Parity
    candidates: tuple[Candidate, ...]  # fp32 first
    chosen: Candidate  # on the selection split
    gated: tuple[GateRecord, ...]  # of `chosen`, for each task; empty for fp32, which passes on parity alone
    shipped: Candidate
    selection: Split
    held_out: Split  # the gate split
    logits: np.ndarray  # float32 (N, columns of all tasks), of `shipped` on the gate split


def search(
    checkpoint: Checkpoint,
    dataset: Dataset,
    *,
    variant: Literal["auto"] | VariantName,
    refit_head: bool,
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
        refit_head: try a head that was fitted on the features of the static int8 backbone, too.
        budget: largest drop that passes, a fraction.
        calibration: how many training examples set the ranges of static int8.
        threads: the most that one run may have; by default all the cores that this process may use.
        timer: compares the latency of two sessions.

    Raises:
        GateFailed: the fp32 graph is not the PyTorch model.
        DataError: a held-out split is too small to judge a task on.
    """
    spec, tasks = checkpoint.spec.input, checkpoint.spec.tasks
    _check_known(checkpoint, dataset)
    selection = reference_split(checkpoint, dataset, "selection")
    sample = list(selection.rows[:SAMPLES])
    fp32 = graph.to_onnx(checkpoint.network, spec, tasks, sample)
    parity = graph.check_parity(fp32, checkpoint.network, spec, tasks, sample)
    log.info("parity", largest_difference=parity.served, tolerance=parity.tolerance)

    graphs: dict[VariantName, bytes] = {"fp32": fp32}
    if variant in ("auto", "int8-dynamic"):
        graphs["int8-dynamic"] = quantize.int8_dynamic(fp32)
    if variant in ("auto", "int8-static"):
        graphs["int8-static"] = quantize.int8_static(fp32, spec, calibration_rows(checkpoint, dataset, calibration))
    if refit_head or variant == "int8-static-refit":
        graphs["int8-static-refit"] = refit.int8_static_refit(
            checkpoint, dataset, calibration_rows(checkpoint, dataset, calibration)
        )
    reference = Session(fp32, device="cpu", threads=threads)
    candidates = tuple(
        measure(name, compiled, reference, spec, tasks, selection, budget, timer) for name, compiled in graphs.items()
    )
    chosen = choose(candidates) if variant == "auto" else next(one for one in candidates if one.name == variant)

    held_out = reference_split(checkpoint, dataset, "gate")
    log.info("gate", variant=chosen.name, examples=len(held_out), budget=budget)
    logits, shipped = chosen.predict(held_out.rows, spec, tasks), chosen
    gated: tuple[GateRecord, ...] = ()
    if chosen.name != "fp32":
        gated = gate.judge_tasks(tasks, held_out.targets, held_out.logits, logits, budget=budget)
        worst = gate.closest(gated)
        log.info("verdict", variant=chosen.name, verdict=worst.verdict, drop=worst.drop, drop_upper=worst.drop_upper)
        if worst.verdict != "PASS":
            shipped = candidates[0]
            logits = shipped.predict(held_out.rows, spec, tasks)
    return Findings(parity, candidates, chosen, gated, shipped, selection, held_out, logits)


def _check_known(checkpoint: Checkpoint, dataset: Dataset) -> None:
    names: tuple[SplitName, ...] = ("selection", "gate")
    for name in names:
        indices = checkpoint.splits.indices(dataset, name)
        for target in dataset.targets:
            known = int(target.take(indices).known.sum())
            if known < 2:
                raise DataError(
                    f"the {name} split holds {known} examples with a known {target.name!r}; comparing models takes 2 "
                    "or more. Give it a larger fraction (edgeward finetune --split)."
                )


def reference_split(checkpoint: Checkpoint, dataset: Dataset, name: SplitName) -> Split:
    """Preprocess a held-out split and run it through PyTorch."""
    indices = checkpoint.splits.indices(dataset, name)
    log.info("reference", split=name, examples=len(indices))
    rows = EncodedRows(dataset, indices, checkpoint.encode)
    logits = evaluate.logits(checkpoint.network, rows, checkpoint.spec.input)
    return Split(rows, tuple(target.take(indices) for target in dataset.targets), logits, indices)


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
    tasks: Sequence[Task],
    selection: Split,
    budget: float,
    timer: timing.Timer,
) -> Candidate:
    """Time a variant against fp32, with as many threads as suit it, and run it over the selection split."""
    sample = list(selection.rows[:SAMPLES])
    feeds = [preprocess.collate([row], spec) for row in sample]
    times, session = timing.fastest(compiled, reference, feeds, timer)
    invariant = graph.is_batch_invariant(session, spec, sample)
    logits = graph.joined(predict_logits(session, spec, selection.rows, batch_invariant=invariant), tasks)
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
        logits,
        gate.judge_tasks(tasks, selection.targets, selection.logits, logits, budget=budget),
    )
    log.info(
        "candidate",
        variant=name,
        threads=session.threads,
        ratio=round(times.ratio, 3),
        ratio_upper=round(times.ratio_upper, 3),
        drop=candidate.drop,
        batch_invariant=invariant,
    )
    return candidate


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest that is surely faster than fp32 and within the budget on the selection split; else fp32."""
    worthy = [
        one
        for one in candidates[1:]
        if one.latency.ratio_upper <= WORTHWHILE and one.within_budget and one not in outdone(candidates)
    ]
    return min(worthy, key=lambda one: one.latency.ratio, default=candidates[0])


def outdone(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of static int8 with the old head and with a refitted one, that which lost more on the selection split, if any.

    They run the same kernels, and which of them is the faster is chance.
    """
    static = [one for one in candidates if one.name.startswith("int8-static")]
    return [one for one in static if one.drop > min(other.drop for other in static)]

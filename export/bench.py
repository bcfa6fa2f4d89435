"""One model's variants on the bench: compiled, judged on the selection split, timed; or remembered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
import onnx

from bundle import preprocess
from bundle.log import log
from bundle.manifest import GateRecord, Latency, Record
from bundle.model import predict_logits
from bundle.session import Session, node_times
from export import fidelity, gate, graph, mixed, placement, robustness, timing
from export.config import ExportConfig
from export.ladder import FP32, Compiler, Recipe
from export.mixed import Kept
from export.nodes import is_quantized
from export.placement import Group
from export.source import Source, Split
from export.target import Target
from finetune.progress import track

SCREENED = {"fast": 64, "normal": 128, "thorough": 512}  # examples on which each group of layers is tried
LIKELY = 0.9  # a chance of passing the gate with which there is no looking for a better one
BATCHES = (1, 8)  # at which what ships is timed


class Traits(Record, frozen=True, kw_only=True):
    """What a graph does, whatever its speed."""

    batch_invariant: bool
    leftovers: int  # conversions between int8 and fp32 that the runtime left


class BatchLatency(Record, frozen=True, kw_only=True):
    """A variant and fp32 at one batch size."""

    batch: int
    p50_ms: float  # of a run
    fp32_p50_ms: float
    ratio: float

    @property
    def rows_per_s(self) -> float:
        """Examples that pass in a second, one run after the other."""
        return 1e3 * self.batch / self.p50_ms


@dataclass(frozen=True, eq=False)
class Candidate:
    """A compiled variant and what was measured of it on the selection split."""

    recipe: Recipe
    graph: bytes
    device: Literal["cpu", "cuda", "tensorrt"]
    batch_invariant: bool
    leftovers: int
    logits: np.ndarray  # float32 (N, columns of all tasks), of the selection split
    selection: tuple[GateRecord, ...]  # for each task
    chance: float  # of passing the gate, see gate.chance_of_passing
    kl: float  # divergence from the reference on the selection split, nats
    latency: Latency | None = None  # at batch 1; none until it is timed
    throughput: BatchLatency | None = None  # at the largest batch, when that is what counts
    kept: tuple[Kept, ...] = ()

    @property
    def name(self) -> str:
        """That of its recipe."""
        return self.recipe.name

    @property
    def within_budget(self) -> bool:
        """Whether no task lost more than the budget on the selection split."""
        return all(record.drop <= record.budget for record in self.selection)

    @property
    def promising(self) -> bool:
        """Whether the gate is more likely to pass it than not."""
        return self.chance >= 0.5

    @property
    def drop(self) -> float:
        """That of the task that lost most on the selection split."""
        return max(record.drop for record in self.selection)

    @cached_property
    def precision(self) -> Literal["fp32", "fp16", "int8"]:
        """As a manifest names it; a model that was quantized before it came is int8, too."""
        kind = self.recipe.kind
        if kind not in ("fp32", "fp16") or is_quantized(onnx.load_from_string(self.graph).graph):
            return "int8"
        return kind

    @cached_property
    def session(self) -> Session:
        """As it is served."""
        return Session(self.graph, device=self.device, threads=self.latency.threads if self.latency else None)

    def predict(self, split: Split, source: Source) -> np.ndarray:
        """Logits float32 (N, columns of all tasks), by the path that serves."""
        outputs = predict_logits(self.session, source.spec, split.rows, batch_invariant=self.batch_invariant)
        return graph.joined(outputs, source.tasks)


class Bench:
    """Compiles and measures the variants of one model, or remembers what an earlier export measured."""

    def __init__(self, source: Source, config: ExportConfig, target: Target, timer: timing.Timer) -> None:
        self.source, self.config, self._target, self._timer = source, config, target, timer
        self.compiler = Compiler(source, signed=target.signed, qdq=target.device == "tensorrt")
        self._memory = source.memory if timer is timing.interleaved else replace(source.memory, enabled=False)

    @cached_property
    def reference(self) -> Session:
        """The fp32 graph with as many threads as make it fastest: a small one may lose time by sharing it out."""
        return Session(self.source.graph, device=self._target.device, threads=self._fp32.threads)

    @cached_property
    def _fp32(self) -> Latency:
        """Of the fp32 graph, whose ratio is 1 by definition."""
        return self._memory.record(Latency, "fp32", self.config.threads, compute=self._fp32_latency)

    def measure(self, recipe: Recipe) -> Candidate:
        """Compile a recipe and run it over the selection split; its speed is not looked at.

        Raises:
            ModelError: it cannot be compiled, or not be run.
        """
        source, memory = self.source, self.source.memory
        compiled = self.compiler.compile(recipe)
        traits = memory.record(Traits, "traits", recipe, compute=lambda: self._traits(compiled))

        def run() -> np.ndarray:
            outputs = predict_logits(
                Session(compiled, device=self._target.device),
                source.spec,
                source.selection.rows,
                batch_invariant=traits.batch_invariant,
            )
            return graph.joined(outputs, source.tasks)

        logits = memory.array("selection", recipe, compute=run)
        records = self.judge(source.selection, logits)
        candidate = Candidate(
            recipe,
            compiled,
            self._target.device,
            traits.batch_invariant,
            traits.leftovers,
            logits,
            records,
            gate.chance_of_passing(records, self._scale),
            fidelity.screen_kl(source.tasks, source.selection.logits, logits),
        )
        log.info("candidate", variant=candidate.name, drop=candidate.drop, kl=candidate.kl)
        return candidate

    @property
    def _scale(self) -> float:
        return self.source.gate_size / len(self.source.selection)

    @cached_property
    def can_pass(self) -> bool:
        """Whether the gate split is large enough for a variant that changes no answer to pass."""
        return gate.chance_of_passing(self._same, self._scale) >= 0.5

    @cached_property
    def can_tell(self) -> bool:
        """Whether the selection split is large enough to see a variant that is likely to pass.

        So few examples that one answer lost and one won leave it in doubt would only choose by luck.
        """
        best = [one if one.lost is None else msgspec.structs.replace(one, lost=1, won=1) for one in self._same]
        return gate.chance_of_passing(best, self._scale) >= LIKELY

    @cached_property
    def _same(self) -> tuple[GateRecord, ...]:
        """Of a variant that answers as the reference does."""
        return self.judge(self.source.selection, self.source.selection.logits)

    def harms(self, base: Candidate, groups: Sequence[Group]) -> list[float]:
        """By how much the KL divergence of a quantized candidate falls when one group alone is in fp32, nats.

        Scales and biases are left as they are, also where the candidate's are corrected: that would take as long as all
        the rest, and those of the candidate do not suit a layer behind one that has become fp32.
        """
        picked = np.random.default_rng(0).permutation(len(self.source.selection))[: SCREENED[self.config.effort]]
        plain = replace(base.recipe, corrected=False)
        before = self._divergence(plain, base.batch_invariant, picked)
        found = []
        for group in track(groups, len(groups), "sensitivity of layers"):
            alone = replace(plain, kept=group.nodes)
            found.append(before - self._divergence(alone, base.batch_invariant, picked))
        return found

    def _divergence(self, recipe: Recipe, batch_invariant: bool, picked: np.ndarray) -> float:
        """That of a recipe on some examples of the selection split, int64 positions (M,)."""
        source = self.source

        def run() -> np.ndarray:
            session = Session(self.compiler.compile(recipe, keep=False), device=self._target.device)
            rows = [source.selection.rows[int(i)] for i in picked]
            outputs = predict_logits(session, source.spec, rows, batch_invariant=batch_invariant)
            return graph.joined(outputs, source.tasks)

        logits = source.memory.array("screen", len(picked), recipe, compute=run)
        return fidelity.screen_kl(source.tasks, source.selection.logits[picked], logits)

    def gains(self, base: Candidate, groups: Sequence[Group]) -> list[float]:
        """What int8 saves in each group, of a run of one example in ms, by profiles of both graphs."""
        assert base.latency is not None
        prepared = self.compiler.prepared
        outputs = {output: node.name for node in onnx.load_from_string(prepared).graph.node for output in node.output}
        feeds = [preprocess.collate([row], self.source.spec) for row in self.source.sample]
        before, after = (
            np.array(mixed.times_of(groups, outputs, node_times(compiled, feeds, threads=base.latency.threads)))
            for compiled in (prepared, base.graph)
        )
        gains: list[float] = (before - after).tolist()
        return gains

    def judge(self, split: Split, logits: np.ndarray) -> tuple[GateRecord, ...]:
        """Hold logits to those of the reference on a split, task by task."""
        config = self.config
        return gate.judge_tasks(
            self.source.tasks,
            split.targets,
            split.logits,
            logits,
            budget=config.max_drop / 100,
            confidence=config.confidence,
            metric=config.metric,
        )

    def time(self, candidate: Candidate) -> Candidate:
        """The candidate with its latency and, where that counts, its throughput."""
        what = ("latency", self.config.threads, candidate.recipe.kernels)
        latency = self._fp32
        if candidate.recipe != FP32:
            latency = self._memory.record(Latency, *what, compute=lambda: self._latency(candidate))
        timed = replace(candidate, latency=latency)
        if self.config.optimize == "throughput":
            timed = replace(timed, throughput=self.at_batch(timed, max(BATCHES)))
        log.info("timed", variant=timed.name, ratio=round(latency.ratio, 3), threads=latency.threads)
        return timed

    def at_batch(self, candidate: Candidate, batch: int) -> BatchLatency:
        """A timed candidate and fp32 at a batch size; one that is not batch-invariant runs its examples one by one."""
        assert candidate.latency is not None
        size = batch if candidate.batch_invariant else 1
        if size == 1:
            alone = candidate.latency
            return BatchLatency(batch=1, p50_ms=alone.p50_ms, fp32_p50_ms=alone.fp32_p50_ms, ratio=alone.ratio)
        what = ("batch", batch, self.config.threads, candidate.latency.threads, candidate.recipe.kernels)
        return self._memory.record(BatchLatency, *what, compute=lambda: self._at_batch(candidate, size))

    def _fp32_latency(self) -> Latency:
        feeds = [preprocess.collate([row], self.source.spec) for row in self.source.sample]
        everything = Session(self.source.graph, device=self._target.device, threads=self.config.threads)
        times, session = timing.fastest(self.source.graph, everything, feeds, self._timer, threads=self.config.threads)
        ms = times.p50_ms
        return Latency(p50_ms=ms, fp32_p50_ms=ms, ratio=1.0, ratio_lower=1.0, ratio_upper=1.0, threads=session.threads)

    def _latency(self, candidate: Candidate) -> Latency:
        feeds = [preprocess.collate([row], self.source.spec) for row in self.source.sample]
        times, session = timing.fastest(
            candidate.graph, self.reference, feeds, self._timer, threads=self.config.threads
        )
        return Latency(
            p50_ms=times.p50_ms,
            fp32_p50_ms=times.reference_p50_ms,
            ratio=times.ratio,
            ratio_lower=times.ratio_lower,
            ratio_upper=times.ratio_upper,
            threads=session.threads,
        )

    def _at_batch(self, candidate: Candidate, batch: int) -> BatchLatency:
        sample, spec = self.source.sample, self.source.spec
        picked = [[sample[(start + i) % len(sample)] for i in range(batch)] for start in range(0, len(sample), batch)]
        feeds = [preprocess.collate(rows, spec) for rows in picked]
        times = self._timer(candidate.session, self.reference, feeds)
        return BatchLatency(batch=batch, p50_ms=times.p50_ms, fp32_p50_ms=times.reference_p50_ms, ratio=times.ratio)

    def _traits(self, compiled: bytes) -> Traits:
        session, spec, rows = Session(compiled, device=self._target.device), self.source.spec, self.source.sample
        return Traits(
            batch_invariant=graph.is_batch_invariant(session, spec, rows)
            and robustness.is_padding_invariant(session, spec, rows),
            leftovers=placement.leftovers(compiled),
        )

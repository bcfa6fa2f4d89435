"""Which compiled variant ships: built, measured, chosen on the selection split, gated once on the gate split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from bundle.errors import ModelError
from bundle.host import cpu_count, cpu_name
from bundle.log import log
from bundle.manifest import GateRecord
from export import gate, mixed, placement, proportions, robustness, timing
from export.bench import BATCHES, LIKELY, BatchLatency, Bench, Candidate
from export.config import ExportConfig, Objective
from export.ladder import FP32, REFIT, Recipe, ladder, recipe_named
from export.placement import Group
from export.source import Source, Split
from export.target import Target
from finetune.progress import track

WORTHWHILE = 0.97  # an int8 variant whose latency ratio may be above this is not worth its rounding
HOPELESS = 5  # budgets


@dataclass(frozen=True)
class Findings:
    """What the search found out."""

    candidates: tuple[Candidate, ...]  # fp32 first
    failed: dict[Recipe, str]  # those that could not be compiled, and why
    chosen: Candidate  # on the selection split
    gated: tuple[GateRecord, ...]  # of `chosen`, for each task; empty for fp32, which passes on parity alone
    shipped: Candidate
    held_out: Split  # the gate split
    logits: np.ndarray  # float32 (N, columns of all tasks), of `shipped` on the gate split
    robustness: robustness.Robustness  # of `shipped`
    batches: tuple[BatchLatency, ...]  # of `shipped`


def search(source: Source, config: ExportConfig, target: Target, timer: timing.Timer) -> Findings:
    """Compile and measure variants, choose one, and gate it.

    Args:
        source: what to compile, and the examples to hold it to.
        config: see ExportConfig.
        target: what to compile for.
        timer: compares the latency of two sessions.

    Raises:
        ModelError: the variant asked for is none, or cannot be compiled.
        DataError: the metric asked for is none of this data's.
    """
    wanted = _recipes(source, config, target)  # names that are wrong are refused before anything is compiled
    gate.gated_metrics(source.tasks, config.metric)
    here = (target.device, target.isa, cpu_name(), str(cpu_count()))  # what is measured here says little of elsewhere
    source = replace(source, memory=replace(source.memory, about=(*source.memory.about, *here)))
    bench = Bench(source, config, target, timer)
    _announce(source, config)
    candidates, failed = [bench.measure(FP32)], {}
    for recipe in track(wanted, len(wanted), "trying variants"):
        try:
            candidates.append(bench.measure(recipe))
        except ModelError as error:
            if config.variant != "auto":
                raise
            log.warning("a variant cannot be compiled", variant=recipe.name, because=str(error))
            failed[recipe] = str(error)
    candidates = _timed(candidates, bench)
    if config.variant == "auto" and config.effort != "fast" and target.device == "cpu":
        candidates += mixed_precision(candidates, bench)
    chosen = candidates[-1] if config.variant != "auto" else choose(candidates, config)
    return _gate(candidates, failed, chosen, bench)


def _recipes(source: Source, config: ExportConfig, target: Target) -> list[Recipe]:
    if config.variant == "auto":
        refit = [REFIT] if config.refit_head else []
        return [*ladder(source.spec, config.effort, target.device), *refit]
    recipe = recipe_named(config.variant, source.spec, target.device)
    return [] if recipe == FP32 else [recipe]


def _announce(source: Source, config: ExportConfig) -> None:
    """Say, before anything is tried, what so many examples can prove."""
    budget, confidence = config.max_drop / 100, config.confidence
    best = proportions.best_certifiable(source.gate_size, confidence)
    log.info("gate split", examples=source.gate_size, certifies_at_best=round(best, 5), budget=budget)
    if budget == 0:
        log.warning("only what is better than the reference can pass a budget of 0", examples=source.gate_size)
    elif best > budget:
        log.warning(
            "the gate split is too small for the budget: fp32 will ship",
            examples=source.gate_size,
            needed=proportions.fewest_examples(budget, confidence),
            certifies_at_best=round(best, 5),
            budget=budget,
        )


def _timed(candidates: Sequence[Candidate], bench: Bench) -> list[Candidate]:
    """All with their latencies; of those that run the same kernels the most accurate is timed, for all of them."""
    best: dict[object, Candidate] = {}
    for one in sorted(candidates, key=_accuracy):
        best.setdefault(one.recipe.kernels, one)
    kinds = dict.fromkeys(one.recipe.kernels for one in candidates)
    times = {kernels: bench.time(best[kernels]) for kernels in track(kinds, len(kinds), "timing")}
    return [
        replace(one, latency=times[one.recipe.kernels].latency, throughput=times[one.recipe.kernels].throughput)
        for one in candidates
    ]


def _accuracy(candidate: Candidate) -> tuple[bool, float, float]:
    """What sorts the more accurate first."""
    return (not candidate.promising, -candidate.chance, candidate.kl)


def mixed_precision(candidates: Sequence[Candidate], bench: Bench) -> list[Candidate]:
    """Of static int8 that is too inaccurate: the same with those layers in fp32 that it takes, if that is still faster.

    Only layers are tried that would leave it faster than what ships without it, by profiles of both graphs.
    """
    config, source = bench.config, bench.source
    static = [
        one
        for one in candidates
        if one.recipe.kind == "static" and is_faster(one, config.optimize) and not _is_hopeless(one)
    ]
    base = min(static, key=lambda one: (speed(one, config.optimize), *_accuracy(one)), default=None)
    if base is None or _enough(base, bench):
        return []
    if not bench.can_tell:
        log.info("no mixed precision", because="there are too few examples to choose by", variant=base.name)
        return []
    room_ms = _room_ms(base, candidates, bench)
    if room_ms <= 0:
        return []
    groups = placement.groups(bench.compiler.prepared, source.spec)
    cheap = {group: gain for group, gain in zip(groups, bench.gains(base, groups), strict=True) if gain <= room_ms}
    ranked = mixed.rank(list(cheap), bench.harms(base, list(cheap)), list(cheap.values()))
    ranked = mixed.affordable(ranked, room_ms)[: len(groups) - 1]  # with all of them it would be fp32

    @cache
    def measured(kept: tuple[Group, ...]) -> Candidate:
        nodes = tuple(name for group in kept for name in group.nodes)
        return bench.measure(replace(base.recipe, kept=nodes))

    kept = mixed.search(ranked, lambda some: _enough(measured(tuple(some)), bench))
    if not kept:
        because = "too many layers would have to stay in fp32"
        log.info("no mixed precision", because=because, variant=base.name, affordable=len(ranked), of=len(groups))
        return []
    found = measured(tuple(one.group for one in kept))
    return [bench.time(replace(found, kept=tuple(one.kept for one in kept)))]


def _room_ms(base: Candidate, candidates: Sequence[Candidate], bench: Bench) -> float:
    """How much longer a run of static int8 may take and still be worth more than what ships without it."""
    assert base.latency is not None
    objective = bench.config.optimize
    chosen = choose(candidates, bench.config)
    to_beat = speed(chosen, objective)
    if not _enough(chosen, bench):
        to_beat = _expected_time(chosen, speed(candidates[0], objective), objective)
    return base.latency.p50_ms * (WORTHWHILE * to_beat / speed(base, objective) - 1)


def _is_hopeless(candidate: Candidate) -> bool:
    """Whether it surely lost so many times the budget that next to everything would have to stay in fp32."""
    return any((record.drop_lower or 0) > HOPELESS * record.budget for record in candidate.selection)


def _enough(candidate: Candidate, bench: Bench) -> bool:
    """Whether the gate is likely to pass it; where it can pass nothing, whether it is within the budget."""
    return candidate.chance >= LIKELY if bench.can_pass else candidate.within_budget


def speed(candidate: Candidate, objective: Objective) -> float:
    """Its time for an example relative to that of fp32; less is faster."""
    assert candidate.latency is not None
    if objective == "latency":
        return candidate.latency.ratio
    assert candidate.throughput is not None
    return 1 / candidate.throughput.rows_per_s


def is_faster(candidate: Candidate, objective: Objective) -> bool:
    """Whether it is surely faster than fp32, by more than what its rounding is worth."""
    assert candidate.latency is not None
    if objective == "latency":
        return candidate.latency.ratio_upper <= WORTHWHILE
    return candidate.batch_invariant and candidate.throughput is not None and candidate.throughput.ratio <= WORTHWHILE


def fits(candidate: Candidate, config: ExportConfig) -> bool:
    """Whether it is as fast and as small as asked for."""
    assert candidate.latency is not None
    slow = config.max_latency_ms is not None and candidate.latency.p50_ms > config.max_latency_ms
    large = config.max_size_mb is not None and len(candidate.graph) > config.max_size_mb * 1e6
    return not slow and not large


def choose(candidates: Sequence[Candidate], config: ExportConfig) -> Candidate:
    """Of those that are surely faster than fp32, the one with which what ships is to be expected to be the fastest.

    The gate is asked once, and what it does not pass is replaced by fp32: the time to be expected is that of the
    candidate and that of fp32, weighted by the chance of passing. Of several that the clock cannot tell from the best
    it is the most accurate. Where none is more likely to pass than not, of those within the budget on the selection
    split the one that is closest to passing. Else fp32.
    """
    worthy = [one for one in candidates[1:] if is_faster(one, config.optimize) and fits(one, config)]
    promising = [one for one in worthy if one.promising]
    if promising:
        otherwise = speed(candidates[0], config.optimize)
        best = min(promising, key=lambda one: (_expected_time(one, otherwise, config.optimize), *_accuracy(one)))
        return min(_as_fast(promising, best, config.optimize), key=_accuracy)
    possible = [one for one in worthy if one.within_budget]
    return min(possible, key=lambda one: (*_accuracy(one), speed(one, config.optimize)), default=candidates[0])


def _expected_time(candidate: Candidate, otherwise: float, objective: Objective) -> float:
    return candidate.chance * speed(candidate, objective) + (1 - candidate.chance) * otherwise


def _as_fast(candidates: Sequence[Candidate], fastest: Candidate, objective: Objective) -> list[Candidate]:
    """Those whose interval of the latency meets that of the fastest; throughput has none."""
    assert fastest.latency is not None
    limit = fastest.latency.ratio_upper
    if objective == "throughput":
        return [one for one in candidates if speed(one, objective) == speed(fastest, objective)]
    return [
        one for one in candidates if one.latency is not None and (one.latency.ratio_lower or one.latency.ratio) <= limit
    ]


def _gate(candidates: Sequence[Candidate], failed: dict[Recipe, str], chosen: Candidate, bench: Bench) -> Findings:
    source, config = bench.source, bench.config
    held_out = source.held_out()
    log.info("gate", variant=chosen.name, examples=len(held_out), budget=config.max_drop / 100)
    logits, shipped = chosen.predict(held_out, source), chosen
    gated: tuple[GateRecord, ...] = ()
    if chosen.recipe != FP32:
        gated = bench.judge(held_out, logits)
        worst = gate.closest(gated)
        log.info("verdict", variant=chosen.name, verdict=worst.verdict, drop=worst.drop, drop_upper=worst.drop_upper)
        if worst.verdict != "PASS":
            shipped = candidates[0]
            logits = shipped.predict(held_out, source)
    checked = robustness.check_robustness(
        shipped.graph, shipped.session, source.spec, source.sample, reference=bench.reference
    )
    batches = dict.fromkeys(bench.at_batch(shipped, batch) for batch in BATCHES)
    return Findings(tuple(candidates), failed, chosen, gated, shipped, held_out, logits, checked, tuple(batches))

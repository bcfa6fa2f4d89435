"""What the search found, as the report says it."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from bundle import metrics
from bundle.host import cpu_name, installed_versions
from bundle.manifest import GateRecord, Multiclass, Provenance, Regression, Task
from export import fidelity, fusion, gate, report
from export.bench import Candidate
from export.config import ExportConfig
from export.report import Outcome
from export.search import Findings, fits, is_faster, speed
from export.source import PACKAGES, Source, Split
from finetune.evaluate import predictions
from finetune.target import columns


def describe(config: ExportConfig, name: str, source: Source, findings: Findings) -> report.Report:
    """Everything that was measured, and what followed from it."""
    tasks, held_out, shipped = source.tasks, findings.held_out, findings.shipped
    comparison = findings.gated if shipped is findings.chosen else ()
    comparison = comparison or gate.judge_tasks(  # of fp32, which was not gated
        tasks,
        held_out.targets,
        held_out.logits,
        findings.logits,
        budget=config.max_drop / 100,
        confidence=config.confidence,
        metric=config.metric,
    )
    return report.Report(
        format_version=report.FORMAT_VERSION,
        name=name,
        version=config.version,
        reference=source.reference,
        shipped=shipped.name,
        budget=config.max_drop / 100,
        confidence=config.confidence,
        optimize=config.optimize,
        certifiable=_certifiable(config, source, held_out, comparison),
        examples={
            "calibration": len(source.calibration),
            "selection": len(source.selection),
            "gate": len(held_out),
        },
        parity=source.parity,
        fusions=fusion.fusions(shipped.graph),
        candidates=(
            *(_candidate(one, config, source, findings) for one in findings.candidates),
            *(report.failed(one.name, one.words, because) for one, because in findings.failed.items()),
        ),
        gate=findings.gated,
        pytorch=report.scores(tasks, held_out.logits, held_out.targets),
        served=report.scores(tasks, findings.logits, held_out.targets),
        comparison=comparison,
        fidelity=fidelity.compare(tasks, held_out.targets, held_out.logits, findings.logits),
        robustness=findings.robustness,
        batches=findings.batches,
        confusion=_confusion(tasks, held_out, findings.logits),
        flips=_flips(tasks, held_out, findings.logits),
        provenance=_provenance(config, source),
    )


def _certifiable(
    config: ExportConfig, source: Source, held_out: Split, comparison: Sequence[GateRecord]
) -> dict[str, float]:
    least = gate.certifiable(
        source.tasks, held_out.targets, held_out.logits, confidence=config.confidence, metric=config.metric
    )
    keys = [report.key(record) for record in comparison]
    return {key: drop for key, drop in zip(keys, least, strict=True) if drop is not None}


def _candidate(one: Candidate, config: ExportConfig, source: Source, findings: Findings) -> report.Candidate:
    outcome, because = _outcome(one, config, findings)
    return report.Candidate(
        name=one.name,
        recipe=one.recipe.words,
        bytes=len(one.graph),
        batch_invariant=one.batch_invariant,
        latency=one.latency,
        rows_per_s=one.throughput.rows_per_s if one.throughput else None,
        selection=report.scores(source.tasks, one.logits, source.selection.targets),
        selection_drop={report.key(record): record.drop for record in one.selection},
        selection_drop_interval={
            report.key(record): (record.drop_lower or 0.0, record.drop_upper) for record in one.selection
        },
        fidelity=fidelity.compare(source.tasks, source.selection.targets, source.selection.logits, one.logits),
        leftovers=one.leftovers,
        kept=one.kept,
        outcome=outcome,
        because=because,
    )


def _outcome(one: Candidate, config: ExportConfig, findings: Findings) -> tuple[Outcome, str]:
    """What became of a candidate, and why."""
    assert one.latency is not None
    chosen = findings.chosen
    if one is findings.shipped:
        return "shipped", "the fastest that is proved" if one is chosen else "nothing faster was proved"
    if one is chosen:
        return "not passed", f"the gate said {gate.closest(findings.gated).verdict}"
    if not fits(one, config):
        return "larger" if config.max_size_mb and len(
            one.graph
        ) > config.max_size_mb * 1e6 else "slower", "over a limit"
    if one.name == "fp32":
        return "not chosen", "a faster one is proved"
    if not (one.within_budget or one.promising):
        return "less accurate", "over the budget on the selection split"
    if not is_faster(one, config.optimize):
        return "slower", "not surely faster than fp32"
    if one.recipe.kernels == chosen.recipe.kernels:
        return "less accurate", f"the same kernels as {chosen.name}, further from the reference"
    if speed(one, config.optimize) >= speed(chosen, config.optimize):
        return "slower", f"no faster than {chosen.name}"
    if one.promising:
        return "not chosen", f"the gate is less likely to pass it: {one.chance:.0%}, {chosen.name} {chosen.chance:.0%}"
    return "not chosen", "within the budget on the selection split, but the gate was not to be expected to pass it"


def _confusion(tasks: Sequence[Task], held_out: Split, logits: np.ndarray) -> tuple[report.Confusion, ...]:
    """Of each multiclass task, what the reference and what ships answered."""
    found = []
    for task, target, part in zip(tasks, held_out.targets, columns(tasks), strict=True):
        if isinstance(task, Multiclass):
            known, classes = target.known, len(task.labels)
            pytorch, served = (
                metrics.confusion(target.values[known], predictions(task, each[known, part]), classes).tolist()
                for each in (held_out.logits, logits)
            )
            name = task.name if len(tasks) > 1 else None
            found.append(report.Confusion(task=name, labels=task.labels, pytorch=pytorch, served=served))
    return tuple(found)


def _flips(tasks: Sequence[Task], held_out: Split, logits: np.ndarray) -> tuple[report.Flip, ...]:
    """The first examples of which what ships gives another label, or another set of labels, than the reference."""
    flips = []
    for task, target, part in zip(tasks, held_out.targets, columns(tasks), strict=True):
        if isinstance(task, Regression):
            continue
        before, after = (predictions(task, each[:, part]) for each in (held_out.logits, logits))
        changed = np.flatnonzero((before != after).reshape(len(before), -1).any(axis=1))
        for i in changed[: report.MOST_FLIPS]:
            truth, pytorch, served = (report.answer(task, each) for each in (target.values[i], before[i], after[i]))
            flips.append(
                report.Flip(
                    task=task.name if len(tasks) > 1 else None,
                    example=int(held_out.indices[i]),
                    truth=truth,
                    pytorch=pytorch,
                    served=served,
                )
            )
    return tuple(flips[: report.MOST_FLIPS])


def _provenance(config: ExportConfig, source: Source) -> Provenance:
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("edgeward", "export", str(config.checkpoint), *_options(config)),
        model=source.model,
        data=source.data,
        data_sha256=source.data_sha256,
        checkpoint_sha256=source.sha256,
        cpu=cpu_name(),
        versions=installed_versions(*PACKAGES),
    )


def _options(config: ExportConfig) -> list[str]:
    """Every option that has a value, defaults written out, as on the command line."""
    options = []
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if name == "cache":
            options += [] if value else ["--no-cache"]
        elif name != "checkpoint" and value is not None and value is not False:
            options.append(f"--{flag}")
            if value is not True:
                options.append(f"{value:g}" if isinstance(value, float) else str(value))
    return options

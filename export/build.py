"""Checkpoint, or any ONNX model -> bundle: the stage as one function, from ExportConfig to ExportResult."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bundle import metrics, preprocess, store
from bundle.errors import BundleError, GateFailed, OutputExists
from bundle.host import cpu_name, installed_versions
from bundle.manifest import (
    FORMAT_VERSION,
    GateRecord,
    Manifest,
    Multiclass,
    Provenance,
    Regression,
    Task,
    Variant,
    to_json,
)
from export import fidelity, gate, goldens, report, timing
from export.add import add_variant, check_same_model
from export.config import ExportConfig as ExportConfig
from export.examples import read_examples
from export.ladder import REFIT
from export.report import Outcome
from export.search import Candidate, Findings, fits, is_faster, search, speed
from export.source import PACKAGES, Source, Split, open_source
from export.target import Target, resolve
from finetune.evaluate import predictions
from finetune.target import columns

REPORT = "report.json"
PAGE = "report.html"


@dataclass(frozen=True)
class ExportResult:
    """A written bundle and its report."""

    bundle: Path
    report: report.Report


def export_checkpoint(config: ExportConfig, *, timer: timing.Timer = timing.interleaved) -> ExportResult:
    """Compile a model into the fastest bundle whose accuracy is proved.

    Args:
        config: what to export and how.
        timer: compares the latency of two sessions.

    Raises:
        GateFailed: the fp32 graph is not the reference, the variant asked for does not pass, or nothing is as fast and
            small as asked; nothing was written but `config.report`.
        OutputExists: there is something at `config.out`.
    """
    name = _check(config)
    target = resolve(config.target)
    present = None if config.add_to is None else store.open_bundle(config.add_to)
    source = open_source(config)
    if present is not None:
        check_same_model(present, source.spec, source.tasks, source.sha256)
    shown = _goldens(config, source)
    findings = search(source, config, target, timer)
    described = _report(config, name, source, findings)
    if config.report is not None:
        _write_report(config.report, described, source)
    _refuse(config, findings)
    variant = _variant(target, source, findings)
    if present is not None:
        _add(present, config, variant, findings, described)
    else:
        _write_bundle(config, source, variant, findings, described, shown)
    return ExportResult(config.out, described)


def _check(config: ExportConfig) -> str:
    """The bundle's name, when the options go together."""
    name = config.name or config.out.name
    if not store.NAME_PATTERN.fullmatch(name):
        raise BundleError(f"{name!r} cannot be a bundle's name: use letters, digits, '.', '_' and '-' (--name).")
    if config.version < 1:
        raise BundleError(f"a bundle's version is 1 or more, not {config.version}.")
    if config.refit_head and config.variant not in ("auto", REFIT.name):
        raise BundleError(f"--refit-head makes {REFIT.name}, but --variant asks for {config.variant} only.")
    if not 0.5 < config.confidence < 1 or config.max_drop < 0 or config.calibration < 1:
        raise BundleError(
            f"--confidence is {config.confidence:g}, --max-drop {config.max_drop:g} and --calibration "
            f"{config.calibration}; they must be between 0.5 and 1, 0 or more, and 1 or more."
        )
    if config.out.exists():  # now, not after the search
        raise OutputExists(f"{config.out} exists already and was left as it is. Choose another --out, or remove it.")
    return name


def _refuse(config: ExportConfig, findings: Findings) -> None:
    """Raise GateFailed when what was asked for did not come out."""
    shipped = findings.shipped
    if config.variant != "auto" and shipped is not findings.chosen:
        raise GateFailed(_refusal(config.variant, gate.closest(findings.gated)))
    if not fits(shipped, config):
        assert shipped.latency is not None
        tried = min(findings.candidates, key=lambda one: one.latency.p50_ms if one.latency else np.inf)
        assert tried.latency is not None
        raise GateFailed(
            f"what may ship, {shipped.name}, takes {shipped.latency.p50_ms:.2f} ms and "
            f"{len(shipped.graph) / 1e6:.1f} MB; asked for were {_limits(config)}. The fastest that was tried, "
            f"{tried.name}, takes {tried.latency.p50_ms:.2f} ms. No bundle was written. Try a smaller model, another "
            "--effort, or a larger budget."
        )


def _limits(config: ExportConfig) -> str:
    limits = []
    if config.max_latency_ms is not None:
        limits.append(f"at most {config.max_latency_ms:g} ms (--max-latency-ms)")
    if config.max_size_mb is not None:
        limits.append(f"at most {config.max_size_mb:g} MB (--max-size-mb)")
    return " and ".join(limits)


def _refusal(variant: str, record: GateRecord) -> str:
    more = f" {report.needed(record).capitalize()}." if record.verdict == "INCONCLUSIVE" else ""
    return (
        f"{record.verdict}: {report.describe(record, variant)}. On {record.examples} held-out examples "
        f"{record.metric.replace('_', ' ')} went from {record.reference:.4g} to {record.served:.4g}.{more} "
        "No bundle was written. Try --variant auto."
    )


def _report(config: ExportConfig, name: str, source: Source, findings: Findings) -> report.Report:
    tasks, held_out, shipped = source.tasks, findings.held_out, findings.shipped
    comparison = gate.judge_tasks(
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
        fusions={},
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
    if not one.within_budget:
        return "less accurate", "over the budget on the selection split"
    if not is_faster(one, config.optimize):
        return "slower", "not surely faster than fp32"
    if one.recipe.kernels == chosen.recipe.kernels:
        return "less accurate", f"the same kernels as {chosen.name}, further from the reference"
    if speed(one, config.optimize) >= speed(chosen, config.optimize):
        return "slower", f"slower than {chosen.name}"
    return "not chosen", "within the budget on the selection split, but not surely"


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


def _write_report(path: Path, described: report.Report, source: Source) -> None:
    path.write_bytes(to_json(described))


def _goldens(config: ExportConfig, source: Source) -> list[bytes]:
    """The raw examples that will travel in the bundle."""
    if config.goldens is None:
        return goldens.examples(source)
    encode = preprocess.encoder(source.spec, source.files.__getitem__)
    return read_examples(config.goldens, source.spec, encode)


def _variant(target: Target, source: Source, findings: Findings) -> Variant:
    """What the manifest says of the one that ships."""
    shipped = findings.shipped
    assert shipped.latency is not None
    return Variant(
        name=shipped.name,
        file=f"model.{shipped.name}.onnx",
        precision=shipped.precision,
        device=target.device,
        isa=target.isa,
        batch_invariant=shipped.batch_invariant,
        tolerance=goldens.TOLERANCE[shipped.precision] * float(np.std(findings.held_out.logits)),
        parity=source.parity.served,
        gate=gate.closest(findings.gated) if findings.gated and shipped is findings.chosen else None,
        latency=shipped.latency,
        rows_per_s=findings.batches[-1].rows_per_s,
    )


def _add(
    present: store.Bundle, config: ExportConfig, variant: Variant, findings: Findings, described: report.Report
) -> None:
    """Write a copy of a bundle with one more variant."""
    shipped = findings.shipped
    add_variant(
        present,
        variant,
        shipped.graph,
        shipped.session,
        report=to_json(described),
        built=described.provenance,
        out=config.out,
    )


def _write_bundle(
    config: ExportConfig,
    source: Source,
    variant: Variant,
    findings: Findings,
    described: report.Report,
    shown: Sequence[bytes],
) -> None:
    shipped = findings.shipped
    with store.new_directory(config.out) as folder:
        (folder / variant.file).write_bytes(shipped.graph)
        (folder / REPORT).write_bytes(to_json(described))
        for beside, data in source.files.items():
            (folder / beside).write_bytes(data)
        manifest = Manifest(
            format="edgeward-bundle",
            format_version=FORMAT_VERSION,
            name=described.name,
            version=described.version,
            input=source.spec,
            tasks=source.tasks,
            variants=(variant,),
            goldens=goldens.write(folder, source.spec, source.files, shown, {shipped.name: shipped.session}),
            provenance=described.provenance,
            files={},
        )
        store.seal(folder, manifest)

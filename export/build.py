"""Checkpoint, or any ONNX model -> bundle: the stage as one function, from ExportConfig to ExportResult."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp

import msgspec
import numpy as np

from bundle import preprocess, store, vector
from bundle.errors import BundleError, GateFailed
from bundle.manifest import (
    FORMAT_VERSION,
    GateRecord,
    ImageInput,
    Manifest,
    TensorsInput,
    TextInput,
    Variant,
    VectorInput,
    WordsInput,
    to_json,
)
from export import gate, goldens, report, timing
from export.add import add_variant, check_same_model
from export.config import ExportConfig as ExportConfig
from export.describe import describe
from export.examples import read_examples
from export.ladder import REFIT
from export.page import Content, ShownFlip, page
from export.search import Findings, fits, search
from export.source import Source, open_source
from export.target import Target, resolve

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
        EdgewardError: `config.out` cannot be written.
    """
    name = _check(config)
    target = resolve(config.target)
    present = None if config.add_to is None else store.open_bundle(config.add_to)
    source = open_source(config)
    if present is not None:
        check_same_model(present, source.spec, source.tasks, source.sha256)
    shown = _goldens(config, source)
    findings = search(source, config, target, timer)
    described = describe(config, name, source, findings)
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
    if not 0.5 < config.confidence < 1:
        raise BundleError(f"--confidence is {config.confidence:g}; it must be between 0.5 and 1, such as 0.95.")
    if not config.max_drop >= 0:
        raise BundleError(f"--max-drop is {config.max_drop:g}; it must be 0 or more, in points.")
    if config.calibration < 1:
        raise BundleError(f"--calibration is {config.calibration}; it must be 1 or more.")
    if config.add_to is not None and (config.goldens or config.name or config.version != 1):
        raise BundleError(
            "--goldens, --name and --version are those of the bundle that --add-to names: leave them out."
        )
    if config.report is not None and config.report.resolve().is_relative_to(config.out.resolve()):
        raise BundleError(
            f"--report {config.report} lies in --out {config.out}, which must not exist before the bundle is written. "
            "Choose another place; the bundle holds its report anyway."
        )
    if config.report is not None and config.report.suffix not in (".json", ".html"):
        raise BundleError(f"--report {config.report} says no format: let its name end in .json or .html.")
    if config.report is not None:
        if config.report.is_dir():
            raise BundleError(f"--report {config.report} is a folder: name a file in it.")
        store.check_writable(config.report, "--report")
    store.check_new(config.out)  # now, not after the search
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


def _write_report(path: Path, described: report.Report, source: Source) -> None:
    """As a page with the flipped examples when the path ends so, else as JSON; whole or not at all."""
    data = to_json(described)
    if path.suffix == ".html":
        data = page(described, [ShownFlip(flip, _content(source, flip.example)) for flip in described.flips]).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _content(source: Source, example: int) -> Content | None:
    """What a reader sees of an example; nothing of tensors, whose meaning is not known."""
    raw = source.raw(example)
    match source.spec:
        case TextInput(pair=str()):
            return " ⏐ ".join(msgspec.json.decode(raw, type=tuple[str, str]))
        case TextInput() | WordsInput():
            return raw.decode(errors="replace")
        case ImageInput():
            return raw
        case VectorInput() as spec:
            numbers: list[float] = vector.decode(raw, spec).tolist()
            return numbers
        case TensorsInput():
            return None


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
        (folder / PAGE).write_text(page(described), encoding="utf-8")
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

"""Checkpoint -> bundle: the stage as one function, from ExportConfig to ExportResult."""

from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from bundle import store
from bundle.errors import BundleError, GateFailed, OutputExists
from bundle.host import cpu_name, installed_versions, isa_class
from bundle.manifest import FORMAT_VERSION, GateRecord, Manifest, Provenance, TextInput, Variant, to_json
from bundle.text import TOKENIZER
from export import gate, goldens, report, timing
from export.search import Candidate, Findings, VariantName, search
from finetune.checkpoint import Checkpoint, load_checkpoint
from finetune.data import Dataset, Modality, load_dataset

REPORT = "report.json"
PACKAGES = (
    *("edgeward", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "pillow", "tokenizers"),
    *("torch", "torchvision", "transformers"),
)


@dataclass(frozen=True)
class ExportConfig:
    """Options of `edgeward export`."""

    checkpoint: Path
    """Directory that `edgeward finetune` wrote."""
    _: KW_ONLY
    out: Path
    """Bundle directory; must not exist yet."""
    data: str | None = None
    """Where the data is now, when it has moved since fine-tuning."""
    name: str | None = None
    """Name to be served under; by default that of the directory."""
    version: int = 1
    """Version to be served as."""
    max_drop: float = 1.0
    """Largest loss of accuracy against PyTorch, in points (1 = 0.01)."""
    variant: Literal["auto"] | VariantName = "auto"
    """Ship exactly this one, or fail; "auto" ships the fastest that passes."""
    calibration: int = 200
    """Training examples that set the ranges of static int8."""
    threads: int | None = None
    """The most that one run may have; by default all the cores that this process may use."""
    report: Path | None = None
    """Write the report here too, even when no bundle is written."""


@dataclass(frozen=True)
class ExportResult:
    """A written bundle and its report."""

    bundle: Path
    report: report.Report


def export_checkpoint(config: ExportConfig, *, timer: timing.Timer = timing.interleaved) -> ExportResult:
    """Compile a checkpoint into the fastest bundle whose accuracy is proved.

    Args:
        config: what to export and how.
        timer: compares the latency of two sessions.

    Raises:
        GateFailed: the fp32 graph is not the PyTorch model, or the variant asked for does not pass; nothing was
            written but `config.report`.
        OutputExists: there is something at `config.out`.
    """
    name = _name(config)
    checkpoint = load_checkpoint(config.checkpoint)
    dataset = _dataset(checkpoint, config.data)
    findings = search(
        checkpoint,
        dataset,
        variant=config.variant,
        budget=config.max_drop / 100,
        calibration=config.calibration,
        threads=config.threads,
        timer=timer,
    )
    described = _report(config, name, checkpoint, dataset, findings)
    if config.report is not None:
        config.report.write_bytes(to_json(described))
    if config.variant != "auto" and findings.gated is not None and findings.gated.verdict != "PASS":
        raise GateFailed(_refusal(config.variant, findings.gated))
    _write_bundle(config, checkpoint, dataset, findings, described)
    return ExportResult(config.out, described)


def _name(config: ExportConfig) -> str:
    name = config.name or config.out.name
    if not store.NAME_PATTERN.fullmatch(name):
        raise BundleError(f"{name!r} cannot be a bundle's name: use letters, digits, '.', '_' and '-' (--name).")
    if config.version < 1:
        raise BundleError(f"a bundle's version is 1 or more, not {config.version}.")
    if config.out.exists():  # now, not after the search
        raise OutputExists(f"{config.out} exists already and was left as it is. Choose another --out, or remove it.")
    return name


def _dataset(checkpoint: Checkpoint, location: str | None) -> Dataset:
    splits = checkpoint.splits
    max_bad = checkpoint.spec.provenance.config.get("max_bad")  # what was left out then is left out now
    modality: Modality = "text" if isinstance(checkpoint.spec.input, TextInput) else "image"
    return load_dataset(
        location or splits.data,
        modality,
        input_column=splits.input_column,
        label_column=splits.label_column or "label",
        max_bad=max_bad if isinstance(max_bad, int) else 0,
    )


def _refusal(variant: str, record: GateRecord) -> str:
    more = f" About {record.examples_needed} examples would decide." if record.examples_needed else ""
    return (
        f"{variant}: {record.verdict}. Accuracy went from {record.reference:.4f} to {record.served:.4f} on "
        f"{record.examples} held-out examples: a drop of at most {record.drop_upper:.4f} with {record.confidence:.0%} "
        f"confidence, the budget is {record.budget:.4f}.{more} No bundle was written. Try --variant auto."
    )


def _report(
    config: ExportConfig, name: str, checkpoint: Checkpoint, dataset: Dataset, findings: Findings
) -> report.Report:
    held_out = findings.held_out
    budget = config.max_drop / 100
    return report.Report(
        format_version=1,
        name=name,
        version=config.version,
        shipped=findings.shipped.name,
        budget=budget,
        confidence=0.95,
        certifiable=gate.best_certifiable(len(held_out.truth)),
        examples={
            "calibration": min(config.calibration, len(checkpoint.splits.indices(dataset, "train"))),
            "selection": len(findings.selection.truth),
            "gate": len(held_out.truth),
        },
        parity=findings.parity,
        candidates=tuple(_candidate(one, findings) for one in findings.candidates),
        gate=findings.gated,
        pytorch=report.scores(held_out.truth, held_out.reference),
        served=report.scores(held_out.truth, findings.predicted),
        comparison=gate.judge(held_out.truth, held_out.reference, findings.predicted, budget=budget),
        provenance=_provenance(config, checkpoint, dataset),
    )


def _candidate(one: Candidate, findings: Findings) -> report.Candidate:
    outcome: report.Outcome = "not chosen"
    if one is findings.shipped:
        outcome = "shipped"
    elif one is findings.chosen:
        outcome = "not passed"
    elif one.name != "fp32" and one.selection.drop > one.selection.budget:
        outcome = "less accurate"
    elif one.name != "fp32" and one.latency.ratio >= findings.chosen.latency.ratio:
        outcome = "slower"
    return report.Candidate(
        name=one.name,
        bytes=len(one.graph),
        batch_invariant=one.batch_invariant,
        latency=one.latency,
        selection_accuracy=one.selection.served,
        selection_drop=one.selection.drop,
        outcome=outcome,
    )


def _provenance(config: ExportConfig, checkpoint: Checkpoint, dataset: Dataset) -> Provenance:
    command = ["edgeward", "export", str(config.checkpoint), "--out", str(config.out)]
    command += ["--max-drop", f"{config.max_drop:g}", "--variant", config.variant]
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(command),
        model=checkpoint.spec.model.name,
        data=dataset.location,
        data_sha256=dataset.sha256,
        checkpoint_sha256=checkpoint.sha256,
        cpu=cpu_name(),
        versions=installed_versions(*PACKAGES),
    )


def _write_bundle(
    config: ExportConfig, checkpoint: Checkpoint, dataset: Dataset, findings: Findings, described: report.Report
) -> None:
    shipped = findings.shipped
    precision: Literal["fp32", "int8"] = "fp32" if shipped.name == "fp32" else "int8"
    spread = float(np.std(findings.held_out.logits))
    with store.new_directory(config.out) as folder:
        file = f"model.{shipped.name}.onnx"
        (folder / file).write_bytes(shipped.graph)
        (folder / REPORT).write_bytes(to_json(described))
        if isinstance(checkpoint.spec.input, TextInput):
            (folder / TOKENIZER).write_bytes(checkpoint.read(TOKENIZER))
        variant = Variant(
            name=shipped.name,
            file=file,
            precision=precision,
            device="cpu",
            isa=isa_class(),
            batch_invariant=shipped.batch_invariant,
            tolerance=goldens.TOLERANCE[precision] * spread,
            parity=findings.parity.served,
            gate=findings.gated if shipped is findings.chosen else None,
            latency=shipped.latency,
        )
        manifest = Manifest(
            format="edgeward-bundle",
            format_version=FORMAT_VERSION,
            name=described.name,
            version=described.version,
            input=checkpoint.spec.input,
            tasks=checkpoint.spec.tasks,
            variants=(variant,),
            goldens=goldens.write(folder, checkpoint, dataset, findings.selection, {shipped.name: shipped.session}),
            provenance=described.provenance,
            files={},
        )
        store.seal(folder, manifest)

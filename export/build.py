"""Checkpoint -> bundle: the stage as one function, from ExportConfig to ExportResult."""

from dataclasses import KW_ONLY, asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from bundle import preprocess, store
from bundle.errors import BundleError, GateFailed, OutputExists
from bundle.host import cpu_name, installed_versions, isa_class
from bundle.manifest import FORMAT_VERSION, GateRecord, Manifest, Provenance, Regression, Variant, to_json
from export import gate, goldens, report, timing
from export.search import Candidate, Findings, VariantName, outdone, search
from finetune.checkpoint import Checkpoint, load_checkpoint
from finetune.data import Dataset, load_dataset
from finetune.pretrained import modality

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
    """Largest loss of accuracy against PyTorch, in points (1 = 0.01); of a regression, in percent of its RMSE."""
    variant: Literal["auto"] | VariantName = "auto"
    """Ship exactly this one, or fail; "auto" ships the fastest that passes."""
    calibration: int = 200
    """Training examples that set the ranges of static int8."""
    refit_head: bool = False
    """Try static int8 with a head that is fitted to what the int8 backbone gives, too: int8-static-refit."""
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
        refit_head=config.refit_head,
        budget=config.max_drop / 100,
        calibration=config.calibration,
        threads=config.threads,
        timer=timer,
    )
    described = _report(config, name, checkpoint, dataset, findings)
    if config.report is not None:
        config.report.write_bytes(to_json(described))
    if config.variant != "auto" and findings.shipped is not findings.chosen:
        raise GateFailed(_refusal(config.variant, gate.closest(findings.gated)))
    _write_bundle(config, checkpoint, dataset, findings, described)
    return ExportResult(config.out, described)


def _name(config: ExportConfig) -> str:
    name = config.name or config.out.name
    if not store.NAME_PATTERN.fullmatch(name):
        raise BundleError(f"{name!r} cannot be a bundle's name: use letters, digits, '.', '_' and '-' (--name).")
    if config.version < 1:
        raise BundleError(f"a bundle's version is 1 or more, not {config.version}.")
    if config.refit_head and config.variant not in ("auto", "int8-static-refit"):
        raise BundleError(f"--refit-head makes int8-static-refit, but --variant asks for {config.variant} only.")
    if config.out.exists():  # now, not after the search
        raise OutputExists(f"{config.out} exists already and was left as it is. Choose another --out, or remove it.")
    return name


def _dataset(checkpoint: Checkpoint, location: str | None) -> Dataset:
    splits = checkpoint.splits
    max_bad = checkpoint.spec.provenance.config.get("max_bad")  # what was left out then is left out now
    return load_dataset(
        location or splits.data,
        modality(f"checkpoint:{checkpoint.path}"),
        input_column=splits.input_columns,
        label_column=splits.label_columns or ("label",),
        max_bad=max_bad if isinstance(max_bad, int) else 0,
    )


def _refusal(variant: str, record: GateRecord) -> str:
    more = f" {report.needed(record).capitalize()}." if record.verdict == "INCONCLUSIVE" else ""
    return (
        f"{record.verdict}: {report.describe(record, variant)}. On {record.examples} held-out examples "
        f"{record.metric.replace('_', ' ')} went from {record.reference:.4g} to {record.served:.4g}.{more} "
        "No bundle was written. Try --variant auto."
    )


def _report(
    config: ExportConfig, name: str, checkpoint: Checkpoint, dataset: Dataset, findings: Findings
) -> report.Report:
    tasks, held_out = checkpoint.spec.tasks, findings.held_out
    budget = config.max_drop / 100
    comparison = gate.judge_tasks(tasks, held_out.targets, held_out.logits, findings.logits, budget=budget)
    return report.Report(
        format_version=report.FORMAT_VERSION,
        name=name,
        version=config.version,
        shipped=findings.shipped.name,
        budget=budget,
        confidence=0.95,
        certifiable={
            report.key(record): gate.best_certifiable(record.examples)
            for record, task in zip(comparison, tasks, strict=True)
            if not isinstance(task, Regression)
        },
        examples={
            "calibration": min(config.calibration, len(checkpoint.splits.indices(dataset, "train"))),
            "selection": len(findings.selection),
            "gate": len(held_out),
        },
        parity=findings.parity,
        candidates=tuple(_candidate(one, checkpoint, findings) for one in findings.candidates),
        gate=findings.gated,
        pytorch=report.scores(tasks, held_out.logits, held_out.targets),
        served=report.scores(tasks, findings.logits, held_out.targets),
        comparison=comparison,
        provenance=_provenance(config, checkpoint, dataset),
    )


def _candidate(one: Candidate, checkpoint: Checkpoint, findings: Findings) -> report.Candidate:
    outcome: report.Outcome = "not chosen"
    if one is findings.shipped:
        outcome = "shipped"
    elif one is findings.chosen:
        outcome = "not passed"
    elif one.name != "fp32" and (not one.within_budget or one in outdone(findings.candidates)):
        outcome = "less accurate"
    elif one.name != "fp32" and one.latency.ratio >= findings.chosen.latency.ratio:
        outcome = "slower"
    return report.Candidate(
        name=one.name,
        bytes=len(one.graph),
        batch_invariant=one.batch_invariant,
        latency=one.latency,
        selection=report.scores(checkpoint.spec.tasks, one.logits, findings.selection.targets),
        selection_drop={report.key(record): record.drop for record in one.selection},
        outcome=outcome,
    )


def _provenance(config: ExportConfig, checkpoint: Checkpoint, dataset: Dataset) -> Provenance:
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("edgeward", "export", str(config.checkpoint), *_options(config)),
        model=getattr(checkpoint.spec.model, "name", "mlp"),
        data=dataset.location,
        data_sha256=dataset.sha256,
        checkpoint_sha256=checkpoint.sha256,
        cpu=cpu_name(),
        versions=installed_versions(*PACKAGES),
    )


def _options(config: ExportConfig) -> list[str]:
    """Every option that has a value, defaults written out, as on the command line."""
    options = []
    for name, value in asdict(config).items():
        if name == "checkpoint" or value is None or value is False:
            continue
        options.append(f"--{name.replace('_', '-')}")
        if value is not True:
            options.append(f"{value:g}" if isinstance(value, float) else str(value))
    return options


def _write_bundle(
    config: ExportConfig, checkpoint: Checkpoint, dataset: Dataset, findings: Findings, described: report.Report
) -> None:
    shipped = findings.shipped
    precision: Literal["fp32", "int8"] = "fp32" if shipped.name == "fp32" else "int8"
    spread = float(np.std(findings.held_out.logits))
    worst = gate.closest(findings.gated) if findings.gated and shipped is findings.chosen else None
    with store.new_directory(config.out) as folder:
        file = f"model.{shipped.name}.onnx"
        (folder / file).write_bytes(shipped.graph)
        (folder / REPORT).write_bytes(to_json(described))
        for beside, data in _input_files(checkpoint).items():
            (folder / beside).write_bytes(data)
        variant = Variant(
            name=shipped.name,
            file=file,
            precision=precision,
            device="cpu",
            isa=isa_class(),
            batch_invariant=shipped.batch_invariant,
            tolerance=goldens.TOLERANCE[precision] * spread,
            parity=findings.parity.served,
            gate=worst,
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


def _input_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What preprocessing reads beside the manifest, such as tokenizer.json: name -> bytes."""
    files = {}

    def read(name: str) -> bytes:
        files[name] = checkpoint.read(name)
        return files[name]

    preprocess.encoder(checkpoint.spec.input, read)
    return files

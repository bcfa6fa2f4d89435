"""`edgeward inspect` and `edgeward verify`."""

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle.manifest import (
    GateRecord,
    Input,
    Manifest,
    Multilabel,
    Regression,
    Task,
    TensorsInput,
    TextInput,
    VectorInput,
    WordsInput,
)
from bundle.model import load_model
from bundle.session import Device
from bundle.store import open_bundle
from edgeward.result import give


def inspect(bundle: Path, *, json: bool = False) -> None:
    """Show what is in a bundle, after checking every hash.

    Args:
        bundle: its directory.
        json: give the manifest as one JSON object.
    """
    manifest = open_bundle(bundle).manifest
    give(manifest, _render(manifest), json=json)


def verify(bundle: Path, *, device: Device = "auto", json: bool = False) -> None:
    """Check every hash of a bundle and run its golden self-test on this machine.

    Args:
        bundle: its directory.
        device: to run the self-test on.
        json: give the result as one JSON object.
    """
    model = load_model(bundle, device=device)
    found = {
        "bundle": bundle,
        "files": len(model.manifest.files),
        "variant": model.variant.name,
        "device": model.session.device,
        "goldens": len(model.manifest.goldens),
    }
    message = (
        f"{bundle}: {found['files']} files as sealed; {found['goldens']} golden examples reproduced by "
        f"{found['variant']} on {found['device']}."
    )
    give(found, Text(message), json=json)


def _render(manifest: Manifest) -> Group:
    facts = Table(title=f"{manifest.name} version {manifest.version}", show_header=False)
    facts.add_column()
    facts.add_column()
    facts.add_row("input", _input(manifest.input))
    for task in manifest.tasks:
        facts.add_row(task.name, _task(task))
    origin = manifest.provenance
    facts.add_row("model", origin.model)
    facts.add_row("data", f"{origin.data} ({origin.data_sha256[:12]})")
    facts.add_row("created", f"{origin.created} on {origin.cpu}")
    facts.add_row("command", " ".join(origin.command))
    facts.add_row("goldens", f"{len(manifest.goldens)}")
    facts.add_row("size", f"{sum(entry.bytes for entry in manifest.files.values()) / 1e6:.1f} MB")
    variants = Table(title="variants")
    for column in ("variant", "device", "instruction set", "p50 ms", "× fp32", "batch-invariant", "gate"):
        variants.add_column(column)
    for one in manifest.variants:
        variants.add_row(
            one.name,
            one.device,
            one.isa,
            f"{one.latency.p50_ms:.2f}",
            f"{one.latency.ratio:.2f}",
            "yes" if one.batch_invariant else "no",
            _gate(one.gate, one.parity),
        )
    return Group(facts, variants)


def _input(spec: Input) -> str:
    kind = type(spec).__name__.removesuffix("Input").lower()
    match spec:
        case TextInput(pair=str(pair)):
            return f"pair of texts as {spec.column!r} and {pair!r}"
        case WordsInput():
            return f"words by {spec.segmenter} as {spec.column!r}"
        case VectorInput():
            return f"vector of {spec.size} numbers as {spec.column!r}"
        case TensorsInput():
            return ", ".join(f"{one.name!r} {one.datatype} {list(one.shape)}" for one in spec.tensors)
        case _:
            return f"{kind} as {spec.column!r}"


def _task(task: Task) -> str:
    if isinstance(task, Regression):
        return f"one number, {task.mean:.4g} ± {task.std:.4g}"
    return f"{'any of ' if isinstance(task, Multilabel) else ''}{', '.join(task.labels)}"


def _gate(record: GateRecord | None, parity: float) -> str:
    if record is None:
        return f"parity within {parity:.1g}"
    metric = f"{record.task}.{record.metric}" if record.task else record.metric
    drop = "increase" if record.metric == "rmse" else "drop"
    return (
        f"{record.verdict}: {metric} {record.reference:.4f} -> {record.served:.4f} on "
        f"{record.examples} examples, {drop} at most {record.drop_upper:.4f} of {record.budget:.4f}"
    )

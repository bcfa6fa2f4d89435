"""`edgeward inspect` and `edgeward verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bundle.errors import DeviceUnavailable, ModelError, SelfTestFailed
from bundle.host import machine_class
from bundle.manifest import (
    GateRecord,
    Input,
    Manifest,
    Multilabel,
    Regression,
    Task,
    TensorsInput,
    TextInput,
    Variant,
    VectorInput,
    WordsInput,
)
from bundle.model import Model, load_model, start_variant
from bundle.session import Device
from bundle.store import Bundle, open_bundle
from edgeward.result import give


def inspect(bundle: Path, *, json: bool = False) -> None:
    """Show what is in a bundle, after checking every hash.

    Args:
        bundle: its directory.
        json: give the manifest as one JSON object.
    """
    manifest = open_bundle(bundle).manifest
    give(manifest, _render(manifest), json=json)


@dataclass(frozen=True)
class Proof:
    """What the self-test of a variant gave here."""

    variant: str
    device: str
    isa: str
    reproduced: bool | None  # none when it could not run
    remark: str


def verify(bundle: Path, *, device: Device = "auto", json: bool = False) -> None:
    """Check every hash of a bundle and run the golden self-test of every variant that this machine can run.

    It fails when the variant that would be served here, or one that was gated on this class of machine, does not
    reproduce its golden examples. One that was gated on another class need not; whether it does is shown.

    Args:
        bundle: its directory.
        device: whose variants to test; "auto" tests those of all devices.
        json: give the result as one JSON object.
    """
    served = load_model(bundle, device=device)
    opened = open_bundle(bundle)
    proofs = [_prove(opened, one, served) for one in opened.manifest.variants if device in ("auto", one.device)]
    found = {
        "bundle": bundle,
        "files": len(opened.manifest.files),
        "variant": served.variant.name,
        "device": served.session.device,
        "goldens": len(opened.manifest.goldens),
        "variants": proofs,
    }
    give(found, _render_proofs(found, proofs), json=json)


def _prove(opened: Bundle, variant: Variant, served: Model) -> Proof:
    def proof(reproduced: bool | None, remark: str) -> Proof:
        return Proof(variant.name, variant.device, variant.isa, reproduced, remark)

    if variant == served.variant:
        return proof(True, "served here")
    here = machine_class(variant.device)
    try:
        start_variant(opened, variant)
    except DeviceUnavailable as error:
        return proof(None, str(error))
    except (SelfTestFailed, ModelError) as error:
        if variant.isa == here:
            raise
        return proof(False, f"not served here, where nothing was gated on {variant.isa}: {error}")
    return proof(True, "" if variant.isa == here else f"gated on another class of machine; this one is {here}")


def _render_proofs(found: dict[str, Any], proofs: list[Proof]) -> Group:
    message = Text(
        f"{found['bundle']}: {found['files']} files as sealed; {found['goldens']} golden examples reproduced by "
        f"{found['variant']} on {found['device']}."
    )
    if len(proofs) == 1:
        return Group(message)
    table = Table("variant", "device", "for", "reproduced", "remark")
    for one in proofs:
        answer = {True: "yes", False: "no", None: "not run"}[one.reproduced]
        table.add_row(one.variant, one.device, one.isa, answer, one.remark)
    return Group(message, table)


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
    return Group(facts, _render_variants(manifest), _render_gates(manifest))


def _render_variants(manifest: Manifest) -> Table:
    table = Table("variant", "device", "for", "p50 ms", "× fp32", "rows/s", "batch-invariant", title="variants")
    for one in manifest.variants:
        table.add_row(
            one.name,
            one.device,
            one.isa,
            f"{one.latency.p50_ms:.2f}",
            f"{one.latency.ratio:.2f}",
            "" if one.rows_per_s is None else f"{one.rows_per_s:.0f}",
            "yes" if one.batch_invariant else "no",
        )
    return table


def _render_gates(manifest: Manifest) -> Table:
    table = Table("variant", "gate", "built")
    for one in manifest.variants:
        built = one.built or manifest.provenance
        table.add_row(one.name, _gate(one.gate, one.parity), f"{built.created[:10]} on {built.cpu}")
    return table


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
    drop = "increase" if record.metric in ("rmse", "mae") else "drop"
    return (
        f"{record.verdict}: {metric} {record.reference:.4f} -> {record.served:.4f} on "
        f"{record.examples} examples, {drop} at most {record.drop_upper:.4f} of {record.budget:.4f}"
    )

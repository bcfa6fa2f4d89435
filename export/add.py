"""A variant for another machine: a new bundle that holds an existing one and what was compiled and gated here."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bundle import preprocess, store
from bundle.errors import BundleError
from bundle.manifest import Golden, Input, Provenance, Task, Variant
from bundle.model import golden_tensors
from bundle.session import Session
from bundle.store import Bundle


def check_same_model(bundle: Bundle, spec: Input, tasks: tuple[Task, ...], sha256: str) -> None:
    """Refuse another model than that of the bundle; to be called before anything is compiled.

    Args:
        bundle: to be added to.
        spec: input of what would be compiled.
        tasks: of what would be compiled.
        sha256: of its checkpoint.

    Raises:
        BundleError: a variant of it would be another model under the same name.
    """
    manifest = bundle.manifest
    theirs = manifest.provenance.checkpoint_sha256
    differing = []
    if sha256 != theirs:
        differing.append(f"the checkpoint, {sha256[:12]} instead of {theirs[:12]}")
    if spec != manifest.input:
        differing.append("the input")
    if tasks != manifest.tasks:
        differing.append("the tasks")
    if differing:
        raise BundleError(
            f"{bundle.path} is of another model; what differs: {', and '.join(differing)}. A variant must come from "
            "the checkpoint that the bundle was exported from. Nothing was written."
        )


def add_variant(
    bundle: Bundle, variant: Variant, graph: bytes, session: Session, *, report: bytes, built: Provenance, out: Path
) -> Variant:
    """Write a new bundle with everything of an existing one, which stays as it is, and one more variant.

    Args:
        bundle: to be added to; see `check_same_model`.
        variant: as for a bundle of its own; its name gets its `isa` appended, its file the name.
        graph: of the variant.
        session: of the graph, on the variant's device; gives the logits of the golden examples.
        report: of its export, as JSON; becomes `report.NAME.json`.
        built: where the variant comes from.
        out: the new bundle's directory.

    Returns:
        The variant as it is in the new bundle.

    Raises:
        BundleError: there is such a variant already, or golden examples are preprocessed otherwise here.
        OutputExists: there is something at `out`.
    """
    added = _named(bundle, variant, built)
    manifest = bundle.manifest
    goldens = _run_goldens(bundle, added.name, session)
    with store.new_directory(out) as folder:
        for name in manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bundle.read(name))
        (folder / added.file).write_bytes(graph)
        (folder / _report_name(added)).write_bytes(report)
        variants = _placed(manifest.variants, added)
        store.seal(folder, msgspec.structs.replace(manifest, variants=variants, goldens=goldens))
    return added


def _named(bundle: Bundle, variant: Variant, built: Provenance) -> Variant:
    name = f"{variant.name}.{variant.isa}"
    added = msgspec.structs.replace(variant, name=name, file=f"model.{name}.onnx", built=built)
    for present in bundle.manifest.variants:
        same_machine = (present.device, present.isa) == (variant.device, variant.isa)
        if same_machine and present.name in (variant.name, name):
            raise BundleError(
                f"{bundle.path} has a variant {present.name} for {variant.device} on {variant.isa} already. Nothing "
                "was written. Ask for another one with --variant, or export a bundle anew."
            )
    taken = {added.name} & {each.name for each in bundle.manifest.variants}
    taken |= {added.file, _report_name(added)} & bundle.manifest.files.keys()
    if taken:
        raise BundleError(
            f"{bundle.path} has something called {', '.join(sorted(taken))} already; nothing was written."
        )
    return added


def _report_name(variant: Variant) -> str:
    return f"report.{variant.name}.json"


def _run_goldens(bundle: Bundle, name: str, session: Session) -> tuple[Golden, ...]:
    """The golden examples with the logits of variant `name`, from tensors that were found to be the bundle's."""
    encode = preprocess.encoder(bundle.manifest.input, bundle.read)
    goldens = []
    for golden in bundle.manifest.goldens:
        outputs = session.run(golden_tensors(bundle, golden, encode))
        rows = {output: tuple(map(float, values[0])) for output, values in outputs.items()}
        goldens.append(msgspec.structs.replace(golden, logits={**golden.logits, name: rows}))
    return tuple(goldens)


def _placed(variants: Sequence[Variant], added: Variant) -> tuple[Variant, ...]:
    """Before the first of the same device and class that is slower: of those, the first is served."""
    for position, present in enumerate(variants):
        same_machine = (present.device, present.isa) == (added.device, added.isa)
        if same_machine and added.latency.ratio < present.latency.ratio:
            return (*variants[:position], added, *variants[position:])
    return (*variants, added)

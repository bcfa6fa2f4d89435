"""What a run is to do, decided once: the units of its input, and what they have to be scored with."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from bundle.errors import DataError, OutputExists
from bundle.manifest import ImageInput, Input, Manifest, TextInput, Variant, WordsInput
from bundle.store import DIGEST, read_manifest
from score import answers
from score.config import ScoreConfig
from score.examples import input_names, renamed
from score.files import Found, absolute, find_inputs
from score.folder import Folder
from score.readers import Wanted, cut
from score.units import InputFile, Plan, Unit, to_json

PLAN = "_plan.json"
UNIT_S = 3.0  # of one core, about: little enough to share out and to lose, and a part is not written for nothing
LEAST_ROWS, MOST_ROWS = 256, 65536  # of a unit
_VERSION = 2  # of how input is cut into units and units are written as parts


def prepare(config: ScoreConfig) -> tuple[ScoreConfig, Plan]:
    """The configuration with absolute paths, and the plan: that of the folder, or a new one that is not written yet.

    Raises:
        BundleError: there is no bundle.
        DataError: an input or an option cannot be used, or the folder holds a run that is another.
        OutputExists: the folder holds something else.
    """
    config = replace(
        config,
        bundle=config.bundle.absolute(),
        inputs=tuple(map(absolute, config.inputs)),
        out=absolute(config.out),
    )
    shard(config, ())
    manifest = read_manifest(config.bundle)
    options = _options(config, manifest)
    bundle = (config.bundle / DIGEST).read_text().split()[0]
    found = find_inputs(config.inputs, images=isinstance(manifest.input, ImageInput), out=config.out)
    files = tuple(each.file for each in found)
    folder = Folder(config.out)
    written = read_plan(folder)
    if written is not None:
        _check_same(folder, written, bundle, options, files)
        return config, written
    units = _units(config, manifest.input, found, int(options["unit_rows"]))
    fingerprint = _fingerprint(bundle, options, files)
    return config, Plan(fingerprint=fingerprint, bundle=bundle, options=options, files=files, units=units)


def read_plan(folder: Folder) -> Plan | None:
    """The plan of the run that a folder holds, or None when it is empty.

    Raises:
        DataError: it is no plan.
        OutputExists: the folder holds files, but no plan.
    """
    data = folder.read(PLAN)
    if data is None:
        names = folder.names()
        if names:
            raise OutputExists(
                f"{folder.path} holds files that are not of a run, such as {min(names)}, and was left as it is. Choose "
                "another --out."
            )
        return None
    try:
        return msgspec.json.decode(data, type=Plan)
    except msgspec.MsgspecError as error:
        raise DataError(f"{folder.path}/{PLAN} is no plan of this edgeward: {error}. Choose another --out.") from error


def record(folder: Folder, plan: Plan) -> Plan:
    """Write the plan, with its settings, before the first unit; of several runs that begin at once the first counts.

    Raises:
        DataError: that is a run of something else.
    """
    if folder.create(PLAN, to_json(plan)):
        return plan
    written = read_plan(folder)
    assert written is not None
    _check_same(folder, written, plan.bundle, plan.options, plan.files)
    return written


def _options(config: ScoreConfig, manifest: Manifest) -> dict[str, str]:
    """Those that change what is written, checked."""
    column, keep = renamed(config.column, "--column"), renamed(config.keep, "--keep")
    unknown = column.keys() - input_names(manifest.input)
    if unknown:
        raise DataError(
            f"--column {', '.join(sorted(unknown))}: the bundle has no such input, only "
            f"{', '.join(sorted(input_names(manifest.input)))}."
        )
    columns = answers.Columns(manifest.tasks, config.top_k, config.scores, config.logits)
    taken = {"_file", "_row", *(field.name for field in [*columns.fields, *answers.STATUS])}
    if taken & keep.keys():
        name = min(taken & keep.keys())
        raise DataError(f"the output has a column {name!r} already. Keep that of the input as --keep NAME={name}.")
    _check_numbers(config)
    unit_rows = config.unit_rows or _unit_rows(manifest)
    return {
        "format": config.format,
        "column": _shown(column),
        "keep": _shown(keep),
        "top_k": str(config.top_k),
        "scores": str(config.scores),
        "logits": str(config.logits),
        "unit_rows": str(unit_rows),
    }


def row_s(variant: Variant, spec: Input) -> float:
    """A row's time on one core, about: as export measured its run, and what comes before."""
    reading = {ImageInput: 5e-3, TextInput: 5e-5, WordsInput: 5e-5}.get(type(spec), 2e-6)
    return variant.latency.p50_ms / 1e3 + reading


def _unit_rows(manifest: Manifest) -> int:
    """As many as UNIT_S are enough for, a power of two; it must depend on the bundle alone."""
    rows = int(UNIT_S / row_s(manifest.variants[0], manifest.input))
    return min(max(1 << rows.bit_length() - 1, LEAST_ROWS), MOST_ROWS)


def _check_numbers(config: ScoreConfig) -> None:
    counts = ("unit_rows", "processes", "threads", "batch", "decoders")
    least = {"top_k": 0, **dict.fromkeys(counts, 1)}
    for name, limit in least.items():
        value = getattr(config, name)
        if value is not None and value < limit:
            raise DataError(f"--{name.replace('_', '-')} is {value}; expected at least {limit}.")
    if not 0 <= config.max_error_rate <= 1:
        raise DataError(f"--max-error-rate is {config.max_error_rate}; expected a fraction from 0 to 1.")


def _shown(names: dict[str, str]) -> str:
    return " ".join(f"{name}={column}" for name, column in names.items())


def _fingerprint(bundle: str, options: dict[str, str], files: Sequence[InputFile]) -> str:
    return hashlib.sha256(msgspec.json.encode([_VERSION, bundle, options, files], order="deterministic")).hexdigest()


def _check_same(folder: Folder, plan: Plan, bundle: str, options: dict[str, str], files: tuple[InputFile, ...]) -> None:
    if plan.fingerprint == _fingerprint(bundle, options, files):
        return
    changed = [
        f"--{name.replace('_', '-')} was {plan.options.get(name)!r} and is {value!r}"
        for name, value in options.items()
        if plan.options.get(name) != value
    ]
    if plan.bundle != bundle:
        changed.append("the bundle is another")
    differing = sorted({file.path for file in set(plan.files) ^ set(files)})
    if differing:
        changed.append(f"the input is another: {', '.join(differing[:3])}")
    raise DataError(
        f"{folder.path} holds a run that is not this one: {'; '.join(changed) or 'another edgeward wrote it'}. Nothing "
        "was changed. Choose another --out."
    )


def _units(config: ScoreConfig, spec: Input, found: Sequence[Found], unit_rows: int) -> tuple[Unit, ...]:
    wanted = Wanted(spec, renamed(config.column, "--column"), renamed(config.keep, "--keep"))
    units: list[Unit] = []
    first: tuple[str, Mapping[str, object]] | None = None
    for index, each in enumerate(found):
        columns, types = wanted.columns(each.file.path, each.file.kind)
        if first is not None and first[1] != types:
            raise DataError(
                f"the columns to keep are {_typed(types)} in {each.file.path} and {_typed(first[1])} in {first[0]}. "
                "Score them apart."
            )
        first = first or (each.file.path, types)
        units += cut(each, index, columns, unit_rows)
    return tuple(units)


def _typed(columns: Mapping[str, object]) -> str:
    return ", ".join(f"{name!r} {kind}" for name, kind in columns.items())


def shard(config: ScoreConfig, units: Sequence[Unit]) -> Sequence[Unit]:
    """The units that --shard leaves to this run.

    Raises:
        DataError: it is not K/N.
    """
    if config.shard is None:
        return units
    number, _, of = config.shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise DataError(f"--shard is {config.shard!r}; expected K/N, such as 0/8, with K from 0 to N - 1.")
    return units[int(number) :: int(of)]

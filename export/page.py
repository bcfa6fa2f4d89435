"""report.html: the accuracy report as one page that needs nothing but itself, no script, no file, no network."""

import math
import shlex
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from bundle.errors import MissingExtra
from bundle.manifest import GateRecord
from export import gate, picture, report
from export.report import Confusion, Flip, Report
from export.robustness import Robustness

MOST_CLASSES = 20  # of a confusion difference
LONGEST_TEXT = 280  # characters of an example
LONGEST_LABEL = 40  # characters
THUMBNAIL = 192  # pixels of the longer side
_TEMPLATE = "report.html.j2"

Content = str | bytes | Sequence[float]


@dataclass(frozen=True)
class ShownFlip:
    """A flipped example with what it is: a text, a PNG or JPEG, or numbers."""

    flip: Flip
    content: Content | None = None


@dataclass(frozen=True)
class Paired:
    """How many examples either got right, of one gate record."""

    record: GateRecord
    both: int
    lost: int  # only the reference
    won: int  # only the candidate
    neither: int
    changed: int  # answers


@dataclass(frozen=True)
class Difference:
    """What a compiled variant changed of a confusion matrix, of the labels with the most changes."""

    task: str | None
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # served minus PyTorch, row = truth
    largest: int
    of: int  # labels altogether


def page(described: Report, flips: Sequence[ShownFlip] = ()) -> str:
    """The report for people, HTML.

    Args:
        described: what is shown.
        flips: its flips with what they are; without them the page holds no user's data but labels.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtra("jinja2 is not installed: pip install 'edgeward[export]'.") from error

    # Labels, texts, paths and commands are the user's: whatever they hold is text.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "cut": cut, "change": change}
    template = environment.from_string(resources.files("export").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=described,
        words=report.words,
        amount=report.amount,
        key=report.key,
        describe=report.describe,
        needed=report.needed,
        headline=report.headline(described),
        badge=gate.closest(described.gate).verdict if described.gate else "PARITY",
        shipped=next(one for one in described.candidates if one.name == described.shipped),
        fp32=next((one for one in described.candidates if one.name == "fp32"), None),
        two_sided=round(100 * (2 * described.confidence - 1)),
        pictures=[drawn for size in ((1040, 460), (400, 420)) if (drawn := picture.draw(described, *size))],
        accuracy=report.accuracy(described),
        gated=report.gated(described).name if described.gate else described.shipped,
        pairs=[pair for record in described.gate or described.comparison if (pair := paired(record))],
        differences=[difference(confusion) for confusion in described.confusion],
        robustness=robust(described.robustness),
        flips=[(shown.flip, *_media(shown.content)) for shown in flips or map(ShownFlip, described.flips)],
        changed=sum(_changed(record) for record in described.comparison),
        unit=_unit(described),
        command=shlex.join(described.provenance.command),
    )


def _unit(described: Report) -> str:
    """Of the losses in the picture."""
    units = {"% of the error" if report.is_error(record.metric) else "points" for record in described.comparison}
    return " or ".join(sorted(units, reverse=True))


def _changed(record: GateRecord) -> int:
    """How many answers are others; of numbers, which all differ a little, none is said to be."""
    return 0 if record.metric in ("rmse", "mae", "r2") else round(record.disagreement * record.examples)


def number(value: float | None, digits: int = 4) -> str:
    """A number with its significant digits; what is not defined says so."""
    if value is None or not math.isfinite(value):
        return "not defined"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def change(value: float, digits: int = 2) -> str:
    """A number with its sign, and a minus that is as wide as a plus."""
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "not defined"


def cut(text: str, most: int = LONGEST_LABEL) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def paired(record: GateRecord) -> Paired | None:
    """The paired counts of a gate record; None of one that does not count right answers."""
    if record.lost is None or record.won is None:
        return None
    right = round(record.reference * record.examples)
    return Paired(
        record=record,
        both=right - record.lost,
        lost=record.lost,
        won=record.won,
        neither=record.examples - right - record.won,
        changed=round(record.disagreement * record.examples),
    )


def difference(confusion: Confusion) -> Difference:
    """Served minus PyTorch, of the labels that take part in the most changes, in their order."""
    counts = np.array(confusion.served, np.int64) - np.array(confusion.pytorch, np.int64)
    changes = np.abs(counts).sum(axis=0) + np.abs(counts).sum(axis=1)
    kept = np.sort(np.argsort(-changes, kind="stable")[:MOST_CLASSES])
    shown = counts[np.ix_(kept, kept)]
    return Difference(
        task=confusion.task,
        labels=tuple(confusion.labels[i] for i in kept),
        counts=tuple(map(tuple, shown.tolist())),
        largest=int(np.abs(counts).max(initial=0)),
        of=len(confusion.labels),
    )


def robust(checks: Robustness) -> list[tuple[bool, str]]:
    """What was checked of what ships: whether it is as one would wish, and a sentence."""
    said = [
        (
            checks.batch_invariant,
            "An answer does not depend on what it is batched with.",
            "An answer depends on what it is batched with, so this variant runs one example at a time.",
        ),
        (
            checks.padding_invariant,
            "An answer does not depend on how far it is padded.",
            "An answer depends on how far it is padded, so this variant runs unpadded.",
        ),
        (
            checks.thread_invariant,
            "One thread and many give the same bits.",
            "One thread and many give answers that differ in their last bits.",
        ),
        (
            checks.repeatable,
            "Two runs give the same bits.",
            "Two runs give answers that differ in their last bits.",
        ),
    ]
    sentences = [(holds, yes if holds else no) for holds, yes, no in said]
    return [*sentences, (False, checks.extremes)] if checks.extremes else sentences


def _media(content: Content | None) -> tuple[str, str]:
    """An example as the template takes it: a text, and the address of an image; either may be empty."""
    match content:
        case None:
            return "", ""
        case str():
            return cut(content, LONGEST_TEXT), ""
        case bytes():
            return "", _thumbnail(content)
    return cut(", ".join(number(float(value)) for value in content[:LONGEST_TEXT]), LONGEST_TEXT), ""


def _thumbnail(raw: bytes) -> str:
    """A small PNG as a data: address; empty of what cannot be decoded."""
    try:
        with Image.open(BytesIO(raw), formats=("PNG", "JPEG")) as image:
            small = image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"

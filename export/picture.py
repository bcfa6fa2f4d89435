"""The picture of a report: what every candidate loses over the time that it takes, as coordinates for an SVG."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10

from export.report import Candidate, Report

MOST_BUDGETS = 4.0  # of the loss axis, unless what ships needs more: one bad candidate must not flatten the others
MOST_RATIO = 2.0  # of the time axis, in the same way
LONGEST_NAME = 26  # characters
CHARACTER, LINE = 6.9, 14.0  # size of one, of the labels' font
RADIUS = 5.0

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """A dot's name and where it stands, with a line to the dot when it is far from it."""

    text: str
    x: float
    y: float
    anchor: str  # of SVG: start, middle, end
    box: Box
    far: bool


@dataclass(frozen=True)
class Dot:
    """One candidate; `beyond` where its place is outside the axes and it is drawn at their edge."""

    name: str
    role: str  # shipped, fp32 or tried
    x: float
    y: float
    across: tuple[float, float]  # the ends of the interval of its time
    down: tuple[float, float]  # and of its loss
    beyond: bool
    label: Label | None  # none where there is no room
    says: str


@dataclass(frozen=True)
class Picture:
    """Coordinates in SVG units; what is lost grows downwards."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    across: tuple[tuple[float, str], ...]  # ticks
    down: tuple[tuple[float, str], ...]
    fp32: float
    budget: float
    untimed: float | None  # where those stand that were not timed
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class _Axes:
    frame: Box
    across: float  # largest ratio
    down: tuple[float, float]  # smallest and largest loss

    def x(self, ratio: float) -> float:
        left, _, right, _ = self.frame
        return left + (right - left) * min(max(ratio / self.across, 0.0), 1.0)

    def y(self, drop: float) -> float:
        _, top, _, bottom = self.frame
        least, most = self.down
        return top + (bottom - top) * min(max((drop - least) / (most - least), 0.0), 1.0)


def draw(report: Report, width: int, height: int) -> Picture | None:
    """Where everything stands, or None when no candidate was scored.

    Of several tasks a candidate stands at the one of which it may have lost most.

    Args:
        report: whose candidates they are.
        width: of the picture.
        height: of it.
    """
    scored = [one for one in report.candidates if one.selection_drop]
    if not scored:
        return None
    untimed = width - 56.0 if any(one.latency is None for one in scored) else None
    frame = (48.0, 12.0, (width - 104.0 if untimed else width - 12.0), height - 44.0)
    axes = _Axes(frame, _most_ratio(scored), _losses(scored, report))
    left, top, right, bottom = frame
    return Picture(
        width=width,
        height=height,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        across=tuple((axes.x(value), text) for value, text in _ticks(0.0, axes.across)),
        down=tuple((axes.y(value / 100), text) for value, text in _ticks(*(100 * drop for drop in axes.down))),
        fp32=axes.x(1.0),
        budget=axes.y(report.budget),
        untimed=untimed,
        dots=_dots(scored, axes, untimed, width),
    )


def worst(one: Candidate) -> tuple[float, float, float]:
    """Loss and both ends of its interval, of the metric of which the candidate may have lost most."""
    losses = [(drop, *one.selection_drop_interval.get(name, (drop, drop))) for name, drop in one.selection_drop.items()]
    return max(losses, key=lambda loss: loss[2])


def _most_ratio(scored: Sequence[Candidate]) -> float:
    uppers = [one.latency.ratio_upper for one in scored if one.latency]
    return min(max(1.1, *(1.05 * upper for upper in uppers)) if uppers else 1.1, MOST_RATIO)


def _losses(scored: Sequence[Candidate], report: Report) -> tuple[float, float]:
    """The least and the largest loss of the axis, with a margin."""
    losses = [worst(one) for one in scored]
    shipped = max(worst(one)[2] for one in scored if one.outcome == "shipped" or one is scored[0])
    limit = max(MOST_BUDGETS * report.budget, 1.2 * shipped)
    most = min(max(1.3 * report.budget, *(upper for _, _, upper in losses)), limit)
    least = max(min(0.0, *(lower for _, lower, _ in losses)), -limit)
    margin = 0.06 * (most - least)
    return least - margin, most + margin


def _ticks(least: float, most: float) -> Iterator[tuple[float, str]]:
    """Round numbers between both, four to eight of them."""
    rough = (most - least) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    digits = max(0, -floor(log10(step)))
    for i in range(ceil(least / step), floor(most / step) + 1):
        yield i * step, f"{i * step:.{digits}f}"


def _dots(scored: Sequence[Candidate], axes: _Axes, untimed: float | None, width: int) -> tuple[Dot, ...]:
    """Every candidate, those first whose label must not be missing; drawn in the opposite order."""
    placed = [_place(one, axes, untimed) for one in sorted(scored, key=_importance)]
    obstacles = [box for dot in placed for box in _boxes(dot)]
    labelled: list[Dot] = []
    for dot in placed:
        taken = [other.label.box for other in labelled if other.label]
        labelled.append(_with_label(dot, axes.frame, width, taken, obstacles))
    return tuple(reversed(labelled))


def _importance(one: Candidate) -> int:
    return 0 if one.outcome == "shipped" else 1 if one.name == "fp32" else 2 if one.outcome == "not passed" else 3


def _place(one: Candidate, axes: _Axes, untimed: float | None) -> Dot:
    drop, lower, upper = worst(one)
    x, across = untimed or 0.0, (untimed or 0.0,) * 2
    if one.latency is not None:
        least = one.latency.ratio if one.latency.ratio_lower is None else one.latency.ratio_lower
        x, across = axes.x(one.latency.ratio), (axes.x(least), axes.x(one.latency.ratio_upper))
    return Dot(
        name=one.name,
        role="shipped" if one.outcome == "shipped" else "fp32" if one.name == "fp32" else "tried",
        x=x,
        y=axes.y(drop),
        across=across,
        down=(axes.y(lower), axes.y(upper)),
        beyond=drop > axes.down[1] or drop < axes.down[0] or bool(one.latency and one.latency.ratio > axes.across),
        label=None,
        says=f"{one.name}: {100 * drop:.2f} lost ({100 * lower:.2f} to {100 * upper:.2f})",
    )


def _boxes(dot: Dot) -> tuple[Box, Box, Box]:
    """What a label should not cover: the dot and both of its intervals."""
    (left, right), (top, bottom), x, y = dot.across, dot.down, dot.x, dot.y
    around = (x - RADIUS - 2, y - RADIUS - 2, x + RADIUS + 2, y + RADIUS + 2)
    return around, (left, y - 2, right, y + 2), (x - 2, top, x + 2, bottom)


def _with_label(dot: Dot, frame: Box, width: int, taken: Sequence[Box], obstacles: Sequence[Box]) -> Dot:
    """The dot with its name at the free place that is nearest; without it where every place is another name's."""
    left, top, _, bottom = frame
    free = [
        (sum(_overlap(label.box, box) for box in obstacles), order, label)
        for order, label in enumerate(_places(dot))
        if label.box[0] >= left + 2 and label.box[2] <= width - 2 and label.box[1] >= top and label.box[3] <= bottom
        if not any(_overlap(label.box, box) for box in taken)
    ]
    label = min(free, key=lambda each: each[:2])[2] if free else None
    return replace(dot, label=label)


def _places(dot: Dot) -> Iterator[Label]:
    """Where its name may stand, the best place first."""
    text = dot.name if len(dot.name) <= LONGEST_NAME else dot.name[: LONGEST_NAME - 1] + "…"
    wide = CHARACTER * sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)
    for away in range(0, 161, 16):
        for dx, dy, anchor in ((9, -7, "start"), (9, 16, "start"), (-9, -7, "end"), (-9, 16, "end")):
            x, y = dot.x + dx, dot.y + dy + (away if dy > 0 else -away)
            left = x - (wide if anchor == "end" else 0)
            yield Label(text, x, y, anchor, (left, y - LINE + 3, left + wide, y + 3), far=away > 0)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

"""_report.html: a run at a glance, as one page that needs nothing but itself, no script, no file, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from score.drift import SPREAD
from score.report import Answers, Cost, Report

MOST_LABELS = 30  # in a picture
LONGEST_LABEL = 32  # characters
WIDTH, HEIGHT = 640.0, 220.0  # of a histogram; units of SVG
_LEFT, _TOP, _BOTTOM, _LINE = 8.0, 18.0, 24.0, 22.0
_NAMES = 220.0  # that labels take beside their bars
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Bar:
    """A rectangle, what it says when it is pointed at, and the text at its end."""

    x: float
    y: float
    width: float
    height: float
    says: str
    name: str = ""


@dataclass(frozen=True)
class Picture:
    """Bars, in units of SVG."""

    title: str
    width: float
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...] = ()  # of the axis below
    note: str = ""


def page(report: Report) -> str:
    """The report for people, HTML."""
    import jinja2

    # Labels, paths and names of columns are the user's: whatever they hold is text.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "size": size, "number": number}
    template = environment.from_string(resources.files("score").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        found=report.found,
        cost=report.cost,
        headline=headline(report),
        pictures=[(answers.task, pictures(answers)) for answers in report.found.answers],
        stages=stages(report.cost),
        chosen=report.settings,
    )


def headline(report: Report) -> str:
    """The run in one sentence."""
    found, cost = report.found, report.cost
    bad = f"{found.rows_bad:,} of them bad ({share(found.rows_bad, found.rows_in)})" if found.rows_bad else "none bad"
    said = f"{found.rows_in:,} rows, {bad}"
    if not cost.rows:
        return f"{said}."
    return f"{said}, at {number(cost.rows_per_s)} rows a second; the limiting stage is {cost.limiting_stage}."


def pictures(answers: Answers) -> list[Picture]:
    """Confidence and labels of a task, or its values."""
    drawn = []
    if sum(answers.confidence):
        drawn.append(histogram("Score of the likeliest label", answers.confidence, 0.0, 1.0))
    if sum(answers.values):
        drawn.append(
            histogram("Values, in standard deviations from the mean of training", answers.values, -SPREAD, SPREAD)
        )
    if sum(answers.labels.values()):
        drawn.append(label_bars(answers.labels, sum(answers.confidence)))
    return drawn


def histogram(title: str, counts: Sequence[int], lowest: float, highest: float) -> Picture:
    """Upright bars over an axis.

    Args:
        title: above it.
        counts: of equal parts of the axis.
        lowest: left end of the axis.
        highest: right end.
    """
    wide, tall = (WIDTH - 2 * _LEFT) / len(counts), HEIGHT - _TOP - _BOTTOM
    step, most, total = (highest - lowest) / len(counts), max(*counts, 1), max(sum(counts), 1)
    bars = tuple(
        Bar(
            x=_LEFT + i * wide + 1,
            y=_TOP + tall * (1 - count / most),
            width=wide - 2,
            height=tall * count / most,
            says=f"{lowest + i * step:.2f} to {lowest + (i + 1) * step:.2f}: {count:,} rows ({share(count, total)})",
        )
        for i, count in enumerate(counts)
    )
    ticks = tuple(
        (_LEFT + wide * len(counts) * i / 10, f"{lowest + (highest - lowest) * i / 10:.3g}") for i in range(11)
    )
    return Picture(title, WIDTH, HEIGHT, bars, ticks, note=f"highest bar: {most:,} rows ({share(most, total)})")


def label_bars(labels: dict[str, int], rows: int) -> Picture:
    """Bars that lie, the longest first; of many labels the most frequent.

    Args:
        labels: rows for which each was predicted.
        rows: that were answered.
    """
    ranked = sorted(labels.items(), key=lambda item: -item[1])
    shown, most = ranked[:MOST_LABELS], max(ranked[0][1], 1)
    room = WIDTH - _NAMES - 150
    bars = tuple(
        Bar(
            x=_NAMES,
            y=_TOP + i * _LINE,
            width=room * count / most,
            height=_LINE - 6,
            says=f"{count:,} ({share(count, rows)})",
            name=label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…",
        )
        for i, (label, count) in enumerate(shown)
    )
    hidden = len(ranked) - len(shown)
    note = f"and {hidden:,} rarer labels, in _report.json" if hidden else ""
    return Picture("Predicted labels", WIDTH, _TOP + _LINE * len(shown) + 4, bars, note=note)


def stages(cost: Cost) -> list[tuple[str, float, float]]:
    """Name, seconds, and seconds as a fraction of those of the limiting stage."""
    most = max(cost.seconds.values(), default=0.0) or 1.0
    return [(name, seconds, seconds / most) for name, seconds in cost.seconds.items()]


def share(part: float, of: float) -> str:
    """A fraction in percent."""
    percent = 100 * part / of if of else 0.0
    return f"{percent:.0f}%" if percent in (0.0, 100.0) else f"{percent:.2g}%" if percent < 10 else f"{percent:.1f}%"


def size(value: int) -> str:
    """Bytes."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def number(value: float) -> str:
    """A number with its significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""What a run gave and what it cost: _report.json for programs, _report.html for people.

`found` depends on bundle, options and input alone; everything else on the machine and the day.
"""

from importlib.util import find_spec

import msgspec

from bundle import outputs
from bundle.errors import MissingExtra
from bundle.host import cpu_count, cpu_name, isa_class
from bundle.manifest import Manifest, Multiclass, Multilabel, Record, Regression, Task, to_json
from score.drift import Drift
from score.progress import Outcome, Process
from score.units import Plan, Settings, Trial
from score.usage import peak_rss, process_name

FORMAT_VERSION = 1
JSON, HTML = "_report.json", "_report.html"


class Vocabulary(Record, frozen=True, kw_only=True):
    """How much of the texts the model does not know: of tokens, special ones included, or of sampled rows' words."""

    known: int
    unknown: int
    rate: float  # unknown, as a fraction of both
    texts: int | None = None  # of words: texts with none that is known


class Answers(Record, frozen=True, kw_only=True):
    """What was answered for one task."""

    task: str
    labels: dict[str, int] = msgspec.field(default_factory=dict)  # rows for which each was predicted
    confidence: tuple[int, ...] = ()  # rows by the score of their likeliest label, in twentieths from 0 to 1
    values: tuple[int, ...] = ()  # rows by (value - mean) / std of the training, in halves from -5 to 5


class Found(Record, frozen=True, kw_only=True):
    """What came of all rows, equal whenever and wherever they are scored."""

    rows_in: int
    rows_ok: int
    rows_bad: int
    missing: int  # rows of which a value is not there
    empty: int | None  # texts of nothing but white space; none where the input is no text
    vocabulary: Vocabulary | None
    answers: tuple[Answers, ...]


class Cost(Record, frozen=True, kw_only=True):
    """What the run has cost; of a run that went on, since then."""

    rows: int
    wall_s: float
    rows_per_s: float
    seconds: dict[str, float]  # that each stage was at work, over all processes
    limiting_stage: str | None  # the one with the most; none where nothing was left to do
    cpu_s: float  # of the processes that scored
    peak_rss: int  # bytes, all processes together
    bytes: int  # of the parts
    processes: tuple[Process, ...]


class Report(Record, frozen=True, kw_only=True):
    """The whole of _report.json."""

    format_version: int
    bundle: str
    bundle_version: int
    bundle_sha256: str  # of its manifest
    fingerprint: str  # of the plan
    options: dict[str, str]
    files: int
    units: int
    found: Found
    cost: Cost
    settings: Settings | None
    trials: tuple[Trial, ...]
    host: dict[str, str | int]


def check_extras() -> None:
    """Refuse, before anything is scored, what could not be written afterwards.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise MissingExtra("jinja2 is not installed. Install edgeward with its extra 'score'.")


def files(manifest: Manifest, plan: Plan, outcome: Outcome) -> dict[str, bytes]:
    """The files _report.json and _report.html.

    Args:
        manifest: of the bundle.
        plan: of the run.
        outcome: of it.

    Raises:
        MissingExtra: see check_extras.
    """
    check_extras()
    from score.page import page

    report = describe(manifest, plan, outcome)
    return {JSON: to_json(report), HTML: page(report).encode()}


def describe(manifest: Manifest, plan: Plan, outcome: Outcome) -> Report:
    """The report of a run; see files."""
    return Report(
        format_version=FORMAT_VERSION,
        bundle=manifest.name,
        bundle_version=manifest.version,
        bundle_sha256=plan.bundle,
        fingerprint=plan.fingerprint,
        options=plan.options,
        files=len(plan.files),
        units=len(plan.units),
        found=_found(manifest, outcome),
        cost=_cost(outcome),
        settings=plan.settings,
        trials=plan.trials,
        host={"cpu": cpu_name(), "isa": isa_class(), "cores": cpu_count()},
    )


def _found(manifest: Manifest, outcome: Outcome) -> Found:
    counts = outcome.counts
    return Found(
        rows_in=counts.rows_in,
        rows_ok=counts.rows_ok,
        rows_bad=counts.rows_bad,
        missing=counts.drift.get("missing", (0,))[0],
        empty=counts.drift["empty"][0] if "empty" in counts.drift else None,
        vocabulary=_vocabulary(counts.drift),
        answers=tuple(_answers(task, outputs.prefix(manifest.tasks, task), counts.drift) for task in manifest.tasks),
    )


def _vocabulary(drift: Drift) -> Vocabulary | None:
    if "vocabulary" not in drift:
        return None
    known, unknown = drift["vocabulary"]
    texts = drift["unknown_texts"][0] if "unknown_texts" in drift else None
    return Vocabulary(known=known, unknown=unknown, rate=unknown / max(known + unknown, 1), texts=texts)


def _answers(task: Task, name: str, drift: Drift) -> Answers:
    match task:
        case Regression():
            return Answers(task=task.name, values=drift.get(f"{name}values", ()))
        case Multiclass() | Multilabel():
            counts = drift.get(f"{name}labels", (0,) * len(task.labels))
            return Answers(
                task=task.name,
                labels=dict(zip(task.labels, counts, strict=True)),
                confidence=drift.get(f"{name}confidence", ()),
            )


def _cost(outcome: Outcome) -> Cost:
    here = () if process_name() in {process.name for process in outcome.processes} else (peak_rss(),)
    return Cost(
        rows=outcome.rows,
        wall_s=outcome.wall_s,
        rows_per_s=outcome.rows / outcome.wall_s if outcome.wall_s else 0.0,
        seconds=outcome.seconds,
        limiting_stage=max(outcome.seconds, key=outcome.seconds.__getitem__, default=None),
        cpu_s=sum(process.cpu_s for process in outcome.processes),
        peak_rss=sum((*here, *(process.peak_rss for process in outcome.processes))),
        bytes=outcome.bytes,
        processes=outcome.processes,
    )

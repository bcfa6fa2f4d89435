"""report.html: every candidate, the verdict and the command are on it, and it needs nothing from anywhere."""

from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from rich.console import Console

from bundle.manifest import GateRecord, Latency, Provenance
from export import page, picture
from export.bench import BatchLatency
from export.fidelity import ClassDrop, Fidelity
from export.graph import Parity
from export.mixed import Kept
from export.page import ShownFlip
from export.report import FORMAT_VERSION, Candidate, Confusion, Flip, Report, failed, headline, needed, render
from export.robustness import Robustness

HOSTILE = "<script>alert('x')</script> & 坏"
VOID = {"meta", "img", "br", "link", "input", "hr"}


def candidate(name, ratio, drop, outcome, **more):
    latency = Latency(
        p50_ms=7 * ratio, fp32_p50_ms=7.0, ratio=ratio, ratio_lower=ratio - 0.02, ratio_upper=ratio + 0.02, threads=2
    )
    base = {
        "recipe": f"how {name} is made",
        "bytes": 23_000_000,
        "batch_invariant": True,
        "latency": latency,
        "rows_per_s": 1300.0,
        "selection": {"accuracy": 0.93 - drop},
        "selection_drop": {"accuracy": drop},
        "selection_drop_interval": {"accuracy": (drop - 0.005, drop + 0.005)},
        "fidelity": (),
        "leftovers": 3,
        "because": f"why {name}",
    }
    return Candidate(name=name, outcome=outcome, **(base | more))


CANDIDATES = (
    candidate("fp32", 1.0, 0.0, "not chosen"),
    candidate("int8-dynamic", 0.55, 0.006, "slower"),
    candidate("int8-static", 0.37, 0.027, "less accurate"),
    candidate("int8-static-entropy", 0.37, 0.026, "less accurate"),
    candidate(
        "int8-static-mixed", 0.41, 0.002, "shipped", kept=(Kept(group="layer.0.dense", because=HOSTILE, harm=0.02),)
    ),
    candidate("int4", 0.9, 0.43, "less accurate", latency=None),
    failed("fp16", "half precision", "no such kernel"),
)


def record(**changes):
    base = {
        "verdict": "PASS",
        "metric": "accuracy",
        "examples": 1000,
        "reference": 0.93,
        "served": 0.928,
        "drop": 0.002,
        "drop_lower": -0.002,
        "drop_upper": 0.0064,
        "budget": 0.01,
        "confidence": 0.95,
        "disagreement": 0.006,
        "disagreement_upper": 0.012,
        "examples_needed": None,
    }
    return GateRecord(**(base | changes))


FLIPS = tuple(  # 3 lost, 1 won, 2 wrong before and after
    Flip(task=None, example=10 * i, truth="a", pytorch=pytorch, served=served)
    for i, (pytorch, served) in enumerate([("a", "b")] * 3 + [("b", "a")] + [("b", "c")] * 2)
)


def report(**changes):
    base = {
        "format_version": FORMAT_VERSION,
        "name": "tweets",
        "version": 3,
        "shipped": "int8-static-mixed",
        "budget": 0.01,
        "confidence": 0.95,
        "optimize": "latency",
        "certifiable": {"accuracy": 0.0027},
        "examples": {"calibration": 200, "selection": 1000, "gate": 1000},
        "parity": Parity(exported=1e-6, served=2e-6, tolerance=1e-3, batches=(1, 2, 3, 8)),
        "fusions": {"Attention": 6},
        "candidates": CANDIDATES,
        "gate": (record(),),
        "pytorch": {"accuracy": 0.93, "mcc": float("nan")},
        "served": {"accuracy": 0.928, "mcc": float("nan")},
        "comparison": (record(),),
        "fidelity": (
            Fidelity(
                task=None,
                broken=0,
                kl=0.004,
                cosine=0.99,
                calibration_error=(0.02, 0.03),
                worst_class=ClassDrop(
                    label="a", examples=60, reference=0.9, candidate=0.8, p_value=0.3, within_chance=True
                ),
            ),
        ),
        "robustness": Robustness(
            batch_invariant=True, padding_invariant=True, thread_invariant=False, repeatable=True, extremes=None
        ),
        "batches": (BatchLatency(batch=8, p50_ms=10.0, fp32_p50_ms=20.0, ratio=0.5),),
        "confusion": (Confusion(task=None, labels=("a", HOSTILE), pytorch=((5, 1), (0, 4)), served=((4, 2), (0, 4))),),
        "flips": FLIPS,
        "provenance": Provenance(
            created="2026-01-01T00:00:00+00:00",
            command=("edgeward", "export", "my run", "--out", "b"),
            model="mlp",
            data=HOSTILE,
            data_sha256="ab" * 32,
            checkpoint_sha256="cd" * 32,
            cpu="a processor",
            versions={"python": "3.11"},
        ),
    }
    return Report(**(base | changes))


class Balanced(HTMLParser):
    """Tags and attributes of a page whose every element is closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(html):
    """The words of a page, once it is proved to be whole and to load nothing."""
    parsed = Balanced(html)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert name.rpartition(":")[2] not in ("href", "src") or value.startswith("data:image/png;base64,")
        assert not name.startswith("on")
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    words = " ".join(" ".join(parsed.text).split())
    assert "nan" not in words.lower().split()
    return words


def test_page_answers_the_question():
    """What ships, how sure that is, every candidate with its fate, and how to repeat it."""
    words = read(page.page(report()))

    assert (
        "int8-static-mixed ships: 0.41 of fp32's time; it lost 0.20 points, at most 0.64 with 95% confidence" in words
    )
    for one in CANDIDATES:
        assert words.count(one.name) >= 2 or one.name == "fp16"
        assert one.because in words
        assert one.recipe in words
    assert "PASS" in words
    assert "edgeward export 'my run' --out b" in words
    assert "ab" * 32 in words
    assert "layer.0.dense" in words


def test_users_text_stays_text():
    """A text that is a script, a label that is one and a picture that is none are shown, and nothing runs."""
    file = BytesIO()
    Image.new("RGB", (900, 600), "red").save(file, "JPEG")
    contents = [HOSTILE, file.getvalue(), b"no picture", [1.0, float("nan")], "long " * 1000, None]
    html = page.page(report(), [ShownFlip(flip, content) for flip, content in zip(FLIPS, contents, strict=True)])

    words = read(html)
    assert words.count(HOSTILE) >= 3
    assert html.count("<img") == 1
    assert len(html) < 100_000


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"drop": 0.002, "drop_upper": 0.0064}, "it lost 0.20 points, at most 0.64 with"),
        ({"drop": -0.005, "drop_upper": 0.0033}, "it gained 0.50 points, and loses at most 0.33 with"),
        ({"drop": -0.005, "drop_upper": -0.001}, "it gained 0.50 points, at least 0.10 with"),
    ],
)
def test_a_bound_is_of_the_loss(measured, says):
    """What gained may still lose, up to the bound; one below zero is of the gain."""
    described = report(gate=(record(**measured),))
    assert says + " 95% confidence; the budget is 1.00" in headline(described)
    assert says in read(page.page(described))


@pytest.mark.parametrize(("drop", "decides"), [(0.005, "for it"), (0.05, "against it")])
def test_what_more_examples_would_say(drop, decides):
    """More examples like these prove what is within the budget, and refute what is beyond it."""
    undecided = record(verdict="INCONCLUSIVE", drop=drop, drop_upper=0.1, examples_needed=56)
    assert needed(undecided) == f"about 56 examples like these would decide {decides}"
    assert f"About 56 examples like these would decide {decides}." in read(page.page(report(gate=(undecided,))))


def test_pairs_are_counted():
    """Three answers were lost and one won; what is no fraction of examples has no such table."""
    counted = page.paired(record(lost=3, won=1))

    assert (counted.both, counted.lost, counted.won, counted.neither) == (927, 3, 1, 69)
    assert page.paired(record(metric="rmse", lost=None, won=None)) is None


def test_confusion_difference_keeps_the_labels_that_changed():
    """Of 300 labels those with a change are shown, at most MOST_CLASSES."""
    before = np.zeros((300, 300), int)
    after = before.copy()
    before[250, 250] = after[250, 7] = 3
    labels = tuple(f"label {i}" for i in range(300))
    rows = [tuple(map(tuple, counts.tolist())) for counts in (before, after)]
    confusion = Confusion(task=None, labels=labels, pytorch=rows[0], served=rows[1])

    shown = page.difference(confusion)
    at = shown.labels.index("label 250")
    assert len(shown.labels) == page.MOST_CLASSES
    assert shown.counts[at][shown.labels.index("label 7")] == 3
    assert shown.counts[at][at] == -3
    assert "20 of 300 labels" in read(page.page(report(confusion=(confusion,))))


def test_names_in_the_picture_do_not_overlap():
    """Every candidate that was scored has a dot; no name covers another, and what ships is named."""
    many = [candidate(f"int8-static-{i}", 0.4 + 0.001 * i, 0.002 * i, "less accurate") for i in range(15)]
    for size in ((1040, 460), (400, 420)):
        drawn = picture.draw(report(candidates=(*CANDIDATES, *many)), *size)
        boxes = [dot.label.box for dot in drawn.dots if dot.label]

        assert {dot.name for dot in drawn.dots} == {one.name for one in (*CANDIDATES, *many)} - {"fp16"}
        assert next(dot for dot in drawn.dots if dot.role == "shipped").label
        assert not any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for i, a in enumerate(boxes) for b in boxes[:i]
        )


def several():
    tasks = ("topic.accuracy", "size.rmse")
    named = {"selection_drop": dict.fromkeys(tasks, 0.002), "selection": dict.fromkeys(tasks, 0.9)}
    intervals = dict.fromkeys(tasks, (0.0, 0.004))
    return report(
        candidates=tuple(replace(one, **named, selection_drop_interval=intervals) for one in CANDIDATES[:5]),
        gate=(record(task="topic"), record(task="size", metric="rmse")),
        comparison=(record(task="topic"), record(task="size", metric="rmse")),
        pytorch={"topic.accuracy": 0.93, "size.rmse": 12.0, "size.loss": 1.0},
        served={"topic.accuracy": 0.928, "size.rmse": 12.1, "size.loss": 1.0},
    )


def only_fp32():
    fp32 = replace(CANDIDATES[0], outcome="shipped")
    bare = {"fidelity": (), "batches": (), "confusion": (), "flips": (), "fusions": {}, "certifiable": {}}
    return report(shipped="fp32", candidates=(fp32,), gate=(), **bare)


def not_passed():
    fates = {"int8-static-mixed": "not passed", "fp32": "shipped"}
    candidates = tuple(replace(one, outcome=fates.get(one.name, one.outcome)) for one in CANDIDATES)
    undecided = record(verdict="INCONCLUSIVE", drop_upper=0.014, examples_needed=2400)
    return report(shipped="fp32", candidates=candidates, gate=(undecided,))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (several, "of 2 tasks the closest to failing is topic: it lost 0.20 points"),
        (only_fp32, "fp32 ships: no other variant was worth a gate"),
        (not_passed, "fp32 ships: int8-static-mixed lost 0.20 points, at most 1.40 with 95% confidence"),
    ],
)
def test_page_and_terminal_say_what_came_of_it(made, says):
    """With several tasks, with nothing but fp32 and with an undecided gate, in a browser and on a terminal."""
    described = made()
    console = Console(width=120, record=True, file=StringIO())
    console.print(render(described))

    assert says in read(page.page(described))
    assert says in " ".join(console.export_text().split())

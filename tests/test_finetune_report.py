"""run.json and report.html: what is in them, and that the page needs nothing from anywhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, matthews_corrcoef, r2_score, roc_auc_score

from bundle.errors import MissingExtra
from bundle.manifest import Multiclass, Multilabel, Regression
from finetune import report
from finetune.checkpoint import Provenance
from finetune.config import TrainResult
from finetune.evaluate import score
from finetune.report import Run, write_report, write_tensorboard
from finetune.target import Target

HOSTILE = "<script>alert('$x^{')</script> & 坏"
TOPIC = Multiclass(name="topic", labels=("a", HOSTILE, "c"))
FACTS = Multilabel(name="facts", labels=("x", "y"))
SIZE = Regression(name="size", mean=20.0, std=5.0)
COUNT = 300


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    """matplotlib's list of fonts is made once a session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))


@pytest.fixture(scope="module")
def answers():
    """Logits and targets of three tasks, some labels missing, the last one never predicted."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(COUNT, 6)).astype(np.float32)
    logits[:, 2] = -9
    topic = np.where(rng.random(COUNT) < 0.1, -1, rng.integers(0, 3, COUNT))
    facts = rng.integers(0, 2, (COUNT, 2)).astype(np.float32)
    size = np.where(rng.random(COUNT) < 0.1, np.nan, rng.normal(20, 5, COUNT))
    targets = (
        Target("topic", "multiclass", TOPIC.labels, topic),
        Target("facts", "multilabel", FACTS.labels, facts),
        Target("size", "regression", (), size),
    )
    return logits, targets


def written(tasks, logits, targets, history):
    measured = score(tasks, logits, targets)
    provenance = Provenance(
        created="2024-01-01T00:00:00+00:00",
        config={"model": "mlp", "widths": (8, 4), "out": HOSTILE},
        seed=0,
        data=HOSTILE,
        data_sha256="ab" * 32,
        device="cpu",
        versions={"python": "3"},
        examples={"train": 700, "validation": COUNT},
        metrics=measured,
        history=history,
    )
    result = TrainResult(
        out=Path("out"),
        strategy="auto",
        metrics=measured,
        history=history,
        facts={"oov_tokens": 0.125},
        rungs=({"strategy": "probe", "accuracy": 0.5, "seconds": 1.0}, {"strategy": "last", "gain": 0.25}),
        trainable_parameters=10,
        total_parameters=100,
        examples=provenance.examples,
        seconds=1.5,
    )
    return write_report(tasks, result, provenance, logits, targets)


EPOCHS = (
    {"epoch": 1, "train_loss": 2.0, "loss": 1.9, "accuracy": 0.5},
    {"epoch": 2, "train_loss": 1.0, "loss": 1.2, "accuracy": 0.75},
)
PENALTIES = ({"l2": 1.0, "loss": 1.9}, {"l2": 1e-5, "loss": 1.2})
EVERYTHING = (TOPIC, FACTS, SIZE)


class Page(HTMLParser):
    """Tags, attributes and the text of the cells of each table."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.tables, self.text = [], [], {}, []
        self.table, self.cell = None, None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self.table = self.tables.setdefault(dict(attributes)["class"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
            self.cell = True
        elif tag == "small":
            self.cell = False

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.table[-1][-1] += data


def test_page_loads_nothing_and_runs_nothing(answers):
    """No address, no script, no file: it is read from a disk in ten years as it is today."""
    html = written(EVERYTHING, *answers, EPOCHS)["report.html"].decode()
    page = Page(html)

    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert page.tags.count("svg") == 3  # loss, accuracy, predicted over true
    for name, value in page.attributes:
        assert name.rpartition(":")[2] not in ("href", "src") or value.startswith("#")
        assert "url(" not in value or "url(#" in value
    assert "http" not in html
    assert "@import" not in html
    assert "<script>alert" not in html


def test_page_shows_the_confusion_matrix(answers):
    """Every count stands under its labels, which may be anything."""
    logits, (target, *_) = answers
    page = Page(written((TOPIC,), logits[:, :3], (target,), EPOCHS)["report.html"].decode())
    known = target.known
    expected = confusion_matrix(target.values[known], logits[known, :3].argmax(axis=1), labels=range(3))

    header, *rows = page.tables["confusion"]
    assert header[1:] == list(TOPIC.labels)
    assert [row[0].strip() for row in rows] == list(TOPIC.labels)
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in rows], expected)
    assert [row[0] for row in page.tables["labels"][1:]] == list(TOPIC.labels)
    assert [int(row[4]) for row in page.tables["labels"][1:]] == expected.sum(axis=1).tolist()
    assert f"{100 * expected[0, 1] / expected[0].sum():.0f}%" in page.text


def test_many_labels_have_their_mistakes_listed():
    """A matrix of thousands of cells says nothing; the most frequent mistakes do."""
    task = Multiclass(name="topic", labels=tuple(f"label {i}" for i in range(60)))
    truth = np.repeat(np.arange(60), 4)
    predicted = truth.copy()
    predicted[:3], predicted[4] = 7, 9
    files = written((task,), np.eye(60)[predicted], (Target("topic", "multiclass", task.labels, truth),), EPOCHS)
    page = Page(files["report.html"].decode())

    assert page.tables["mistakes"][1:] == [["label 0", "label 7", "3"], ["label 1", "label 9", "1"]]
    assert "confusion" not in page.tables
    assert msgspec.json.decode(files["run.json"], type=Run).tasks[0].confusion == ()


def test_run_holds_what_was_measured(answers):
    """It reads back as its type, and its metrics are scikit-learn's on what is known."""
    logits, targets = answers
    run = msgspec.json.decode(written(EVERYTHING, logits, targets, EPOCHS)["run.json"], type=Run)
    topic, facts, size = run.tasks
    known, sized = targets[0].known, targets[2].known

    assert run.provenance.history == EPOCHS
    assert run.provenance.config["widths"] == (8, 4)
    assert run.rungs[1] == {"strategy": "last", "gain": 0.25}
    assert run.host["cores"] >= 1
    assert (topic.examples, facts.examples, size.examples) == (known.sum(), COUNT, sized.sum())
    probabilities = np.exp(logits[known, :3].astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    truth = targets[0].values[known]
    assert topic.metrics["auroc"] == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"), rel=1e-3)
    assert topic.metrics["mcc"] == pytest.approx(matthews_corrcoef(truth, probabilities.argmax(axis=1)))
    assert [label.label for label in topic.labels] == list(TOPIC.labels)
    assert topic.labels[2].precision == 0
    assert facts.metrics["auroc"] == pytest.approx(roc_auc_score(targets[1].values, logits[:, 3:5]))
    assert facts.confusion == ()
    assert size.metrics["r2"] == pytest.approx(r2_score(targets[2].values[sized], logits[sized, 5] * 5 + 20), rel=1e-5)


def test_metric_that_is_not_defined_is_null(answers):
    """AUROC of a label that nobody has is no number, in JSON neither."""
    target = Target("topic", "multiclass", TOPIC.labels, np.ones(COUNT, np.int64))
    files = written((TOPIC,), answers[0][:, :3], (target,), PENALTIES)

    assert msgspec.json.decode(files["run.json"], type=Run).tasks[0].metrics["auroc"] is None
    assert "not defined" in Page(files["report.html"].decode()).text


def test_same_run_gives_the_same_bytes(answers):
    """Nothing in the files hangs on the time, or on what was drawn before."""
    assert written(EVERYTHING, *answers, PENALTIES) == written(EVERYTHING, *answers, PENALTIES)


def test_plots_stay_small():
    """Of very many examples only some are drawn, and the page says so."""
    rng = np.random.default_rng(0)
    truth = rng.normal(20, 5, 50_000)
    logits = rng.normal(size=(50_000, 1)).astype(np.float32)
    html = written((SIZE,), logits, (Target("size", "regression", (), truth),), EPOCHS)["report.html"]

    assert len(html) < 500_000
    assert f"{report.MAX_POINTS} of them" in html.decode()


def test_fonts_are_listed_in_the_cache_and_not_at_home(tmp_path):
    """matplotlib keeps its list of fonts where edgeward keeps what can be made again, and pyplot is not touched."""
    code = (
        "import sys; from finetune.report import _curves\n"
        "assert _curves(({'epoch': 1, 'loss': 2.0},))['loss'].startswith('<svg')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)

    assert not any((tmp_path / "home").iterdir())
    assert any((tmp_path / "cache" / "edgeward" / "matplotlib").iterdir())


def test_curves_for_tensorboard(tmp_path):
    """TensorBoard's own reader finds every value under its epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tensorboard(tmp_path / "curves", EPOCHS)

    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(1, 0.5), (2, 0.75)]
    assert set(events.Tags()["scalars"]) == {"epoch", "train_loss", "loss", "accuracy"}


def test_missing_library_is_named_before_anything_is_trained(monkeypatch):
    """The error has the line that installs it."""
    report.check_extras(tensorboard=True)
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "tensorboard" else object())
    report.check_extras()
    with pytest.raises(MissingExtra, match=r"tensorboard is not installed: pip install 'edgeward\[tensorboard\]'"):
        report.check_extras(tensorboard=True)

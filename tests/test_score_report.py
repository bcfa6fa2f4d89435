import json
import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from bundle import outputs, preprocess
from bundle.errors import BadInput
from bundle.manifest import Multiclass
from bundle.store import open_bundle
from score import answers, autotune, drift, local, page, report
from score.config import ScoreConfig
from score.errors import Missing
from score.folder import Folder
from score.plan import prepare, read_plan
from score.progress import Outcome, Process
from score.run import score
from score.units import Counts, InputFile, Plan, Settings, Trial
from tests.serve_bundles import (
    COLOUR,
    FLOWER,
    REVIEW,
    TASKS,
    TEXT,
    write_text_bundle,
    write_vector_bundle,
    write_words_bundle,
)

COUNTS = Counts(
    rows_in=1010,
    rows_ok=1000,
    rows_bad=10,
    drift={
        "missing": (7,),
        "empty": (2,),
        "vocabulary": (90, 10),
        "mood.labels": (700, 300, 0),
        "mood.confidence": (0,) * 15 + (100, 200, 300, 300, 100),
        "tags.labels": (5, 900),
        "tags.confidence": (0,) * 19 + (1000,),
        "length.values": (0,) * 9 + (500, 500) + (0,) * 9,
    },
)
OUTCOME = Outcome(
    counts=COUNTS,
    rows=1010,
    wall_s=2.0,
    seconds={"read": 0.1, "preprocess": 0.5, "run": 1.5, "write": 0.2},
    bytes=1234,
    processes=(
        Process(name="box:1", units=1, rows=500, wall_s=2.0, cpu_s=1.0, peak_rss=100 << 20),
        Process(name="box:2", units=1, rows=510, wall_s=2.0, cpu_s=1.2, peak_rss=200 << 20),
    ),
)
SETTINGS = Settings(variant="only", processes=2, threads=1, batch=32, decoders=1, chunk=1024)
PLAN = Plan(
    fingerprint="f" * 64,
    bundle="b" * 64,
    options={"top_k": "3"},
    files=(InputFile(path="/data/a.csv", kind="csv", size=9, version="1"),),
    units=(),
    settings=SETTINGS,
    trials=(
        Trial(processes=1, threads=2, batch=32, decoders=2, rows_per_s=400.0),
        Trial(processes=2, threads=1, batch=32, decoders=1, rows_per_s=505.0),
    ),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return open_bundle(write_text_bundle(tmp_path_factory.mktemp("bundle") / "mood", tasks=TASKS)).manifest


def test_a_report_says_what_was_found_and_what_it_cost(manifest):
    """Counts by name; the stage with the most seconds limits; memory is that of all processes."""
    described = report.describe(manifest, PLAN, OUTCOME)

    assert (described.found.missing, described.found.empty) == (7, 2)
    assert described.found.vocabulary == report.Vocabulary(known=90, unknown=10, rate=0.1)
    mood, tags, length = described.found.answers
    assert mood.labels == {"good": 700, "bad": 300, "neither — é": 0}
    assert (sum(mood.confidence), tags.labels, length.values[9:11]) == (1000, {"x": 5, "y": 900}, (500, 500))
    assert (described.cost.rows_per_s, described.cost.limiting_stage) == (505.0, "run")
    assert described.cost.peak_rss > 300 << 20
    assert described.cost.cpu_s == pytest.approx(2.2)


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.data = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data):
        self.data.append(data)


def test_a_page_needs_nothing_but_itself(manifest):
    """No script, no address; a histogram has a bar for each twentieth, and the chosen trial stands out."""
    text = report.files(manifest, PLAN, OUTCOME)[report.HTML].decode()
    parsed = _Page(text)

    assert parsed.addresses == []
    assert "script" not in parsed.tags
    assert not re.search(r"url\(|@import", text)
    assert parsed.tags.count("rect") == 3 * 20 + 3 + 2 + 4  # histograms, labels of both tasks, stages
    assert text.count('class="chosen"') == 1
    assert "1,010 rows, 10 of them bad (0.99%), at 505 rows a second; the limiting stage is run." in text


def test_labels_are_text_on_a_page(manifest):
    """Whatever they hold; of many labels the most frequent are drawn."""
    labels = tuple(f"<script>{i}</script>" for i in range(50))
    task = Multiclass(name="mood", labels=labels)
    counts = Counts(rows_in=1275, rows_ok=1275, drift={"labels": tuple(range(1, 51))})

    text = page.page(
        report.describe(
            msgspec.structs.replace(manifest, tasks=(task,)), PLAN, msgspec.structs.replace(OUTCOME, counts=counts)
        )
    )

    assert "script" not in _Page(text).tags
    assert "&lt;script&gt;49&lt;/script&gt;" in text
    assert "&lt;script&gt;19&lt;/script&gt;" not in text
    assert "and 20 rarer labels" in text


def test_confidence_and_labels_are_counted():
    """Each row once, in the twentieth of its highest score; a score of 1 is in the last."""
    logits = np.array([[9.0, -9], [100, 0], [0, 0], [-1, 1]], np.float32)
    counted = drift.of_answers((COLOUR,), answers.of_logits((COLOUR,), {"logits": logits}))

    assert counted["labels"] == (3, 1)
    assert counted["confidence"] == (0,) * 10 + (1,) + (0,) * 6 + (1,) + (0, 2)
    assert outputs.softmax(logits).max(axis=1)[3] == pytest.approx(0.8808, abs=1e-4)


def test_values_are_counted_in_standard_deviations():
    """What lies beyond is in the outermost bins; what is no number in none."""
    logits = {"mood.logits": np.zeros((5, 3)), "tags.logits": np.zeros((5, 2))}
    values = np.array([[-100.0], [-0.1], [0.1], [100], [np.nan]], np.float32)

    counted = drift.of_answers(TASKS, answers.of_logits(TASKS, logits | {"length.logits": values}))["length.values"]

    assert (counted[0], counted[9], counted[10], counted[19], sum(counted)) == (1, 1, 1, 1, 4)


def test_unknown_words_are_counted_in_every_16th_row(tmp_path):
    """Whatever chunks the rows come in; of a text that was cut at its longest nobody knows."""
    bundle = open_bundle(write_words_bundle(tmp_path / "reviews"))
    vocabulary = drift.Vocabulary(REVIEW, bundle.read)
    encode = preprocess.encoder(REVIEW, bundle.read)
    raws = ["电影 很 nonsense".encode()] * 15 + [b"film nonsense nonsense", b"nonsense", b""] + [b"film " * 9] * 15
    encoded = [encode(raw) for raw in raws]

    whole = Counts(drift=vocabulary.count(raws, encoded, 1))
    parts = [Counts(drift=vocabulary.count(raws[i : i + 5], encoded[i : i + 5], 1 + i)) for i in range(0, len(raws), 5)]

    assert whole.drift == {"vocabulary": (1, 2), "unknown_texts": (2,)}
    assert sum(parts, Counts()) == whole


def test_unknown_tokens_are_counted(tmp_path):
    """Special tokens are known; rows without a tensor count for nothing."""
    bundle = open_bundle(write_text_bundle(tmp_path / "mood"))
    encode = preprocess.encoder(TEXT, bundle.read)
    vocabulary = drift.Vocabulary(TEXT, bundle.read)

    counted = vocabulary.count([b"good nonsense", None, b"film"], [encode(b"good nonsense"), None, encode(b"film")], 0)

    assert counted == {"vocabulary": (4, 1)}
    assert vocabulary.count([None], [None], 0) == {"vocabulary": (0, 0)}


def test_missing_and_empty_texts_are_counted():
    """Bad rows of other kinds are neither."""
    raws = [b"good", Missing("'text' is missing."), b" \n", b"", BadInput("not UTF-8")]

    assert drift.of_raws(TEXT, raws) == {"missing": (1,), "empty": (2,)}
    assert drift.of_raws(FLOWER, raws) == {"missing": (1,)}


def test_a_report_tells_of_all_rows_and_does_not_change_them(tmp_path):
    """A run that found nothing left to do leaves the report of the one that did it."""
    bundle = write_text_bundle(tmp_path / "mood")
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the film is good"}\n{"text": null}\n{"text": " "}\n{"text": "zzz"}\n' * 5)
    config = ScoreConfig(bundle, (str(data),), out=str(tmp_path / "out"), processes=1, threads=1, unit_rows=6)

    result = score(config)
    written = (tmp_path / "out/_report.json").read_bytes()
    score(config)

    found = json.loads(written)["found"]
    assert (found["rows_in"], found["rows_bad"], found["missing"], found["empty"]) == (20, 5, 5, 5)
    assert sum(found["answers"][0]["confidence"]) == result.counts.rows_ok == 15
    assert found["vocabulary"]["unknown"] == 5
    assert (tmp_path / "out/_report.json").read_bytes() == written


def prepared(tmp_path, bundle, **options):
    data = tmp_path / "a.csv"
    data.write_text("text,sepal,petal,stem\n" + "the film is good,1,2,3\n" * 300)
    return prepare(ScoreConfig(bundle, (str(data),), out=str(tmp_path / "out"), unit_rows=100, **options))


@pytest.fixture
def brief(monkeypatch):
    """Trials are made, however little there is to do, and are short."""
    monkeypatch.setattr(autotune, "WORTH_S", 0.0)
    monkeypatch.setattr(autotune, "TRIAL_S", 0.0)
    monkeypatch.setattr(autotune, "cpu_count", lambda: 2)


def test_trials_choose_the_settings(tmp_path, brief):
    """Batches in one process, then processes × threads; the fastest is taken, and nothing is written."""
    config, plan = prepared(tmp_path, write_text_bundle(tmp_path / "mood"))

    tuned = autotune.tune(config, plan)

    assert [(trial.processes, trial.threads, trial.batch) for trial in tuned.trials[:-1]] == [
        (1, 2, 16),
        (1, 2, 32),
        (1, 2, 64),
    ]
    last, settings = tuned.trials[-1], tuned.settings
    fastest = max(tuned.trials[:-1], key=lambda trial: trial.rows_per_s)
    assert (last.processes, last.threads, last.batch) == (2, 1, fastest.batch)
    together = last.rows_per_s > autotune.GAIN * fastest.rows_per_s
    assert (settings.processes, settings.threads) == ((2, 1) if together else (1, 2))
    assert settings.batch == fastest.batch
    assert msgspec.structs.replace(tuned, settings=None, trials=()) == plan
    assert not (tmp_path / "out").exists()


def test_settings_are_written_before_the_first_unit_and_used_again(tmp_path, brief, monkeypatch):
    """A run that is stopped at its first unit has left them, with the trials; the next one tries nothing."""
    config, plan = prepared(tmp_path, write_text_bundle(tmp_path / "mood"), processes=1)
    seen = []

    def engine(config, given, units):
        seen.append((read_plan(Folder(config.out)), given.settings))
        yield from () if len(seen) == 1 else local.reports(config, given, units)

    stopped = score(config, engine)
    monkeypatch.setattr(autotune, "tune", lambda *_: pytest.fail("settings were tried out again"))
    score(config, engine)

    assert stopped.parts == 0
    (first, begun), (second, went_on) = seen
    assert first.trials
    assert first.settings == begun == went_on
    assert first == second == msgspec.structs.replace(plan, settings=begun, trials=first.trials)
    report = json.loads((tmp_path / "out/_report.json").read_bytes())
    assert report["settings"] == msgspec.to_builtins(begun)
    assert report["trials"] == list(msgspec.to_builtins(first.trials))


def test_options_that_were_given_are_kept(tmp_path, brief):
    """Where all are, nothing is tried."""
    config, plan = prepared(
        tmp_path, write_vector_bundle(tmp_path / "flowers"), processes=2, threads=3, batch=7, decoders=4
    )

    tuned = autotune.tune(config, plan)

    assert tuned.trials == ()
    kept = {"processes": 2, "threads": 3, "batch": 7, "decoders": 4}
    assert tuned.settings == Settings(variant="only", **kept, chunk=tuned.settings.chunk)


def test_what_is_quickly_done_is_not_tried(tmp_path, monkeypatch):
    """One process with all cores."""
    config, plan = prepared(tmp_path, write_text_bundle(tmp_path / "mood"))
    monkeypatch.setattr(autotune, "cpu_count", lambda: 2)

    tuned = autotune.tune(config, plan)

    assert (tuned.trials, tuned.settings.processes, tuned.settings.threads) == ((), 1, 2)


def test_answers_that_depend_on_the_batch_have_none(tmp_path, manifest):
    """A batch that is given changes nothing for them."""
    alone = msgspec.structs.replace(manifest.variants[0], batch_invariant=False)
    config = ScoreConfig(tmp_path, (), out="out", batch=32)

    assert autotune.batches(config, alone) == (1,)
    assert autotune.batches(config, manifest.variants[0]) == (32,)


@pytest.mark.parametrize(
    ("cores", "units", "options", "expected"),
    [
        (2, 9, {}, [(1, 2), (2, 1)]),
        (16, 99, {}, [(1, 16), (4, 4), (8, 2), (16, 1)]),
        (16, 99, {"threads": 4}, [(1, 4), (2, 4), (4, 4)]),
        (16, 99, {"processes": 3}, [(3, 5)]),
        (16, 1, {}, [(1, 16)]),
        (1, 99, {}, [(1, 1)]),
    ],
)
def test_cores_are_shared_out_between_processes(tmp_path, manifest, monkeypatch, cores, units, options, expected):
    """No more processes than units, and one is always tried unless their number was given."""
    monkeypatch.setattr(autotune, "cpu_count", lambda: cores)
    config = ScoreConfig(tmp_path, (), out="out", **options)

    assert autotune.splits(config, manifest.variants[0], units) == expected

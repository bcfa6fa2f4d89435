"""Bad rows are data: each says what is wrong with it, and those around it are answered."""

import json

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bundle.errors import ModelError, SelfTestFailed
from bundle.model import load_model
from bundle.session import Session
from bundle.store import open_bundle
from score.errors import TooManyBadRows
from score.scorer import Scorer
from tests import serve_bundles as bundles
from tests.score_examples import read, run, scored, write_csv

OK, BAD_INPUT, FAILED = 0, 1, 2


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return bundles.write_vector_bundle(tmp_path_factory.mktemp("bundle") / "flowers", tasks=(bundles.COLOUR,))


def assert_bad(table, expected):
    """Rows whose number is in `expected` have no answer but an error with that in it; all others are answered."""
    for number, row in enumerate(table.to_pylist()):
        message = expected.get(number)
        assert row["_row"] == number
        if message is None:
            assert (row["_status"], row["_error"]) == (OK, None), row
            assert row["label"] is not None
            assert row["score"] is not None
        else:
            assert row["_status"] == BAD_INPUT
            assert message in row["_error"]
            assert row["label"] is None
            assert row["score"] is None


def test_texts_of_json(mood, tmp_path):
    """Null, absent, of another type, not UTF-8, too long, no JSON: each is told apart."""
    lines = [b'{"text": "bad"}', b'{"text": null}', b'{"id": 1}', b'{"text": [1]}', b'{"text": "\xff"}', b"{"]
    lines += [json.dumps({"text": "x" * 1001}).encode(), b'{"text": "film"}']
    (tmp_path / "texts.jsonl").write_bytes(b"\n".join(lines))
    table = scored(mood, tmp_path / "texts.jsonl", out=tmp_path / "out", keep=("id",))

    expected = ["", "'text' is missing", "'text' is missing", "is a list", "not JSON", "not JSON", "1001 bytes", ""]
    assert_bad(table, {number: message for number, message in enumerate(expected) if message})
    assert table["id"].to_pylist() == [None, None, "1", None, None, None, None, None]


def test_texts_of_csv(mood, tmp_path):
    """Fields too many or too few, bytes that are not UTF-8; kept columns are there wherever they can be read."""
    data = b'id,text\n1,bad\n2\n3,a,b\n4,\xff\n\xe9,film\n6,"never ends\n'
    (tmp_path / "texts.csv").write_bytes(data)
    table = scored(mood, tmp_path / "texts.csv", out=tmp_path / "out", keep=("id",))

    assert_bad(table, {1: "1 fields", 2: "3 fields", 3: "not UTF-8", 5: "quote is not closed"})
    assert table["id"].to_pylist() == ["1", None, None, "4", "�", None]


def test_texts_of_parquet(mood, tmp_path):
    """Null is not an empty text."""
    parquet.write_table(pa.table({"text": ["bad", None, "", "film"]}), tmp_path / "texts.parquet")

    assert_bad(scored(mood, tmp_path / "texts.parquet", out=tmp_path / "out"), {1: "'text' is missing"})


VECTORS = [[1, 2, 3], [1, 2], None, [1, None, 3], [1, float("nan"), 3], [1e300, 0, 0], [4, 5, 6]]
FAULTS = {1: "shape [2]", 2: "missing", 3: "holds object", 4: "'petal', is nan", 5: "is inf"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_vectors(flowers, tmp_path, kind):
    """Too short, null, with a null, not a number, beyond float32."""
    path = tmp_path / f"vectors.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"flower": pa.array(VECTORS, pa.list_(pa.float64()))}), path)
        faults = FAULTS
    else:
        rows = [None if row is None else [None if each != each else each for each in row] for row in VECTORS]
        path.write_text("".join(json.dumps({"flower": row}) + "\n" for row in rows))
        faults = FAULTS | {4: "holds object"}
    assert_bad(scored(flowers, path, out=tmp_path / "out"), faults)


def test_numbers_of_csv(flowers, tmp_path):
    """What is no number is named with its column."""
    path = tmp_path / "vectors.csv"
    path.write_text("sepal,petal,stem\n1,2,3\n1,,3\n1,two,3\n1,1_000,3\n1,inf,3\n 4 ,5e0,-6\n")

    faults = {1: "'petal' is no number", 2: "'two'", 3: "1_000", 4: "'petal', is inf"}
    assert_bad(scored(flowers, path, out=tmp_path / "out"), faults)


def test_images(tmp_path):
    """Broken, cut off, no image at all, not there: by folder, list and column."""
    bundle = bundles.write_image_bundle(tmp_path / "colour")
    good = bundles.png("red")
    files = {"0.png": good, "1.png": good[:-20], "2.jpg": b"\xff\xd8\xff\xe0 no", "3.png": b"", "4.png": good}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    faults = {1: "PNG", 2: "not a", 3: "not a PNG or JPEG (0 bytes)"}
    globbed = scored(bundle, tmp_path / "*.[pj][np]g", out=tmp_path / "out1", decoders=2)
    listed = [*files, "gone.png", "folder", "nowhere://x.png"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.txt").write_text("\n".join(listed))
    write_csv(tmp_path / "list.csv", {"photo": listed})

    assert_bad(globbed, faults)
    more = faults | {5: "gone.png cannot be read", 6: "folder cannot be read", 7: "nowhere://x.png cannot be read"}
    assert_bad(scored(bundle, tmp_path / "list.txt", out=tmp_path / "out2"), more)
    assert_bad(scored(bundle, tmp_path / "list.csv", out=tmp_path / "out3"), more)
    parquet.write_table(pa.table({"photo": [*files.values(), None]}), tmp_path / "bytes.parquet")
    assert_bad(scored(bundle, tmp_path / "bytes.parquet", out=tmp_path / "out4"), faults | {5: "missing"})


def test_nothing_but_bad_rows(mood, tmp_path):
    """The answers are null, of the same types as ever."""
    (tmp_path / "bad.jsonl").write_text("no\n" * 5)
    (tmp_path / "good.jsonl").write_text('{"text": "film"}\n')
    result = run(mood, tmp_path / "bad.jsonl", out=tmp_path / "bad", scores=True)
    run(mood, tmp_path / "good.jsonl", out=tmp_path / "good", scores=True)

    assert (result.counts.rows_in, result.counts.rows_ok, result.counts.rows_bad) == (5, 0, 5)
    assert read(tmp_path / "bad").schema.equals(read(tmp_path / "good").schema)


class _Breaks:
    """A session that fails on every batch with a certain text, or on all of them."""

    def __init__(self, session, ids=None):
        self.session = session
        self.ids = ids
        self.batches = []

    def run(self, feeds):
        self.batches.append(len(feeds["input_ids"]))
        if self.ids is None or any(self.ids == row[row != 0].tolist() for row in feeds["input_ids"]):
            raise ModelError("the device has no room")
        return self.session.run(feeds)


def test_a_batch_that_fails_is_halved_until_the_row_is_found(mood):
    """One row makes the run fail: it alone has no answer, and the others are those of ever."""
    scorer = Scorer(mood, device="cpu", threads=1)
    raws = [b"the film", b"bad bad", b"good", b"a film is a film", b"is"]
    before = scorer.score(raws).to_pylist()
    bad = [2, *([bundles.WORDS.index("bad")] * 2)]
    scorer.model.session = _Breaks(scorer.model.session, bad)
    after = scorer.score(raws).to_pylist()

    assert after[1] == {"label": None, "score": None, "_status": FAILED, "_error": "the device has no room"}
    assert after[:1] + after[2:] == before[:1] + before[2:]


def test_a_device_that_fails_is_no_row_s_fault(mood):
    """When the golden examples fail as well, the run ends, and no row is written as bad."""
    scorer = Scorer(mood, device="cpu", threads=1)
    scorer.model.session = _Breaks(scorer.model.session)

    with pytest.raises((ModelError, SelfTestFailed), match="no room"):
        scorer.score([b"film", b"bad"])


def test_a_graph_that_depends_on_the_batch_runs_row_by_row(tmp_path, monkeypatch):
    """As in the server: the answers of a variant that is not batch-invariant are those at batch 1, unpadded."""
    runs = []
    run_once = Session.run
    monkeypatch.setattr(Session, "run", lambda self, feeds: (runs.append(feeds), run_once(self, feeds))[1])
    scorer = Scorer(bundles.write_text_bundle(tmp_path / "mood"), device="cpu", threads=1)
    scorer.model.variant = msgspec.structs.replace(scorer.model.variant, batch_invariant=False)
    runs.clear()
    scorer.score([b"film", b"the film is good", b"a film"])

    assert sorted(feeds["input_ids"].shape for feeds in runs) == [(1, 2), (1, 3), (1, 5)]


def test_too_many_bad_rows_stop_the_run(mood, tmp_path):
    """As soon as it is certain, with what was written left in its place; a higher rate goes on from there."""
    rows = ["no" if number % 5 == 4 else '{"text": "film"}' for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    options = {"out": tmp_path / "out", "unit_rows": 5}

    with pytest.raises(TooManyBadRows, match=r"3 of the 15 rows.*of all 40 at most 0\.05"):
        run(mood, tmp_path / "texts.jsonl", max_error_rate=0.05, **options)
    stopped = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    result = run(mood, tmp_path / "texts.jsonl", max_error_rate=0.2, **options)

    assert len(stopped) >= 3
    assert stopped.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}.items()
    assert (result.counts.rows_ok, result.counts.rows_bad) == (32, 8)


def test_a_failing_row_has_its_own_status(mood):
    """The three statuses: answered, bad as it came, failed when it ran."""
    scorer = Scorer(mood, device="cpu", threads=1)
    scorer.model.session = _Breaks(scorer.model.session, [2, bundles.WORDS.index("bad")])
    table = scorer.score([b"film", b"\xff", b"bad"])

    assert table["_status"].to_pylist() == [OK, BAD_INPUT, FAILED]
    expected = load_model(mood, device="cpu").predict([b"film"])
    assert table["label"].to_pylist() == [expected["label"][0, 0].decode(), None, None]
    np.testing.assert_array_equal(table["score"].to_numpy()[:1], expected["score"].max(axis=1))


class _Gives:
    """A session one of whose answers is another number."""

    def __init__(self, session, value):
        self.session, self.value = session, value

    def run(self, feeds):
        outputs = self.session.run(feeds)
        for values in outputs.values():
            values[(feeds["input_ids"] == bundles.WORDS.index("bad")).any(axis=1), 0] = self.value
        return outputs


@pytest.mark.parametrize(("value", "status"), [(np.nan, FAILED), (np.inf, FAILED), (-np.inf, OK)])
def test_an_answer_that_is_no_number_is_a_bad_row(mood, value, status):
    """Whatever the model gave the others; of the logarithm of 0 there is a score."""
    scorer = Scorer(mood, device="cpu", threads=1)
    before = scorer.score([b"film", b"the film is good"]).to_pylist()
    scorer.model.session = _Gives(scorer.model.session, value)
    after = scorer.score([b"film", b"bad", b"the film is good"]).to_pylist()

    assert after[:1] + after[2:] == before
    assert after[1]["_status"] == status
    if status == FAILED:
        assert (after[1]["label"], after[1]["score"]) == (None, None)
        assert after[1]["_error"] == "the model gives logits that are not numbers."


def test_the_bundle_is_hashed_once_for_all_rows_that_fail(mood, monkeypatch):
    """Each is held against the golden examples, of a bundle that was verified at the first."""
    opened = []
    monkeypatch.setattr("score.scorer.open_bundle", lambda path: (opened.append(path), open_bundle(path))[1])
    scorer = Scorer(mood, device="cpu", threads=1)
    scorer.model.session = _Breaks(scorer.model.session, [2, bundles.WORDS.index("bad")])
    table = scorer.score([b"bad"] * 5)

    assert table["_status"].to_pylist() == [FAILED] * 5
    assert opened == [mood]

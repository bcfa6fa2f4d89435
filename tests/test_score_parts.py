"""Exactly once: whatever stops a run, the same command ends with the same files."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

from bundle.errors import DataError, OutputExists
from score.folder import Folder
from score.parts import done
from score.plan import prepare, record
from score.run import score
from score.runner import UnitRunner
from score.units import Settings
from tests import serve_bundles as bundles
from tests.score_examples import config, read, run, scored, tree, write_csv

ROWS = 60


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Some rows, every seventh of which is bad."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"id": number, "text": None if number % 7 == 6 else " ".join(["film"] * (number % 9))} for number in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(mood, texts, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("out") / "whole"
    run(mood, texts, out=out, unit_rows=2, keep=("id",))
    return out


RUN = """
import sys
from pathlib import Path
from score.run import score
from tests.score_examples import config
score(config(Path(sys.argv[1]), sys.argv[2], out=sys.argv[3], unit_rows=2, keep=("id",)))
"""


def start(mood, texts, out):
    """The run of `whole` in a process of its own."""
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", RUN, mood, texts, out], cwd=root, stderr=subprocess.DEVNULL)


def count_parts(out):
    return sum(1 for path in out.glob("part-*")) if out.is_dir() else 0


def wait_for_parts(process, out, count):
    deadline = time.monotonic() + 60
    while count_parts(out) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_killed_again_and_again_it_ends_with_the_same_files(mood, texts, whole, tmp_path):
    """SIGKILL after a few parts, three times, wherever it may strike; then every file is as without."""
    out, codes = tmp_path / "out", []
    for more in (1, 3, 6):
        process = start(mood, texts, out)
        wait_for_parts(process, out, count_parts(out) + more)
        process.kill()
        codes.append(process.wait(60))
        if codes[-1]:
            assert not (out / "_SUCCESS").exists()
    run(mood, texts, out=out, unit_rows=2, keep=("id",))

    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {-signal.SIGKILL, 0}  # one that was quicker than we are has ended by itself
    assert tree(out) == tree(whole)


def test_two_runs_at_once_write_the_same_files(mood, texts, whole, tmp_path):
    """They waste each other's time, and spoil nothing."""
    out = tmp_path / "out"
    process = start(mood, texts, out)
    wait_for_parts(process, out, 1)
    run(mood, texts, out=out, unit_rows=2, keep=("id",))
    assert process.wait(60) == 0

    assert tree(out) == tree(whole)


def test_what_is_done_is_not_done_again(mood, texts, whole, tmp_path, monkeypatch):
    """A run that is whole loads no model; one that lost a part makes that one, and _SUCCESS, again."""
    before = tree(whole)
    with monkeypatch.context() as patch:
        patch.setattr("score.scorer.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        assert run(mood, texts, out=whole, unit_rows=2, keep=("id",)).missing == 0
    times = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    (whole / "part-000000-000003.parquet").unlink()
    (whole / ".part-000000-000003.parquet.tmp-0123").write_bytes(b"half")
    run(mood, texts, out=whole, unit_rows=2, keep=("id",))

    assert tree(whole) == before
    changed = {path.name for path in whole.iterdir() if times.get(path.name) != path.stat().st_mtime_ns}
    assert changed - {"_report.json", "_report.html"} == {"part-000000-000003.parquet", "_SUCCESS"}


def test_every_row_is_there_once_and_success_says_so(whole):
    """The totals are those of the rows, and the hashes those of the parts."""
    success = json.loads((whole / "_SUCCESS").read_text())
    table = read(whole)

    assert table["_row"].to_pylist() == list(range(ROWS))
    bad = sum(status != 0 for status in table["_status"].to_pylist())
    assert bad == ROWS // 7
    counts = success["counts"]
    assert (counts["rows_in"], counts["rows_ok"], counts["rows_bad"]) == (ROWS, ROWS - bad, bad)
    assert success["parts"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in whole.glob("part-*")
    }


def test_a_part_says_what_it_is_of(mood, texts, whole):
    """Its footer has the bundle's digest, the input's identity and the counts."""
    metadata = parquet.read_metadata(whole / "part-000000-000003.parquet").metadata
    footer = json.loads(metadata[b"edgeward"])

    assert footer["bundle"] == (mood / "manifest.sha256").read_text().split()[0]
    assert footer["input"]["path"] == str(texts)
    assert footer["input"]["size"] == texts.stat().st_size
    assert (footer["unit"], footer["first_row"]) == ("part-000000-000003", 6)
    assert (footer["counts"]["rows_in"], footer["counts"]["rows_bad"]) == (2, 1)


def refusals(mood, texts, tmp_path):
    """What may not go on in a folder that holds another run."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "film", "id": 1}\n')
    return {
        "bundle is another": {"bundle": bundles.write_text_bundle(tmp_path / "mood", version=2)},
        "--unit-rows was '2' and is '3'": {"unit_rows": 3},
        "--format was 'parquet' and is 'csv'": {"format": "csv"},
        "--keep was 'id=id' and is ''": {"keep": ()},
        "--logits was 'False' and is 'True'": {"logits": True},
        "--top-k was '0' and is '1'": {"top_k": 1},
        "--scores": {"scores": True},
        "--column": {"column": ("text=id",)},
        "input is another.*other.jsonl": {"inputs": (str(texts), str(other))},
    }


def test_another_run_in_the_same_folder_is_refused(mood, texts, whole, tmp_path):
    """Another bundle, input or option that changes what is written: nothing is touched, and the message says what."""
    before = tree(whole)
    right = config(mood, texts, out=whole, unit_rows=2, keep=("id",))
    for message, change in refusals(mood, texts, tmp_path).items():
        with pytest.raises(DataError, match=message):
            score(replace(right, **change))
    score(replace(right, batch=9, decoders=2, max_error_rate=0.9))  # only the speed, or when it stops

    assert tree(whole) == before


def test_an_input_that_has_changed_is_refused(mood, tmp_path):
    """Between two runs, and between the plan and the reading of a unit."""
    path = write_csv(tmp_path / "texts.csv", {"text": ["film", "bad"]})
    right = config(mood, path, out=tmp_path / "out")
    given, plan = prepare(right)
    settings = Settings(variant="only", processes=1, threads=1, batch=4, decoders=1, chunk=10)
    record(Folder(given.out), msgspec.structs.replace(plan, settings=settings))
    path.write_text("text\nfilm\nanother\n")

    with pytest.raises(DataError, match="input is another"):
        score(right)
    with pytest.raises(DataError, match="changed since"):
        UnitRunner(given, msgspec.structs.replace(plan, settings=settings))(plan.units[0])
    assert count_parts(tmp_path / "out") == 0


def test_a_folder_of_something_else_is_left_alone(mood, texts, tmp_path):
    """Files that are no run are not mixed with one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")

    with pytest.raises(OutputExists, match=r"thesis\.tex"):
        run(mood, texts, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("fault", ["damaged", "foreign", "of another run"])
def test_parts_that_are_not_of_the_run_are_refused(mood, texts, whole, tmp_path, fault):
    """A run ends only on parts that say they are its own."""
    out = tmp_path / "out"
    run(mood, texts, out=out, unit_rows=20, keep=("id",))
    name = "part-000000-000001.parquet"
    match fault:
        case "damaged":
            (out / name).write_bytes((out / name).read_bytes()[:-8])
        case "foreign":
            (out / name).rename(out / "part-000009-000000.parquet")
        case _:
            (out / name).write_bytes((whole / name).read_bytes())

    with pytest.raises(DataError, match="part-000"):
        run(mood, texts, out=out, unit_rows=20, keep=("id",))


def test_of_runs_that_begin_at_once_the_first_plan_counts(mood, texts, tmp_path):
    """All of them go on with its settings."""
    given, plan = prepare(config(mood, texts, out=tmp_path / "out"))
    settings = [Settings(variant="only", processes=n, threads=1, batch=1, decoders=1, chunk=1) for n in (1, 2)]
    plans = [msgspec.structs.replace(plan, settings=each) for each in settings]
    folder = Folder(given.out)

    assert record(folder, plans[0]) == plans[0]
    assert record(folder, plans[1]) == plans[0]


def test_shards_share_a_folder(mood, texts, whole, tmp_path):
    """Each writes its own units; the one that finds all of them there says so."""
    options = {"out": tmp_path / "out", "unit_rows": 2, "keep": ("id",)}
    results = [run(mood, texts, shard=f"{number}/3", **options) for number in range(3)]

    assert [result.missing for result in results] == [20, 10, 0]
    assert tree(tmp_path / "out") == tree(whole)


def test_another_variant_does_not_go_on(mood, texts, tmp_path):
    """The parts of one run are all of the same graph, wherever they are scored."""
    given, plan = prepare(config(mood, texts, out=tmp_path / "out"))
    settings = Settings(variant="of a GPU", processes=1, threads=1, batch=1, decoders=1, chunk=1)
    record(Folder(given.out), msgspec.structs.replace(plan, settings=settings))

    with pytest.raises(DataError, match=r"'only'.*'of a GPU'"):
        score(given)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_other_formats_hold_the_same(mood, texts, tmp_path, form):
    """CSV with lists as JSON, and JSONL: what is read from them is what Parquet has; they too go on."""
    options = {"unit_rows": 25, "keep": ("id",), "logits": True}
    expected = scored(mood, texts, out=tmp_path / "parquet", **options).to_pylist()
    run(mood, texts, out=tmp_path / form, format=form, **options)
    before = tree(tmp_path / form)
    (tmp_path / form / f"part-000000-000001.{form}").unlink()
    run(mood, texts, out=tmp_path / form, format=form, **options)
    rows = []
    for part in sorted((tmp_path / form).glob(f"part-*.{form}")):
        with part.open(newline="") as file:
            rows += list(csv.DictReader(file)) if form == "csv" else map(json.loads, file)

    assert tree(tmp_path / form) == before
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for row, want in zip(rows, expected, strict=True):
        for name, value in want.items():
            got = row[name]
            if form == "csv":
                got = None if got == "" else json.loads(got) if not isinstance(value, str) else got
            assert got == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_what_is_written_is_found_by_its_footer(mood, texts, whole):
    """A program can ask which parts of a plan are there."""
    given, plan = prepare(config(mood, texts, out=whole, unit_rows=2, keep=("id",)))
    footers = done(Folder(given.out), plan)

    assert list(footers) == [unit.name for unit in plan.units]
    assert sum(footer.counts.rows_in for footer in footers.values()) == plan.rows == ROWS


def test_a_parquet_part_reads_as_a_data_set(whole):
    """What stands beside the parts does not get in the way of those who read the folder as one table."""
    table = dataset.dataset(whole, format="parquet").to_table()

    assert isinstance(table, pa.Table)
    assert len(table) == ROWS


@pytest.mark.parametrize(
    ("option", "value"),
    [("unit_rows", 0), ("processes", 0), ("threads", -1), ("batch", 0), ("decoders", 0), ("top_k", -1)]
    + [("max_error_rate", value) for value in (-0.1, 1.5)],
)
def test_numbers_that_mean_nothing_are_refused(mood, texts, tmp_path, option, value):
    """Before anything is read or written; 0 is not the default in disguise."""
    with pytest.raises(DataError, match=f"--{option.replace('_', '-')} is {value}; expected"):
        prepare(config(mood, texts, out=tmp_path / "out", **{option: value}))
    assert not (tmp_path / "out").exists()

"""By pyarrow's own client of S3, against a server on loopback that speaks as much of it."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bundle.errors import DataError
from score import files
from tests import serve_bundles as bundles
from tests.s3_server import S3Server
from tests.score_examples import TEXTS, run, scored, tree, write_csv


@pytest.fixture
def s3(monkeypatch):
    with S3Server() as server:
        settings = {"ENDPOINT_URL": server.endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "local"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        files._bucket.cache_clear()
        yield server
        files._bucket.cache_clear()


def objects(s3, folder):
    """The objects of a folder, but for reports, and for what pyarrow puts in the folder's place when it deletes one."""
    names = {key.removeprefix(f"{folder}/"): data for key, data in s3.objects.items() if key.startswith(f"{folder}/")}
    return {name: data for name, data in names.items() if name and not name.startswith("_report")}


def test_a_bucket_is_scored_like_a_folder(s3, tmp_path):
    """Read by prefix and glob, in ranges; every part is an object; what is there is not done again."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    data = write_csv(tmp_path / "texts.csv", {"text": TEXTS}).read_bytes()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    s3.objects |= {"bucket/in/a b.csv": data, "bucket/in/deep/c.jsonl": rows, "bucket/in/_skipped.csv": data}
    options = {"unit_rows": 3, "format": "jsonl"}

    result = run(bundle, "s3://bucket/in", out="s3://bucket/out", **options)
    once, keys = objects(s3, "bucket/out"), set(s3.objects)
    assert result.counts.rows_ok == 2 * len(TEXTS)
    assert "bucket/out/" not in keys
    parts = [json.loads(line) for name in sorted(once) if name.startswith("part-") for line in once[name].splitlines()]
    assert [row["_file"] for row in parts] == ["s3://bucket/in/a b.csv"] * 7 + ["s3://bucket/in/deep/c.jsonl"] * 7
    assert [row["_row"] for row in parts] == [*range(7), *range(7)]
    assert {row["label"] for row in parts[:7]} == {row["label"] for row in parts[7:]}

    del s3.objects["bucket/out/part-000001-000001.jsonl"]
    assert run(bundle, "s3://bucket/in", out="s3://bucket/out", **options) == result
    assert objects(s3, "bucket/out") == once
    assert run(bundle, "s3://bucket/**/*[bc].*", out="s3://bucket/out2", **options).counts.rows_in == 2 * len(TEXTS)


def test_a_run_into_a_bucket_that_was_killed_goes_on(s3, tmp_path):
    """From the objects that are there, to the bytes that a run into a folder writes; the input is in the bucket too."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    s3.objects["bucket/in.jsonl"] = b'{"text": "the film is good"}\n{"text": null}\nno\n' * 40
    command = [sys.executable, "-m", "edgeward", "score", str(bundle), "s3://bucket/in.jsonl", "--unit-rows", "2"]
    killed = subprocess.Popen([*command, "--out", "s3://bucket/out", "--processes", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any("/part-" in key for key in tuple(s3.objects)) and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    begun = objects(s3, "bucket/out")
    run(bundle, "s3://bucket/in.jsonl", out="s3://bucket/out", unit_rows=2)
    run(bundle, "s3://bucket/in.jsonl", out=tmp_path / "out", unit_rows=2)

    assert "_SUCCESS" not in begun
    ended, expected = objects(s3, "bucket/out"), tree(tmp_path / "out")
    assert ended.pop("_plan.json") == begun["_plan.json"]
    expected.pop("_plan.json")
    assert len(expected) == 60 + 1
    assert ended == expected
    assert begun.items() <= (ended | {"_plan.json": begun["_plan.json"]}).items()


def test_every_kind_of_table_is_read_from_a_bucket(s3, tmp_path):
    """In ranges, without a copy of the file: the answers are those of the same file on this machine."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=3)
    np.savez(tmp_path / "b.npz", text=np.array(TEXTS))
    write_csv(tmp_path / "c.csv", {"text": TEXTS})
    for name in ("a.parquet", "b.npz", "c.csv"):
        s3.objects[f"bucket/{name}"] = (tmp_path / name).read_bytes()
        there = scored(bundle, f"s3://bucket/{name}", out=tmp_path / f"{name}.there", unit_rows=2)
        here = scored(bundle, tmp_path / name, out=tmp_path / f"{name}.here", unit_rows=2)

        assert there.drop_columns("_file").equals(here.drop_columns("_file"))
        assert set(there["_file"].to_pylist()) == {f"s3://bucket/{name}"}


def test_what_is_not_in_the_bucket_is_not_there(s3, tmp_path):
    """And nothing is left behind."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")

    with pytest.raises(DataError, match=r"s3://bucket/none\.csv is not there"):
        run(bundle, "s3://bucket/none.csv", out=tmp_path / "out")
    assert s3.objects == {}
    assert not (tmp_path / "out").exists()


def test_images_of_a_bucket(s3, tmp_path):
    """Each is fetched where it is decoded; one that is missing is a bad row."""
    bundle = bundles.write_image_bundle(tmp_path / "colour")
    s3.objects |= {f"bucket/{colour}.png": bundles.png(colour) for colour in ("red", "blue")}
    (tmp_path / "list.txt").write_text("s3://bucket/red.png\ns3://bucket/gone.png\ns3://bucket/blue.png\n")
    folder = run(bundle, "s3://bucket", out=tmp_path / "folder", format="jsonl", decoders=2)
    run(bundle, tmp_path / "list.txt", out=tmp_path / "list", format="jsonl", decoders=2)

    assert folder.counts.rows_ok == 2
    rows = [json.loads(line) for line in tree(tmp_path / "list")["part-000000-000000.jsonl"].splitlines()]
    assert [row["_status"] for row in rows] == [0, 1, 0]
    assert "gone.png cannot be read" in rows[1]["_error"]

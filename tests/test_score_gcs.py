"""By pyarrow's own client of Google Cloud Storage, against an emulator that others wrote, in a process of its own."""

import json
import socket
import subprocess
import sys
import time
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from pyarrow import fs, parquet

from bundle.errors import DataError
from score import files
from tests import serve_bundles as bundles
from tests.score_examples import TEXTS, run, tree, write_csv

BUCKET = "gs://anonymous@bucket"


@pytest.fixture
def put(monkeypatch):
    """Puts an object into the bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    emulator = subprocess.Popen([*command, "--in-memory", "--default-bucket=bucket"], stderr=subprocess.DEVNULL)
    wait_for(port)
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
    files._bucket.cache_clear()

    def _put(name, data):
        url = f"{endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}"
        urlopen(Request(url, data, {"Content-Type": "application/octet-stream"}, method="POST")).close()

    yield _put
    files._bucket.cache_clear()
    emulator.kill()
    emulator.wait()


def wait_for(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


def test_a_bucket_is_scored_like_a_folder(put, tmp_path):
    """By prefix and by glob; the parts are those of a local run but for the names of the files."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    data = write_csv(tmp_path / "a.csv", {"text": TEXTS}).read_bytes()
    put("in/a.csv", data)
    put("in/deep/b.csv", data)
    options = {"unit_rows": 3, "format": "jsonl"}

    there = run(bundle, f"{BUCKET}/in", out=tmp_path / "there", **options)
    run(bundle, tmp_path / "a.csv", out=tmp_path / "here", **options)
    matched = run(bundle, f"{BUCKET}/in/*.csv", out=tmp_path / "matched", **options)

    assert (there.counts.rows_ok, matched.counts.rows_ok) == (2 * len(TEXTS), len(TEXTS))
    parts = {name: data for name, data in tree(tmp_path / "matched").items() if name.startswith("part-")}
    here = {name: data for name, data in tree(tmp_path / "here").items() if name.startswith("part-")}
    assert parts.keys() == here.keys()
    for name, expected in here.items():
        rows, wanted = ([json.loads(line) for line in part.splitlines()] for part in (parts[name], expected))
        assert {row.pop("_file") for row in rows} == {f"{BUCKET}/in/a.csv"}
        assert rows == [{key: value for key, value in row.items() if key != "_file"} for row in wanted]
    with pytest.raises(DataError, match=r"none\.csv is not there"):
        run(bundle, f"{BUCKET}/none.csv", out=tmp_path / "none")


def test_parts_are_written_to_a_bucket(put, tmp_path):
    """A second run finds them all done."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    source = write_csv(tmp_path / "a.csv", {"text": TEXTS})

    first = run(bundle, source, out=f"{BUCKET}/out", unit_rows=3)
    system, _ = files.system_of(f"{BUCKET}/out")
    there = {info.base_name for info in system.get_file_info(fs.FileSelector("bucket/out"))}
    again = run(bundle, source, out=f"{BUCKET}/out", unit_rows=3)

    assert again == first
    assert {"_plan.json", "_SUCCESS", "part-000000-000000.parquet"} <= there
    with system.open_input_file("bucket/out/part-000000-000000.parquet") as file:
        assert parquet.read_table(file).num_rows == 3

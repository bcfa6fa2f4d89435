"""Scoring on a real Ray: a local one of two workers, which a program of its own starts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks.score_throughput import family
from bundle.errors import DataError, MissingExtra
from score.config import ScoreConfig
from score.ray_engine import MAX_ATTEMPTS
from score.run import score
from tests.serve_bundles import write_text_bundle

ROWS, UNIT_ROWS = 4000, 100
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # as /proc/net has them
PROGRAM = """
import json, os, signal, sys
from pathlib import Path

from score import ray_engine
from score.config import ScoreConfig
from score.errors import WorkerDied
from score.run import score


def harassed(config, plan, units):
    for number, report in enumerate(ray_engine.reports(config, plan, units)):
        if number == 0:
            os.kill(int(report.process.partition(":")[2]), signal.SIGKILL)
        yield report


class Deadly(ray_engine._Actor):
    def _running(self):
        os.kill(os.getpid(), signal.SIGKILL)


def fate(options, out):
    ray_engine._Actor = Deadly
    options |= {"out": out, "engine": "ray", "unit_rows": options["unit_rows"] * 40}
    try:
        score(ScoreConfig(**options))
    except WorkerDied as error:
        return str(error)


def family(parents):
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening():
    stats = [entry / "stat" for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    parents = {int(stat.parent.name): int(stat.read_text().rpartition(")")[2].split()[1]) for stat in stats}
    ends = (link for pid in family(parents) for link in Path(f"/proc/{pid}/fd").iterdir())
    ours = {os.readlink(link) for link in ends if link.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").open()]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in ours]


def main():
    out, back, options = json.loads(sys.argv[1])
    options |= {"bundle": Path(options["bundle"]), "inputs": tuple(options["inputs"])}
    with ray_engine.connected(None, cpus=2):
        begun = score(ScoreConfig(**options | {"out": back, "shard": "1/2"}), harassed)
        ended = score(ScoreConfig(**options | {"out": out, "engine": "ray"}))
        told = {"missing": [begun.missing, ended.missing], "listening": listening()}
        told["fate"] = fate(options, f"{out}-deadly")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
"""


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def parts(folder):
    """The sha256 of every part, and of _SUCCESS."""
    paths = [path for path in Path(folder).iterdir() if path.name.startswith("part-") or path.name == "_SUCCESS"]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in paths}


def free_ports():
    """Two that were free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return [str(each.getsockname()[1]) for each in (one, two)]


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    write_text_bundle(folder / "mood")
    texts = [None if row % 7 == 0 else f"the film is {'good' if row % 3 else 'bad'}" for row in range(ROWS)]
    parquet.write_table(pa.table({"text": texts}), folder / "rows.parquet")
    return ScoreConfig(
        folder / "mood",
        (str(folder / "rows.parquet"),),
        out=str(folder / "alone"),
        unit_rows=UNIT_ROWS,
        processes=1,
        threads=1,
        batch=8,
        decoders=1,
    )


@pytest.fixture(scope="module")
def alone(config):
    """What there is when one process has scored everything."""
    score(config)
    return parts(config.out)


@pytest.fixture(scope="module")
def on_ray(config, tmp_path_factory):
    """A run that was begun by one process and finished on Ray, one that was begun on Ray, and what the program told."""
    folder = tmp_path_factory.mktemp("ray")
    out, back = str(folder / "out"), str(folder / "back")
    score(replace(config, out=out, shard="0/2"))
    (folder / "program.py").write_text(PROGRAM)
    options = vars(config) | {"bundle": str(config.bundle)}
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets have no room for a long path
        environment = os.environ | {"HOME": short, "RAY_TMPDIR": short}
        command = [sys.executable, str(folder / "program.py"), json.dumps([out, back, options])]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    return out, back, json.loads(ran.stdout)


@needs_ray
def test_what_one_process_began_is_finished_on_ray(alone, on_ray):
    """The parts and _SUCCESS are the same, byte for byte."""
    out, _, told = on_ray

    assert told["missing"][1] == 0
    assert parts(out) == alone


@needs_ray
def test_what_ray_began_is_finished_by_one_process(config, alone, on_ray):
    """A shard on Ray, of which a worker was killed, is whole, and the rest goes on from there."""
    _, back, told = on_ray
    assert told["missing"][0] == ROWS // UNIT_ROWS // 2
    assert len(parts(back)) == ROWS // UNIT_ROWS // 2

    assert score(replace(config, out=back)).missing == 0
    assert parts(back) == alone


@needs_ray
def test_a_local_ray_is_reached_from_this_machine_only(on_ray):
    """Every port that Ray opens is on the loopback address."""
    assert on_ray[2]["listening"]
    assert set(on_ray[2]["listening"]) <= LOOPBACK


@needs_ray
def test_units_that_kill_every_worker_end_the_run(on_ray):
    """After a few attempts they are named; Ray itself would try for ever."""
    assert re.search(f"Ray lost {MAX_ATTEMPTS} times what had part-000000-000000 in hand", on_ray[2]["fate"])


@needs_ray
def test_a_ray_that_was_started_before_is_used_and_left_running(config, alone, tmp_path):
    """By the address of one that `ray start` has started, and that is there for the next run as well."""
    port, other = free_ports()
    start = ["--head", "--block", "--port", port, "--ray-client-server-port", other, "--node-ip-address", "127.0.0.1"]
    quiet = ["--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *start, *quiet]
    out, log = tmp_path / "out", tmp_path / "log"
    score_it = [sys.executable, "-m", "edgeward", "score", config.bundle, *config.inputs, "--out", out, "--json"]
    score_it += ["--unit-rows", str(UNIT_ROWS), "--threads", "1"]
    score_it += ["--engine", "ray", "--ray-address", f"127.0.0.1:{port}"]
    with tempfile.TemporaryDirectory() as short:
        environment = os.environ | {"HOME": short, "RAY_TMPDIR": short, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        with log.open("wb") as file:
            head = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_until(lambda: head.poll() is not None or b"--block" in log.read_bytes())
            first = subprocess.run(score_it, env=environment, capture_output=True, text=True, timeout=120)
            left = head.poll()
        finally:
            for process in family(head.pid):
                os.kill(process, signal.SIGKILL)  # at SIGTERM it would wait half a minute
            head.wait(30)
    assert first.returncode == 0, first.stderr
    assert left is None
    assert json.loads(first.stdout)["missing"] == 0
    assert parts(out) == alone


@needs_ray
def test_an_address_where_no_ray_is_is_told_at_once(config, tmp_path):
    """Not after minutes of trying; nothing is planned."""
    address = f"127.0.0.1:{free_ports()[0]}"

    with pytest.raises(DataError, match=f"no Ray answers at --ray-address {address}"):
        score(replace(config, out=str(tmp_path / "out"), engine="ray", ray_address=address))
    assert not (tmp_path / "out").exists()


def test_without_ray_the_engine_says_what_to_install(config, monkeypatch, tmp_path):
    """Nothing is planned, so that the folder is free for another run, and the message has the extra's name."""
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(MissingExtra, match="its extra 'ray'"):
        score(replace(config, out=str(tmp_path / "out"), engine="ray"))
    assert not (tmp_path / "out").exists()

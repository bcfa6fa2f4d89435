"""Ctrl-C and SIGTERM, also on a real `edgeward score` with two processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import score.run
from benchmarks.score_kills import lives
from bundle.log import captured
from bundle.signals import terminable
from tests.score_examples import run, tree

ROWS, UNIT_ROWS = 16_000, 80


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text('{"text": "the film is good"}\n{"text": null}\n' * (ROWS // 2))
    return path


@pytest.fixture(scope="module")
def whole(mood, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(mood, texts, out=out, unit_rows=UNIT_ROWS)
    return {name: data for name, data in tree(out).items() if name != "_plan.json"}


@pytest.mark.parametrize(
    ("number", "to_all", "code", "says"),
    [
        (signal.SIGINT, True, 130, "edgeward: stopped at"),  # as a terminal sends it
        (signal.SIGTERM, False, 143, "stopped at"),  # as Kubernetes does
        (signal.SIGTERM, True, 143, "stopped at"),  # as systemd does
    ],
)
def test_a_signal_ends_a_run_with_one_line(mood, texts, whole, tmp_path, number, to_all, code, says):
    """No process is left, no file is half-written, whole parts stay, and the same command goes on to the same files."""
    out = tmp_path / "out"
    options = ["--unit-rows", str(UNIT_ROWS), "--processes", "2", "--threads", "1"]
    command = [sys.executable, "-m", "edgeward", "score", mood, texts, "--out", out, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(out.glob("part-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    left = tree(out)
    run(mood, texts, out=out, unit_rows=UNIT_ROWS)

    assert process.returncode == code
    (line,) = [line for line in errors.splitlines() if "settings" not in line]
    assert f"of {ROWS} rows. The same command goes on from there." in line
    assert says in line
    assert not lives(process.pid)
    assert not any(".tmp-" in name for name in left)
    parts = {name for name in left if name.startswith("part-")}
    assert 0 < len(parts) < ROWS // UNIT_ROWS
    assert left.items() <= tree(out).items()
    assert {name: data for name, data in tree(out).items() if name != "_plan.json"} == whole


@pytest.mark.parametrize("stage", ["prepare", "record", "autotune"])
def test_a_run_that_is_stopped_while_it_is_planned_says_so(mood, texts, tmp_path, monkeypatch, stage):
    """In one line; nothing is in the folder."""
    where = (score.run.autotune, "tune") if stage == "autotune" else (score.run, stage)
    monkeypatch.setattr(*where, lambda *arguments: signal.raise_signal(signal.SIGTERM))

    with captured() as lines, pytest.raises(SystemExit, match="143"):
        run(mood, texts, out=tmp_path / "out", unit_rows=UNIT_ROWS)

    (said,) = [line["event"] for line in lines if line["event"] != "settings"]
    assert said == "stopped while the run was planned. The same command goes on from there."
    assert not any((tmp_path / "out").glob("*"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Destroyed:
    """Sends a signal to its own process while it is destroyed, where Python drops what the handler raises."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler runs here
            pass


def wait_for(number):
    Destroyed(number)
    threading.Event().wait(60)


def close_after_two(closed):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)
        closed.append(True)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_python_drops_comes_again(number, raised):
    """Nothing is said of the first one."""
    with pytest.raises(raised), terminable():
        wait_for(number)


def test_a_second_signal_does_not_disturb_what_is_being_closed():
    """It is the same stop; after the block a signal does what it did before."""
    closed = []
    with pytest.raises(SystemExit, match="143"), terminable():
        close_after_two(closed)

    assert closed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("command", "stage"), [("export", "export_checkpoint"), ("finetune", "prepare")])
def test_sigterm_ends_a_stage_as_ctrl_c_does(monkeypatch, command, stage):
    """What it has open is closed: else a temporary folder were left behind."""
    from edgeward import stages

    monkeypatch.setattr(stages, stage, lambda *_: signal.raise_signal(signal.SIGTERM))

    with captured() as logs, pytest.raises(SystemExit) as ended:
        getattr(stages, command)(None)

    assert ended.value.code == 143
    assert logs[-1]["event"].startswith("ended by SIGTERM")

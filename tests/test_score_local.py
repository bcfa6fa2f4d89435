import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from bundle.errors import DataError
from bundle.log import captured
from score import progress
from score.config import ScoreConfig
from score.errors import TooManyBadRows, WorkerDied
from score.local import run_units
from score.progress import follow
from score.run import score
from score.units import Counts, Plan, Unit
from tests.score_runners import Runner
from tests.serve_bundles import write_text_bundle


def units(*orders, rows=10):
    """A unit for each order, see tests.score_runners."""
    return [
        Unit(
            file="a.csv", index=0, part=i, kind="csv", first_row=rows * i, rows=rows, start=0, stop=1, entries=(order,)
        )
        for i, order in enumerate(orders)
    ]


def plan_of(of):
    return Plan(fingerprint="f", bundle="b", options={}, files=(), units=tuple(of))


def tries(folder, unit):
    return len((folder / unit.name).read_text().split())


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pids(folder, todo):
    """Of the processes that had a unit in hand."""
    return [
        int(pid) for unit in todo if (folder / unit.name).exists() for pid in (folder / unit.name).read_text().split()
    ]


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def signal_when(path, number):
    wait_until(path.exists)
    os.kill(os.getpid(), number)


def test_every_unit_is_scored_once_by_several_processes(tmp_path):
    """A killed process is replaced, what it had in hand begins anew, and no other unit does."""
    todo = units("", "", "die once", *[""] * 9)

    reports = list(run_units(partial(Runner, tmp_path), todo, processes=2))

    assert sorted(report.unit for report in reports) == [unit.name for unit in todo]
    assert [tries(tmp_path, unit) for unit in todo] == [1, 1, 2, *[1] * 9]
    assert len({report.process for report in reports}) >= 2
    assert all(report.peak_rss > 1 << 20 for report in reports)


def test_a_unit_that_kills_two_processes_is_an_error(tmp_path):
    """It is named, tried twice and no more, and no process is left."""
    todo = units("", "die", *[""] * 3)

    with pytest.raises(WorkerDied, match=r"SIGKILL while it had part-000000-000001 in hand, twice.*--processes"):
        list(run_units(partial(Runner, tmp_path), todo, processes=2))

    assert tries(tmp_path, todo[1]) == 2
    assert all(gone(pid) for pid in pids(tmp_path, todo))


@pytest.mark.parametrize("order", ["refuse", "break"])
def test_an_error_of_a_process_ends_the_run(tmp_path, order):
    """Ours as it is, any other with its traceback."""
    kind, says = {
        "refuse": (DataError, "part-000000-000001 cannot be read"),
        "break": (RuntimeError, "a fault of ours"),
    }[order]

    with pytest.raises(kind, match=says):
        list(run_units(partial(Runner, tmp_path), units("", order), processes=2))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_cleanly(tmp_path, processes, number):
    """Every unit in work is closed, as a file that is half-written must be, and the processes have ended."""
    todo = units("hang", "hang")
    engine = run_units(partial(Runner, tmp_path), todo, processes=processes)
    threading.Thread(target=signal_when, args=(tmp_path / "hangs", number), daemon=True).start()

    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
        follow(engine, plan_of(todo), done=Counts())

    begun = [unit for unit in todo if (tmp_path / f"{unit.name}.hangs").exists()]  # in the block that closes it
    assert begun
    assert all((tmp_path / f"{unit.name}.closed").exists() for unit in begun)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    """Nobody would hear of what they write."""
    program = (
        "from functools import partial; from pathlib import Path\n"
        "from score.local import run_units\nfrom tests.score_runners import Runner\n"
        "from tests.test_score_local import units\n"
        f"list(run_units(partial(Runner, Path({str(tmp_path)!r})), units('hang', 'hang'), processes=2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1])
    wait_until((tmp_path / "hangs").exists)
    parent.kill()
    parent.wait()

    children = pids(tmp_path, units("", ""))
    assert children
    wait_until(lambda: all(gone(pid) for pid in children))


def test_too_many_bad_rows_stop_a_run(tmp_path):
    """As soon as it is certain, and not before; a limit that is met exactly lets all through."""
    todo = units(*[""] * 8)  # one bad row of ten in each

    with pytest.raises(TooManyBadRows, match=r"3 of the 30 rows that were scored are bad; of all 80 at most 0\.03"):
        follow(
            run_units(partial(Runner, tmp_path), todo, processes=1), plan_of(todo), done=Counts(), max_error_rate=0.03
        )
    assert not (tmp_path / todo[3].name).exists()

    outcome = follow(
        run_units(partial(Runner, tmp_path), todo, processes=1), plan_of(todo), done=Counts(), max_error_rate=0.1
    )
    assert outcome.counts.rows_bad == 8


def test_rows_of_an_earlier_run_count(tmp_path):
    """In the totals, and against the limit; not in what this run has cost."""
    todo = units("", "")
    before = Counts(rows_in=10, rows_ok=9, rows_bad=1, drift={"nulls:text": (3,)})

    outcome = follow(run_units(partial(Runner, tmp_path), todo[1:], processes=1), plan_of(todo), done=before)

    assert outcome.counts == Counts(rows_in=20, rows_ok=18, rows_bad=2, drift={"nulls:text": (4,)})
    assert (outcome.rows, outcome.bytes, outcome.seconds) == (10, 10, {"read": 1.0, "run": 2.0})
    assert [(each.units, each.rows) for each in outcome.processes] == [(1, 10)]
    with pytest.raises(TooManyBadRows):
        follow(run_units(partial(Runner, tmp_path), (), processes=1), plan_of(todo), done=before, max_error_rate=0.01)


def test_a_run_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    """Where stderr is no terminal, lines of the log; where it is one, a bar."""
    todo = units(*[""] * 3)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with captured() as lines:
        follow(run_units(partial(Runner, tmp_path), todo, processes=1), plan_of(todo), done=Counts())
    assert [(line["rows"], line["of"], line["bad"]) for line in lines] == [(10, 30, 1), (20, 30, 2), (30, 30, 3)]

    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    follow(run_units(partial(Runner, tmp_path), todo, processes=1), plan_of(todo), done=Counts())
    assert re.search(r"30/30.*rows/s, 3 bad", capsys.readouterr().err)


def test_a_killed_run_goes_on_with_the_same_files(tmp_path):
    """Byte for byte those of a run that nobody disturbed, and by the settings that were chosen first."""
    bundle = write_text_bundle(tmp_path / "mood")
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the film is good"}\n{"text": null}\n{"text": "bad"}\n' * 300)
    options = {"bundle": bundle, "inputs": (str(data),), "unit_rows": 10, "threads": 1}
    whole = tmp_path / "whole"
    score(ScoreConfig(out=str(whole), processes=1, **options))
    out = tmp_path / "out"

    arguments = ["score", str(bundle), str(data), "--out", str(out), "--unit-rows", "10"]
    run = subprocess.Popen([sys.executable, "-m", "edgeward", *arguments, "--processes", "2", "--threads", "1"])
    wait_until(lambda: len(list(out.glob("part-*"))) >= 2)
    run.kill()
    run.wait()
    plan = (out / "_plan.json").read_bytes()
    score(ScoreConfig(out=str(out), processes=1, **options))

    assert (out / "_plan.json").read_bytes() == plan
    kept = {path.name: path.read_bytes() for path in whole.iterdir() if not path.name.startswith(("_plan", "_report"))}
    assert {name: (out / name).read_bytes() for name in kept} == kept

"""Whatever moment a run is killed at, the same command ends with the same files, and nothing else."""

from multiprocessing import get_context

import pytest

from benchmarks import mixed_rows, score_kills
from score.run import score
from tests.score_deaths import CODE, MOMENTS, run_and_die
from tests.score_examples import config, tree

PART = "part-000000-000001.csv"
FILES = ("_plan.json", f"_{PART}.json", PART, "_report.json", "_report.html", "_SUCCESS")
TEXTS = ("the film is good", "bad", "a film", "is the film a film?")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows of mixed quality, and how many they are."""
    folder, rows = tmp_path_factory.mktemp("data") / "mixed", 480
    mixed_rows.write(folder, rows, TEXTS)
    return folder, rows


def test_killed_with_all_its_processes_it_ends_with_the_same_files(mood, mixed, tmp_path):
    """Parquet, CSV and JSONL with bad rows in them; every process of the run gets SIGKILL, three times."""
    data, rows = mixed
    whole, out = tmp_path / "whole", tmp_path / "out"
    first_s, whole_s = score_kills.undisturbed(mood, data, whole, unit_rows=4)
    window = (0.7 * first_s, first_s + (whole_s - first_s) / 4)
    options = {"unit_rows": 4, "units": rows // 4, "window_s": window, "kills": 3}
    kills = list(score_kills.harass(mood, data, out, **options))

    assert len(kills) == 3
    assert score_kills.faults(out, whole, rows) == []


@pytest.fixture(scope="module")
def processes():
    """Spawns processes from one that has imported everything."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.score_deaths"])
    return context


@pytest.fixture(scope="module")
def whole(mood, mixed, tmp_path_factory):
    """What a run that nobody disturbed leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    score(config(mood, mixed[0] / "b.csv", out=out, unit_rows=50, format="csv"))
    return tree(out)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", FILES)
def test_killed_at_every_step_of_every_file(mood, mixed, whole, processes, tmp_path, name, moment):
    """Half-written, flushed and not yet named, just named: plan, part, what stands beside it, report, _SUCCESS."""
    given = config(mood, mixed[0] / "b.csv", out=tmp_path / "out", unit_rows=50, format="csv")
    process = processes.Process(target=run_and_die, args=(given, name, moment))
    process.start()
    process.join(60)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    score(given)

    assert process.exitcode == CODE
    assert (name in left) == (moment == "named")
    assert moment == "named" or any(each.startswith(f".{name}.tmp-") for each in left)
    assert tree(tmp_path / "out") == whole

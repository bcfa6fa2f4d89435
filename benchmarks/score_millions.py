"""Many rows of mixed quality on a few cores: python -m benchmarks.score_millions --out DIR

`words` scores 1,000,000 rows with word vectors, `text` 100,000 with MiniLM; both bundles are made first, once, as
benchmarks/score_inputs.py does. The rows are those of benchmarks/mixed_rows.py: a twentieth is bad. Whether each is
there once, and the right ones without an answer, is checked row by row. Memory is the PSS of all processes at a tenth
of the rows and at the other tenths: what processes share counts once. The numbers go to TASK-ROWS.json.
"""

import argparse
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import mixed_rows
from benchmarks.score_inputs import EDGEWARD
from benchmarks.score_throughput import family, pss

ROWS = {"words": 1_000_000, "text": 100_000}
TENTHS = range(1, 11)
LOOK_S = 0.2
STOPPED = 143  # exit code


@dataclass(frozen=True)
class Scored:
    """A run, or what it came to so far.

    Attributes:
        rows: that the parts have; none while it has not ended.
        bad: of them.
        command_s: of the commands, from their start to their end.
        pss_mib: peak of all processes in each tenth of the rows.
        settings: that it chose.
    """

    rows: int
    bad: int
    command_s: float
    pss_mib: tuple[int, ...]
    settings: dict[str, object]


NOTHING = Scored(0, 0, 0.0, (0,) * len(TENTHS), {})


def run(
    bundle: Path, data: Path, out: Path, rows: int, *options: str, before: Scored = NOTHING, limit_s: float = 1e9
) -> Scored:
    """Score the rows of a folder, and look at memory meanwhile.

    Args:
        bundle: that takes texts.
        data: as mixed_rows.write has written it.
        out: of the command; it goes on from what is there.
        rows: of the data.
        options: more of the command.
        before: what earlier calls came to.
        limit_s: after which the command gets SIGTERM.

    Raises:
        ValueError: rows are missing, twice, or not as they should be.
    """
    command = [EDGEWARD, "score", str(bundle), str(data), "--out", str(out), "--keep", "id", "--json", *options]
    began, peaks = time.perf_counter(), [*before.pss_mib]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_silent()) as process:
        while process.poll() is None:
            tenth = min(len(TENTHS) - 1, len(TENTHS) * _written(out) // rows)
            peaks[tenth] = max(peaks[tenth], sum(map(pss, family(process.pid))) >> 20)
            time.sleep(LOOK_S)
            if time.perf_counter() - began > limit_s:
                process.terminate()
        assert process.stdout
        answer = process.stdout.read()
    seconds = round(before.command_s + time.perf_counter() - began, 1)
    if process.returncode == STOPPED:
        return Scored(0, 0, seconds, tuple(peaks), {})
    told = json.loads(answer)
    found, bad = mixed_rows.count(out, rows)
    counts = told["counts"]
    if (counts["rows_in"], counts["rows_ok"], counts["rows_bad"]) != (found, found - bad, bad):
        raise ValueError(f"the command says {counts}; there are {found} rows, {bad} of them bad")
    return Scored(found, bad, seconds, tuple(peaks), told["settings"])


def _written(out: Path) -> int:
    """Rows in the parts that are there, about."""
    plan = out / "_plan.json"
    if not plan.exists():
        return 0
    return sum(1 for name in os.listdir(out) if name.startswith("part-")) * _unit_rows(plan)


def _unit_rows(plan: Path) -> int:
    return int(json.loads(plan.read_bytes())["options"]["unit_rows"])


def _silent() -> dict[str, str]:
    return os.environ | {"ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    from benchmarks.score_inputs import bundle as made
    from bundle.host import cpu_count, cpu_name
    from examples.tweets import tweets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="bundles, rows and parts are kept there")
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="TASK")
    parser.add_argument("--bundle", type=Path, help="of one --only; by default it is made")
    parser.add_argument("--rows", type=int, help=f"of each task (default {ROWS})")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop then; the same command goes on from there")
    options, more = parser.parse_known_args()  # more: for the command, such as --processes 2
    folder = options.out.absolute()
    print(f"{cpu_name()}, {cpu_count()} cores")
    for task in options.only:
        rows = options.rows or ROWS[task]
        bundle = (options.bundle or made(task, folder)).absolute()
        data, out, results = folder / f"mixed-{rows}", folder / f"{task}-{rows}", folder / f"{task}-{rows}.json"
        if not data.exists():
            mixed_rows.write(data, rows, [text for text, _ in tweets()])
        before = NOTHING
        if out.exists() and results.exists():
            before = Scored(**json.loads(results.read_bytes()))
        scored = run(bundle, data, out, rows, *more, before=before, limit_s=options.seconds)
        results.write_text(json.dumps(asdict(scored), indent=1))
        print(
            f"{task}: {scored.rows or 'not yet all'} rows, {scored.bad} bad, each once; {scored.command_s:.0f} s",
            end="",
        )
        print(f" = {scored.rows / scored.command_s:.0f} rows/s; PSS by tenth {scored.pss_mib} MiB; {scored.settings}")


if __name__ == "__main__":
    main()

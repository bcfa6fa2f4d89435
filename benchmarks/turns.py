"""Two or more ways to do one job, each in a process of its own, in turns: A B C, C B A, and so on.

A side is the benchmark's own script with `--side NAME`; it does the job once and says how it went in the last line of
its stdout. The parent measures the process: its peak resident memory and its whole time. All sides have the same
threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

Row = dict[str, float]
Job = Callable[[argparse.Namespace], Row]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--turns", type=int, default=4, help="times that each side runs (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: the cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="every turn as one JSON object")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def compare(
    options: argparse.Namespace, sides: Mapping[str, Job], prepare: Callable[[argparse.Namespace], None]
) -> None:
    """Do the job of one side, or let all of them do it in turns and print what came of it.

    Args:
        options: of the command line.
        sides: by name; the first is what the others are divided by.
        prepare: writes what all of them read into options.folder.
    """
    if options.side:
        print(json.dumps(sides[options.side](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        prepare(options)
        measured: dict[str, list[Row]] = {name: [] for name in sides}
        for turn in range(options.turns):
            for name in list(sides) if turn % 2 == 0 else reversed(sides):
                measured[name].append(_run(name, options))
    if options.json:
        print(json.dumps({"options": _plain(options), "sides": measured}))
        return
    _print(measured)


def _run(name: str, options: argparse.Namespace) -> Row:
    """One turn of one side, whose own figures and its process's."""
    threads = str(options.threads)
    environment = os.environ | {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "ORT_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(options.folder / "cache"),
    }
    command = [sys.executable, *sys.argv, "--side", name, "--folder", str(options.folder)]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise SystemExit(f"{name}: exit code {process.returncode}\n{stderr.read().decode(errors='replace')}")
        told: Row = json.loads(stdout.read().splitlines()[-1])
    row = {**told, "process s": seconds, "peak MiB": usage.ru_maxrss / 1024}
    print(f"{name}: {_figures(row)}", file=sys.stderr, flush=True)
    return row


def _print(measured: Mapping[str, Sequence[Row]]) -> None:
    """Medians, and the medians of the ratios to the first side, turn by turn."""
    first = next(iter(measured.values()))
    for name, rows in measured.items():
        print(f"{name}: {_figures({figure: median(row[figure] for row in rows) for figure in rows[0]})}")
    for name, rows in list(measured.items())[1:]:
        for figure in ("seconds", "peak MiB"):
            ratios = sorted(row[figure] / ours[figure] for row, ours in zip(rows, first, strict=True))
            print(f"{figure} of {name} / ours: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def _plain(options: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(options).items() if isinstance(value, str | int | float)}

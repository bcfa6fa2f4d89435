"""What a run leaves that is killed again and again: python -m benchmarks.score_kills --out DIR

Rows of mixed quality (benchmarks/mixed_rows.py) are scored by two processes, first undisturbed. Then the same is done
once more, and at ten random moments every process of the run is killed with SIGKILL; each time the same command goes
on. In the end every file but the reports must have the same sha256 as without, and nothing else may be there.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import mixed_rows

EDGEWARD = (sys.executable, "-m", "edgeward")
SETTINGS = ("--processes", "2", "--threads", "1", "--batch", "64", "--keep", "id")
GOES_ON = 0.9  # of what is left is done by all runs that are killed, about


@dataclass(frozen=True)
class Kill:
    """A run that was killed.

    Attributes:
        at_s: when, since its start.
        state: what it was at.
        parts: that were there.
        drafts: files that were not whole.
    """

    at_s: float
    state: str
    parts: int
    drafts: int


def start(bundle: Path, data: Path, out: Path, unit_rows: int, scratch: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own."""
    command = [*EDGEWARD, "score", bundle, data, "--out", out, "--unit-rows", str(unit_rows), *SETTINGS]
    scratch.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(scratch)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, start_new_session=True, env=environment, stdout=quiet, stderr=quiet)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to the whole group, and wait until none of it is left; whether the run had not ended."""
    alive = process.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while lives(process.pid):
        time.sleep(0.001)
    return alive and process.returncode == -signal.SIGKILL


def lives(group: int) -> bool:
    """Whether a process of the group is left that is not waiting to be buried."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False


def state(out: Path, units: int) -> tuple[str, int, int]:
    """What a run was at, its parts, and the files that are not whole."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    parts = sum(name.startswith("part-") for name in names)
    at = "starting" if "_plan.json" not in names else "closing" if parts == units else "scoring"
    return at, parts, sum(".tmp-" in name for name in names)


def digests(out: Path) -> dict[str, str]:
    """The sha256 of every file but the reports."""
    paths = (path for path in out.iterdir() if not path.name.startswith("_report"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def harass(
    bundle: Path, data: Path, out: Path, *, unit_rows: int, units: int, window_s: tuple[float, float], kills: int
) -> Iterator[Kill]:
    """Start the run again and again, and kill it at random moments of the window; in the end let it be."""
    chance, scratch = random.Random(kills), out.with_name("scratch")
    done = parts = 0
    while done < kills:
        process = start(bundle, data, out, unit_rows, scratch)
        began = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(*window_s))
        seconds = time.monotonic() - began
        if not kill(process):
            raise SystemExit(f"the run had ended after {done} kills: give it more --rows")
        at, now, drafts = state(out, units)
        yield Kill(round(seconds, 2), "loading" if at == "scoring" and now == parts else at, now, drafts)
        done, parts = done + 1, now
    if start(bundle, data, out, unit_rows, scratch).wait():
        raise SystemExit("the last run failed")


def faults(out: Path, whole: Path, rows: int) -> list[str]:
    """What differs from the undisturbed run, and what does not add up."""
    found, expected = digests(out), digests(whole)
    names = found.keys() | expected.keys()
    wrong = [f"{name} differs" for name in sorted(names) if found.get(name) != expected.get(name)]
    wrong += [f"{path} is left" for path in out.with_name("scratch").iterdir()]
    success = json.loads((out / "_SUCCESS").read_bytes())
    counts = success["counts"]
    if not counts["rows_in"] == counts["rows_ok"] + counts["rows_bad"] == rows:
        wrong.append(f"_SUCCESS counts {counts}")
    if success["parts"] != {name: digest for name, digest in found.items() if name.startswith("part-")}:
        wrong.append("_SUCCESS names other parts")
    if mixed_rows.count(out, rows) != (rows, counts["rows_bad"]):
        wrong.append("_SUCCESS counts other rows")
    return wrong


def undisturbed(bundle: Path, data: Path, out: Path, unit_rows: int) -> tuple[float, float]:
    """Seconds until the first part is there, and until the end."""
    began, first = time.monotonic(), 0.0
    process = start(bundle, data, out, unit_rows, out.with_name("scratch"))
    while process.poll() is None:
        if not first and any(out.glob("part-*")):
            first = time.monotonic() - began
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit("the undisturbed run failed")
    return first, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the bundle is made and kept there")
    parser.add_argument("--bundle", type=Path, help="of texts; by default word vectors are trained")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--unit-rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    from benchmarks.score_inputs import bundle as made
    from bundle.host import cpu_count, cpu_name
    from examples.tweets import tweets

    bundle = (options.bundle or made("words", options.out)).absolute()
    folder = options.out.absolute() / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    data, whole, out = folder / "data", folder / "whole", folder / "out"
    mixed_rows.write(data, options.rows, [text for text, _ in tweets()])
    first_s, whole_s = undisturbed(bundle, data, whole, options.unit_rows)
    units = sum(1 for _ in whole.glob("part-*"))
    print(f"{cpu_name()}, {cpu_count()} cores")
    print(f"{options.rows} rows in {units} parts, undisturbed {whole_s:.1f} s, the first part after {first_s:.1f} s")
    print(f"{'kill':>4} {'after':>8}  {'at':<10}{'parts':>6}{'drafts':>8}", flush=True)
    window = (0.0, first_s + 2 * GOES_ON * (whole_s - first_s) / options.kills)
    told = []
    disturbed = harass(
        bundle, data, out, unit_rows=options.unit_rows, units=units, window_s=window, kills=options.kills
    )
    for number, each in enumerate(disturbed, 1):
        print(f"{number:>4} {each.at_s:>6.2f} s  {each.state:<10}{each.parts:>6}{each.drafts:>8}", flush=True)
        told.append(asdict(each))
    wrong = faults(out, whole, options.rows)
    print("\n".join(wrong) or f"all {units} parts, _plan.json and _SUCCESS are equal; nothing else is left")
    (folder / "results.json").write_text(json.dumps({"rows": options.rows, "kills": told, "wrong": wrong}, indent=1))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

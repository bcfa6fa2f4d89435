"""Rows a second of `edgeward score`, its limit, and others: python -m benchmarks.score_throughput --out DIR

For texts, images and feature vectors (benchmarks/score_inputs.py), every side runs in a process of its own, in turns,
`--rounds` times; the medians are printed. The limit is the cores divided by the CPU seconds a row of reading,
preprocessing, session and writing, each measured alone in one thread (benchmarks/score_peer.py), in the same turns.
`command` counts everything from the start of the process to its end, `scoring` what comes after the loading of
libraries and model, and of trials of settings. Memory is the peak of PSS over all processes of a side.

Then `--memory` rows of vectors, and a hundred times as many, are scored for their peak memory.

Sides that need a library that this environment lacks get one of their own below --out. The numbers go to results.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.score_inputs import EDGEWARD, bundle, rows
from bundle.host import cpu_count

ROOT = Path(__file__).resolve().parents[1]
PEER = str(ROOT / "benchmarks" / "score_peer.py")
ROWS = {"text": 20_000, "images": 5_000, "vectors": 200_000}
SIDES = ("edgeward", "session", "stages", "pipeline", "datasets", "ray")
LIMIT_S = 3600.0  # of one side
SAMPLED_S = 0.05  # between two looks at the memory
SILENT = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Told:
    """What one run of a side has cost."""

    command_s: float
    peak_bytes: int
    answer: dict[str, Any]


def watched(command: list[str], log: Path) -> Told:
    """Run a command that prints one JSON object; look at its memory meanwhile."""
    environment = os.environ | SILENT | {"PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        peak, ended = [0], threading.Event()
        looking = threading.Thread(target=_look, args=(process.pid, peak, ended))
        looking.start()
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
            ended.set()
            looking.join()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; see {log}")
    return Told(seconds, peak[0], json.loads(output.decode().strip().splitlines()[-1]))


def _look(root: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLED_S):
        peak[0] = max(peak[0], sum(map(_pss, _family(root))))


def _family(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _pss(process: int) -> int:
    """Proportional set size in bytes: what processes share counts once."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def interpreter(side: str, out: Path) -> str:
    """Our Python, or for datasets one that sees everything of ours and datasets besides."""
    if side != "datasets":
        return sys.executable
    folder = out / "environment"
    python = folder / "bin" / "python"
    if not (folder / "finished").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "ours.pth").write_text(str(next(Path(sys.prefix).glob("lib/python*/site-packages"))) + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "datasets>=4"], check=True)
        (folder / "finished").touch()
    return str(python)


def run(side: str, task: str, path: Path, source: Path, out: Path) -> Told:
    """One run of one side, written to a fresh place."""
    target = out / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    log = out / f"{task}-{side}.log"
    if side == "edgeward":
        command = [EDGEWARD, "score", str(path), str(source), "--out", str(target / "scores"), "--json"]
        told = watched([*command, "--device", "cpu"], log)
        report = json.loads((target / "scores" / "_report.json").read_bytes())
        told.answer = {"scoring_s": report["cost"]["wall_s"], "limiting": report["cost"]["limiting_stage"]}
        return told
    arguments = [side, task, str(path), str(source), str(target / "peer"), str(cpu_count())]
    return watched([interpreter(side, out), PEER, *arguments], log)


def measure(task: str, count: int, sides: list[str], rounds: int, out: Path) -> dict[str, Any]:
    """The medians of one task; rows a second, except of `stages`."""
    path, source = bundle(task, out), rows(task, count, out)
    told: dict[str, list[Told]] = {side: [] for side in sides if (task, side) != ("vectors", "pipeline")}
    for _ in range(rounds):
        for side, runs in told.items():
            print(task, side, "...", file=sys.stderr, flush=True)
            runs.append(run(side, task, path, source, out))
    result: dict[str, Any] = {"rows": count, "cores": cpu_count()}
    if stages := told.pop("stages", None):
        names = stages[0].answer
        result["stages"] = {name: statistics.median(each.answer[name] for each in stages) for name in names}
        result["limit"] = cpu_count() / sum(result["stages"].values())
    for side, runs in told.items():
        result[side] = {
            "scoring": count / statistics.median(each.answer["scoring_s"] for each in runs),
            "command": count / statistics.median(each.command_s for each in runs),
            "peak_mib": statistics.median(each.peak_bytes for each in runs) / 2**20,
            "runs": [asdict(each) for each in runs],
        }
    return result


def show(task: str, result: dict[str, Any]) -> None:
    """A table of one task, with each side's share of the limit, and of ours."""
    print(f"\n{task}: {result['rows']} rows, {result['cores']} cores; rows a second")
    limit = result.get("limit")
    if limit:
        shares = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in result["stages"].items())
        print(f"  limit      {limit:>10.0f}   (CPU µs a row: {shares})")
    ours = result.get("edgeward", {}).get("scoring")
    for side in SIDES:
        if side in result:
            one = result[side]
            line = (
                f"  {side:<10} {one['scoring']:>10.0f}   command {one['command']:>8.0f}   {one['peak_mib']:>6.0f} MiB"
            )
            line += f"   {one['scoring'] / limit:.2f} of the limit" if limit else ""
            print(line + (f"   ours is × {ours / one['scoring']:.2f}" if ours and side != "edgeward" else ""))


def memory(count: int, out: Path) -> dict[str, float]:
    """Peak memory in MiB by rows."""
    path, found = bundle("vectors", out), {}
    for many in (count, 100 * count):
        told = run("edgeward", "vectors", path, rows("vectors", many, out), out)
        found[str(many)] = told.peak_bytes / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="bundles, inputs and environments are kept there")
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="TASK")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES], metavar="SIDE")
    parser.add_argument("--rows", type=int, help=f"of each task (default {ROWS})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=20_000, help="rows; 0 leaves it out (default 20000)")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for task in options.only:
        results[task] = measure(task, options.rows or ROWS[task], options.sides, options.rounds, out)
        show(task, results[task])
    if options.memory:
        results["memory"] = memory(options.memory, out)
        few, many = results["memory"].values()
        print(f"\nmemory: {few:.0f} MiB for {options.memory} rows, {many:.0f} MiB for 100 times as many")
    (out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

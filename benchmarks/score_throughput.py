"""Rows a second of `edgeward score`, its limit, and others: python -m benchmarks.score_throughput --out DIR [--keep]

For texts, images, feature vectors and word vectors (benchmarks/score_inputs.py), every side runs in a process of its
own, in turns, `--rounds` times; the medians are printed. The limit is the cores divided by the CPU seconds a row of
reading, preprocessing, session and writing, each measured alone in one thread (benchmarks/score_peer.py), in the same
turns: once while the other cores have nothing to do, and once while each does the same, as cores share caches, memory
and, where they are virtual, more.

`command` counts everything from the start of the process to its end, `scoring` what comes after the loading of
libraries and model, and of trials of settings: until the last part is on the disk. Memory is the peak of PSS over all
processes of a side. The sides that run the bundle must give the same labels and scores, bit for bit.

Then `--memory` rows of vectors, and a hundred times as many, are scored for their peak memory, with the same settings.

Sides that need a library that this environment lacks get one of their own below --out. The numbers go to
DIR/results.json, beside those of other tasks and sides that are there; --keep also writes benchmarks/results.
"""

import argparse
import hashlib
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

import pyarrow as pa
from pyarrow import dataset

from benchmarks.score_inputs import EDGEWARD, bundle, rows
from bundle.host import cpu_count, cpu_name

ROOT = Path(__file__).resolve().parents[1]
PEER = str(ROOT / "benchmarks" / "score_peer.py")
RESULTS = ROOT / "benchmarks" / "results"
ROWS = {"text": 8_000, "images": 2_000, "vectors": 5_000_000, "words": 1_000_000}
SIDES = ("edgeward", "session", "stages", "together", "pipeline", "datasets", "ray")
LIMITS = {"stages": "limit, one core at work", "together": "limit, all cores at work"}
SAME = ("datasets", "ray")  # run the same model as we do
PIPED = ("text", "images")  # what transformers has a pipeline for
LIMIT_S = 3600.0  # of one side
SAMPLED_S = 1.0  # between two looks at the memory, which take 6 ms of a core from those who are looked at
ALLOCATOR = {"MIMALLOC_PURGE_DELAY": "-1"}  # of Arrow, as the processes of `edgeward score` have it
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


def watched(command: list[str], log: Path, **more: str) -> Told:
    """Run a command that prints one JSON object, with more in its environment; look at its memory meanwhile."""
    environment = os.environ | SILENT | {"PYTHONPATH": str(ROOT)} | more
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
        peak[0] = max(peak[0], sum(map(pss, family(root))))


def family(root: int) -> set[int]:
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


def pss(process: int) -> int:
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


def run(side: str, task: str, path: Path, source: Path, out: Path, *options: str | int) -> Told:
    """One run of one side, written to a fresh place; with options of `edgeward score`."""
    target = out / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    log = out / f"{task}-{side}.log"
    if side == "edgeward":
        command = [EDGEWARD, "score", str(path), str(source), "--out", str(target / "scores"), "--json"]
        told = watched([*command, "--device", "cpu", *map(str, options)], log)
        report = json.loads((target / "scores" / "_report.json").read_bytes())
        cost = report["cost"]
        told.answer = {name: report[name] for name in ("settings", "trials")} | {"cost": cost}
        told.answer["scoring_s"] = max(process["wall_s"] for process in cost["processes"])
        told.answer["answers"] = answers(target / "scores")
        return told
    arguments = [side, task, str(path), str(source), str(target / "peer"), str(cpu_count())]
    told = watched([interpreter(side, out), PEER, *arguments], log, **(ALLOCATOR if side in LIMITS else {}))
    if side in SAME:
        told.answer["answers"] = answers(target / "peer")
    return told


def answers(written: Path) -> str:
    """The sha256 of the labels and scores of all rows, sorted, as Ray keeps no order."""
    table = dataset.dataset(written, format="parquet").to_table(["label", "score"])
    table = table.cast(pa.schema({"label": pa.string(), "score": pa.float32()}))
    table = table.sort_by([("label", "ascending"), ("score", "ascending")]).combine_chunks()
    labels = "\n".join(table["label"].to_pylist()).encode()
    return hashlib.sha256(labels + table["score"].to_numpy().tobytes()).hexdigest()


def measure(task: str, count: int, sides: list[str], rounds: int, out: Path) -> dict[str, Any]:
    """The medians of one task; rows a second, except of `stages`."""
    path, source = bundle(task, out), rows(task, count, out)
    told: dict[str, list[Told]] = {side: [] for side in sides if side != "pipeline" or task in PIPED}
    for _ in range(rounds):
        for side, runs in told.items():
            print(task, side, "...", file=sys.stderr, flush=True)
            runs.append(run(side, task, path, source, out))
    result: dict[str, Any] = {"rows": count, "cores": cpu_count()}
    for side in LIMITS:
        if stages := told.pop(side, None):
            names = stages[0].answer
            seconds = {name: statistics.median(each.answer[name] for each in stages) for name in names}
            result[side] = {"limit": cpu_count() / sum(seconds.values()), "cpu_s": seconds}
    for side, runs in told.items():
        result[side] = {
            "scoring": count / statistics.median(each.answer["scoring_s"] for each in runs),
            "command": count / statistics.median(each.command_s for each in runs),
            "peak_mib": statistics.median(each.peak_bytes for each in runs) / 2**20,
            "runs": [asdict(each) for each in runs],
        }
    return result


def check_same(task: str, result: dict[str, Any]) -> None:
    """The sides that run the bundle gave the same, in every round."""
    runs = [one for side in ("edgeward", *SAME) for one in result.get(side, {}).get("runs", [])]
    if len({one["answer"]["answers"] for one in runs}) > 1:
        raise SystemExit(f"{task}: the sides that run the bundle do not agree")


def table(results: dict[str, Any]) -> str:
    """Every task with its sides, in Markdown."""
    lines = [
        "| task | side | rows/s, scoring | of the limit | ours is × | rows/s, command | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, result in results["tasks"].items():
        limit, ours = result.get("stages", {}).get("limit"), result.get("edgeward", {}).get("scoring")
        for side, name in LIMITS.items():
            if one := result.get(side):
                shares = ", ".join(f"{name} {1e6 * value:.3g}" for name, value in one["cpu_s"].items())
                share = f"{one['limit'] / limit:.2f}" if limit else ""
                lines.append(f"| {task} | {name} (µs a row: {shares}) | {one['limit']:,.0f} | {share} | | | |")
        for side in (side for side in SIDES if side in result and side not in LIMITS):
            one = result[side]
            share = f"{one['scoring'] / limit:.3f}" if limit else ""
            times = f"{ours / one['scoring']:.2f}" if ours else ""
            rates = f"{one['scoring']:,.0f} | {share} | {times} | {one['command']:,.0f}"
            lines.append(f"| {task} | {side} | {rates} | {one['peak_mib']:.0f} |")
    return "\n".join(lines)


def told(results: dict[str, Any]) -> str:
    """What is kept, in Markdown."""
    command = "Rows a second of `edgeward score`: `python -m benchmarks.score_throughput --out DIR --keep`"
    text = f"{command}\n\n{results['cpu']}, {results['cores']} cores.\n\n{table(results)}\n"
    for count, peak in results.get("memory", {}).items():
        text += f"\nPeak memory, {int(count):,} rows of vectors: {peak:.0f} MiB.\n"
    return text


def memory(count: int, out: Path) -> dict[str, float]:
    """Peak memory in MiB by rows, as the report has it: the most that each process held, all together."""
    path, found = bundle("vectors", out), {}
    for many in (count, 100 * count):
        settings = ("--processes", cpu_count(), "--threads", 1, "--batch", 64, "--unit-rows", count // 5)
        told = run("edgeward", "vectors", path, rows("vectors", many, out), out, *settings)
        found[str(many)] = told.answer["cost"]["peak_rss"] / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="bundles, inputs and environments are kept there")
    parser.add_argument("--keep", action="store_true", help="write the results to benchmarks/results as well")
    parser.add_argument("--only", nargs="*", choices=[*ROWS], default=[*ROWS], metavar="TASK")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES], metavar="SIDE")
    parser.add_argument("--rows", type=int, help=f"of each task (default {ROWS})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=50_000, help="rows; 0 leaves it out (default 50000)")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"tasks": {}}
    results |= {"cpu": cpu_name(), "cores": cpu_count()}
    for task in options.only:
        found = measure(task, options.rows or ROWS[task], options.sides, options.rounds, out)
        before = results["tasks"].get(task, {})
        results["tasks"][task] = (before if before.get("rows") == found["rows"] else {}) | found
        check_same(task, results["tasks"][task])
    if options.memory:
        results["memory"] = memory(options.memory, out)
    written = json.dumps(results, indent=1)
    path.write_text(written)
    print(told(results))
    if options.keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "score_throughput.md").write_text(told(results))
        (RESULTS / "score_throughput.json").write_text(written + "\n")


if __name__ == "__main__":
    main()

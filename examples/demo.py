"""From data to a served answer, with the commands that anybody would type: python examples/demo.py tweets|digits

Everything is written below --out, which must not exist. The last lines are the result.
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from examples.steps import EDGEWARD, HERE, begin, minilm, run, served


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["tweets", "digits"])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--rows", type=int, default=10_000, help="tweets to use")
    options = parser.parse_args()
    out = begin(options.out / options.task)
    arguments, inputs = prepare(options.task, out, options.rows)
    started = time.monotonic()
    run(EDGEWARD, "finetune", *arguments, "--out", out / "checkpoint")
    trained = time.monotonic()
    bundle = out / "bundle"
    run(EDGEWARD, "export", out / "checkpoint", "--out", bundle, "--name", options.task)
    exported = time.monotonic()
    run(sys.executable, HERE / "yardstick.py", out / "checkpoint")
    with served(bundle) as address:
        run(EDGEWARD, "infer", address, options.task, *inputs)
        answer = run(EDGEWARD, "infer", address, options.task, *inputs, "--json")
    report = json.loads((bundle / "report.json").read_bytes())
    summarise(report, answer, trained - started, exported - trained)


def summarise(report: dict[str, Any], answer: str, train_s: float, export_s: float) -> None:
    torch, answered, compared = report["pytorch"], report["served"], report["comparison"][0]
    shipped = next(one for one in report["candidates"] if one["name"] == report["shipped"])
    print(f"fine-tuned in {train_s:.0f} s, exported in {export_s:.0f} s; {compared['examples']} examples held out")
    print(f"PyTorch   accuracy {torch['accuracy']:.4f}  macro F1 {torch['macro_f1']:.4f}")
    print(f"served    accuracy {answered['accuracy']:.4f}  macro F1 {answered['macro_f1']:.4f}  ({report['shipped']})")
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

"""How far int8 moves the features before anything is trained, as the pre-flight sees it: python benchmarks/drift.py

MiniLM on tweets, a ResNet18 that was first trained on the digits 0 to 4 at 32 × 32 pixels on all ten, and
EfficientNet-Lite0 on digits. The relative error is what export/preflight.py compares with its DRIFT.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

ROWS = 400  # of which 70% are in the train split, and 200 of these are tried


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of a training each, by name; their data is written below the folder."""
    from benchmarks.refit import job
    from benchmarks.strategies import digits_job

    found: dict[str, dict[str, Any]] = {}
    for name, task in (("MiniLM, tweets", "tweets"), ("EfficientNet-Lite0, digits", "digits")):
        place = folder / task
        place.mkdir()
        model, data = job(task, place, ROWS)
        found[name] = {"model": model, "data": str(data)}
    (folder / "resnet").mkdir()
    return found | {"ResNet18, digits": digits_job(folder / "resnet", ROWS)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    from export.preflight import EXAMPLES, preflight
    from finetune.loader import EncodedRows
    from finetune.train import TrainConfig, prepare

    with tempfile.TemporaryDirectory() as folder:
        lines = ["| model, data | int8 | relative error | cosine |", "|---|---|---|---|"]
        for name, options in jobs(Path(folder)).items():
            job = prepare(TrainConfig(**options, out=Path(folder) / name))
            rows = EncodedRows(job.dataset, job.indices("train")[:EXAMPLES], job.encode)
            drift = preflight(job.network, job.pretrained.input, job.tasks, rows).drift
            assert drift is not None
            lines.append(f"| {name} | {drift.variant} | {drift.relative_error:.3f} | {drift.cosine:.4f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

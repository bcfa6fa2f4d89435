"""What the fusions of export/fusion.py save: python benchmarks/fusion.py

MiniLM (6 × 384) with a head on tweets, one text at a time: the latency of the fused graph by that of the exporter's
own, in turns A B B A, with the upper end of its 95% bootstrap interval; in fp32, dynamic and static int8, at 20 and 128
tokens, with one thread and with all.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROWS = 200
TOKENS = (20, 128)


def graphs(folder: Path) -> tuple[bytes, bytes, Any, list[Any]]:
    """The graph after and before the fusions, its input, and preprocessed texts."""
    from benchmarks.refit import job
    from export import graph
    from finetune.loader import EncodedRows
    from finetune.train import TrainConfig, prepare

    model, data = job("tweets", folder, ROWS)
    made = prepare(TrainConfig(model=model, data=str(data), out=folder / "checkpoint"))
    rows = list(EncodedRows(made.dataset, made.indices("train"), made.encode))
    network, spec, tasks = made.network.eval(), made.pretrained.input, made.tasks
    after = graph.to_onnx(network, spec, tasks, rows)
    with mock.patch.object(graph, "fused", lambda exported: (exported, {})):
        return after, graph.to_onnx(network, spec, tasks, rows), spec, rows


def of_length(rows: list[Any], tokens: int) -> list[Any]:
    """Texts of so many tokens, made of the words of all."""
    import numpy as np

    inner = np.concatenate([row[1:-1] for row in rows])
    ends = rows[0][:1], rows[0][-1:]
    return [
        np.concatenate([ends[0], inner[start : start + tokens - 2], ends[1]]) for start in range(0, 16 * tokens, tokens)
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    from bundle import preprocess
    from bundle.host import cpu_count
    from bundle.session import Session
    from export import quantize, timing

    with tempfile.TemporaryDirectory() as folder:
        after, before, spec, rows = graphs(Path(folder))
    kinds = {
        "fp32": lambda exported: exported,
        "dynamic int8": quantize.int8_dynamic,
        "static int8": lambda exported: quantize.int8_minmax(exported, spec, rows[:64]),
    }
    compiled = {kind: (make(after), make(before)) for kind, make in kinds.items()}
    print(f"| threads | tokens | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for threads in sorted({1, cpu_count()}):
        for tokens in TOKENS:
            feeds = [preprocess.collate([row], spec) for row in of_length(rows, tokens)]
            cells = []
            for pair in compiled.values():
                sessions = [Session(each, device="cpu", threads=threads) for each in pair]
                found = timing.interleaved(sessions[0], sessions[1], feeds)
                cells.append(f"{found.ratio:.2f} (≤ {found.ratio_upper:.2f})")
            print(f"| {threads} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

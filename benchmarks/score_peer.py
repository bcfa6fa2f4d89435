"""One side of benchmarks/score_throughput.py: python score_peer.py SIDE TASK BUNDLE INPUT OUT WORKERS

session    The bundle's bare session on tensors that are there already: the longest first, nothing read or written.
stages     CPU seconds a row of reading, preprocessing, session and writing, each alone, in one thread.
pipeline   transformers' pipeline with a network of the same architecture, in torch.
datasets   datasets.map, with the bundle.
ray        Ray Data's own reading, map_batches and writing, with the bundle.

What it found goes to stdout as one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

BATCH = 64  # of every side, as ours takes at most


def inputs(source: Path) -> list[Path] | pa.Table:
    """Paths of images, or a table."""
    return sorted(source.iterdir()) if source.is_dir() else parquet.read_table(source)


def raws(source: Path) -> list[bytes]:
    """Every raw example."""
    found = inputs(source)
    if isinstance(found, list):
        return [path.read_bytes() for path in found]
    return encoded(found.column(0).to_pylist())


def encoded(values: list[Any]) -> list[bytes]:
    """Texts or vectors as a bundle takes them."""
    return [value.encode() if isinstance(value, str) else np.asarray(value, "<f4").tobytes() for value in values]


@cache
def model(bundle: str) -> Any:
    from bundle.model import load_model

    return load_model(Path(bundle), device="cpu", threads=1)


def ordered(bundle: str, source: Path) -> list[np.ndarray]:
    """Tensors, the longest first."""
    from bundle import preprocess

    loaded = model(bundle)
    rows = [loaded.encode(raw) for raw in raws(source)]
    return sorted(rows, key=lambda row: -preprocess.length(row, loaded.manifest.input))


def share(bundle: str, source: Path, number: int, workers: int, ready: Any) -> float:
    """Seconds that one process needs for every `workers`-th batch."""
    rows = ordered(bundle, source)
    mine = [rows[start : start + BATCH] for start in range(BATCH * number, len(rows), BATCH * workers)]
    loaded = model(bundle)
    loaded.logits(rows[:BATCH])
    ready.wait()
    began = time.perf_counter()
    for batch in mine:
        loaded.logits(batch)
    return time.perf_counter() - began


def session(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    context = get_context("spawn")
    with context.Manager() as manager, context.Pool(workers) as pool:
        ready = manager.Barrier(workers)
        shares = [(bundle, source, number, workers, ready) for number in range(workers)]
        return {"scoring_s": max(pool.starmap(share, shares))}


def stages(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """By the parts of our pipeline, one after the other, on the rows of the first units."""
    from score.config import ScoreConfig
    from score.folder import Folder
    from score.parts import PartWriter
    from score.plan import prepare
    from score.readers import Reader, Wanted
    from score.scorer import Scorer
    from score.units import Counts, Footer

    config = ScoreConfig(Path(bundle), (str(source),), str(out), threads=1, device="cpu")
    config, plan = prepare(config)
    scorer = Scorer(config.bundle, device="cpu", threads=1)
    reader = Reader(Wanted(scorer.model.manifest.input, {}, {}), plan.files, 1024)
    units = plan.units[: max(1, 16384 // plan.units[0].rows)]
    count = sum(unit.rows for unit in units)
    chunks, read_s = timed(lambda: [chunk for unit in units for chunk in reader.read(unit)])
    rows, preprocess_s = timed(lambda: [scorer.encode(chunk.raws) for chunk in chunks])
    tensors = [row for each in rows for row in each]
    batches = [tensors[start : start + BATCH] for start in range(0, len(tensors), BATCH)]
    scorer.model.logits(batches[0])
    _, session_s = timed(lambda: [scorer.model.logits(batch) for batch in by_length(scorer, tensors)])
    tables = [scorer.answer(each).table for each in rows]
    footer = Footer(
        fingerprint=plan.fingerprint,
        bundle=plan.bundle,
        variant=scorer.model.variant.name,
        input=plan.files[0],
        unit=units[0].name,
        first_row=0,
        counts=Counts(),
    )
    with PartWriter(Folder(str(out)), units[0], tables[0].schema, "parquet") as part:
        _, write_s = timed(lambda: [*map(part.write, tables), part.finish(footer)])
    seconds = {"read": read_s, "preprocess": preprocess_s, "session": session_s, "write": write_s}
    return {name: value / count for name, value in seconds.items()}


def by_length(scorer: Any, tensors: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    from bundle import preprocess

    rows = sorted(tensors, key=lambda row: -preprocess.length(row, scorer.model.manifest.input))
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the CPU seconds of all threads."""
    began = time.process_time()
    return do(), time.process_time() - began


def pipeline(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    import torch
    import transformers

    torch.set_num_threads(workers)
    found = inputs(source)
    if task == "text":
        from examples.steps import minilm

        kind, folder = "text-classification", str(minilm())
        network = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=3, dtype=torch.float32
        )
        make = {"tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}
        data: list[str] = found.column(0).to_pylist()
        more = {"truncation": True, "max_length": 128}
    else:
        kind = "image-classification"
        shape = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        network = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10, **shape))
        make = {"image_processor": transformers.ConvNextImageProcessor(size={"shortest_edge": 112}, crop_pct=0.875)}
        data, more = [str(path) for path in found], {}
    pipe = transformers.pipeline(kind, model=network.eval(), device="cpu", **make)
    began = time.perf_counter()
    answers = list(pipe(iter(data), batch_size=BATCH, **more))
    first = [each[0] if isinstance(each, list) else each for each in answers]
    parquet.write_table(pa.Table.from_pylist(first), out)
    return {"scoring_s": time.perf_counter() - began}


def answer(bundle: str, raw: list[bytes]) -> dict[str, list[Any]]:
    """The best label and its score, as most people would write it."""
    loaded = model(bundle)
    answers = loaded.predict(raw)
    return {"label": [row[0].decode() for row in answers["label"]], "score": answers["score"].max(axis=1).tolist()}


def mapped(bundle: str, batch: dict[str, Any]) -> dict[str, list[Any]]:
    if "path" in batch:
        return answer(bundle, [Path(path).read_bytes() for path in batch["path"]])
    if "bytes" in batch:
        return answer(bundle, list(batch["bytes"]))
    return answer(bundle, encoded(list(next(iter(batch.values())))))


def datasets(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    import datasets as hf

    hf.disable_progress_bars()
    began = time.perf_counter()
    if source.is_dir():
        rows = hf.Dataset.from_dict({"path": [str(path) for path in inputs(source)]})
    else:
        rows = hf.load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(out.parent / "hf"))
    done = rows.map(partial(mapped, bundle), batched=True, batch_size=BATCH, num_proc=workers)
    done.select_columns(["label", "score"]).to_parquet(str(out))
    return {"scoring_s": time.perf_counter() - began}


class OnRay:
    """What Ray's guide to batch inference has: the model in an actor."""

    def __init__(self, bundle: str) -> None:
        self.bundle = bundle

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return mapped(self.bundle, batch)


def ray(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    from score.ray_engine import connected

    with connected(None, cpus=workers) as module:
        module.data.DataContext.get_current().enable_progress_bars = False
        began = time.perf_counter()
        read = module.data.read_binary_files if source.is_dir() else module.data.read_parquet
        size = module.data.ActorPoolStrategy(size=workers)
        read(str(source)).map_batches(
            OnRay, fn_constructor_args=(bundle,), batch_size=BATCH, compute=size, num_cpus=0.5
        ).write_parquet(str(out))
        return {"scoring_s": time.perf_counter() - began}


def main() -> None:
    side, task, bundle, source, out, workers = sys.argv[1:]
    sides = {each.__name__: each for each in (session, stages, pipeline, datasets, ray)}
    print(json.dumps(sides[side](task, bundle, Path(source), Path(out), int(workers))))


if __name__ == "__main__":
    from benchmarks import score_peer  # what goes to other processes is found there by its name

    score_peer.main()

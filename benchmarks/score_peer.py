"""One side of benchmarks/score_throughput.py: python score_peer.py SIDE TASK BUNDLE INPUT OUT WORKERS

session    The bundle's bare session on tensors that are there already: the longest first, nothing read or written.
stages     CPU seconds a row of reading, preprocessing, session and writing, each alone, in one thread; writing is what
           makes logits a part on the disk, with every column that a part has.
together   The same while every core does the same.
pipeline   transformers' pipeline with a network of the same architecture, in torch.
datasets   datasets.map, with the bundle.
ray        Ray Data's own reading, map_batches and writing, with the bundle.

What it found goes to stdout as one JSON object. Of datasets and ray, too, the seconds of scoring begin when every
process has its model.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

BATCH = 64  # of every side, as ours takes at most
FIRST = 200_000  # rows that the bare session is given at most, as they lie in memory
STAGED = 8192  # rows that are read, and written, together


def inputs(source: Path) -> list[Path] | pa.Table:
    """Paths of images, or a table."""
    return sorted(source.iterdir()) if source.is_dir() else parquet.read_table(source)


def raws(source: Path) -> tuple[list[bytes], float]:
    """The first raw examples, and which part of all they are."""
    found = inputs(source)
    some = found[:FIRST]
    part = len(some) / len(found)
    if isinstance(some, list):
        return [path.read_bytes() for path in some], part
    return encoded(some.column(0).to_pylist()), part


def encoded(values: list[Any]) -> list[bytes]:
    """Texts or vectors as a bundle takes them."""
    return [value.encode() if isinstance(value, str) else np.asarray(value, "<f4").tobytes() for value in values]


@cache
def model(bundle: str, ready: Path | None = None) -> Any:
    """The model; when it is there, a file in the folder `ready` says so."""
    from bundle.model import load_model

    loaded = load_model(Path(bundle), device="cpu", threads=1)
    if ready:
        (ready / f"{os.getpid()}").touch()
    return loaded


def since(ready: Path) -> float:
    """Seconds since the last process had its model."""
    return time.time() - max(each.stat().st_mtime for each in ready.iterdir())


def ordered(bundle: str, source: Path) -> tuple[list[np.ndarray], float]:
    """Tensors, the longest first, and which part of all they are."""
    from bundle import preprocess

    loaded = model(bundle)
    some, part = raws(source)
    rows = [loaded.encode(raw) for raw in some]
    return sorted(rows, key=lambda row: -preprocess.length(row, loaded.manifest.input)), part


def share(bundle: str, source: Path, number: int, workers: int, ready: Any) -> float:
    """Seconds that one process would need for every `workers`-th batch of all rows."""
    from bundle.model import predict_logits
    from bundle.preprocess import is_sequence

    rows, part = ordered(bundle, source)
    mine = [rows[start : start + BATCH] for start in range(BATCH * number, len(rows), BATCH * workers)]
    loaded = model(bundle)
    if not is_sequence(loaded.manifest.input):
        mine = list(map(np.stack, mine))
    spec, invariant = loaded.manifest.input, loaded.variant.batch_invariant
    predict_logits(loaded.session, spec, rows[:BATCH], batch_invariant=invariant)
    ready.wait()
    began = time.perf_counter()
    for batch in mine:
        predict_logits(loaded.session, spec, batch, batch_invariant=invariant)
    return (time.perf_counter() - began) / part


def session(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    context = get_context("spawn")
    with context.Manager() as manager, context.Pool(workers) as pool:
        ready = manager.Barrier(workers)
        shares = [(bundle, source, number, workers, ready) for number in range(workers)]
        return {"scoring_s": max(pool.starmap(share, shares))}


def stages(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    return staged(bundle, source, out, lambda: None)


def together(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    context = get_context("spawn")
    with context.Manager() as manager, context.Pool(workers) as pool:
        wait = manager.Barrier(workers).wait
        found = pool.starmap(staged, [(bundle, source, Path(f"{out}-{number}"), wait) for number in range(workers)])
    return {name: sum(each[name] for each in found) / workers for name in found[0]}


def staged(bundle: str, source: Path, out: Path, ready: Callable[[], Any]) -> dict[str, float]:
    """By the parts of our pipeline, one after the other, on the rows of the first two units.

    Before each of them it is called whether everybody else is `ready`.
    """
    from bundle.model import predict_logits
    from bundle.preprocess import is_sequence, length
    from score.answers import STATUS, Columns, of_logits
    from score.config import ScoreConfig
    from score.folder import Folder
    from score.parts import PLACE, PartWriter
    from score.plan import prepare
    from score.readers import Reader, Wanted
    from score.scorer import Scorer
    from score.units import Counts, Footer

    config = ScoreConfig(Path(bundle), (str(source),), out=str(out), threads=1, device="cpu")
    config, plan = prepare(config)
    scorer = Scorer(config.bundle, device="cpu", threads=1)
    spec, tasks = scorer.model.manifest.input, scorer.model.manifest.tasks
    reader = Reader(Wanted(spec, {}, {}), plan.files, STAGED)
    units = plan.units[:2]
    count = sum(unit.rows for unit in units)
    sum(1 for unit in units for _ in reader.read(unit))  # takes the memory that the run, too, takes but once
    ready()
    _, read_s = timed(lambda: [len(chunk.raws) for unit in units for chunk in reader.read(unit)])
    chunks = [chunk for unit in units for chunk in reader.read(unit)]
    ready()
    rows, preprocess_s = timed(lambda: [scorer.encode(chunk.raws).rows for chunk in chunks])
    rows = [sorted(each, key=lambda row: -length(row, spec)) if is_sequence(spec) else each for each in rows]
    batches = [each[start : start + BATCH] for each in rows for start in range(0, len(each), BATCH)]
    run = partial(predict_logits, scorer.model.session, spec, batch_invariant=scorer.model.variant.batch_invariant)
    run(batches[0])
    ready()
    found, session_s = timed(lambda: list(map(run, batches)))
    logits = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    footer = Footer(
        fingerprint=plan.fingerprint,
        bundle=plan.bundle,
        variant=scorer.model.variant.name,
        input=plan.files[0],
        unit=units[0].name,
        first_row=0,
        counts=Counts(),
    )
    columns = Columns(tasks)
    schema = pa.schema([*PLACE, *columns.fields, *STATUS])

    def write() -> None:
        with PartWriter(Folder(str(out)), units[0], schema, "parquet") as part:
            for start in range(0, count, STAGED):
                some = {name: each[start : start + STAGED] for name, each in logits.items()}
                size = len(next(iter(some.values())))
                place = [pa.repeat(str(source), size), pa.array(np.arange(start, start + size))]
                arrays = columns.arrays(of_logits(tasks, some), np.ones(size, bool))
                status = [pa.array(np.zeros(size, np.int8)), pa.nulls(size, pa.string())]
                part.write(pa.Table.from_arrays([*place, *arrays, *status], schema=schema))
            part.finish(footer)

    ready()
    _, write_s = timed(write)
    seconds = {"read": read_s, "preprocess": preprocess_s, "session": session_s, "write": write_s}
    return {name: value / count for name, value in seconds.items()}


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
    answers = list(pipe((each for each in data), batch_size=BATCH, **more))  # a generator is what it batches
    first = [each[0] if isinstance(each, list) else each for each in answers]
    parquet.write_table(pa.Table.from_pylist(first), out)
    return {"scoring_s": time.perf_counter() - began}


def answer(bundle: str, ready: Path, raw: list[bytes]) -> dict[str, list[Any]]:
    """The best label and its score, as most people would write it."""
    loaded = model(bundle, ready)
    answers = loaded.predict(raw)
    return {"label": [row[0].decode() for row in answers["label"]], "score": answers["score"].max(axis=1).tolist()}


def mapped(bundle: str, ready: Path, batch: dict[str, Any]) -> dict[str, list[Any]]:
    if "path" in batch:
        return answer(bundle, ready, [Path(path).read_bytes() for path in batch["path"]])
    if "bytes" in batch:
        return answer(bundle, ready, list(batch["bytes"]))
    return answer(bundle, ready, encoded(list(next(iter(batch.values())))))


def made(out: Path) -> Path:
    ready = out.with_name("ready")
    ready.mkdir()
    return ready


def datasets(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    import datasets as hf

    hf.disable_progress_bars()
    ready = made(out)
    if source.is_dir():
        rows = hf.Dataset.from_dict({"path": [str(path) for path in inputs(source)]})
    else:
        rows = hf.load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(out.parent / "hf"))
    done = rows.map(partial(mapped, bundle, ready), batched=True, batch_size=BATCH, num_proc=workers)
    done.select_columns(["label", "score"]).to_parquet(str(out))
    return {"scoring_s": since(ready)}


class OnRay:
    """What Ray's guide to batch inference has: the model in an actor."""

    def __init__(self, bundle: str, ready: Path) -> None:
        self.bundle, self.ready = bundle, ready
        model(bundle, ready)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return mapped(self.bundle, self.ready, batch)


def ray(task: str, bundle: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    from score.ray_engine import connected

    with connected(None, cpus=workers) as module:
        module.data.DataContext.get_current().enable_progress_bars = False
        ready = made(out)
        read = module.data.read_binary_files if source.is_dir() else module.data.read_parquet
        size = module.data.ActorPoolStrategy(size=workers)
        read(str(source)).map_batches(
            OnRay, fn_constructor_args=(bundle, ready), batch_size=BATCH, compute=size, num_cpus=0.5
        ).write_parquet(str(out))
        return {"scoring_s": since(ready)}


def main() -> None:
    side, task, bundle, source, out, workers = sys.argv[1:]
    sides = {each.__name__: each for each in (session, stages, together, pipeline, datasets, ray)}
    print(json.dumps(sides[side](task, bundle, Path(source), Path(out), int(workers))))


if __name__ == "__main__":
    from benchmarks import score_peer  # what goes to other processes is found there by its name

    score_peer.main()

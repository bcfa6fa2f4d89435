"""What `edgeward score` can be told."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from bundle.session import Device

Format = Literal["parquet", "csv", "jsonl"]


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `edgeward score`."""

    bundle: Path
    """Directory of the bundle."""
    inputs: tuple[str, ...]
    """Parquet, CSV, JSONL and .npz files, images, lists of images (.txt, a path a line), folders of them, and globs;
    on this machine, or s3://, gs:// and what else fsspec knows."""
    _: KW_ONLY
    out: str
    """Folder that the parts are written to. A run that was stopped goes on from what is there."""
    format: Format = "parquet"
    """Of the parts."""
    column: tuple[str, ...] = ()
    """Where the files call a column of the bundle otherwise: NAME=COLUMN, such as text=review."""
    keep: tuple[str, ...] = ()
    """Columns of the input that are copied to the output."""
    top_k: int = 0
    """Give this many of the highest labels of each classification task, with their scores."""
    scores: bool = False
    """Give the scores of all labels."""
    logits: bool = False
    """Give the logits of classification tasks."""
    unit_rows: int | None = None
    """Rows that are scored and written as one part; by default about three seconds' worth, from 256 to 65536."""
    max_error_rate: float = 1.0
    """Stop with an error as soon as more than this fraction of all rows could not be scored."""
    device: Device = "auto"
    """auto takes CUDA where it works, else the CPU, and logs which."""
    processes: int | None = None
    """That score units side by side. This and the three options that follow are tried out unless given, once a run."""
    threads: int | None = None
    """Of one session run on the CPU."""
    batch: int | None = None
    """Rows of one session run, at most 64; 1 where answers would depend on it."""
    decoders: int | None = None
    """Threads of each process that decode, resize and tokenise."""
    shard: str | None = None
    """K/N: of the units score those whose number in the plan leaves K when divided by N, with K from 0 to N - 1: for
    indexed jobs, all with the same --out. The one that finds every part written writes _SUCCESS."""
    engine: Literal["local", "ray"] = "local"
    """ray: units are scored wherever the Ray cluster has room."""
    ray_address: str | None = None
    """Of a running Ray cluster; by default one is started on this machine."""

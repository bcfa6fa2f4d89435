"""How a command gives its result: one JSON object, or something for people."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from rich.console import RenderableType


def give(value: Any, rendered: "RenderableType", *, json: bool) -> None:
    """Write a result to stdout.

    Args:
        value: dataclass, record or dict; written when `json` is set.
        rendered: written otherwise.
        json: one object on one line.
    """
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(value, enc_hook=_plain) + b"\n")
        sys.stdout.buffer.flush()
        return
    from rich.console import Console  # which a server does not need

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    console.print(rendered)


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value)
        case np.ndarray() if value.dtype == object:  # bytes, which msgspec would give in base64
            return np.vectorize(lambda item: item.decode(errors="replace"), otypes=[object])(value).tolist()
        case np.ndarray():
            return value.tolist()
        case np.generic():
            return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")

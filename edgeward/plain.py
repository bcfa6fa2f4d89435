"""`edgeward serve` with options that need no explanation, read without cyclopts.

A server keeps what it imports for as long as it runs, and of cyclopts, 3 MB, it has no need. Help, errors and whatever
else is not plain are cyclopts' own.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import msgspec

from serve import logs
from serve.config import ServeConfig
from serve.server import serve as run_server

_OPTIONS = {"--" + field.name.replace("_", "-"): field for field in fields(ServeConfig) if field.name != "paths"}


def serve(config: ServeConfig) -> None:
    """Answer gRPC calls until SIGTERM or Ctrl-C, then drain."""
    logs.configure(requests=config.log_requests)
    run_server(config)


def read(arguments: Sequence[str]) -> ServeConfig | None:
    """What the arguments of `edgeward serve` mean, as cyclopts reads them; None: ask cyclopts."""
    given: dict[str, Any] = {"paths": []}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        option = _OPTIONS.get(name)
        if not word.startswith("-"):
            given["paths"].append(word)
            continue
        if option is None or option.name in given:
            return None
        if not equals:
            value = "true" if option.type is bool else next(words, "-")
        if value.startswith("-") or (option.type in (int, int | None) and not value.isdecimal()):
            return None
        given[option.name] = value
    try:
        config = msgspec.convert(given, ServeConfig, strict=False, dec_hook=lambda kind, text: kind(text))
    except msgspec.ValidationError:
        return None
    return config if config.paths else None

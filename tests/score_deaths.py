"""A run that dies at a chosen moment of a chosen file, for tests that spawn it."""

import os
from pathlib import Path

from score import folder
from score.config import ScoreConfig
from score.parts import PartWriter
from score.run import score

CODE = 77  # that the process ends with
MOMENTS = ("half-written", "flushed", "named")


def run_and_die(config: ScoreConfig, name: str, moment: str) -> None:
    """Score until the file `name` is at that moment, and end this process there, as SIGKILL would."""
    match moment:
        case "half-written":
            _die_half_way(name)
        case "flushed":
            _die_after(folder, "_flush", lambda path: path.name.startswith(f".{name}.tmp-"))
        case _:
            for owner, function in ((Path, "rename"), (os, "link")):
                _die_after(owner, function, lambda draft, named: Path(named).name == name)
    score(config)


def _die_after(owner, function, now):
    """Let a function do its work, and end the process when it was called for what is waited for."""
    call = getattr(owner, function)

    def called(*arguments):
        result = call(*arguments)
        if now(*arguments):
            os._exit(CODE)
        return result

    setattr(owner, function, called)


def _die_half_way(name):
    write, finish = Path.write_bytes, PartWriter.finish

    def write_half(path, data):
        if not path.name.startswith(f".{name}.tmp-"):
            return write(path, data)
        write(path, data[: len(data) // 2])
        os._exit(CODE)

    def finish_not(part, footer):
        if part._name != name:
            return finish(part, footer)
        part._file.flush()  # rows, but no footer
        os._exit(CODE)

    Path.write_bytes, PartWriter.finish = write_half, finish_not

"""A server in a process of its own, and what its log says."""

import json
import subprocess
import sys
from contextlib import contextmanager

_PROGRAM = """
import json, sys
from pathlib import Path
{before}
from bundle.log import configure
configure(json=True)
from serve.config import ServeConfig
from serve.server import serve
serve(ServeConfig((Path(sys.argv[1]),), device="cpu", threads=1, **json.loads(sys.argv[2])))
"""


@contextmanager
def run_server(path, before="pass", **options):
    """Start one, whose process does not outlast the block; `before` is code that it runs first."""
    command = [sys.executable, "-c", _PROGRAM.format(before=before), str(path), json.dumps({"port": 0, **options})]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, word):
    """The first line of the log that has the word."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return line
    raise AssertionError(f"the server ended without {word!r}: {''.join(lines)}")


def address_in(line):
    """Of a line that has one."""
    return line.split('"address": "')[1].split('"')[0]

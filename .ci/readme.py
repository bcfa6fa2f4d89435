"""Run the commands of README.md as they stand there, one shell for all, and stop at the first that fails.

`make demo` and `make test` are left out: CI runs them by themselves. Servers that the commands start are stopped.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
lines = [line for block in blocks for line in block.splitlines() if not line.startswith(("make ", "git ", "cd "))]
script = "set -euxo pipefail\n" + "\n".join(lines)
shell = subprocess.Popen(["bash", "-c", script], cwd=ROOT, start_new_session=True)
try:
    code = shell.wait(1200)
finally:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGTERM)
sys.exit(code)

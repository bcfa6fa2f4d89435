"""Constraints that pin what an edge box installs to the lowest versions that pyproject.toml allows."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]:
    found = re.match(r"([\w-]+)>=([\w.]+)", requirement)
    if found is None:
        raise SystemExit(f"{requirement} has no floor")
    sys.stdout.write(f"{found[1]}=={found[2]}\n")

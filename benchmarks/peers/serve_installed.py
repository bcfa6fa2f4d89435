"""What pip installs for each server."""

import hashlib
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOLD = {
    "bentoml",
    "edgeward",
    "grpcio",
    "litserve",
    "mlserver",
    "numpy",
    "nvidia-pytriton",
    "onnxruntime",
    "protobuf",
    "ray",
}
NOT_COUNTED = {"pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils", "__pycache__"}


def requirements(name: str) -> str:
    """Of a peer, what stands beside its script; of ours, the package as an edge box with a CPU has it."""
    if name != "edgeward":
        return (HERE / f"serve_{name}.txt").read_text()
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"# pyproject.toml {digest}\n-c {ROOT / 'constraints.txt'}\nedgeward[cpu] @ {ROOT.as_uri()}\n"


def size_mb(python: str) -> float:
    """Of the files of an environment's packages, without .pyc, pip and setuptools."""
    tops = [top for top in site(python).iterdir() if top.name.split("-")[0] not in NOT_COUNTED]
    files = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return sum(path.stat().st_size for path in files) / 1e6


def versions(python: str) -> dict[str, str]:
    """Of the packages that matter."""
    found = {each.metadata["Name"].lower(): each.version for each in distributions(path=[str(site(python))])}
    return {name: found[name] for name in sorted(TOLD & set(found))}


def site(python: str) -> Path:
    """Where an environment's packages are."""
    return next(Path(python).parent.parent.glob("lib/python*/site-packages"))

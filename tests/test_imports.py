import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "protos": set(),
    "bundle": set(),
    "finetune": {"bundle"},
    "export": {"bundle", "finetune"},
    "score": {"bundle"},
    "serve": {"bundle", "protos"},
    "edgeward": {"bundle", "export", "finetune", "protos", "score", "serve"},
}
HEAVY = {
    "datasets",
    "gensim",
    "onnx",
    "onnxscript",
    "peft",
    "ray",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree):
    """The full names of everything that is imported below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def imported_when_loaded(tree):
    """What importing a module imports: everything that is outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_when_loaded(node)


def tops(names):
    return {name.split(".")[0] for name in names}


def test_every_package_has_a_rule():
    """A new package is added to the rule before it is added to the wheel."""
    packages = {path.parent.name for path in ROOT.glob("*/py.typed")}

    assert packages == MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(package):
    """Data goes from finetune to serve, imports go only the other way."""
    for path in modules(package):
        ours = tops(imported(ast.parse(path.read_text()))) & MAY_IMPORT.keys()
        assert ours <= MAY_IMPORT[package] | {package}, path


@pytest.mark.parametrize("package", ["bundle", "protos", "score", "serve"])
def test_what_runs_on_the_edge_never_imports_what_trains(package):
    """Neither torch nor any other heavy library, not even inside a function; Ray where it is asked for."""
    for path in modules(package):
        allowed = {"ray"} if path.name == "ray_engine.py" else set()
        assert tops(imported(ast.parse(path.read_text()))) & HEAVY <= allowed, path


def test_the_command_loads_lazily():
    """Only edgeward.stages needs what trains, and only the command that is called is imported."""
    for path in modules("edgeward"):
        names = set(imported_when_loaded(ast.parse(path.read_text())))
        assert "edgeward.stages" not in names, path
        assert path.name == "stages.py" or tops(names) & (HEAVY | {"export", "finetune"}) == set(), path


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_are_absolute(package):
    """A module is called by one name everywhere."""
    for path in modules(package):
        relative = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert relative == [], path


def test_telemetry_is_off_before_the_runtime_is_imported():
    """Importing onnxruntime starts its telemetry, so whoever imports it imports bundle.session before.

    Import order within a module is the formatter's, so the package's __init__.py has to do it.
    """
    for package in MAY_IMPORT:
        for path in modules(package):
            users = tops(imported(ast.parse(path.read_text()))) & {"onnxruntime"}
            if users and path != ROOT / "bundle/runtime.py":
                opening = imported_when_loaded(ast.parse((ROOT / package / "__init__.py").read_text()))
                assert next(opening, None) == "bundle.session", path


@pytest.mark.parametrize(
    "modules",
    [
        "bundle.model",
        "serve.server",
        "score.run",
        "edgeward.__main__, edgeward.commands, edgeward.plain, edgeward.scoring, edgeward.serving, edgeward.bundles",
    ],
)
def test_serving_needs_no_training_library(modules):
    """With torch, transformers and onnx made unimportable, everything that an edge box runs imports."""
    program = (
        f"import sys\nfor name in {sorted(HEAVY)}: sys.modules[name] = None\n"
        f"import {modules}\n"
        "assert not any(name.split('.')[0] in ('export', 'finetune') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr

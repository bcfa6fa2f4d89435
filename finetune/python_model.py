"""`python:PATH.py:function` and `python:pkg.mod:function`: image classifiers that a Python function makes.

The function takes nothing and returns `(torch.nn.Module, bundle.manifest.ImageInput)`; the module takes float32 pixels
(N, 3, height, width), scaled by the input's mean and std, and ends in an nn.Linear.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

from torch import nn

from bundle.errors import ModelError
from bundle.manifest import ImageInput
from finetune.classifier import cut_head
from finetune.model import PythonModel
from finetune.pretrained import Pretrained

FACTORY = "factory.py"


def open_model(name: str) -> Pretrained:
    """What the function makes, with the source of its module.

    Raises:
        ModelError: there is no such function, or it fails, or does not return what it should.
    """
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ModelError(f"python:{name} is neither python:PATH.py:function nor python:pkg.mod:function.")
    if place.endswith(".py"):
        spec = PythonModel(name=name, function=function, module=None)
        source = _read(Path(place))
        module = _run_source(source, place)
    else:
        spec = PythonModel(name=name, function=function, module=place)
        module, source = _import_module(place)
    model, image = _call(module, spec)
    backbone, width, _ = cut_head(model, image.height, image.width, f"python:{name}")
    return Pretrained(spec, image, backbone, width, {FACTORY: source})


def rebuild(spec: PythonModel, read: Callable[[str], bytes]) -> tuple[nn.Module, int]:
    """What the function makes today, and its number of features.

    Raises:
        ModelError: the module that was named by its import name is gone, or its source is another one.
    """
    stored = read(FACTORY)
    if spec.module is None:
        module = _run_source(stored, FACTORY)
    else:
        module, source = _import_module(spec.module)
        if source != stored:
            raise ModelError(
                f"module {spec.module} is not the one this checkpoint was trained with: its source has sha256 "
                f"{hashlib.sha256(source).hexdigest()}, not {hashlib.sha256(stored).hexdigest()}."
            )
    model, image = _call(module, spec)
    backbone, width, _ = cut_head(model, image.height, image.width, f"python:{spec.name}")
    return backbone, width


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def _run_source(source: bytes, name: str) -> ModuleType:
    module = ModuleType("edgeward_factory")
    module.__file__ = name
    try:
        exec(compile(source, name, "exec"), module.__dict__)  # the user's own code, asked for by name
    except Exception as error:
        raise ModelError(f"{name} fails: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> tuple[ModuleType, bytes]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # ImportError, or whatever its body raises
        raise ModelError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not module.__file__ or not module.__file__.endswith(".py"):
        raise ModelError(f"module {name} has no Python source file, so it cannot be recorded.")
    return module, _read(Path(module.__file__))


def _call(module: ModuleType, spec: PythonModel) -> tuple[nn.Module, ImageInput]:
    factory = getattr(module, spec.function, None)
    if not callable(factory):
        raise ModelError(f"python:{spec.name}: there is no function {spec.function}.")
    try:
        with redirect_stdout(sys.stderr):  # libraries greet; standard output is for results
            made = factory()
    except Exception as error:
        raise ModelError(f"python:{spec.name} fails: {type(error).__name__}: {error}") from error
    match made:
        case (nn.Module() as model, ImageInput() as image):
            return model.float(), image
    raise ModelError(f"python:{spec.name} must return (torch.nn.Module, ImageInput), not {type(made).__name__}.")

"""The models of a server: found below the paths it was given, loaded, looked up by name and version."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from bundle.errors import BadInput, ModelError
from bundle.model import load_model
from bundle.session import Device, Session
from bundle.store import MANIFEST
from serve.errors import StartError, UnknownModel
from serve.models import ServedModel, bare_graph, check_gate, plain_graph, served_bundle

log = structlog.get_logger()

VERSION = re.compile(r"[1-9][0-9]{0,17}")
GRAPH = "model.onnx"


class Repository:
    """Models by name and version."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models: dict[str, dict[int, ServedModel]] = {}
        for model in models:
            versions = self._models.setdefault(model.name, {})
            if model.version in versions:
                raise StartError(
                    f"{versions[model.version].source} and {model.source} are both model {model.name!r} version "
                    f"{model.version}. Serve one of them, or export one under another --name or --version."
                )
            versions[model.version] = model
        if not self._models:
            raise StartError("there is nothing to serve. Give at least one bundle, folder of bundles or .onnx file.")

    def __iter__(self) -> Iterator[ServedModel]:
        for versions in self._models.values():
            yield from versions.values()

    def names(self) -> list[str]:
        """Of every model."""
        return list(self._models)

    def versions(self, name: str) -> list[int]:
        """Of one model, ascending; none when there is no such model."""
        return sorted(self._models.get(name, ()))

    def find(self, name: str, version: str) -> ServedModel:
        """The model that a request means.

        Args:
            name: of the model.
            version: a positive integer, or "" for the highest there is.

        Raises:
            BadInput: the name or version is one that no model can have.
            UnknownModel: there is no such model.
        """
        if version and not VERSION.fullmatch(version):
            raise BadInput(f"model version {version!r} is not a version; expected a positive integer, or none.")
        if "\0" in name:
            raise BadInput(f"model name {name!r} holds a NUL character; expected none.")
        versions = self._models.get(name)
        if versions is None:
            raise UnknownModel(f"Request for unknown model: {name!r} is not found")
        number = int(version) if version else max(versions)
        if number not in versions:
            served = ", ".join(map(str, sorted(versions)))
            raise UnknownModel(
                f"Request for unknown model: {name!r} version {number} is not found; it has versions {served}"
            )
        return versions[number]


def load_repository(
    paths: Iterable[Path], *, device: Device = "auto", threads: int | None = None, require_gate: bool = False
) -> Repository:
    """Find, load and self-test everything below the paths.

    Args:
        paths: each a bundle, a folder of bundles, a repository NAME/VERSION/ of bundles or of model.onnx files, or a
            plain .onnx file.
        device: see Session.
        threads: see Session.
        require_gate: refuse what no gate has passed.

    Raises:
        EdgewardError: a path holds nothing that can be served, or something on it cannot be loaded or may not be.
    """
    models: list[ServedModel] = []
    for place in [place for path in paths for place in _find(path)]:
        loaded = place.load(device, threads)
        if require_gate:
            check_gate(loaded[0])
        if loaded[0].facts["gate"] == "ungated":
            log.warning("ungated model", model=loaded[0].name, version=loaded[0].version, path=str(place.path))
        models += loaded
    return Repository(models)


@dataclass(frozen=True)
class _Place:
    """A bundle or a graph that lies somewhere, and what the folders above it call it."""

    path: Path
    name: str | None = None
    version: int | None = None

    def load(self, device: Device, threads: int | None) -> list[ServedModel]:
        if self.path.is_file():
            session = _load_graph(self.path, device, threads)
            return [plain_graph(session, self.name or self.path.stem, self.version or 1, self.path)]
        model = load_model(self.path, device=device, threads=threads)
        manifest = model.manifest
        if self.name is not None and (self.name, self.version) != (manifest.name, manifest.version):
            raise StartError(
                f"{self.path} holds bundle {manifest.name!r} version {manifest.version}; in a repository it belongs in "
                f"{manifest.name}/{manifest.version}."
            )
        return [served_bundle(model, self.path), bare_graph(model, self.path)]


def _load_graph(path: Path, device: Device, threads: int | None) -> Session:
    try:
        return Session(path.read_bytes(), device=device, threads=threads)
    except (OSError, ModelError) as error:
        raise ModelError(f"{path} cannot be served: {error}") from error


def _find(path: Path) -> list[_Place]:
    if path.is_file() and path.suffix == ".onnx":
        return [_Place(path)]
    if (path / MANIFEST).is_file():
        return [_Place(path)]
    if not path.is_dir():
        raise StartError(f"{path} is not there, or is neither a folder nor an .onnx file.")
    places = [place for folder in _folders(path) for place in _find_named(folder)]
    if not places:
        raise StartError(f"{path} holds no bundle and no model. `edgeward export` writes one.")
    return places


def _find_named(folder: Path) -> list[_Place]:
    if (folder / MANIFEST).is_file():
        return [_Place(folder)]
    if (folder / "config.pbtxt").exists():
        raise StartError(
            f"{folder / 'config.pbtxt'} is not read yet, and without it the model could be served otherwise than it "
            f"says. Give {folder}'s .onnx file itself to serve the graph as it is."
        )
    versions = _folders(folder)
    if not versions:
        raise StartError(f"{folder} is neither a bundle nor a model with version folders.")
    return [_find_version(folder.name, version) for version in versions]


def _find_version(name: str, folder: Path) -> _Place:
    if not VERSION.fullmatch(folder.name):
        raise StartError(f"{folder} is not a version; expected a positive integer without leading zeros.")
    if (folder / MANIFEST).is_file():
        return _Place(folder, name, int(folder.name))
    if (folder / GRAPH).is_file():
        return _Place(folder / GRAPH, name, int(folder.name))
    raise StartError(f"{folder} holds neither a bundle nor a {GRAPH}.")


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))  # dots: being written
